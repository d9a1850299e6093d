"""Tools loaded into the test's own process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from absl import flags

from ratiograph import command_line

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def call(module: ModuleType, *arguments: object, **options: object) -> int:
    """The exit code of a loaded tool's command line; ``options`` as of `command_line.call`."""
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS):
        if flags.FLAGS.find_module_defining_flag(name) == module.__name__:
            flags.FLAGS[name].unparse()
    return command_line.call(module.main, flags.FLAGS([module.__name__, *map(str, arguments)])[1:], **options)


@contextmanager
def tool(name: str) -> Iterator[ModuleType]:
    """The module tools/NAME.py; flags of other tools, which have the same names, stand aside meanwhile."""
    absls = {flag for flag in flags.FLAGS if str(flags.FLAGS.find_module_defining_flag(flag)).startswith("absl")}
    others = {flag: flags.FLAGS[flag] for flag in set(flags.FLAGS) - absls}
    for flag in others:
        delattr(flags.FLAGS, flag)
    spec = importlib.util.spec_from_file_location(f"{name}_tool", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        yield module
    finally:
        flags.FLAGS.unparse_flags()
        for flag in set(flags.FLAGS) - absls:
            delattr(flags.FLAGS, flag)
        for flag, holder in others.items():
            flags.FLAGS[flag] = holder
