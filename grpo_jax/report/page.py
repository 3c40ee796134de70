"""Some runs -> the parts of a page -> one file.

    Page       the runs' readings; `parts` are JSON, compressed; `update` reads what the runs wrote since
    html       the page around its parts, or, live, without them
    write      folders -> a file

The file has the page's markup, style and script, then the parts in base64, which holds nothing that markup is made of: what a
model wrote meets no HTML parser. The policy at its top allows the one script and the style by their hashes, and no request to
anywhere; live it allows requests to where the page came from.
"""

from __future__ import annotations

import base64
import hashlib
import html as markup
import json
import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from grpo_jax.metrics import plain
from grpo_jax.report import calls, panels, words
from grpo_jax.report.reading import Reading, pack

MOST_GROUPS = 10_000
_PART = re.compile(r"(index|groups|tasks)-(\d{1,9})(?:-(\d{1,9}))?")  # of which run, which chunk
HERE = Path(__file__).parent
_SCRIPTS = ("uplot.js", "dom.js", "curves.js", "rollouts.js", "page.js")
_STYLES = ("uplot.css", "page.css")


class Page:
    """What a page shows of some runs."""

    def __init__(self, folders: Sequence[Path], most_groups: int = MOST_GROUPS):
        self.readings = [Reading(folder, most_groups) for folder in folders]
        self.version = 0
        self.update()

    def update(self) -> bool:
        """Reads what is new; whether anything is. Raises ValueError for a damaged file, as `Reading.update`."""
        changed = any([reading.update() for reading in self.readings])
        self.version += changed
        return changed

    @property
    def title(self) -> str:
        return ", ".join(self._names())

    def parts(self) -> Iterator[tuple[str, bytes]]:
        """(name, compressed JSON): the runs, then of each the columns of its groups, what they say, and their tasks."""
        yield "runs", pack(self.runs())
        for i, reading in enumerate(self.readings):
            groups = reading.groups
            yield f"index-{i}", self.part(f"index-{i}")
            for kind, chunks in (("groups", groups.chunks), ("tasks", groups.task_chunks)):
                for k in range(len(chunks)):
                    yield f"{kind}-{i}-{k}", self.part(f"{kind}-{i}-{k}")

    def part(self, name: str) -> bytes | None:
        """The part of this name, as `parts` has it; None where there is none."""
        if name == "runs":
            return pack(self.runs())
        found = _PART.fullmatch(name)
        if not found or int(found[2]) >= len(self.readings):
            return None
        groups = self.readings[int(found[2])].groups
        if found[1] == "index":
            return pack(groups.index())
        chunks, k = groups.chunks if found[1] == "groups" else groups.task_chunks, int(found[3] or 0)
        return packed(chunks[k]) if k < len(chunks) else None

    def runs(self) -> dict[str, Any]:
        """All but the rollouts."""
        settings = [flat(reading.config) for reading in self.readings]
        differing = differences(settings)
        names = list(dict.fromkeys(name for reading in self.readings for name in reading.names))
        return {
            "version": self.version,
            "made": datetime.now().astimezone().isoformat(" ", "seconds"),
            "sections": panels.sections(names),
            "differing": differing,
            "marks": calls.MARKS,
            "reasons": words.REASONS,
            "runs": [
                {
                    "name": name,
                    "label": label(name, own, differing),
                    "folder": str(reading.folder.resolve()),
                    "settings": own,
                    "metrics": {key: [plain(row.get(key)) for row in reading.rows] for key in ("step", *reading.names)},
                    "summary": words.summary(reading),
                    "groups": reading.count,
                    "begun": reading.begun,
                }
                for name, reading, own in zip(self._names(), self.readings, settings, strict=True)
            ],
        }

    def _names(self) -> list[str]:
        """The folders' names, or as many more parts of their paths as tell them apart; numbers for what is given twice."""
        paths = [reading.folder.resolve().parts for reading in self.readings]
        depth = next((d for d in range(1, 99) if len({parts[-d:] for parts in paths}) == len({*paths})), 1)
        names = ["/".join(parts[-depth:]) for parts in paths]
        return [name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.field": value} of nested settings."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def differences(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The fields that are not alike in all runs; the folder, which never is, left out."""
    fields = dict.fromkeys(field for own in settings for field in own if field != "run.dir")
    return [field for field in fields if len({json.dumps(own.get(field)) for own in settings}) > 1]


def label(name: str, own: dict[str, Any], differing: Sequence[str]) -> str:
    """A run in a legend: its name, and what it has that others have not, by the last part of the field's name."""
    return ", ".join([name, *(f"{field.rpartition('.')[2]} {own.get(field)}" for field in differing[:4])])


def packed(chunk: bytes | list) -> bytes:
    """A chunk of a Reading: full ones are compressed already."""
    return chunk if isinstance(chunk, bytes) else pack(chunk)


def html(title: str, live: bool) -> list[str]:
    """The page in three: before its first part, between this and the others, after them."""
    script = "\n".join(['"use strict";', f"/* {_read('uplot.LICENSE')} */", *map(_read, _SCRIPTS)])
    style = "\n".join(map(_read, _STYLES))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; connect-src " + ("'self'" if live else "'none'")
    )
    values = {
        "POLICY": policy,
        "TITLE": markup.escape(title),
        "STYLE": style,
        "SCRIPT": script,
        "LIVE": "yes" if live else "no",
    }
    before, rest = _read("page.html").split("{{FIRST}}")
    return [_filled(text, values) for text in (before, *rest.split("{{PARTS}}"))]


def write(folders: Sequence[Path], out: Path, most_groups: int = MOST_GROUPS) -> Page:
    """Makes the page of the runs in `folders`, and returns what it shows; at any moment the file is the old one or the new."""
    page = Page(folders, most_groups)
    before, between, after = html(page.title, live=False)
    temporary = out.with_name(out.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(before)
        for name, data in page.parts():
            file.write(f'<script type="application/octet-stream" id="{name}">{base64.b64encode(data).decode()}</script>\n')
            if name == "runs":  # curves are drawn before the rollouts are read
                file.write(between)
        file.write(after)
    os.replace(temporary, out)
    return page


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _filled(text: str, values: dict[str, str]) -> str:
    """The text with each {{NAME}} replaced, in one go: a value may hold such a name."""
    pieces = text.split("{{")
    filled = [values[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:])]
    return pieces[0] + "".join(filled)
