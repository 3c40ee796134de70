"""Texts that may hold anything, as parts of a Markdown page.

What models wrote is quoted, and a model may write Markdown, HTML or a terminal's escapes. So every text that is not the
program's own goes through `cell`, `code` or `fenced`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from data.command_line import plural
from grpo_jax.console import visible

HEAD, TAIL = 500, 700  # characters of a long text that are quoted; the end of a reply has its calls


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line; cells are Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def _inert(text: str) -> str:
    """Visible, and "<" of a tag as "&lt;", but for those of our own format: for viewers that do not know what code is."""
    return re.sub(r"<(?=[A-Za-z/!?])(?!/?(?:think|tool_call)>)", "&lt;", visible(text, "utf-8"))


def cell(text: str) -> str:
    """One line of text as Markdown that shows it as it is, in a table, too."""
    line = " ".join(visible(text, "utf-8").split())
    line = re.sub(r"([\\`*\[\]|~#])|(?<!\w)_|_(?!\w)", lambda found: "\\" + found[0], line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """One line of text as a span of code, in a table, too."""
    line = " ".join(_inert(text).split()).replace("|", "\\|")
    ticks = "`" * (_longest_run(line) + 1)
    return f"{ticks} {line} {ticks}" if "`" in line else f"{ticks}{line}{ticks}"


def fenced(text: str) -> str:
    """A text as a block of code that nothing in it can close; a long one without its middle, and it says so."""
    left_out = len(text) - HEAD - TAIL
    if left_out > 0:
        text = f"{text[:HEAD]}\n[... {plural(left_out, 'character')} left out ...]\n{text[-TAIL:]}"
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}text\n{_inert(text)}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
