"""Which training rows ask what a benchmark asks.

    read(paths) --> Benchmarks: every text that a user says in them, normalized
    Benchmarks.files_with(messages) --> the files in which a task's user says the same

BFCL, API-Bank and ACEBench write their questions in five ways: a text, a text of "user: ... system: ..." lines, a list of
messages, a list of lists of messages, all under the keys of `KEYS`; and a file that is one dialogue, a message a line.
Texts are the same if their letters and digits are: case, spaces and punctuation do not count. In a dialogue with several
user turns, one of fewer than `TELLING_WORDS` words ("yes, please") says too little to be the same question, on either side.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.example import DEEPEST, is_deeper

KEYS = ("question", "query", "messages", "history", "input")
DIALOGUES = ("input",)  # keys under which a text that is no dialogue is something else than a question
SUFFIXES = (".json", ".jsonl")
TELLING_WORDS = 4

_SPEAKER = re.compile(r"^(user|system|assistant|ai|api-request|generate api request): ?", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Benchmarks:
    """queries: normalized text -> the files that hold it. counts: file -> different texts in it, for each file with any."""

    queries: dict[str, tuple[str, ...]]
    counts: dict[str, int]

    def files_with(self, messages: Iterable[dict[str, Any]]) -> tuple[str, ...]:
        """The files in which a user says what one says in these messages; () for none."""
        said = _telling([turn["content"] for turn in messages if turn["role"] == "user"])
        return tuple(sorted({file for text in said for file in self.queries.get(text, ())}))


def read(paths: Sequence[str]) -> Benchmarks:
    """The queries of files, and of all JSON files in folders and below, which need not all hold some.

    Raises FileNotFoundError where there is nothing under a path, and ValueError where it holds no query.
    """
    queries: dict[str, set[str]] = defaultdict(set)
    counts = {}
    for path in paths:
        place = Path(path)
        if not place.exists():
            raise FileNotFoundError(f"--benchmarks {path}: no such file or folder")
        below = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        inside = below if place.is_dir() else [place]
        found = {str(file): _queries(file) for file in inside}
        if not any(found.values()):
            raise ValueError(
                f"--benchmarks {path}: no user's text in it, under {', '.join(KEYS)}: give BFCL's data/, or the like"
            )
        for name, texts in found.items():
            if texts:
                counts[name] = len(texts)
            for text in texts:
                queries[text].add(name)
    return Benchmarks({text: tuple(sorted(names)) for text, names in queries.items()}, counts)


def normalized(text: str) -> str:
    """Letters and digits of a text in lower case, words with one space between."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _telling(texts: Sequence[str]) -> set[str]:
    plain = [normalized(text) for text in texts]
    fewest = TELLING_WORDS if len(plain) > 1 else 1
    return {text for text in plain if len(text.split()) >= fewest}


def _queries(file: Path) -> set[str]:
    found, spoken = set(), []  # spoken: by the user of the one dialogue that such a file is
    for row in _rows(file):
        spoken += _user_texts(row)
        for key in KEYS:
            if key in row and (key not in DIALOGUES or _is_dialogue(row[key])):
                found |= _telling([*_user_texts(row[key])])
    return found | _telling(spoken)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file, a list of them, or JSON lines; none where it is something else, or nested very deep."""
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    try:
        values = [json.loads(text)]
    except (ValueError, RecursionError):
        values = [_json_or_none(line) for line in text.split("\n")]
    for value in values:
        rows = value if isinstance(value, list) else [value]
        yield from (row for row in rows if isinstance(row, dict) and not is_deeper(row, DEEPEST))


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and value.lower().startswith("user:")


def _user_texts(value: Any) -> Iterator[str]:
    """What users say in a text, a dialogue in one text, a message, or lists of such."""
    if isinstance(value, str):
        parts = _SPEAKER.split(value)  # text before, speaker, text, speaker, text, ...
        spoken = zip(parts[1::2], parts[2::2], strict=True)
        yield from (text for speaker, text in spoken if speaker.lower() == "user") if _is_dialogue(value) else [value]
    elif isinstance(value, list):
        for part in value:
            yield from _user_texts(part)
    elif isinstance(value, dict):
        said = {key.lower(): part for key, part in value.items()}
        text = said.get("content", said.get("text"))
        if str(said.get("role")).lower() in ("user", "human") and isinstance(text, str):
            yield text
