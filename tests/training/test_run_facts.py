"""Files that a run reads, replaced before it goes on or before its student is sampled."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_runs
from ratiograph import config
from ratiograph.core.files import sampled_digest
from ratiograph.data.embedded import resolve
from ratiograph.data.shards import read_shard, write_shards
from ratiograph.data.stream import ShardStream
from ratiograph.networks.weights.weight_files import read_header, shipped
from ratiograph.reports.export import load_student
from ratiograph.tasks import student_files
from ratiograph.training import checkpoints, trainer
from ratiograph.training.run_facts import check_facts, run_facts


def test_a_digest_tells_sizes_heads_and_what_lies_far_behind_apart(tmp_path):
    found = set()
    for name, data in {
        "zeros": bytes(5 * 2**20),
        "longer": bytes(5 * 2**20 + 1),
        "head": b"1" + bytes(5 * 2**20 - 1),
        "end": bytes(5 * 2**20 - 1) + b"1",
        "spread": bytes(2**20) + b"1" * 2**22,
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
        found.add(sampled_digest([tmp_path / name]))
        shutil.copyfile(tmp_path / name, tmp_path / "copy")
        assert sampled_digest([tmp_path / "copy"]) in found
    assert len(found) == 6
    assert sampled_digest([tmp_path / "empty"]) == hashlib.sha256(b"0:").hexdigest()[:16]


DIGITS = ["Experiment.batch_size = 4", "Experiment.evaluator = None", "Experiment.loggers = []"]


def digits(folder: Path, steps: int):
    lines = [
        *DIGITS,
        f"EDM.weights = '{folder}/teacher.safetensors'",
        f"ShardStream.urls = '{folder}/data/d-000000.tar'",
    ]
    experiment = config.build(config.parse(["gin/mnist_sba.gin"], lines, {"Experiment.steps": steps}))
    trainer.train(experiment, workdir=folder / "run", device="cpu")
    return experiment


def shards(folder: Path, first: int) -> None:
    shutil.rmtree(folder / "data", ignore_errors=True)
    samples = list(read_shard(resolve("mnist")[0]))[first : first + 8]
    write_shards(folder / "data", "d", [{"__key__": s.key, "png": s.image, "cls": s.label} for s in samples], 1)


def other_teacher(folder: Path) -> None:
    file = folder / "teacher.safetensors"
    save_file({name: 1.25 * tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (
            other_teacher,
            r"checkpoints: weights \S+teacher\.safetensors of student\.denoiser \(EDM\) was \w{16} and is \w{16}",
        ),
        (
            lambda folder: shards(folder, 8),
            r"checkpoints: (shards|index of) \S+tar of data \(ShardStream\) was [0-9a-f]{16} and is ",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_files_at_the_same_path(tmp_path, replace, message):
    shutil.copyfile(shipped("mnist_teacher"), tmp_path / "teacher.safetensors")
    shards(tmp_path, 0)
    digits(tmp_path, 1)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("teacher.safetensors", "data"):
        (shutil.copytree if (tmp_path / name).is_dir() else shutil.copyfile)(tmp_path / name, kept / name)
    replace(tmp_path)
    with pytest.raises(ValueError, match=message + ".*Put back the file that was there, or .* another --workdir"):
        digits(tmp_path, 2)
    for name in ("teacher.safetensors", "data"):  # copies are the same files
        shutil.rmtree(tmp_path / name) if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
        (kept / name).rename(tmp_path / name)
    digits(tmp_path, 2)
    assert checkpoints.latest(tmp_path / "run" / "checkpoints")[0] == 2


def test_facts_of_shards(tmp_path):
    shards(tmp_path, 0)
    stream = ShardStream(urls=f"{tmp_path}/data/d-000000.tar")
    first = stream.file_facts()
    assert sorted(first) == [f"index of {stream.urls}", f"shards {stream.urls}"]
    (tmp_path / "data" / "index.json").unlink()
    assert stream.file_facts() == {f"shards {stream.urls}": first[f"shards {stream.urls}"]}  # an index may come and go
    with open(tmp_path / "data" / "d-000000.tar", "ab") as file:
        file.write(bytes(512))
    assert stream.file_facts()[f"shards {stream.urls}"] != first[f"shards {stream.urls}"]
    assert ShardStream(urls="mnist").file_facts() == {}  # its shards are verified and written anew by themselves


def test_files_of_another_path_are_a_change_of_gin_and_not_compared():
    here, there = ({"teacher (EDM)": {f"weights {path}": digest}} for path, digest in (("a", "1"), ("b", "2")))
    assert check_facts(here, there, "checkpoints", "") is None
    with pytest.raises(
        ValueError, match=r"^run: weights a of teacher \(EDM\) was 2 and is 1\. Put .* was there, or x$"
    ):
        check_facts(here, {"teacher (EDM)": {"weights a": "2"}}, "run", "x")


@pytest.mark.parametrize("stored", [None, {}, [1], {"teacher (EDM)": 3}, {"teacher (EDM)": {"prediction": "x"}}])
def test_a_checkpoint_without_facts_is_accepted(stored):
    assert check_facts({"teacher (EDM)": {"weights": "1"}}, stored, "checkpoints", "") is None


# --- Stable Diffusion -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, macros) of a run of one step, whose teacher predicts v."""
    folder = tmp_path_factory.mktemp("trained")
    macros = tiny_runs.material(folder, "sd15")
    scheduler(folder, prediction_type="v_prediction")
    tiny_runs.train(tiny_runs.parse(["gin/sd15_reward_tilt.gin"], macros, steps=1), folder / "run")
    return folder, macros


def scheduler(folder: Path, **said) -> None:
    file = folder / "pipeline" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"prediction_type": "epsilon"},
            r"prediction of \S*denoiser \(StableDiffusion\) was v_prediction and is epsilon",
        ),
        ({"beta_end": 0.02}, r"process of \S*denoiser .* was steps=1000, .*beta_end=0\.012 and is .*beta_end=0\.02"),
        (None, "prediction of .* was v_prediction and is epsilon"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no scheduler")
def test_a_student_is_not_used_as_its_teacher_s_scheduler_file_says_by_now(trained, said, message):
    folder, macros = trained
    file = folder / "pipeline" / "scheduler" / "scheduler_config.json"
    before = file.read_bytes()
    file.unlink() if said is None else scheduler(folder, **said)
    try:
        with pytest.raises(ValueError, match=r"student\.safetensors: " + message):
            load_student(folder / "run")
        with pytest.raises(ValueError, match="checkpoints: " + message):
            tiny_runs.train(tiny_runs.parse(["gin/sd15_reward_tilt.gin"], macros, steps=2), folder / "run")
        task = student_files.read_experiment(folder / "run", memory=True).task
        task.prepare(torch.device("cpu"), None)
        with pytest.raises(ValueError, match=r"student\.safetensors: " + message):
            student_files.load_students(task, folder / "run")
    finally:
        file.write_bytes(before)
    _, student = load_student(folder / "run")
    assert student.denoiser.prediction.name == "v_prediction"


def test_what_is_stored(trained):
    folder, macros = trained
    _, state = checkpoints.latest(folder / "run" / "checkpoints")
    files = state["run"]["files"]
    assert files == run_facts(config.build(tiny_runs.parse(["gin/sd15_reward_tilt.gin"], macros)))
    said = {"prediction": "v_prediction", "process": "steps=1000, beta_start=0.00085, beta_end=0.012"}
    unet = folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    assert files["student.denoiser (StableDiffusion)"] == said | {
        f"weights {macros['TEACHER']}": sampled_digest([unet])
    }
    kinds = {name.partition(" ")[2] for name in files}
    assert kinds == {"(LatentStream)", "(StableDiffusion)", "(EmptyPrompt)", "(CLIPReward)", "(Autoencoder)"}
    header = json.loads(read_header(folder / "run" / "student.safetensors")["network"])
    assert header == {"denoiser (StableDiffusion)": said}
