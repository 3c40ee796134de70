"""Command lines of programs without presets: what is wrong is one line that names the nearest right word."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from data import command_line


@dataclass(frozen=True)
class Inner:
    #: Where.
    path: str = ""


@dataclass(frozen=True)
class Args:
    """Does something."""

    #: Which.
    what: Annotated[Literal["this", "that"], tyro.conf.Positional]
    data: Inner = field(default_factory=Inner)
    #: At most
    #: so many.
    some_limit: int | None = None
    #: Says nothing.
    quiet: bool = False


def test_words_become_options():
    found = command_line.read(Args, "program", ["that", "--data.path", "x", "--some_limit", "3", "--quiet"])
    assert found == Args("that", Inner("x"), 3, True)
    assert command_line.read(Args, "program", ["this", "--some-limit=4"]).some_limit == 4


@pytest.mark.parametrize(
    "words, says",
    [
        (["this", "--some_limt", "3"], "unknown option '--some_limt': did you mean '--some_limit'?"),
        (["this", "--data.pth", "3"], "did you mean '--data.path'?"),
        (["this", "--some_limit", "abc"], "Error parsing --some_limit: ['abc'] is no INT"),
        (["this", "that"], "Unrecognized options: that"),
        ([], "missing: {this,that}; --help says what to give"),
    ],
)
def test_what_is_wrong_is_one_line(words, says, capsys):
    with pytest.raises(ValueError) as error:
        command_line.read(Args, "program", words)
    assert says.lower() in str(error.value).lower() and "\n" not in str(error.value) and len(str(error.value)) < 200
    assert capsys.readouterr().err == ""


@dataclass(frozen=True)
class Needy:
    """Does something."""

    #: A file. With
    #: --to_path left out, nothing is written.
    from_path: str
    #: A folder.
    to_path: str


def test_what_is_missing_is_named_without_its_help():
    for words, names in ([[], "--from_path, --to_path"], [["--from_path", "x"], "--to_path"]):
        with pytest.raises(ValueError) as error:
            command_line.read(Needy, "program", words)
        assert str(error.value) == f"missing: {names}; --help says what to give"


def test_counts_are_words():
    assert [command_line.plural(n, "row") for n in (0, 1, 2, 3000)] == ["0 rows", "1 row", "2 rows", "3,000 rows"]


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.read(Args, "program", ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "Does something." in shown and "--no-quiet" not in shown and "program" in shown
    assert "At most so many. " in shown and "Says nothing." in shown  # two lines of the source become one


def test_help_fills_its_lines():
    """tyro joins the lines of a comment above a field, unless one begins with anything but a letter."""
    root = Path(__file__).resolve().parents[2]
    sources = [path for room in ("grpo_jax", "data", "eval", "scripts") for path in sorted((root / room).rglob("*.py"))]
    pairs = [pair for path in sources for pair in pairwise(map(str.strip, path.read_text().splitlines()))]
    further = [second for first, second in pairs if first.startswith("#: ") and second.startswith("#: ")]
    assert len(further) > 50 and not [line for line in further if not line[3].isalpha()]
