"""What the launcher and the tools have in common: the entry point, shared flags, checks of arguments, a progress bar.

Only absl and light modules are imported here, so that --help and a wrong flag are answered at once; a program
imports torch inside its ``main``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

import ratiograph
from ratiograph.core.tracebacks import described, out_of_memory, own_line

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn  # imported where a bar is drawn: it takes a tenth of a second

__all__ = [
    "UsageError",
    "configuration_code",
    "define_bindings",
    "define_configuration",
    "define_device",
    "exactly",
    "needs_configuration",
    "no_arguments",
    "overrides",
    "progress_bar",
    "run",
]

flags.disclaim_key_flags()  # a flag defined here belongs to the program that asked for it, and to its --help

flags.DEFINE_bool("verbose_errors", False, "Show the traceback of an error too.")

OVERRIDES = {
    "steps": ("Experiment.steps", 1, "Optimisation steps of the whole run (Experiment.steps)."),
    "batch_size": ("Experiment.batch_size", 1, "Samples a step (Experiment.batch_size)."),
    "seed": ("Experiment.seed", 0, "Seed of everything random (Experiment.seed)."),
    "precision": ("Experiment.precision", None, "Arithmetic of the networks, e.g. auto (Experiment.precision)."),
    "data": ("DATA", None, "Data set: an embedded one by name, or shards by pattern (macro DATA)."),
    "teacher": ("TEACHER", None, "Weights of the teacher: a file or folder (macro TEACHER)."),
}
"""(what gin calls the value, least value of a whole number or None for text, help) of each run-level flag."""


class UsageError(ValueError):
    """The command line is wrong."""


def run(main: Callable[[list[str]], int | None], **options: object) -> None:
    """Parses the flags of ``sys.argv``, calls ``main`` and ends the program; see `call` for ``options``.

    A wrong flag ends the program with 2, --help with 0.
    """
    flags.declare_key_flag("verbose_errors")
    app.run(lambda argv: call(main, argv[1:], **options), flags_parser=parse_flags)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """What of ``argv`` is no flag; ends the program after --help and at a wrong flag."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error} (--help lists all)", file=sys.stderr)
        sys.exit(2)
    except SystemExit:  # --help, which absl ends with 1
        sys.exit(0)
    except BrokenPipeError:  # --help into a pipe whose reader has ended, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's flush at exit fails too
        sys.exit(0)


def call(
    main: Callable[[list[str]], int | None],
    arguments: list[str],
    *,
    code_of: Callable[[Exception], int] = lambda error: 1,
    interrupted: str = "interrupted",
) -> int:
    """The exit code of ``main(arguments)``; every error becomes one line on stderr.

    ValueError and OSError are the user's to mend and say how. What a user's own module raises is told with its line,
    and memory that does not suffice with what takes less. Anything else is a fault of ratiograph: the line names a file
    with what its authors need to know. A flag --verbose_errors shows the traceback of each.

    Args:
        main: takes the arguments that are no flags; returns the exit code, or None for 0.
        arguments: of the command line, without the program's name.
        code_of: the exit code for a ValueError or OSError that ``main`` raises.
        interrupted: the line for Ctrl-C; the code is 130.
    """
    try:
        return main(arguments) or 0
    except Exception as error:
        if "verbose_errors" in flags.FLAGS and flags.FLAGS["verbose_errors"].value:
            traceback.print_exc()
        print(f"error: {_line(error, main.__code__.co_filename)}", file=sys.stderr)
        return code_of(error)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def _line(error: Exception, program: str) -> str:
    """What to say of an error that ends a program, whose ``main`` is in the file ``program``."""
    place, known = own_line(error, program), isinstance(error, ValueError | OSError)
    if place and not isinstance(error, UsageError):
        return f"{place}: {error if known else described(error)}"
    if known:
        return str(error)
    if out_of_memory(error):
        return (
            f"memory does not suffice ({described(error)}). Lower the batch size or the number of samples, take fewer "
            "processes, or use a machine with more"
        )
    return f"this is a fault of {_suspects()}: {described(error)}. Please report it with the file {_report(error)}"


def _suspects() -> str:
    """'ratiograph', or with a user's own modules, whose components may not allow the calls that it makes."""
    components = sys.modules.get("ratiograph.config.components")
    modules = components.known_modules() if components else ()
    own = sorted(module for module in modules if not module.startswith("ratiograph."))
    return " or ".join(["ratiograph", *own])


def _report(error: Exception) -> Path:
    """Writes what a report of a fault needs: versions, the command, the configuration's digest, the traceback."""
    given = [Path(name) for name in flags.FLAGS["gin_file"].value] if "gin_file" in flags.FLAGS else []
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in given if path.is_file())).hexdigest()
    torch = sys.modules.get("torch")
    lines = [
        f"ratiograph {ratiograph.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__ if torch else 'not imported'}",
        f"command: {shlex.join(sys.argv)}",
        f"SHA-256 of its gin files: {digest}",
        "",
        *traceback.format_exception(error),
    ]
    with tempfile.NamedTemporaryFile("w", prefix="ratiograph-fault-", suffix=".txt", delete=False) as file:
        file.write("\n".join(lines))
    return Path(file.name)


def configuration_code(error: Exception) -> int:
    """The exit code of programs that tell a wrong configuration or command line, 2, from other errors, 1."""
    if isinstance(error, UsageError):
        return 2
    from ratiograph.config import ConfigError  # imports torch

    return 2 if isinstance(error, ConfigError) else 1


# --- flags ------------------------------------------------------------------------------------------------------------


def define_device(help: str = "auto, cpu, cuda, cuda:1, ...: auto takes a GPU if there is one.") -> None:
    """Defines --device."""
    flags.DEFINE_string("device", "auto", help)


def define_bindings(help: str = "A line of gin on top of the run's config.gin; repeatable.") -> None:
    """Defines --gin_param."""
    flags.DEFINE_multi_string("gin_param", [], help)


def define_configuration(*names: str) -> None:
    """Defines --gin_file, --gin_param and, of the run-level flags in ``OVERRIDES``, those in ``names``."""
    flags.DEFINE_multi_string("gin_file", [], "A gin file; repeatable, later files win over earlier ones.")
    define_bindings("A line of gin, e.g. 'SBA.lam=1.0'; repeatable, after the files.")
    for name in names:
        _, least, text = OVERRIDES[name]
        if least is None:
            flags.DEFINE_string(name, None, text)
        else:
            flags.DEFINE_integer(name, None, text, lower_bound=least)


def overrides(*names: str) -> dict[str, object]:
    """Gin's name => value, of the run-level flags in ``names`` that were given."""
    values = {name: flags.FLAGS[name].value for name in names}
    return {OVERRIDES[name][0]: value for name, value in values.items() if value is not None}


# --- arguments --------------------------------------------------------------------------------------------------------


def no_arguments(arguments: Sequence[str], flag: str) -> None:
    """UsageError for an argument that is no flag; ``flag`` is the one that was probably meant."""
    if arguments:
        raise UsageError(f"'{arguments[0]}' is no flag. Did you mean --{flag}={arguments[0]}?")


def exactly(arguments: Sequence[str], count: int, usage: str) -> None:
    """UsageError with the message ``usage`` unless there are ``count`` arguments."""
    if len(arguments) != count:
        raise UsageError(usage)


def needs_configuration(arguments: Sequence[str], example: str = "gin/mnist_sba.gin") -> None:
    """UsageError for an argument that is no flag, or without a --gin_file."""
    no_arguments(arguments, "gin_file")
    if not flags.FLAGS.gin_file:
        raise UsageError(f"no configuration: name one, e.g. --gin_file={example}")


# --- progress ---------------------------------------------------------------------------------------------------------


def progress_bar(*columns: str | ProgressColumn, transient: bool = False, disable: bool = False) -> Progress:
    """A bar on stderr: description, how many of how many, ``columns``, time left.

    Args:
        columns: further ones of rich.
        transient: remove the bar at its end.
        disable: show nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    known = ("{task.description}", BarColumn(), MofNCompleteColumn(), *columns, TimeRemainingColumn())
    return Progress(*known, console=Console(stderr=True), transient=transient, disable=disable)
