"""A canvas that writes SVG: cards, symbols and arrows in one palette, and text that stays inside its box."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

__all__ = ["BORDER", "FIELD", "FILL", "INK", "LINE", "MUTED", "PAPER", "Canvas", "card_height", "fit", "width_of"]

INK, MUTED, LINE, PAPER = "#1d2733", "#66727f", "#9aa5b1", "#ffffff"
FIELD = "#c62f3f"
BORDER = {"student": "#2563b0", "student_score": "#0e7f76", "ratio": "#b26a00", "teacher": "#66727f", "": "#9aa5b1"}
FILL = {"student": "#e8f0fb", "student_score": "#e3f4f1", "ratio": "#fdf1dc", "teacher": "#eef1f4", "": "#f7f8fa"}
SANS = "Inter,'Segoe UI','Helvetica Neue',Arial,'DejaVu Sans',sans-serif"


def width_of(text: str, size: float, bold: bool = False) -> float:
    """An upper estimate of the width of ``text`` in pixels at the font size ``size``."""
    plain = re.sub(r"[_^]\{([^}]*)\}", r"\1", text)
    narrow = sum(c in "iljtfrI.,:;'|()[]{}! ·" for c in plain)
    wide = sum(c in "mwMWQO@—∇Σ%‖" for c in plain)
    return size * (0.57 * len(plain) - 0.25 * narrow + 0.4 * wide) * (1.07 if bold else 1.0)


def fit(text: str, size: float, width: float, bold: bool = False) -> str:
    """``text``, or its beginning with an ellipsis, within ``width`` pixels."""
    if width_of(text, size, bold) <= width:
        return text
    while text and width_of(text + "…", size, bold) > width:
        text = text[:-1]
    return text.rstrip(" ·,(") + "…"


def _rich(text: str, size: float) -> str:
    """Escaped text; ``x_{t}`` and ``h^{2}`` become sub- and superscripts of a text of ``size`` pixels."""
    parts, baseline = [], 0.0
    for plain, kind, script in re.findall(r"([^_^]+|[_^](?!{))|([_^]){([^}]*)}", text):
        wanted = size * {"_": 0.26, "^": -0.36, "": 0.0}[kind]
        small = f' font-size="{0.74 * size:g}"' if kind else ""
        parts.append(f'<tspan dy="{wanted - baseline:.2f}"{small}>{escape(plain or script, quote=False)}</tspan>')
        baseline = wanted
    return "".join(parts) if "{" in text else escape(text, quote=False)


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
        self.boxes.append(f'<text x="{x:g}" y="{y:g}" {style}>{_rich(text, size)}</text>')

    def label(self, x: float, y: float, text: str, color: str = MUTED, size: float = 11.5) -> None:
        """``text`` centred on a line, on a patch of paper so that the line does not strike it through."""
        half = width_of(text, size) / 2 + 5
        self.boxes.append(
            f'<rect x="{x - half:g}" y="{y - 9:g}" width="{2 * half:g}" height="18" rx="4" fill="{PAPER}"/>'
        )
        self.text(x, y + 4, text, size, color=color, anchor="middle")

    def box(self, x: float, y: float, w: float, h: float, kind: str = "") -> None:
        """A rounded box in the colours of ``kind``."""
        self.boxes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="9" fill="{FILL[kind]}" '
            f'stroke="{BORDER[kind]}" stroke-width="1.5"/>'
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
        """A variable: a circle around its symbol."""
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
        leave, arrive = x1 + 0.4 * (x2 - x1), x1 + 0.45 * (x2 - x1)
        self.path(f"M{x1:g} {y1:g} C{leave:g} {y1:g} {arrive:g} {y2:g} {x2:g} {y2:g}", color)

    def svg(self, width: float, height: float, title: str) -> str:
        """The whole picture, lines below boxes."""
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
    """Height in pixels of a card with ``notes``."""
    return 52 + 16 * len(notes)
