"""The component graph of a run as Mermaid text, for pages that render Mermaid."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import inf

from ratiograph.config.tree import Node, short, step_of
from ratiograph.reports import graph_picture

__all__ = ["to_mermaid"]


def to_mermaid(node: Node) -> str:
    """The graph that `graph_picture.to_svg` draws, as a Mermaid flowchart."""
    task = step_of(node)
    return "\n".join(["flowchart LR", *(_mermaid_step(node, task) if task else _mermaid_tree(node))]) + "\n"


def _mermaid_text(*lines: str) -> str:
    return '"' + "<br/>".join(escape(line, quote=True) for line in lines if line) + '"'


def _mermaid_card(role: str, node: Node) -> str:
    params = ", ".join(f"{k}={v}" for k, v in node.shown().items())
    return _mermaid_text(role, graph_picture.compose(node.chain()), params, node.size)


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
        parts = [(part, term.child(part)) for part in graph_picture.TERM_PARTS if term.child(part)]
        parts = [f"{part}: {graph_picture.chosen(n)} {graph_picture.inside(n, inf)}".strip() for part, n in parts]
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
