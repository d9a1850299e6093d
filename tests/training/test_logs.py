"""logs.py, run_logger.py: what is written is what was measured, once a step, over any number of interruptions."""

import errno
import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ratiograph.training import display
from ratiograph.training.display import sparkline
from ratiograph.training.loggers import TensorBoard
from ratiograph.training.logs import duration, make_grid, read_metrics, significant
from ratiograph.training.run_logger import RunLogger


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def scalars(workdir, tag):
    board = EventAccumulator(str(workdir / "tensorboard"))
    board.Reload()
    return {event.step: event.value for event in board.Scalars(tag)}


class Clock:
    """A clock that the test moves, in place of time.monotonic."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(display.time, "monotonic", lambda: self.now)


def test_every_file_has_the_values_that_were_logged(tmp_path):
    with RunLogger(tmp_path / "run", 100, images_per_step=64, loggers=[TensorBoard()], console=quiet()) as log:
        log.log(10, {"loss/ratio": torch.tensor(0.5), "field/gan": 1e-3})
        log.log(20, {"loss/ratio": 0.25})
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (first["step"], first["images"], first["loss/ratio"], first["field/gan"]) == (10, 640, 0.5, 1e-3)
    assert (second["step"], second["images"], second["loss/ratio"]) == (20, 1280, 0.25)
    assert "field/gan" not in second
    assert scalars(tmp_path / "run", "loss/ratio") == {10: 0.5, 20: 0.25}


def test_seconds_rate_and_time_left_come_from_the_clock(tmp_path, monkeypatch):
    clock, console = Clock(monkeypatch), quiet()
    with RunLogger(tmp_path, 100, console=console) as log:
        clock.now += 5
        log.log(20, {})
        clock.now += 3
        log.log(50, {})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {"step": 20, "seconds": 5.0, "rate/steps_per_second": 4.0}
    assert second == {"step": 50, "seconds": 8.0, "rate/steps_per_second": 10.0}
    # 50 steps remain at the mean of 8 s / 50 steps
    assert console.file.getvalue().splitlines() == [
        "step  20/100  4.00 steps/s  0:20 left",
        "step  50/100  10.0 steps/s  0:08 left",
    ]


def test_a_resume_drops_later_lines_and_goes_on_counting_seconds(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with RunLogger(tmp_path, 100, loggers=[TensorBoard()], console=quiet()) as log:
        for step in (10, 20, 30):
            clock.now += 2
            log.log(step, {"loss/a": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "loss/')  # torn by a kill
    clock.now += 1000  # the machine was off
    with RunLogger(tmp_path, 100, resume_step=20, loggers=[TensorBoard()], console=quiet()) as log:
        clock.now += 3
        log.log(30, {"loss/a": -30})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["seconds"], r["loss/a"]) for r in records] == [
        (10, 2, 10),
        (20, 4, 20),
        (30, 7, -30),
    ]
    assert records[-1]["rate/steps_per_second"] == pytest.approx(10 / 3)
    assert scalars(tmp_path, "loss/a") == {10: 10, 20: 20, 30: -30}


def test_a_run_that_starts_over_keeps_nothing_of_the_one_before(tmp_path):
    with RunLogger(tmp_path, 100, console=quiet()) as log:
        log.log(0, {"loss/a": 1.0})
    with RunLogger(tmp_path, 100, console=quiet()) as log:
        log.log(0, {"loss/a": 2.0})
    assert [(r["step"], r["loss/a"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(0, 2.0)]


def test_metrics_are_strict_json_whatever_the_value(tmp_path):
    with RunLogger(tmp_path, 10, console=quiet()) as log:
        log.log(1, {"loss/a": math.nan, "loss/b": math.inf, "loss/c": 1.5})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["loss/a"], record["loss/b"], record["loss/c"]) == (None, None, 1.5)


@pytest.mark.parametrize(
    "line",
    ['{"step": 2, "a": "x"}', '{"step": true}', '{"step": -1}', '{"step": 2, "a": [1]}', '{"a": 1}', "[" * 10_000],
)
def test_a_line_of_other_types_is_skipped(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "a": null}}\n{line}\n{line}\n{{"step": 3, "a": 0.5}}\n')
    with pytest.warns(UserWarning, match=r"jsonl:2 is not an object with a step and numbers: skipped, as are 1 more"):
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None}, {"step": 3, "a": 0.5}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n{"step": 3, "lo')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:2 is not an object with a step"):
        assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_logging_a_step_twice_is_a_mistake(tmp_path):
    with RunLogger(tmp_path, 10, console=quiet()) as log:
        log.log(4, {})
        with pytest.raises(AssertionError, match="step 4 logged after step 4"):
            log.log(4, {})


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_every_pixel_where_it_belongs(channels):
    images = torch.rand(5, channels, 4, 6, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    images[3, 0, 1, 2] = math.nan
    grid = make_grid(images, columns=3, min_side=12)
    assert grid.shape == (2 + 2 * (8 + 2), 2 + 3 * (12 + 2), 3)
    expected = np.full_like(grid, 255)
    for n in range(5):
        for y in range(8):
            for x in range(12):
                for c in range(3):
                    value = images[n, min(c, channels - 1), y // 2, x // 2].item()
                    value = 0.0 if math.isnan(value) else min(max(value, -1.0), 1.0)
                    row, column = 2 + n // 3 * 10 + y, 2 + n % 3 * 14 + x
                    expected[row, column, c] = round((value + 1) * 127.5)
    np.testing.assert_array_equal(grid, expected)


def test_grid_refuses_what_is_no_picture():
    for shape in [(3, 2), (3, 4, 8, 8), (0, 1, 8, 8)]:
        with pytest.raises(ValueError, match="a grid shows images"):
            make_grid(torch.zeros(shape))


def test_image_is_written_losslessly(tmp_path):
    grid = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    with RunLogger(tmp_path, 10, loggers=[TensorBoard()], console=quiet()) as log:
        log.image(400, "samples", grid)
        with pytest.raises(ValueError, match=r"image tag '\.\./x' names a folder"):
            log.image(400, "../x", grid)
    path = tmp_path / "samples" / "step_00000400.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), grid)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Images("samples")
    assert event.step == 400
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), grid)


def test_live_display_shows_progress_and_latest_values(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    log = RunLogger(tmp_path / "mnist_sba", 2000, console=console, live=True)
    with log:
        clock.now += 10
        log.log(400, {"data/wait": 0.0, "loss/ratio": 0.75})
        clock.now += 10
        log.log(1000, {"field/gan": 0.0125, "loss/ratio": 0.5, "loss/bad": math.nan})
        log.message("a message [not markup]")
    text = console.file.getvalue()
    assert "a message [not markup]" in text
    picture = Console(file=io.StringIO(), width=90)  # one column of groups
    picture.print(log._display)
    shown = " ".join(picture.file.getvalue().split())
    assert "mnist_sba step 1,000 of 2,000 50%" in shown
    assert "60.0 steps/s" in shown
    assert "0:20 elapsed 0:20 left" in shown
    assert "ratio 0.5000 █▁" in shown
    assert "gan 0.01250 ▄" in shown
    assert "bad nan" in shown
    assert shown.index("loss") < shown.index("field") < shown.index("data")


def test_plain_output_when_standard_output_is_a_pipe_even_if_colour_is_forced(tmp_path):
    script = (
        "import sys; from ratiograph.training.run_logger import RunLogger\n"
        "with RunLogger(sys.argv[1], 4) as log:\n"
        "    log.message('student σ = 2.5'); log.log(2, {'loss/a': 1.5})\n"
    )
    environment = {"FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.decode("ascii").splitlines()
    assert first == "student ? = 2.5"
    assert second.startswith("step 2/4  ")
    assert second.endswith(" left  loss/a 1.500")


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with RunLogger(tmp_path, 4, console=Console(file=Gone())) as log:
        log.log(1, {"loss/a": 1.0})
        log.log(2, {"loss/a": 2.0})
    assert [record["loss/a"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0]


def test_a_full_disk_is_told_once_and_leaves_no_torn_line(tmp_path):
    class Full:
        """A file on a disk with room for 10 bytes more."""

        def __init__(self, file):
            self.file, self.truncate = file, file.truncate

        def write(self, line):
            self.file.write(line[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    console = quiet()
    log = RunLogger(tmp_path, 9, console=console)
    files = log._loggers[0]
    log.log(1, {"loss/a": 1.0})
    file, files._file = files._file, Full(files._file)
    log.log(2, {"loss/a": 2.0})
    log.log(3, {"loss/a": 3.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    files._file = file  # someone made room
    log.log(4, {"loss/a": 4.0})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 4]
    told = [line for line in console.file.getvalue().splitlines() if "does not log" in line]
    assert len(told) == 1
    assert "metrics.jsonl: No space left on device" in told[0]


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write .*run"):
        RunLogger(tmp_path / "run", 4, console=quiet())


def test_importing_logs_imports_neither_torch_nor_tensorboard():
    heavy = "torch", "tensorboard", "wandb", "trackio"
    script = "import sys, ratiograph.training.loggers, ratiograph.training.run_logger\n"
    script += f"print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.69314718, "0.6931"),
        (-0.3, "-0.3000"),
        (0.00012346, "0.0001235"),
        (0.000012345, "1.23e-05"),
        (51200, "51,200"),
        (12.3456, "12.35"),
        (99_999_999, "1.00e+08"),
        (math.nan, "nan"),
        (None, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_significant(value, text):
    assert significant(value) == text


def test_duration():
    assert [duration(s) for s in (0, 59.4, 61, 3725, None, math.inf)] == [
        "0:00",
        "0:59",
        "1:01",
        "1:02:05",
        "-:--",
        "-:--",
    ]


def test_sparkline_spans_lowest_to_highest():
    assert sparkline([0, 7, 3.5, math.nan, 1]) == "▁█▅ ▂"
    assert sparkline([2.0, 2.0]) == "▄▄"
