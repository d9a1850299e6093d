"""Markdown of foreign texts and of tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ratiograph.core.foreign import shown

__all__ = ["code", "plain", "table"]

MARKUP = re.compile(r"[\\`*\[\]<~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
LONGEST = 2000  # characters of a text


def plain(foreign: object) -> str:
    """Foreign text on one line that no reader of Markdown takes for markup, HTML or a formula."""
    return MARKUP.sub(r"\\\g<0>", shown(foreign, LONGEST))


def code(foreign: object) -> str:
    """Foreign text on one line, as code."""
    return f"`{shown(foreign, LONGEST).replace('`', chr(39))}`"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, left: int | None = None) -> str:
    """A table of ``heads`` over ``rows``; columns after the first ``left`` are aligned right, none by default."""
    left = len(heads) if left is None else left
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (heads, *rows)]
    lines.insert(1, "|" + "---|" * left + "---:|" * (len(heads) - left))
    return "\n".join(lines)
