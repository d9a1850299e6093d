"""Exported students in plain diffusers: latents to the bit, images, LoRA files, cards, and refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

import tiny_pipelines
import tiny_runs
from ratiograph import config
from ratiograph.algebra.noising import ScaledLinearDDPM
from ratiograph.core.types import Condition, Encoding
from ratiograph.networks.autoencoder import Autoencoder
from ratiograph.networks.students import OneStepDDPM
from ratiograph.networks.teachers.stable_diffusion import (
    EpsilonPrediction,
    SamplePrediction,
    StableDiffusion,
    VPrediction,
)
from ratiograph.networks.text_encoders import SD15CaptionEncoder, SDXLCaptionEncoder
from ratiograph.networks.weights import weight_files
from ratiograph.reports.export import _copy_part, export_lora, export_pipeline, load_student, scheduler_config

PROMPTS = ["ab cab", "two CATS"]
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1.0}
LORA = "gin/base/sd15_lora.gin"


def finished(folder, files, macros, *more):
    """The workdir of a run that ended with perturbed teacher weights as its student, without the training."""
    cfg = tiny_runs.parse(files, macros, *more)
    folder.mkdir()
    config.save(cfg, folder / "config.gin")
    student = config.build(cfg).task.student
    student.denoiser.load()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    weight_files.save_weights(folder / "student.safetensors", student)
    (folder / "evaluation.json").write_text(json.dumps({"clip_score": {"student": 0.25}}))
    return folder


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd15")
    macros = tiny_runs.material(root, "sd15")
    workdir = finished(root / "run", ["gin/sd15_reward_tilt.gin"], macros)
    lora = finished(root / "lora", ["gin/sd15_reward_tilt.gin", LORA], macros)
    return workdir, lora, macros["TEACHER"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    root = tmp_path_factory.mktemp("sdxl")
    macros = tiny_runs.material(root, "sdxl")
    return finished(root / "run", ["gin/papers/dmd2/sdxl.gin"], macros), macros["TEACHER"]


def noise(seed=4):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def ours(workdir, encoder):
    """The student's own latents."""
    _, student = load_student(workdir)
    encoder.load()
    with torch.no_grad():
        return student(noise(), encoder.encode(PROMPTS))


def theirs(folder, **more):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, latents=noise(), **ONE_STEP, **more).images, pipeline


def test_latents_and_images_of_sd15_to_the_bit(sd15, tmp_path):
    workdir, _, teacher = sd15
    out = export_pipeline(workdir, tmp_path / "out")
    expected = ours(workdir, SD15CaptionEncoder(weights=teacher))
    found, pipeline = theirs(out, output_type="latent")
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert torch.equal(found, expected)
    assert pipeline.scheduler.timesteps.tolist() == [999]
    autoencoder = Autoencoder(weights=teacher)
    autoencoder.load()
    images = (autoencoder.decode(expected) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(theirs(out, output_type="np")[0], images)
    assert images.std() > 0.01
    plain, _ = theirs(teacher, output_type="latent")
    assert (plain - found).abs().max() > 0.1  # neither the teacher's weights nor its scheduler


def test_latents_of_sdxl_to_the_bit(sdxl, tmp_path):
    workdir, teacher = sdxl
    out = export_pipeline(workdir, tmp_path / "out")
    encoder = SDXLCaptionEncoder(weights=teacher, sizes=(16, 16, 0, 0, 16, 16))
    found, pipeline = theirs(out, output_type="latent")
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    assert torch.equal(found, ours(workdir, encoder))
    assert pipeline.scheduler.timesteps.tolist() == [399]


@pytest.mark.parametrize("timestep", [999, 399, 20])
@pytest.mark.parametrize("prediction", [EpsilonPrediction, VPrediction, SamplePrediction])
def test_one_step_of_the_scheduler_is_mu(timestep, prediction):
    class Told(torch.nn.Module):
        shape, classes, feature_channels = (4, 8, 8), 0, (4,)

        def encode(self, x, c_noise, condition):
            assert torch.equal(x, noise())
            assert c_noise.tolist() == [timestep, timestep]
            return Encoding((x,))

        def decode(self, encoding):
            return noise(seed=8)

    student = OneStepDDPM(denoiser=StableDiffusion(network=Told(), prediction=prediction()), timestep=timestep)
    scheduler = DDIMScheduler(**scheduler_config(student))
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [timestep]
    assert scheduler.init_noise_sigma == 1
    found = scheduler.step(noise(seed=8), scheduler.timesteps[0], noise()).prev_sample
    assert torch.equal(found, student(noise(), Condition()))
    exact = ScaledLinearDDPM()
    standard = DDIMScheduler(**tiny_pipelines.SCALED_LINEAR)
    assert torch.equal(scheduler.alphas_cumprod, standard.alphas_cumprod[: timestep + 1])
    torch.testing.assert_close(scheduler.alphas_cumprod[timestep].sqrt(), exact.alpha_table[timestep].float())


def test_a_lora_merged_and_as_a_file(sd15, tmp_path):
    _, workdir, teacher = sd15
    expected = ours(workdir, SD15CaptionEncoder(weights=teacher))
    merged, _ = theirs(export_pipeline(workdir, tmp_path / "merged"), output_type="latent")
    scale = expected.abs().max()
    assert (merged - expected).abs().max() < 1e-5 * scale
    out = export_lora(workdir, tmp_path / "lora")
    assert sorted(p.name for p in out.iterdir()) == [
        *("README.md", "config.gin", "pytorch_lora_weights.safetensors", "scheduler"),
    ]
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_pretrained(out, subfolder="scheduler")
    before = pipeline(PROMPTS, latents=noise(), output_type="latent", **ONE_STEP).images
    pipeline.load_lora_weights(out)
    found = pipeline(PROMPTS, latents=noise(), output_type="latent", **ONE_STEP).images
    assert (found - expected).abs().max() < 1e-5 * scale
    assert (found - before).abs().max() > 1e-2 * scale


def test_the_folder_is_ordinary(sd15, tmp_path):
    workdir = sd15[0]
    out = export_pipeline(workdir, tmp_path / "out", half=True)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {path.rpartition(".")[2] for path in names} <= {"safetensors", "json", "txt", "md", "gin"}
    assert {"unet/config.json", "scheduler/scheduler_config.json", "model_index.json", "config.gin"} <= names
    with safe_open(out / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers")
    assert "- clip_score.student: 0.25" in card
    assert 'DiffusionPipeline.from_pretrained("out"' in card
    assert "OneStepDDPM" in card
    assert (out / "config.gin").read_text() == (workdir / "config.gin").read_text()


def test_a_teacher_in_half_precision_is_exported_so_that_it_loads(sd15, tmp_path):
    workdir, _, teacher = sd15
    StableDiffusionPipeline.from_pretrained(teacher).to(torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16"
    )
    out = export_pipeline(workdir, tmp_path / "out", teacher=str(tmp_path / "half"))
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert theirs(out, output_type="np")[0].shape == (2, 16, 16, 3)


def test_bad_input_says_what_to_do(sd15, tmp_path):
    workdir, lora, _ = sd15
    with pytest.raises(FileNotFoundError, match=r"has no config\.gin: give the workdir of a finished run"):
        export_pipeline(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="not a LoRA: export the pipeline"):
        export_lora(workdir, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no model_index\.json: give --teacher=FOLDER"):
        export_pipeline(workdir, tmp_path / "out", teacher=str(workdir))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ValueError, match="taken exists already: give another OUT"):
        export_pipeline(lora, tmp_path / "taken")


def test_the_tool(sd15, tmp_path):
    workdir, lora, _ = sd15
    assert tiny_runs.tool("export", lora, tmp_path / "lora", "--lora").strip() == str(tmp_path / "lora")
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    for arguments, told in {
        (workdir,): "give two names: tools/export.py WORKDIR OUT",
        (workdir, tmp_path / "out", "--lora", "--half"): "--lora writes adapters in float32",
    }.items():
        command = [sys.executable, tiny_runs.ROOT / "tools" / "export.py", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ")
        assert told in line


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_part_in_pieces_is_copied_for_diffusers(tmp_path, variant):
    vae = tiny_pipelines.autoencoder().half()
    vae.save_pretrained(tmp_path / "vae", variant=variant, max_shard_size="20KB")
    assert len(list((tmp_path / "vae").glob("*-of-*.safetensors"))) > 1
    assert _copy_part(tmp_path / "vae", tmp_path / "made")
    found = AutoencoderKL.from_pretrained(tmp_path / "made").state_dict()
    for name, tensor in vae.state_dict().items():
        assert torch.equal(found[name], tensor.float()), name
