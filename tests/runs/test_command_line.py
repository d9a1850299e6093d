"""The entry point of launcher and tools: exit codes, one-line errors, --help, and shared flags."""

import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from absl import flags

import ratiograph
from ratiograph import command_line
from ratiograph.command_line import UsageError, call, configuration_code
from ratiograph.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text())

PROGRAM = '''
"""Says what the gin files are."""

from absl import flags

from ratiograph import command_line

command_line.define_configuration("steps", "data")
command_line.define_device()


def main(arguments):
    command_line.needs_configuration(arguments)
    print(flags.FLAGS.gin_file, command_line.overrides("steps", "data"))
    raise OSError("the disk is full")


command_line.run(main)
'''


def raising(error):
    def main(arguments):
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_code_is_what_main_returns(returned, code, capsys):
    received = []
    assert call(lambda arguments: received.append(arguments) or returned, ["a", "b"]) == code
    assert received == [["a", "b"]]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError("two is odd"), FileNotFoundError("two is odd"), UsageError("two is odd")])
def test_an_expected_error_is_one_line(error, capsys):
    assert call(raising(error), []) == 1
    assert capsys.readouterr() == ("", "error: two is odd\n")


def test_ctrl_c_is_one_line(capsys):
    assert call(raising(KeyboardInterrupt()), [], interrupted="the same command continues") == 130
    assert capsys.readouterr().err == "the same command continues\n"


@pytest.mark.parametrize(
    ("modules", "suspects"),
    [({"ratiograph.algebra.times"}, "ratiograph"), ({"ratiograph.data.stream", "mine"}, "ratiograph or mine")],
)
def test_any_other_error_is_a_fault_with_a_report(modules, suspects, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    known = SimpleNamespace(known_modules=lambda: modules)  # of this process other tests have registered some
    monkeypatch.setitem(sys.modules, "ratiograph.config.components", known)
    assert call(raising(KeyError("width")), []) == 1
    line = capsys.readouterr().err
    (report,) = tmp_path.iterdir()
    assert line == (
        f"error: this is a fault of {suspects}: KeyError: 'width'. Please report it with the file {report}\n"
    )
    text = report.read_text()
    assert text.startswith(f"ratiograph {ratiograph.__version__}, Python 3")
    assert "test_command_line.py" in text
    assert text.rstrip().endswith("KeyError: 'width'")


OWN = "def value(x):\n    return {}\n"


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("1 / x", "mine.py:2 (in value): ZeroDivisionError: division by zero"),
        ("int('one')", "mine.py:2 (in value): invalid literal for int() with base 10: 'one'"),
        ("__import__('json').loads('{')", "mine.py:2 (in value): Expecting property name"),
    ],
)
def test_a_fault_in_a_module_of_ones_own_is_its_line(does, said, capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN.format(does))
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine

    assert call(lambda arguments: mine.value(0), []) == 1
    sys.modules.pop("mine")
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / said}")


def test_memory_that_does_not_suffice_is_one_line_with_a_remedy(capsys):
    assert call(lambda arguments: torch.empty(2**58, dtype=torch.uint8), []) == 1
    assert call(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")), []) == 1
    assert call(raising(MemoryError()), []) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line[:30] for line in lines] == 3 * ["error: memory does not suffice"]
    assert "Tried to allocate 2 GiB.)" in lines[1]
    assert all("Lower the batch size" in line for line in lines)


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError("x"), 2), (ConfigError("x"), 2), (ValueError("x"), 1), (OSError("x"), 1)]
)
def test_a_wrong_configuration_has_a_code_of_its_own(error, code):
    assert call(raising(error), [], code_of=configuration_code) == code


def test_checks_of_arguments():
    command_line.no_arguments([], "run")
    command_line.exactly(["a", "b"], 2, "give two names")
    with pytest.raises(UsageError, match=r"'a' is no flag\. Did you mean --run=a\?"):
        command_line.no_arguments(["a"], "run")
    with pytest.raises(UsageError, match="give two names"):
        command_line.exactly(["a"], 2, "give two names")


@pytest.fixture
def program(tmp_path):
    """program(*arguments) => the finished process of a program with shared flags."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return lambda *arguments: subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True)


def test_help_shows_the_docstring_and_shared_flags_and_ends_with_0(program):
    done = program("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Says what the gin files are." in done.stdout
    for flag in ("--gin_file", "--gin_param", "--steps", "--data", "--device"):
        assert f"  {flag}: " in done.stdout
    assert "--teacher" not in done.stdout


def test_help_into_a_pipe_that_nobody_reads_ends_quietly():
    """As in ``--help | head -1``; unbuffered, so that the first line already fails."""
    command = [sys.executable, "-u", ROOT / "tools" / "sample.py", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        done.stdout.close()
        assert (done.stderr.read(), done.wait(timeout=60)) == ("", 0)


@pytest.mark.parametrize(
    ("arguments", "code", "output", "error"),
    [
        (["--gni_file=a"], 2, "", "Unknown command line flag 'gni_file'. Did you mean: gin_file ? (--help lists all)"),
        (["--steps=0"], 2, "", "flag --steps=0: 0 is not a positive integer (--help lists all)"),
        ([], 1, "", "no configuration: name one, e.g. --gin_file=gin/mnist_sba.gin"),
        (["a.gin"], 1, "", "'a.gin' is no flag. Did you mean --gin_file=a.gin?"),
        (
            ["--gin_file=a", "--gin_file=b", "--steps=3"],
            *(1, "['a', 'b'] {'Experiment.steps': 3}\n", "the disk is full"),
        ),
    ],
)
def test_a_program_from_its_command_line(program, arguments, code, output, error):
    done = program(*arguments)
    assert (done.returncode, done.stdout) == (code, output)
    assert done.stderr.splitlines()[-1] == f"error: {error}"


@pytest.mark.parametrize("tool", ["../launch/main.py", *TOOLS])
def test_help_of_every_program_is_instant(tool):
    command = [sys.executable, "-X", "importtime", ROOT / "tools" / tool, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "flags:" in done.stdout
    assert done.returncode == 0
    assert " torch\n" not in done.stderr


def test_the_bar_counts(capsys):
    with command_line.progress_bar() as progress:
        progress.update(progress.add_task("images", total=7), completed=3)
    assert "images" in capsys.readouterr().err


def test_verbose_errors_shows_the_traceback(capsys):
    holder = flags.FlagValues()
    flags.DEFINE_bool("verbose_errors", True, "", flag_values=holder)
    holder.mark_as_parsed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line.flags, "FLAGS", holder)
        assert call(raising(ValueError("two is odd")), []) == 1
    assert "Traceback" in capsys.readouterr().err
