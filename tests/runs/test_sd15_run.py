"""The named command end to end on tiny pipelines: train, checkpoint, resume, sample, export; and its dry run."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusers import DiffusionPipeline

import tiny_runs
from ratiograph import config
from ratiograph.core.draws import SampleDraws
from ratiograph.reports.export import export_pipeline

TILT = "gin/sd15_reward_tilt.gin"
RUNS = {
    "sd15": [TILT],
    "sd15-lora": [TILT, "gin/base/sd15_lora.gin"],
    "sdxl": ["gin/papers/dmd2/sdxl.gin"],
    "sdxl-lora": ["gin/papers/dmd2/sdxl.gin", "gin/base/sdxl_lora.gin"],
}


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return {kind: tiny_runs.material(tmp_path_factory.mktemp(kind), kind) for kind in ("sd15", "sdxl")}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_trains_resumes_samples_and_exports(name, materials, tmp_path):
    macros = materials[name.partition("-")[0]]
    whole = tiny_runs.train(tiny_runs.parse(RUNS[name], macros, steps=3), tmp_path / "whole")
    tiny_runs.train(tiny_runs.parse(RUNS[name], macros, steps=2), tmp_path / "run")
    tiny_runs.train(tiny_runs.parse(RUNS[name], macros, steps=3), tmp_path / "run")
    ended = [load_file(tmp_path / folder / "student.safetensors") for folder in ("whole", "run")]
    for key, tensor in ended[0].items():  # captions are embedded in other groups after a resume, which rounds otherwise
        torch.testing.assert_close(ended[1][key], tensor, rtol=0, atol=1e-6)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(value) for value in metrics[-1].values() if isinstance(value, float))
    saved = torch.load(next((tmp_path / "run" / "checkpoints").glob("*03.pt")), weights_only=True)["task"]["networks"]
    frozen = [key for state in saved.values() for key in state if "autoencoder" in key]
    assert not frozen
    if name.endswith("lora"):
        assert all(".lora_" in key for node in ("student", "student_score") for key in saved[node])
    assert whole.student_samples(SampleDraws(0, range(2))).isfinite().all()

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ab cab\ntwo CATS\n")
    out = tmp_path / "samples.npz"
    arguments = (f"--workdir={tmp_path / 'run'}", f"--pipeline={macros['TEACHER']}", f"--prompts={prompts}")
    tiny_runs.tool("sample", *arguments, "--samples=2", f"--out={out}", "--uint8", "--precision=fp32", "--device=cpu")
    found = np.load(out)["images"]
    pipeline = DiffusionPipeline.from_pretrained(export_pipeline(tmp_path / "run", tmp_path / "exported"))
    z = SampleDraws(0, range(2)).normal((4, 8, 8))
    size = {"target_size": (1024, 1024), "original_size": (1024, 1024)} if name.startswith("sdxl") else {}
    images = pipeline(
        ["ab cab", "two CATS"], latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="np", **size
    ).images
    expected = (255 * images).round().astype(np.uint8)
    difference = np.abs(found.astype(int) - expected.astype(int))
    # A merged LoRA adds in another order, so that a pixel in between two values may fall to the other.
    assert difference.max() <= (1 if name.endswith("lora") else 0)
    assert expected.std() > 5


@pytest.mark.slow
def test_a_tilt_needs_captions_alone(materials, tmp_path):
    """By the tool: a prompt list, its text states cached without a latent, and the named run fed with them."""
    macros, prompts = materials["sd15"], tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["ab cab", "", "two CATS", "x" * 10_000, "a b", "ba"]))
    given = (prompts, tmp_path / "cache", f"--teacher={macros['TEACHER']}", "--caption_only", "--shard_samples=3")
    told = tiny_runs.tool("cache_latents", *given, "--device=cpu")
    assert "6 samples in 2 shards" in told
    assert "Experiment.data = @CachedCaptionStream()" in told
    lines = ("Experiment.data = @CachedCaptionStream()", "CachedCaptionStream.urls = %DATA")
    data = {"DATA": f"{tmp_path}/cache/shard-{{000000..000001}}.tar"}
    tiny_runs.train(tiny_runs.parse(RUNS["sd15"], macros | data, *lines), tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2
    assert all(np.isfinite(value) for value in metrics[-1].values() if isinstance(value, float))


def test_the_dry_run_knows_the_sizes():
    """The graph at full size on the meta device: SD 1.5 three times, CLIP ViT-L/14 and the autoencoder."""
    with torch.device("meta"):
        task = config.build(config.parse([TILT])).task
    assert all(parameter.is_meta for parameter in task.parameters())
    for node in (task.teacher, task.student, task.student_score):
        assert sum(p.numel() for p in node.parameters()) == 859_520_964
    reward = task.objective.terms["distribution"].target.reward
    assert sum(p.numel() for p in reward.autoencoder.parameters()) == 83_653_863
    assert sum(p.numel() for p in reward.reward.parameters()) == 427_616_513
    assert (task.student.timestep, task.teacher.guidance_scale) == (999, 1.75)
    assert type(task.objective.terms["distribution"].weighting).__name__ == "KL"
