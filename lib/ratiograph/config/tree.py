"""The component graph of an experiment as data and as a text tree.

A *node* is an object whose class a ratiograph module, or one that a configuration imports, lists in ``__all__``: what a
gin file may name. Everything inside a node that is not one itself (convolutions, embeddings) is counted, not drawn.
"""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text
from rich.tree import Tree
from torch import nn

from ratiograph.config.components import is_component

__all__ = ["Node", "count", "describe", "render_tree", "short", "step_of"]

SHOWN = 3  # a node with at most so many plain parameters shows all of them, a larger one those that were chosen


@dataclass(frozen=True)
class Node:
    """One component.

    Args:
        name: what its owner calls it, e.g. ``student`` or ``terms[distribution]``.
        cls: its class.
        params: its plain constructor arguments.
        chosen: names of those that differ from their default.
        children: components it owns, in the order of its constructor's arguments.
        parameters: number of weights in it, children included; 0 for a component without any.
        requires: sibling nodes it asks at run time, e.g. ``("teacher", "student_score")``.
        shared: whether the same object was described before, under another owner.
    """

    name: str
    cls: str
    params: Mapping[str, object] = field(default_factory=dict)
    chosen: frozenset[str] = frozenset()
    children: tuple[Node, ...] = ()
    parameters: int = 0
    requires: tuple[str, ...] = ()
    shared: bool = False

    def child(self, name: str) -> Node | None:
        """The child of that name, or None."""
        return next((c for c in self.children if c.name == name), None)

    def group(self, name: str) -> dict[str, Node]:
        """Children kept in a dict or list called ``name``, by key."""
        prefix = f"{name}["
        return {c.name[len(prefix) : -1]: c for c in self.children if c.name.startswith(prefix)}

    def shown(self) -> dict[str, str]:
        """The parameters worth showing, as short text."""
        few = len(self.params) <= SHOWN
        return {k: short(v) for k, v in self.params.items() if v is not None and (few or k in self.chosen)}

    @property
    def size(self) -> str:
        """'1.21 M parameters', or '' for a component without weights."""
        return f"{count(self.parameters)} parameters" if self.parameters else ""

    def chain(self) -> list[Node]:
        """The node, the one inside it that holds its weights, the one inside that: OneStep, EDM, UNet."""
        inner = [c for c in self.children if c.parameters and 2 * c.parameters > self.parameters]
        return [self, *inner[0].chain()] if len(inner) == 1 else [self]


def short(value: object, limit: int = 28) -> str:
    """A plain value as short text: ``0.0002`` as 0.0002, ``(1, 2)``, a long path by its end."""
    if isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, list | tuple):
        text = f"({', '.join(short(v) for v in value)})"
    else:
        text = str(value)
    if len(text) <= limit:
        return text
    return f"…{text[1 - limit :]}" if isinstance(value, str) else f"{text[: limit - 1]}…"


def count(parameters: int) -> str:
    """A number of weights in words: 12, 3.4 k, 1.21 M, 2.6 G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)


# --- objects => nodes -------------------------------------------------------------------------------------------------


def describe(component: object, name: str = "experiment", *, package: str = "ratiograph") -> Node:
    """The node of ``component`` with everything below it; needs neither weights nor memory for them.

    Args:
        component: any component, also one built on the meta device.
        name: what to call it.
        package: modules below this package count as ours, beside the components that a configuration imported.
    """
    return _describe(component, name, package, set())


def _describe(component: object, name: str, package: str, seen: set[int]) -> Node:
    if id(component) in seen:
        return Node(name, type(component).__name__, shared=True)
    seen.add(id(component))
    params, chosen = {}, set()
    for parameter, default in _arguments(type(component)).items():
        value = getattr(component, parameter, inspect.Parameter.empty)
        if _plain(value):
            params[parameter] = value
            same = _comparable(value) == _comparable(default)
            chosen |= set() if same else {parameter}
    return Node(
        name=name,
        cls=type(component).__name__,
        params=params,
        chosen=frozenset(chosen),
        children=tuple(_describe(c, n, package, seen) for n, c in _owned(component, package)),
        parameters=sum(p.numel() for p in component.parameters()) if isinstance(component, nn.Module) else 0,
        requires=_requires(component),
    )


def _arguments(cls: type) -> dict[str, object]:
    signature = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in signature if p.name != "self" and p.kind != p.VAR_KEYWORD}


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _comparable(value: object) -> object:
    return tuple(map(_comparable, value)) if isinstance(value, list | tuple) else value


def _is_component(value: object, package: str) -> bool:
    module = type(value).__module__
    public = getattr(sys.modules.get(module), "__all__", ())
    if is_component(type(value)):
        return True
    return (module == package or module.startswith(package + ".")) and type(value).__name__ in public


def _owned(component: object, package: str) -> Iterator[tuple[str, object]]:
    """The components among the constructor's arguments, in their order; what a node makes for itself is its own."""
    attributes = {k: v for k, v in vars(component).items() if not k.startswith("_")}
    if isinstance(component, nn.Module):
        attributes |= component._modules
    for name in _arguments(type(component)):
        value = attributes.get(name)
        if _is_component(value, package):
            yield name, value
            continue
        if isinstance(value, nn.ModuleDict | Mapping):
            items = list(value.items())
        elif isinstance(value, nn.ModuleList | list | tuple):
            items = list(enumerate(value))
        else:
            items = []
        yield from ((f"{name}[{key}]", item) for key, item in items if _is_component(item, package))


def _requires(component: object) -> tuple[str, ...]:
    """Siblings that a component says it asks: directions, targets and terms list them, the others set a flag."""
    required = set(getattr(component, "requires", ()))
    required |= {"ratio"} if getattr(component, "needs_ratio", False) else set()
    required |= {"teacher"} if getattr(component, "on_teacher", False) else set()
    required |= {"student_score"} if getattr(component, "on_student_score", False) else set()
    return tuple(sorted(required))


# --- nodes => text ----------------------------------------------------------------------------------------------------


def _label(node: Node) -> Text:
    params = "  ".join(f"{k}={v}" for k, v in node.shown().items())
    parts = [
        (f"{node.name}: ", "dim"),
        (node.cls, "bold"),
        ("  (shared, shown above)" if node.shared else "", "dim"),
        (f"  {params}" if params else "", "cyan"),
        (f"  {node.size}" if node.size else "", "magenta"),
    ]
    return Text.assemble(*parts)


def render_tree(node: Node) -> str:
    """The graph as an indented tree with parameter counts; coloured if stdout is a terminal."""

    def grow(node: Node, branch: Tree) -> Tree:
        for child in node.children:
            grow(child, branch.add(_label(child)))
        return branch

    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), force_terminal=terminal, no_color=not terminal, width=160, soft_wrap=True)
    console.print(grow(node, Tree(_label(node))), soft_wrap=True)
    return console.file.getvalue().rstrip()


def step_of(node: Node) -> Node | None:
    """The distillation task in ``node``: what has a student, a noising process and an objective with terms."""
    for candidate in (node, node.child("task")):
        if candidate and all(candidate.child(n) for n in ("student", "noising", "objective")):
            return candidate
    return None
