"""Pictures of a graph in hand-written SVG: one training step of a distillation, or any component tree.

Colours mean the same in every picture: blue learns from the field, teal is the student score, amber the ratio
estimator, grey is frozen or has no weights, and red is the field on its way back to the student. Solid lines carry
values, dashed lines carry detached samples and the critics' updates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ratiograph.graph import Node

__all__ = ["TERM_PARTS", "draw_step", "draw_tree"]

TERM_PARTS = ("direction", "weighting", "target", "time_weight")
SYMBOLS = {"direction": "d", "weighting": "ω", "target": "r*", "time_weight": "w(t)"}

INK, MUTED, LINE, PAPER = "#1d2733", "#66727f", "#9aa5b1", "#ffffff"
FIELD = "#c62f3f"
BORDER = {"student": "#2563b0", "student_score": "#0e7f76", "ratio": "#b26a00", "teacher": "#66727f", "": "#9aa5b1"}
FILL = {"student": "#e8f0fb", "student_score": "#e3f4f1", "ratio": "#fdf1dc", "teacher": "#eef1f4", "": "#f7f8fa"}
ROLES = {"student": "student", "student_score": "student score", "ratio": "ratio estimator", "teacher": "teacher"}
OUTPUTS = {"student_score": "μ_{q}", "ratio": "ℓ = log p/q", "teacher": "μ_{p}"}

SANS = "Inter,'Segoe UI','Helvetica Neue',Arial,'DejaVu Sans',sans-serif"


def width_of(text: str, size: float, bold: bool = False) -> float:
    """An upper estimate of a text's width in pixels, so that nothing runs out of its box."""
    plain = re.sub(r"[_^]\{([^}]*)\}", r"\1", text)
    narrow = sum(c in "iljtfrI.,:;'|()[]{}! ·" for c in plain)
    wide = sum(c in "mwMWQO@—∇Σ%‖" for c in plain)
    return size * (0.58 * len(plain) - 0.22 * narrow + 0.3 * wide) * (1.07 if bold else 1.0)


def fit(text: str, size: float, width: float, bold: bool = False) -> str:
    """``text``, or its beginning with an ellipsis, within ``width`` pixels."""
    if width_of(text, size, bold) <= width:
        return text
    while text and width_of(text + "…", size, bold) > width:
        text = text[:-1]
    return text.rstrip(" ·,(") + "…"


def _rich(text: str) -> str:
    """Escaped text; ``x_{t}`` and ``h^{2}`` become sub- and superscripts."""

    def script(match: re.Match) -> str:
        shift = 0.28 if match[1] == "_" else -0.38
        back = f'<tspan dy="{-shift * 0.72:.3f}em" font-size="0.01">&#8203;</tspan>'
        inner = f'<tspan dy="{shift}em" font-size="72%">{match[2]}</tspan>'
        return inner + back

    return re.sub(r"([_^])\{([^}]*)\}", script, escape(text, quote=False))


class Canvas:
    """Collects SVG elements; coordinates in pixels, y downwards."""

    def __init__(self):
        self.lines: list[str] = []
        self.boxes: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12,
        *,
        color: str = INK,
        weight: int = 400,
        anchor: str = "start",
    ) -> None:
        """``text`` with its baseline at ``y``."""
        style = f'font-size="{size:g}" fill="{color}" font-weight="{weight}" text-anchor="{anchor}"'
        self.boxes.append(f'<text x="{x:g}" y="{y:g}" {style}>{_rich(text)}</text>')

    def label(self, x: float, y: float, text: str, color: str = MUTED, size: float = 11.5) -> None:
        """``text`` centred on a line, on a patch of paper so that the line does not strike it through."""
        half = width_of(text, size) / 2 + 5
        self.boxes.append(
            f'<rect x="{x - half:g}" y="{y - 9:g}" width="{2 * half:g}" height="18" rx="4" fill="{PAPER}"/>'
        )
        self.text(x, y + 4, text, size, color=color, anchor="middle")

    def box(self, x: float, y: float, w: float, h: float, kind: str = "", dashed: bool = False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.boxes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="9" fill="{FILL[kind]}" '
            f'stroke="{BORDER[kind]}" stroke-width="1.5"{dash}/>'
        )

    def card(self, x: float, y: float, w: float, role: str, title: str, notes: Sequence[str], kind: str = "") -> float:
        """A box with its role, a title and notes; returns its height."""
        height = card_height(notes)
        self.box(x, y, w, height, kind)
        self.text(x + 13, y + 20, fit(role, 11, w - 26), 11, color=BORDER[kind] if kind else MUTED, weight=600)
        self.text(x + 13, y + 40, fit(title, 14.5, w - 26, True), 14.5, weight=650)
        for i, note in enumerate(notes):
            self.text(x + 13, y + 58 + 16 * i, fit(note, 11.5, w - 26), 11.5, color=MUTED)
        return height

    def variable(self, x: float, y: float, text: str) -> None:
        """A value that flows: a circle around its symbol."""
        self.boxes.append(f'<circle cx="{x:g}" cy="{y:g}" r="21" fill="{PAPER}" stroke="{INK}" stroke-width="1.5"/>')
        self.text(x, y + 5, text, 15, anchor="middle", weight=500)

    def path(self, points: str, color: str = LINE, *, dashed: bool = False, width: float = 1.6, head: bool = True):
        """An SVG path, with an arrow head of its own colour."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        marker = f' marker-end="url(#head-{color[1:]})"' if head else ""
        self.lines.append(f'<path d="{points}" fill="none" stroke="{color}" stroke-width="{width:g}"{dash}{marker}/>')

    def line(
        self, *points: tuple[float, float], color: str = LINE, dashed: bool = False, width: float = 1.6, head=True
    ):
        """Straight segments."""
        self.path("M" + " L".join(f"{x:g} {y:g}" for x, y in points), color, dashed=dashed, width=width, head=head)

    def curve(self, x1: float, y1: float, x2: float, y2: float, color: str = LINE) -> None:
        """From left to right, leaving and arriving horizontally."""
        middle = (x1 + x2) / 2
        self.path(f"M{x1:g} {y1:g} C{middle:g} {y1:g} {middle:g} {y2:g} {x2:g} {y2:g}", color)

    def svg(self, width: float, height: float, title: str) -> str:
        heads = "".join(
            f'<marker id="head-{c[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0.8 L10 5 L0 9.2 z" fill="{c}"/></marker>'
            for c in sorted({LINE, FIELD, INK, *BORDER.values()})
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="{SANS}" role="img" style="max-width:100%;height:auto">'
            f"<title>{escape(title)}</title><defs>{heads}</defs>"
            f'<rect width="{width:g}" height="{height:g}" fill="{PAPER}"/>\n'
            + "\n".join([*self.lines, *self.boxes])
            + "\n</svg>\n"
        )


def card_height(notes: Sequence[str]) -> float:
    return 52 + 16 * len(notes)


# --- one training step ------------------------------------------------------------------------------------------------

WIDTH = 1300
STUDENT_X, STUDENT_W = 118, 204
X0, NOISING_X, NOISING_W, XT = 372, 432, 178, 660
NETWORK_X, NETWORK_W = 722, 212
TERM_X, TERM_W, BUS = 1022, 226, 1272
LANE, TOP = 108, 146  # the field's way back; the top of the main row


def compose(node: Node) -> str:
    """'EDM ∘ UNet'."""
    return " ∘ ".join(n.cls for n in node.chain())


def summary(node: Node | None) -> str:
    """'LogNormalSigma(mean −1.2, std 1.2)'."""
    if node is None:
        return ""
    inner = [f"{k} {v}" for k, v in node.shown().items()] + [summary(c) for c in node.children]
    return f"{node.cls}({', '.join(inner)})" if inner else node.cls


def notes_of(node: Node, skip: int = 1) -> list[str]:
    """What a card says below its title: the parts inside it, their settings, its size."""
    settings = [f"{k} {v}" for k, v in node.shown().items()]
    return [line for line in (" · ".join(settings), node.size) if line]


def draw_step(root: Node, task: Node, title: str) -> str:
    """z -> student -> x0 -> noising -> x_t -> networks -> terms -> field -> x0, and the critics' losses below."""
    c = Canvas()
    networks = {name: task.child(name) for name in ("teacher", "ratio", "student_score") if task.child(name)}
    terms = task.child("objective").group("terms")
    heights = {name: card_height(_network_notes(name, node)) for name, node in networks.items()}
    row = max(sum(heights.values()) + 26 * (len(heights) - 1), 136 * len(terms) + 20 * (len(terms) - 1), 190)
    middle = TOP + row / 2
    _heading(c, root, title)
    _generator(c, task, middle)
    rows = _networks(c, networks, heights, middle)
    _terms(c, terms, rows, networks, middle)
    _way_back(c, middle)
    bottom = TOP + row + 34
    height = _critics(c, root, task, rows, heights, middle, bottom)
    return c.svg(WIDTH, height, title or "One training step")


def _heading(c: Canvas, root: Node, title: str) -> None:
    c.text(30, 42, f"{title}: one training step" if title else "One training step", 21, weight=700)
    run = [
        f"{root.params[k]} {word}"
        for k, word in (("steps", "steps"), ("batch_size", "samples a step"))
        if k in root.params
    ]
    c.text(30, 64, " · ".join(run), 12.5, color=MUTED)
    legend = (("student", "moved by the field"), ("student_score", "student score, online"))
    legend += (("ratio", "ratio estimator, online"), ("teacher", "frozen"))
    x = WIDTH - 30
    for kind, text in reversed(legend):
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
    notes = [" ∘ ".join(n.cls for n in student.chain()[1:]), *notes_of(student)]
    notes = [n for n in notes if n]
    c.variable(52, middle, "z")
    c.text(52, middle + 40, "N(0, I)", 11.5, color=MUTED, anchor="middle")
    c.line((73, middle), (STUDENT_X - 2, middle), color=INK)
    c.card(STUDENT_X, middle - card_height(notes) / 2, STUDENT_W, "student", student.cls, notes, "student")
    c.line((STUDENT_X + STUDENT_W, middle), (X0 - 23, middle), color=INK)
    c.variable(X0, middle, "x_{0}")
    c.line((X0 + 21, middle), (NOISING_X - 2, middle), color=INK)
    notes = ["x_{t} = α_{t} x_{0} + σ_{t} ε", *([f"t ~ {times.cls}", *_settings(times)] if times else [])]
    c.card(NOISING_X, middle - card_height(notes) / 2, NOISING_W, "noising", noising.cls, notes)
    c.line((NOISING_X + NOISING_W, middle), (XT - 23, middle), color=INK)
    c.variable(XT, middle, "x_{t}")


def _settings(node: Node) -> list[str]:
    return [" · ".join(f"{k} {v}" for k, v in node.shown().items())] if node.shown() else []


def _network_notes(name: str, node: Node) -> list[str]:
    return [*_settings(node), " · ".join(part for part in (node.size, "frozen" if name == "teacher" else "") if part)]


def _networks(c: Canvas, networks: dict[str, Node], heights: dict[str, float], middle: float) -> dict[str, float]:
    """The networks that look at x_t, one below the other; returns the height of each one's centre."""
    y = middle - (sum(heights.values()) + 26 * (len(heights) - 1)) / 2
    rows = {}
    for name, node in networks.items():
        c.card(NETWORK_X, y, NETWORK_W, ROLES[name], compose(node), _network_notes(name, node), name)
        c.text(NETWORK_X + NETWORK_W - 12, y + 20, OUTPUTS[name], 12.5, color=BORDER[name], anchor="end", weight=600)
        rows[name] = y + heights[name] / 2
        c.curve(XT + 21, middle, NETWORK_X - 2, rows[name], INK)
        y += heights[name] + 26
    if "ratio" in networks and "teacher" in networks and "teacher" in networks["ratio"].requires:
        x, below = NETWORK_X + 40, rows["teacher"] + heights["teacher"] / 2
        c.line((x, below), (x, below + 24), color=BORDER["teacher"])
        c.text(x + 9, below + 17, "features, the same pass", 11, color=MUTED)
    return rows


def _terms(c: Canvas, terms: dict[str, Node], rows: dict[str, float], networks: dict[str, Node], middle: float) -> None:
    """One card a term; a line from each network to the part of the term that asks for it."""
    y = middle - (136 * len(terms) + 20 * (len(terms) - 1)) / 2
    for name, term in terms.items():
        _term(c, name, term, y, rows)
        c.line((TERM_X + TERM_W, y + 68), (BUS, y + 68), color=FIELD, head=False, width=2.2)
        c.line((BUS, y + 68), (BUS, LANE), color=FIELD, head=False, width=2.2)
        y += 156


def _term(c: Canvas, name: str, term: Node, y: float, rows: dict[str, float]) -> None:
    c.box(TERM_X, y, TERM_W, 136)
    coefficient = term.params.get("coefficient", 1.0)
    c.text(TERM_X + 13, y + 21, "term", 11, color=MUTED, weight=600)
    c.text(TERM_X + 44, y + 21, fit(name, 13.5, TERM_W - 130, True), 13.5, weight=650)
    c.text(TERM_X + TERM_W - 13, y + 21, f"× {coefficient:g}", 12.5, color=FIELD, anchor="end", weight=600)
    drawn: set[str] = set()
    for i, part in enumerate(TERM_PARTS):
        node, line = term.child(part), y + 46 + 24 * i
        if node is None:
            continue
        c.text(TERM_X + 13, line, SYMBOLS[part], 13.5, color=FIELD, weight=600)
        c.text(TERM_X + 52, line, fit(summary(node), 12.5, TERM_W - 64), 12.5)
        for network in node.requires:
            if network in rows:
                c.curve(NETWORK_X + NETWORK_W, rows[network], TERM_X - 2, line - 4, BORDER[network])
                drawn.add(network)


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
    """What trains the student score and the ratio: losses on the same samples, detached. Returns the picture's height."""
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
        enter = X0 if x < X0 < x + width else x + 40
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
    optimizer = task.child(f"{name}_optimizer")
    times = task.child(f"{name}_times")
    notes = [losses[name], f"t{'′' if name == 'student_score' else '″'} ~ {summary(times)}" if times else ""]
    rate = f"{updates} update{'s' * (updates != 1)} a step · {summary(optimizer)}"
    return [n for n in (*notes, rate) if n]


def _update(c: Canvas, name: str, right: float, card_y: float, row: float, height: float, *, direct: bool) -> None:
    """From a loss up to the network that it trains."""
    if direct:
        x = NETWORK_X + NETWORK_W / 2
        c.line((x, card_y), (x, row + height / 2 + 2), color=BORDER[name], dashed=True, width=2)
        return
    channel = XT + 36
    target = row + height / 2 - 14
    c.line(
        (right, card_y + 30),
        (right + 14, card_y + 30),
        (right + 14, card_y - 18),
        color=BORDER[name],
        dashed=True,
        width=2,
        head=False,
    )
    c.line(
        (right + 14, card_y - 18),
        (channel, card_y - 18),
        (channel, target),
        (NETWORK_X - 2, target),
        color=BORDER[name],
        dashed=True,
        width=2,
    )


def _real(c: Canvas, root: Node, logistic_x: float, y: float) -> None:
    """Where the ratio's positives come from."""
    data = root.child("data")
    title = data.cls if data else "teacher's samples"
    notes = _settings(data) if data else ["exact draws"]
    width = min(220, logistic_x - 62)
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
    notes = [] if node.shared else notes_of(node)
    height, width, below = card_height(notes), column - 50, y
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
