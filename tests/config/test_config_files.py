"""What a configuration's files are found to lack, before anything is built: one line each, or nothing."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ratiograph import config
from ratiograph.config.locating import check_files, missing_files

ROOT = Path(__file__).resolve().parents[2]
TILT = "gin/sd15_reward_tilt.gin"


@pytest.fixture
def there(tmp_path):
    """Names of all that the named run reads, each a file that is there and nothing else."""
    for name in ("teacher/unet", "teacher/vae"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "diffusion_pytorch_model.safetensors").touch()
    (tmp_path / "clip").mkdir()
    for name in ("clip/model.safetensors", "empty.safetensors", "shard-000000.tar"):
        (tmp_path / name).touch()
    return {
        "DATA": f"{tmp_path}/shard-000000.tar",
        "TEACHER": f"{tmp_path}/teacher",
        "EMPTY_PROMPT": f"{tmp_path}/empty.safetensors",
        "REWARD": f"{tmp_path}/clip",
    }


def parsed(macros, *more, files=(TILT,)):
    return config.parse(list(files), [*(f"{name} = {value!r}" for name, value in macros.items()), *more])


def lines(cfg):
    return missing_files(cfg)


def test_what_is_there_is_not_missed_and_not_read(there):
    assert lines(parsed(there)) == []  # empty files, which no reader would take
    check_files(parsed(there))


def test_a_folder_that_is_not_there_is_told_once(there):
    (line,) = lines(parsed(there | {"TEACHER": "/none/such"}))
    assert line.startswith("TEACHER = '/none/such' (flag --gin_param 'TEACHER = '/none/such''; change it by --teacher=")
    assert "no U-Net weights at /none/such" in line
    assert "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 unet/diffusion_pytorch_model.safetensors" in line
    with pytest.raises(FileNotFoundError) as caught:
        check_files(parsed(there | {"TEACHER": "/none/such"}))
    assert str(caught.value) == line


def test_each_missing_part_is_a_line_of_its_own(there):
    for part in ("unet", "vae"):
        (Path(there["TEACHER"]) / part / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        check_files(parsed(there))
    head, *found = str(caught.value).splitlines()
    assert head == "2 things that this run reads are missing:"
    assert [("no U-Net weights at" in line, "no autoencoder at" in line) for line in found] == [
        (True, False),
        (False, True),
    ]
    assert all(line.startswith(f"  TEACHER = '{there['TEACHER']}'") and "hf download" in line for line in found)


def test_the_network_s_own_command_and_the_file_s_own_line(there, tmp_path):
    (line,) = lines(parsed({"DATA": there["DATA"]}, files=["gin/papers/dmd2/sdxl.gin"]))
    assert line.startswith("TEACHER = 'teachers/stable-diffusion-xl-base-1.0' (gin/base/sdxl.gin:")
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0" in line
    cfg = parsed(there, "teacher/StableDiffusion.weights = 'x'", files=[TILT, "gin/base/sd15_lora.gin"])
    (line,) = lines(cfg)
    assert line.startswith("teacher/StableDiffusion.weights = 'x' (flag --gin_param")
    assert lines(parsed(there, files=[TILT, "gin/base/sd15_lora.gin"])) == []
    folder = tmp_path / "model"
    more = ("StableDiffusion.network = @UNetFromFolder()", f"UNetFromFolder.folder = '{folder}'")
    (line,) = lines(parsed(there, *more))
    assert "holds no config.json" in line


def test_caption_encoders_miss_their_parts(there):
    more = ("Experiment.data = @EncodedStream()", "EncodedStream.stream = @LatentStream()")
    cfg = parsed(there, *more, "EncodedStream.encoder = @SD15CaptionEncoder()", "SD15CaptionEncoder.weights = %TEACHER")
    (line,) = lines(cfg)
    assert "no tokenizer at SD15CaptionEncoder.weights" in line
    for part, file in (("tokenizer", "vocab.json"), ("text_encoder", "config.json")):
        (Path(there["TEACHER"]) / part).mkdir()
        (Path(there["TEACHER"]) / part / file).touch()
    (line,) = lines(cfg)
    assert "no text_encoder at SD15CaptionEncoder.weights" in line
    (Path(there["TEACHER"]) / "text_encoder" / "model.safetensors").touch()
    assert lines(cfg) == []


def test_a_gated_model_of_the_hub_is_told_before_anything_is_built(there, monkeypatch):
    pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import GatedRepoError

    def gated(name, **arguments):
        assert name == "owner/name"
        raise GatedRepoError("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    (line,) = {text.split(", then")[0] for text in lines(parsed(there | {"TEACHER": "hf://owner/name"}))}
    assert "hf://owner/name is gated: accept its licence at https://huggingface.co/owner/name, run `hf auth" in line


def test_nothing_is_built_and_no_heavy_package_imported():
    """In CPU seconds, which other processes do not add to."""
    code = (
        "import sys, time; from ratiograph import config; from ratiograph.config import locating; "
        f"cfg = config.parse(['{TILT}']); start = time.process_time(); "
        "found = locating.missing_files(cfg); "
        "assert found and time.process_time() - start < 0.5, time.process_time() - start; "
        "assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_launcher_tells_all_that_is_missing_and_leaves_nothing(tmp_path):
    command = [sys.executable, "launch/main.py", f"--gin_file={TILT}", f"--workdir={tmp_path}/run", "--device=cpu"]
    command += [f"--data={tmp_path}/none.tar", f"--teacher={tmp_path}/none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 1
    head, *lines = done.stderr.strip().splitlines()
    assert head == "error: 4 things that this run reads are missing:"
    told = ("no U-Net weights at", "hf download openai/clip-vit-large-patch14", "--empty_prompt=FILE", "No such shard")
    assert all(any(words in line for line in lines) for words in told)
    assert len(lines) == 4
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())
