"""Reads gin files and lines into statements, each with the place where it stands.

Gin's own parser does the reading; mistakes become a `ConfigError` whose message begins with file and line. A file may
come from somebody else, so it runs nothing: its ``import`` lines and ``pipe:`` commands have to be named on the command
line too.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gin import config_parser

from ratiograph.config.values import ConfigError, Macro, Reference, Statement, parts, spell, suggest
from ratiograph.core.files import expanded
from ratiograph.core.foreign import read_text, shown
from ratiograph.core.tracebacks import described, own_line

__all__ = ["Reader", "check_commands", "find", "gin_text", "imported", "parse_text", "short"]

CHECKOUT = Path(__file__).resolve().parents[3]
DEEPEST = 32  # brackets inside brackets in a value
COMMAND = re.compile(r"(?:^|::)\s*(pipe:.*)", re.DOTALL)  # as `data.remote` reads a list of shards


class _Delegate(config_parser.ParserDelegate):
    """Records references and macros instead of resolving them: mistakes in them are reported our way."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


@dataclass
class Reader:
    """Collects the statements of files and flags in order. ``done`` files are not included again.

    ``load`` imports a module and registers its components; ``known`` are those that a file may import.
    """

    load: Callable[[str], None]
    known: frozenset[str]
    statements: list[Statement] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)
    done: set[Path] = field(default_factory=set)

    def file(self, path: Path, stack: tuple[Path, ...] = ()) -> None:
        self.done.add(path)
        for statement, where in parse_text(gin_text(path), short(path)):
            if isinstance(statement, config_parser.IncludeStatement):
                included = find(statement.filename, path, where)
                if included in (*stack, path):
                    chain = " -> ".join(short(p) for p in (*stack, path, included))
                    raise ConfigError(f"{where}: files include each other in a circle: {chain}. Remove one include.")
                if included not in self.done:
                    self.file(included, (*stack, path))
            else:
                self.add(statement, where)

    def text(self, text: str, where: str, typed: bool = True) -> None:
        """Reads a line of the command line or, where it is not ``typed``, one that somebody else may have written."""
        found = list(parse_text(text, where, is_file=False))
        if not found:
            raise ConfigError(f"{where}: holds no binding. Write Component.parameter=value or MACRO=value.")
        for statement, _ in found:
            if isinstance(statement, config_parser.IncludeStatement):
                raise ConfigError(f"{where}: a flag cannot include a file; use --gin_file={statement.filename}.")
            self.add(statement, where, typed)

    def add(self, statement: Any, where: str, typed: bool = False) -> None:
        if isinstance(statement, config_parser.ImportStatement):
            if not typed and statement.module not in self.known:
                raise ConfigError(
                    f"{where}: the file asks to run code, import {shown(statement.module)}. If you know and trust that "
                    f"module, name it: --gin_param='import {shown(statement.module)}'."
                )
            self.imports.append(self.run_module(statement.module, where))
        elif isinstance(statement, config_parser.BindingStatement):
            if not statement.arg_name and statement.scope:
                macro = spell(statement.scope, statement.selector)
                raise ConfigError(f"{where}: '{macro}' names no parameter; write `{macro}.<parameter> = ...`.")
            name, parameter = statement.selector, statement.arg_name
            name, parameter = (name, parameter) if parameter else ("", name)
            self.statements.append(Statement(statement.scope, name, parameter, statement.value, where, typed))

    def run_module(self, module: str, where: str) -> str:
        """Imports ``module``, which runs a user's own code: whatever that raises becomes a `ConfigError`."""
        try:
            self.load(module)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except ModuleNotFoundError as error:
            there = error.name is None or not f"{module}.".startswith(f"{error.name}.")
            remedy = "" if there else " Put the folder that it lies in on PYTHONPATH."
            raise ConfigError(f"{where}: cannot import {module}: {error}.{remedy}") from error
        except Exception as error:
            place = own_line(error)
            raise ConfigError(
                f"{where}: cannot import {module}: {f'{place}: ' if place else ''}{described(error)}."
            ) from error
        return module


def gin_text(path: Path) -> str:
    """The text of a gin file; ConfigError where it cannot be read."""
    try:
        return read_text(path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{short(path)}: cannot be read as text: {error}") from error


def check_commands(statements: Iterable[Statement]) -> None:
    """A command that a file names is named on the command line too, in the place of a list of shards or inside one.

    Args:
        statements: those whose values a run would use.

    Raises:
        ConfigError: a file asks to run a command of its own.
    """
    statements = list(statements)
    typed = {command for s in statements if s.typed for command in _commands(s.value)}
    for s in statements:
        for command in () if s.typed else _commands(s.value):
            if command not in typed:
                raise ConfigError(
                    f"{s.where}: the file asks to run a command, {shown(command)!r} in {s}. If you know and trust it, "
                    f"give the value on the command line: --gin_param=\"{s} = '...'\"."
                )


def _commands(value: object) -> list[str]:
    return [command for part in parts(value) if isinstance(part, str) for command in COMMAND.findall(part)]


def parse_text(text: str, source: str, is_file: bool = True) -> Iterator[tuple[Any, str]]:
    """Statements of gin text with where each stands; ``source`` is a file's name, or says where a single line is from.

    A file may include any other that can be read, such as one of passwords: messages quote lines of .gin files alone.
    """

    def at(line: int) -> str:
        return f"{source}:{line}" if is_file else source

    parser = None
    try:
        parser = config_parser.ConfigParser(io.StringIO(text + "\n"), _Delegate())
        for statement in parser:
            where = at(statement.location.line_num)
            if isinstance(statement, config_parser.BindingStatement):
                _check_size(statement.value, where)
            yield statement, where
    except (RecursionError, MemoryError) as error:  # Python's own parser, in brackets thousands deep
        raise ConfigError(f"{at(parser.current_token.start[0])}: a value nests too many brackets.") from error
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        message = "a bracket or a string is not closed" if message.startswith("EOF") else message
        raise ConfigError(f"{at(line)}: {message}.") from error
    except TypeError as error:
        line = parser.current_token.start[0]
        raise ConfigError(f"{at(line)}: {error}: a dict's keys are numbers or strings.") from error
    except SyntaxError as error:
        quoted = not is_file or source.endswith(".gin")
        why = _explain(error, text) if quoted else "cannot be read as gin. Name gin files *.gin to see the line here."
        raise ConfigError(f"{at(error.lineno or 1)}: {why}") from error


def _check_size(value: object, where: str) -> None:
    """ConfigError for a value that is nested too deep for Python's recursion, or an int too long to be written."""
    level = [value]
    for _ in range(DEEPEST + 1):
        if any(isinstance(part, int) and part.bit_length() > 64 for part in level):
            raise ConfigError(f"{where}: a whole number has more than 64 bits.")
        nested = [part for part in level if isinstance(part, dict | list | tuple)]
        level = [item for part in nested for item in (part.items() if isinstance(part, dict) else part)]
    if nested:
        raise ConfigError(f"{where}: a value nests more than {DEEPEST} brackets.")


PYTHON = {"true": "True", "false": "False", "none": "None", "null": "None", "inf": "1e999", "-inf": "-1e999"}


def _explain(error: SyntaxError, text: str) -> str:
    """What is wrong with a line and how to write it, from gin's own words."""
    line = (error.text or text).strip()
    word = re.search(r"Failed to parse token '(-?[A-Za-z_][\w./-]*)'", error.msg)
    if line.startswith("include"):
        return f"cannot read `{line}`. Write include 'folder/file.gin', with the quotes."
    if word and word[1].lower() in PYTHON:
        return f"cannot read the value in `{line}`. Write {PYTHON[word[1].lower()]}."
    if word:
        name = word[1]
        kinds = f"Write '{name}' for a string, @{name}() for a component, %{name} for a macro."
        return f"cannot read the value in `{line}`. {kinds}"
    if error.msg.startswith("Expected newline"):
        return f"cannot read `{line}`: the value is followed by more. A value is a literal, not an expression."
    message = error.msg.strip().splitlines()[0].rstrip(".").replace("Malformatted", "malformed")
    message = f"cannot read `{line}`: {message[0].lower()}{message[1:]}."
    return f"{message} A line reads `Component.parameter = value`."


def find(name: str, including: Path | None, where: str) -> Path:
    """Where a file is: beside the including one, under its ``gin`` folder, from here, from the checkout."""
    if including is None:
        folders = [Path.cwd(), CHECKOUT]
    else:
        roots = [p for p in including.parents if p.name == "gin"]
        folders = [including.parent, *roots, Path.cwd(), CHECKOUT / "gin", CHECKOUT]
    tried = dict.fromkeys((folder / expanded(name)).resolve() for folder in folders)
    for path in tried:
        if path.is_file():
            return path
    beside = [str(Path(name).with_name(p.name)) for path in tried for p in path.parent.glob("*.gin")]
    shipped = CHECKOUT / "gin" / name
    beside += [short(shipped)] if including is None and shipped.is_file() else []
    near = suggest(name, beside)
    looked = ", ".join(dict.fromkeys(short(path) for path in tried))
    raise ConfigError(f"{where}: there is no file '{name}'.{near} Looked for {looked}.")


def short(path: Path) -> str:
    """The path as a person would type it: relative to here or to the checkout where it lies below."""
    for base in (Path.cwd(), CHECKOUT):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)


def imported(bindings: Iterable[str]) -> frozenset[str]:
    """The modules that the command line imports."""
    statements = (s for line in bindings for s, _ in parse_text(line, f"flag --gin_param '{line}'", is_file=False))
    return frozenset(s.module for s in statements if isinstance(s, config_parser.ImportStatement))
