"""Pictures of a component graph in SVG: one training step of a distillation, or any component tree.

Colours mean the same in every picture: blue learns from the field, teal is the student score, amber the ratio
estimator, grey is frozen or has no weights, and red is the field on its way back to the student. Solid lines carry
values, dashed lines carry detached samples and the critics' updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ratiograph.config.tree import Node, describe, step_of
from ratiograph.core.files import write_atomically
from ratiograph.reports.canvas import BORDER, FIELD, FILL, INK, MUTED, PAPER, Canvas, card_height, fit, width_of

__all__ = ["TERM_PARTS", "chosen", "inside", "save", "to_svg"]

TERM_PARTS = ("direction", "weighting", "target", "time_weight")
SYMBOLS = {"direction": "d", "weighting": "ω", "target": "r*", "time_weight": "w(t)"}

ROLES = {"student": "student", "student_score": "student score", "ratio": "ratio estimator", "teacher": "teacher"}
OUTPUTS = {"student_score": "μ_{q}", "ratio": "ℓ = log p/q", "teacher": "μ_{p}"}


# --- one training step ------------------------------------------------------------------------------------------------

WIDTH = 1300
STUDENT_X, STUDENT_W = 112, 200
X0, NOISING_X, NOISING_W, XT = 360, 418, 178, 642
NETWORK_X, NETWORK_W = 726, 212
TERM_X, TERM_W, BUS = 1014, 238, 1274
LANE, TOP = 108, 146  # the field's way back; the top of the main row


def settings(node: Node, only: frozenset[str] | None = None) -> list[str]:
    """['lam −0.5', ...]: the parameters worth showing, or of those the ones in ``only``."""
    return [f"{k} {v}".replace(" -", " −") for k, v in node.shown().items() if only is None or k in only]


def summary(node: Node, only: frozenset[str] | None = None) -> str:
    """'LogNormalSigma(mean −1.2, std 1.2)': a component with its `settings`."""
    inner = settings(node, only)
    return f"{node.cls}({', '.join(inner)})" if inner else node.cls


def chosen(node: Node) -> str:
    """'SBA(lam −0.5)': a component with the settings that differ from their default."""
    return summary(node, node.chosen)


def inside(node: Node, width: float) -> str:
    """'of Clamped of SBA(lam 0.5)': what a part of a term wraps, with as much detail as ``width`` pixels hold."""
    wrapped = []
    while node.children:
        node = node.children[0]
        wrapped.append(node)
    full = [chosen(n) for n in wrapped]
    names = [n.cls for n in wrapped]
    spellings = ["of " + " of ".join(parts) for parts in (full, [*names[:-1], full[-1]], names)] if wrapped else [""]
    return next((s for s in spellings if width_of(s, 11) <= width), fit(spellings[-1], 11, width))


def compose(nodes: Sequence[Node]) -> str:
    """'EDM ∘ UNet'."""
    return " ∘ ".join(node.cls for node in nodes)


def wrap(items: Sequence[str], width: float, lines: int = 3) -> list[str]:
    """Items joined by dots, broken between items into at most ``lines`` lines of ``width`` pixels."""
    wrapped: list[str] = []
    for item in items:
        longer = f"{wrapped[-1]} · {item}" if wrapped else item
        if wrapped and (width_of(longer, 11.5) <= width or len(wrapped) == lines):
            wrapped[-1] = longer
        else:
            wrapped.append(item)
    return wrapped


def notes_of(node: Node, width: float) -> list[str]:
    """What a card of ``width`` says below its title: its settings and its size."""
    return [*wrap(settings(node), width - 26), *([node.size] if node.size else [])]


def draw_step(root: Node, task: Node, title: str) -> str:
    """z -> student -> x0 -> noising -> x_t -> networks -> terms -> field -> x0, and the critics' losses below."""
    c = Canvas()
    networks = {name: task.child(name) for name in ("teacher", "ratio", "student_score") if task.child(name)}
    terms = task.child("objective").group("terms")
    used = {name for term in terms.values() for name in term.requires}
    used |= {name for network in used & networks.keys() for name in networks[network].requires}
    heights = {name: card_height(_network_notes(name, node, used)) for name, node in networks.items()}
    row = max(sum(heights.values()) + 26 * (len(heights) - 1), _stack_height(terms), 190)
    middle = TOP + row / 2
    _heading(c, root, task, title)
    _generator(c, task, middle)
    rows = _networks(c, networks, used, heights, middle)
    _terms(c, terms, rows, middle)
    _way_back(c, middle)
    bottom = TOP + row + 34
    height = _critics(c, root, task, rows, heights, middle, bottom)
    return c.svg(WIDTH, height, title or "One training step")


def _heading(c: Canvas, root: Node, task: Node, title: str) -> None:
    c.text(30, 42, f"{title}: one training step" if title else "One training step", 21, weight=700)
    words = {"steps": "steps", "batch_size": "samples a step"}
    run = " · ".join(f"{root.params[key]} {word}" for key, word in words.items() if key in root.params)
    c.text(30, 64, run, 12.5, color=MUTED)
    legend = {"student": "moved by the field", "student_score": "student score, online"}
    legend |= {"ratio": "ratio estimator, online", "teacher": "frozen"}
    x = WIDTH - 30
    for kind, text in reversed(legend.items()):
        if task.child(kind) is None:
            continue
        x -= width_of(text, 12) + 6
        c.text(x, 41, text, 12, color=MUTED)
        x -= 20
        c.boxes.append(
            f'<rect x="{x:g}" y="31" width="13" height="12" rx="3" fill="{FILL[kind]}" stroke="{BORDER[kind]}" '
            'stroke-width="1.5"/>'
        )
        x -= 16


def _generator(c: Canvas, task: Node, middle: float) -> None:
    """z, the student, x0, the noising process, x_t, from left to right."""
    student, noising, times = task.child("student"), task.child("noising"), task.child("times")
    notes = [*filter(None, [compose(student.chain()[1:])]), *notes_of(student, STUDENT_W)]
    c.variable(52, middle, "z")
    c.text(52, middle + 40, "N(0, I)", 11.5, color=MUTED, anchor="middle")
    c.line((73, middle), (STUDENT_X - 2, middle), color=INK)
    c.card(STUDENT_X, middle - card_height(notes) / 2, STUDENT_W, "student", student.cls, notes, "student")
    c.line((STUDENT_X + STUDENT_W, middle), (X0 - 23, middle), color=INK)
    c.variable(X0, middle, "x_{0}")
    c.line((X0 + 21, middle), (NOISING_X - 2, middle), color=INK)
    notes = [
        "x_{t} = α_{t} x_{0} + σ_{t} ε",
        *([f"t ~ {times.cls}", *wrap(settings(times), NOISING_W - 26)] if times else []),
    ]
    c.card(NOISING_X, middle - card_height(notes) / 2, NOISING_W, "noising", noising.cls, notes)
    c.line((NOISING_X + NOISING_W, middle), (XT - 23, middle), color=INK)
    c.variable(XT, middle, "x_{t}")


def _network_notes(name: str, node: Node, used: set[str]) -> list[str]:
    last = " · ".join(filter(None, [node.size, "frozen" if name == "teacher" else ""]))
    return [*wrap(settings(node), NETWORK_W - 26), *filter(None, [last, "" if name in used else "no term uses it"])]


def _networks(
    c: Canvas, networks: dict[str, Node], used: set[str], heights: dict[str, float], middle: float
) -> dict[str, float]:
    """The networks that are evaluated at x_t, one below the other; returns the y of each one's centre."""
    y = middle - (sum(heights.values()) + 26 * (len(heights) - 1)) / 2
    rows = {}
    for name, node in networks.items():
        c.card(NETWORK_X, y, NETWORK_W, ROLES[name], compose(node.chain()), _network_notes(name, node, used), name)
        c.text(NETWORK_X + NETWORK_W - 12, y + 20, OUTPUTS[name], 12.5, color=BORDER[name], anchor="end", weight=600)
        rows[name] = y + heights[name] / 2
        if name in used:
            c.curve(XT + 21, middle, NETWORK_X - 2, rows[name], INK)
        y += heights[name] + 26
    if "ratio" in networks:
        _features(c, networks["ratio"].requires, rows, heights)
    return rows


def _features(c: Canvas, sources: tuple[str, ...], rows: dict[str, float], heights: dict[str, float]) -> None:
    """An arrow to the ratio from the network above or below it whose encoder it reads."""
    x = NETWORK_X + 40
    for name, down, baseline in (("teacher", 1, 17), ("student_score", -1, -9)):
        if name in sources and name in rows:
            edge = rows[name] + down * heights[name] / 2
            c.line((x, edge), (x, edge + 24 * down), color=BORDER[name])
            c.text(x + 9, edge + baseline, "features, the same pass", 11, color=MUTED)


def _rows_of(term: Node) -> dict[str, tuple[Node, float]]:
    """The parts of a term, each with the height of its row: a second line names what a wrapper wraps."""
    parts = {part: term.child(part) for part in TERM_PARTS}
    return {part: (node, 39 if node.children else 24) for part, node in parts.items() if node}


def _term_height(term: Node) -> float:
    return 40 + sum(height for _, height in _rows_of(term).values())


def _stack_height(terms: dict[str, Node]) -> float:
    return sum(map(_term_height, terms.values())) + 20 * (len(terms) - 1)


def _terms(c: Canvas, terms: dict[str, Node], rows: dict[str, float], middle: float) -> None:
    """One card a term; its field leaves to the right and joins the others on the way up."""
    y = middle - _stack_height(terms) / 2
    for name, term in terms.items():
        _term(c, name, term, y, rows)
        centre = y + _term_height(term) / 2
        c.line((TERM_X + TERM_W, centre), (BUS, centre), (BUS, LANE), color=FIELD, head=False, width=2.2)
        y += _term_height(term) + 20


def _term(c: Canvas, name: str, term: Node, y: float, rows: dict[str, float]) -> None:
    """A term's card; a line from each network to the part that needs it."""
    c.box(TERM_X, y, TERM_W, _term_height(term))
    coefficient = f"× {term.params.get('coefficient', 1.0):g}"
    room = TERM_W - 64 - width_of(coefficient, 12.5)
    c.text(TERM_X + 13, y + 21, "term", 11, color=MUTED, weight=600)
    c.text(TERM_X + 44, y + 21, fit(name, 13.5, room, True), 13.5, weight=650)
    c.text(TERM_X + TERM_W - 13, y + 21, coefficient, 12.5, color=FIELD, anchor="end", weight=600)
    y += 46
    for part, (node, height) in _rows_of(term).items():
        c.text(TERM_X + 13, y, SYMBOLS[part], 13.5, color=FIELD, weight=600)
        c.text(TERM_X + 48, y, fit(chosen(node), 12.5, TERM_W - 58), 12.5)
        c.text(TERM_X + 48, y + 15, inside(node, TERM_W - 58), 11, color=MUTED)
        for network in node.requires:
            if network in rows:
                c.curve(NETWORK_X + NETWORK_W, rows[network], TERM_X - 2, y - 4, BORDER[network])
        y += height


def _way_back(c: Canvas, middle: float) -> None:
    """The field from the terms to x0 along the top, and one backward pass through the student."""
    c.line((BUS, LANE), (X0, LANE), (X0, middle - 23), color=FIELD, width=2.2)
    sum_x = TERM_X + TERM_W / 2
    c.boxes.append(f'<circle cx="{sum_x}" cy="{LANE}" r="16" fill="{PAPER}" stroke="{FIELD}" stroke-width="2"/>')
    c.text(sum_x, LANE + 6, "Σ", 16, color=FIELD, anchor="middle", weight=600)
    c.label(
        (X0 + sum_x) / 2, LANE, "field  g = Σ coefficient · w(t) · α_{t} · [ ω(r) d − ω(r*) ∇ log r* ]", FIELD, 13.5
    )
    c.line((X0 - 17, middle - 13), (STUDENT_X + STUDENT_W + 2, middle - 13), color=FIELD, width=2.2)
    c.text(X0 - 10, LANE + 24, "x_{0}.backward(g)", 12.5, color=FIELD, anchor="end", weight=600)
    c.text(X0 - 10, LANE + 40, "one backward pass, through the student alone", 11, color=FIELD, anchor="end")


def _critics(
    c: Canvas, root: Node, task: Node, rows: dict[str, float], heights: dict[str, float], middle: float, top: float
) -> float:
    """The losses of student score and ratio on the same samples, detached. Returns the picture's height."""
    online = [n for n in ("ratio", "student_score") if n in rows and task.child(f"{n}_optimizer")]
    if not online:
        return top
    width, spots = 330, {online[-1]: NETWORK_X - 60}
    if len(online) == 2:
        spots["ratio"] = 300
    card_y, deepest = top + 34, 0.0
    c.line((X0, middle + 21), (X0, top), color=MUTED, dashed=True, head=False)
    for name, x in spots.items():
        notes = _loss_notes(task, name)
        title = "denoising loss" if name == "student_score" else "logistic loss, real against student"
        deepest = max(deepest, c.card(x, card_y, width, f"{ROLES[name]} learns by", title, notes, name))
        enter = X0 if x < X0 < x + width else x + 110
        c.line((X0, top), (enter, top), (enter, card_y - 2), color=MUTED, dashed=True)
        _update(c, name, x + width, card_y, rows[name], heights[name], direct=name == online[-1])
    c.label(X0, top - 14, "x_{0} detached", MUTED)
    if "ratio" in spots:
        _real(c, root, spots["ratio"], card_y)
    return card_y + deepest + 30


def _loss_notes(task: Node, name: str) -> list[str]:
    losses = {
        "student_score": "E λ(σ) ‖μ_{q}(x_{t′}) − x_{0}‖^{2}",
        "ratio": "E_{real} softplus(−ℓ) + E_{student} softplus(ℓ)",
    }
    updates = task.params.get(f"{name}_updates", 1)
    times = f"t{'′' if name == 'student_score' else '″'} ~ {summary(task.child(f'{name}_times'))}"
    rate = f"{updates} update{'s' * (updates != 1)} a step · {summary(task.child(f'{name}_optimizer'))}"
    return [losses[name], times, rate]


def _update(c: Canvas, name: str, right: float, card_y: float, row: float, height: float, *, direct: bool) -> None:
    """From a loss up to the network that it trains."""
    if direct:
        x = NETWORK_X + NETWORK_W / 2
        c.line((x, card_y), (x, row + height / 2 + 2), color=BORDER[name], dashed=True, width=2)
        return
    channel, target, start = NETWORK_X - 24, row + height / 2 - 14, right - 40
    turns = ((start, card_y), (start, card_y - 17), (channel, card_y - 17), (channel, target), (NETWORK_X - 2, target))
    c.line(*turns, color=BORDER[name], dashed=True, width=2)


def _real(c: Canvas, root: Node, logistic_x: float, y: float) -> None:
    """The source of the ratio's real samples."""
    data = root.child("data")
    title = data.cls if data else "teacher's samples"
    width = min(220, logistic_x - 62)
    notes = notes_of(data, width) if data else ["exact draws"]
    c.card(30, y, width, "real samples", title, notes)
    c.line((30 + width, y + 34), (logistic_x - 2, y + 34), color=INK)


# --- any component tree -----------------------------------------------------------------------------------------------


def draw_tree(root: Node, title: str) -> str:
    """The components as a tree from left to right, one column a depth."""
    c = Canvas()
    heading = title or root.cls
    c.text(30, 42, heading, 21, weight=700)
    depth = _depth(root)
    column = max(250, min(320, (WIDTH - 60) / depth))
    bottom = _branch(c, root, 30, 70, column)[1]
    return c.svg(max(60 + column * depth - 50, 400, 60 + width_of(heading, 21, True)), bottom + 16, heading)


def _depth(node: Node) -> int:
    return 1 + max((_depth(child) for child in node.children), default=0)


def _branch(c: Canvas, node: Node, x: float, y: float, column: float) -> tuple[float, float]:
    """Draws ``node`` and all below it from ``y`` down; returns the centre of its card and where the next may start."""
    width, below = column - 50, y
    notes = ["shared, drawn above"] if node.shared else notes_of(node, width)
    height = card_height(notes)
    centres = []
    for child in node.children:
        centre, below = _branch(c, child, x + column, below, column)
        centres.append(centre)
    below = max(below, y + height + 14)
    middle = (centres[0] + centres[-1]) / 2 if centres else y + height / 2
    middle = max(middle, y + height / 2)
    c.card(x, middle - height / 2, width, node.name, node.cls, notes, "student" if node.parameters else "")
    for centre in centres:
        c.curve(x + width, middle, x + column - 2, centre)
    return middle, max(below, middle + height / 2 + 14)


def to_svg(node: Node, title: str = "") -> str:
    """A self-contained SVG: the data flow of one training step for a distillation, the component tree otherwise.

    Args:
        node: what `describe` gave.
        title: heading; names the kind of picture by default.
    """
    task = step_of(node)
    return draw_step(node, task, title) if task else draw_tree(node, title)


def save(experiment: object, folder: Path) -> None:
    """Writes ``graph.svg`` into the folder of a run."""
    picture = to_svg(describe(experiment), title=folder.resolve().name)
    write_atomically(folder / "graph.svg", picture.encode())
