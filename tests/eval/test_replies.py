"""Replies made elsewhere: which lines are replies, and whose."""

import json
import re

import pytest

from eval import replies

IDS = {"bfcl": frozenset({"a", "b"}), "acebench": frozenset({"b", "c"})}


def read(tmp_path, *rows):
    path = tmp_path / "replies.jsonl"
    path.write_bytes("\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows).encode())
    return path, replies.read(path)


def test_lines_of_several_benchmarks(tmp_path):
    path, found = read(
        tmp_path,
        {"id": "a", "output": "x\u2028y", "token_count": 3, "truncated": True, "reason": "no_call", "calls": None},
        "",
        {"id": "b", "text": "one", "benchmark": "bfcl"},
        {"id": "b", "output": "two", "benchmark": "acebench"},
        {"id": "d", "output": "three", "benchmark": "api_bank"},  # not asked for
        {"id": "c", "output": "", "token_count": "many", "truncated": 1, "reason": 7},
    )
    given = replies.assigned(path, found, IDS)
    assert {key: (one.line, one.output) for key, one in given.items()} == {
        ("bfcl", "a"): (1, "x\u2028y"),
        ("bfcl", "b"): (3, "one"),
        ("acebench", "b"): (4, "two"),
        ("acebench", "c"): (6, ""),
    }
    first, last = given["bfcl", "a"], given["acebench", "c"]
    assert (first.token_count, first.truncated, first.reason) == (3, True, "no_call")
    assert (last.token_count, last.truncated, last.reason) == (None, False, None)


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"id": "a", "output": "x"'], ":1: not a reply (Expecting"),
        (["[" * 100_000], ":1: not a reply"),
        (["[1]"], ":1: not a reply (no object with id and output)"),
        ([{"id": "a"}], ":1: not a reply (no object with id and output)"),
        ([{"output": "x"}], ":1: not a reply (no object with id and output)"),
        ([{"id": 1, "output": "x"}], ":1: not a reply (id, output and benchmark are texts)"),
        ([{"id": "a", "output": None}], ":1: not a reply (id, output and benchmark are texts)"),
        ([{"id": "a", "output": ""}, {"id": "a", "text": ""}], ":2: id 'a' is that of line 1, too: an item has one reply"),
        ([{"id": "a", "output": ""}, {"id": "a", "text": "", "benchmark": "bfcl"}], ":2: id 'a' has a reply in line 1, too"),
        ([{"id": "x", "output": ""}], ":1: id 'x' is no item of bfcl or acebench: mend it, or"),
        ([{"id": "a", "output": "", "benchmark": "acebench"}], ":1: id 'a' is no item of acebench"),
        ([{"id": "b", "output": ""}], ":1: id 'b' is an item of bfcl and acebench: say which in the line, as \"benchmark\""),
        ([], ": it holds no replies to bfcl or acebench"),
        ([{"id": "d", "output": "", "benchmark": "api_bank"}], ": it holds no replies to bfcl or acebench"),
    ],
)
def test_lines_that_are_none_or_nobodys(tmp_path, lines, message):
    with pytest.raises(ValueError, match=re.escape(f"replies.jsonl{message}")) as error:
        replies.assigned(*read(tmp_path, *lines), IDS)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_no_text(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no such file: give the JSON lines with the replies"):
            replies.read(path)
    (tmp_path / "bytes").write_bytes(b'{"id": "a"}\n\xff\xfe')
    with pytest.raises(ValueError, match="bytes:1: not a reply"):
        replies.read(tmp_path / "bytes")
