"""The component graph of an experiment as data, as a text tree, as Mermaid and as a picture.

A *node* is an object whose class a ratiograph module, or one that a configuration imports, lists in ``__all__``: what a
gin file may name. Everything inside a node that is not one itself (convolutions, embeddings) is counted, not drawn.
"""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from math import inf

from rich.console import Console
from rich.text import Text
from rich.tree import Tree
from torch import nn

from ratiograph import config, graph_svg

__all__ = ["Node", "describe", "render_tree", "short", "to_mermaid", "to_svg"]

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
    if config.is_component(type(value)):
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
    asked = set(getattr(component, "requires", ()))
    asked |= {"ratio"} if getattr(component, "needs_ratio", False) else set()
    asked |= {"teacher"} if getattr(component, "on_teacher", False) else set()
    asked |= {"student_score"} if getattr(component, "on_student_score", False) else set()
    return tuple(sorted(asked))


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


# --- nodes => pictures ------------------------------------------------------------------------------------------------


def step_of(node: Node) -> Node | None:
    """The distillation task in ``node``: what has a student, a noising process and an objective with terms."""
    for candidate in (node, node.child("task")):
        if candidate and all(candidate.child(n) for n in ("student", "noising", "objective")):
            return candidate
    return None


def to_svg(node: Node, title: str = "") -> str:
    """A self-contained SVG: the data flow of one training step for a distillation, the component tree otherwise.

    Args:
        node: what `describe` gave.
        title: heading; names the kind of picture by default.
    """
    task = step_of(node)
    return graph_svg.draw_step(node, task, title) if task else graph_svg.draw_tree(node, title)


def to_mermaid(node: Node) -> str:
    """The same graph as ``to_svg`` in Mermaid, for a page that renders it."""
    task = step_of(node)
    return "\n".join(["flowchart LR", *(_mermaid_step(node, task) if task else _mermaid_tree(node))]) + "\n"


def _mermaid_text(*lines: str) -> str:
    return '"' + "<br/>".join(escape(line, quote=True) for line in lines if line) + '"'


def _mermaid_card(role: str, node: Node) -> str:
    params = ", ".join(f"{k}={v}" for k, v in node.shown().items())
    return _mermaid_text(role, " ∘ ".join(n.cls for n in node.chain()), params, node.size)


def _mermaid_tree(node: Node) -> Iterator[str]:
    numbers = iter(range(10**6))

    def grow(node: Node) -> Iterator[str]:
        number = next(numbers)
        yield f"  n{number}[{_mermaid_card(node.name, node)}]"
        for child in node.children:
            first, *rest = list(grow(child))
            yield first
            yield f"  n{number} --> {first.split('[')[0].strip()}"
            yield from rest

    return grow(node)


def _mermaid_step(node: Node, task: Node) -> Iterator[str]:
    networks = [n for n in ("teacher", "ratio", "student_score") if task.child(n)]
    yield '  z(("z")) --> student'
    yield f"  student[{_mermaid_card('student', task.child('student'))}] --> x0((x0))"
    times = task.child("times")
    yield f"  x0 --> noising[{_mermaid_card('noising', task.child('noising'))}] --> xt((x_t))"
    if times:
        yield f"  times[{_mermaid_card('t', times)}] --> noising"
    for name in networks:
        yield f"  xt --> {name}[{_mermaid_card(name.replace('_', ' '), task.child(name))}]"
    for name in networks:
        if "ratio" in networks and name in task.child("ratio").requires:
            yield f"  {name} -->|features| ratio"
    for i, (name, term) in enumerate(task.child("objective").group("terms").items()):
        parts = [(part, term.child(part)) for part in graph_svg.TERM_PARTS if term.child(part)]
        parts = [f"{part}: {graph_svg.chosen(n)} {graph_svg.inside(n, inf)}".strip() for part, n in parts]
        heading = f"{name} × {short(term.params.get('coefficient', 1.0))}"
        yield f"  term{i}[{_mermaid_text(heading, *parts)}] --> field((Σ))"
        yield from (f"  {network} --> term{i}" for network in networks if network in term.requires)
    yield '  field == "x0.backward(field)" ==> x0'
    if "student_score" in networks:
        yield f"  x0 -. detached .-> denoising[{_mermaid_text('denoising loss')}] -. trains .-> student_score"
    if "ratio" in networks and task.child("ratio_optimizer"):
        yield f"  x0 -. detached .-> logistic[{_mermaid_text('logistic loss')}] -. trains .-> ratio"
        source = node.child("data")
        yield f"  real[{_mermaid_text('real samples', source.cls if source else 'of the teacher')}] --> logistic"
