"""The official runner of BFCL on replies of ours: the same verdict on every item, and the same tables."""

import copy
import csv
import importlib.util
import json

import pytest

from data import prompt
from eval import bfcl, bfcl_handler

NEEDED = ("bfcl_eval", "pandas", "tqdm", "tenacity", "overrides", "dotenv", "tree_sitter", "tree_sitter_java")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_runner = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} missing: {bfcl.INSTALL}; {bfcl_handler.INSTALL}")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"id": "multiple_0"}\n', ":1: not a reply"),
        ('{"id": "a", "text": ""}\n[]\n', ":2: not a reply"),
        ("{\n", ":1: not a reply"),
        ('{"id": "a", "text": ""}\n\n{"id": "a", "text": ""}\n', ":3: id 'a' is that of line 1, too"),
        ('{"id": 1, "text": ""}\n', ":1: not a reply .id, output and benchmark are texts"),
    ],
)
def test_files_that_hold_no_replies(tmp_path, text, message):
    path = tmp_path / "responses.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        bfcl_handler.read(path)
    path.write_text(json.dumps({"id": "a", "text": "x\u2028y", "more": 1}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert bfcl_handler.read(path) == {"a": "x\u2028y"}
    path.write_text('{"id": "a", "output": "x", "benchmark": "bfcl"}\n{"id": "a", "output": "y", "benchmark": "acebench"}')
    assert bfcl_handler.read(path) == {"a": "x"}


def test_result_files(tmp_path):
    replies = {"multiple_1": "\ud800é", "live_simple_0-0-0": "b", "multiple_0": "a"}
    bfcl_handler.write(replies, {name: name.rsplit("_", 1)[0] for name in replies}, tmp_path)
    files = {path.relative_to(tmp_path).as_posix(): path.read_text().splitlines() for path in tmp_path.rglob("*.json")}
    assert {name: [json.loads(line) for line in lines] for name, lines in files.items()} == {
        f"{bfcl.MODEL}/non_live/BFCL_v4_multiple_result.json": [
            {"id": "multiple_1", "result": "&#55296;é"},
            {"id": "multiple_0", "result": "a"},
        ],
        f"{bfcl.MODEL}/live/BFCL_v4_live_simple_result.json": [{"id": "live_simple_0-0-0", "result": "b"}],
    }


def right(calls):
    return prompt.reply(calls, "So.")


def changed(calls, index):
    """A reply made of right calls, wrong in one of many ways, by turns."""
    calls = copy.deepcopy(list(calls))
    arguments = calls[0]["arguments"]
    key = next(iter(arguments), None)
    match index % 16:
        case 1:
            arguments.pop(key, None)
        case 2:
            arguments["unheard_of"] = 1
        case 3:
            arguments[key] = str(arguments.get(key))
        case 4:
            arguments[key] = [arguments.get(key), "\ud800"]
        case 5:
            calls[0]["name"] += "_x"
        case 6:
            calls = calls[::-1]
        case 7:
            calls += calls
        case 8:
            return "I cannot \ud800 do that."
        case 9:
            return f"<tool_call>{json.dumps(calls[0])}</tool_call>"
        case 10:
            return f"{right(calls)}<tool_call>[]</tool_call>"
        case 11:
            return f"<tool_call>{json.dumps(calls)[:-2]}</tool_call>{right(calls)}"
        case 12:
            arguments[key] = 10**400  # no float holds it, and the checker makes one
        case 13:
            arguments[key] = [5, {"a": float("nan")}]
        case 14:
            deep = (
                json.dumps(calls)
                .replace("{}", "[]")
                .replace('"arguments": {', '"arguments": {"deep": ' + "[" * 98 + "]" * 98 + ",", 1)
            )
            return f"<tool_call>{deep.replace(',}', '}')}</tool_call>"
        case 15:
            return f"<tool_call>{'[' * 5000}</tool_call>"
    return right(calls)


@needs_runner
@pytest.mark.parametrize("block", ["first", "last"])
def test_verdicts_are_the_official_runners(tmp_path, block):
    items = bfcl.items(block=block)
    replies = {item.id: changed(item.example.answer, index) for index, item in enumerate(items)}
    ours = {item.id: bfcl.verdict(replies[item.id], item) for item in items}
    assert {scored.reason for scored in ours.values()} == set(bfcl.REASONS)
    official = bfcl_handler.evaluate(replies, tmp_path / "out", block)
    assert len(official) == 2501
    assert official == {name: scored.value == 1 for name, scored in ours.items()}
    with pytest.raises(ValueError, match="name another folder"):
        bfcl_handler.evaluate(replies, tmp_path / "out", block)
    counts = {category: [0, 0] for category in bfcl.CATEGORIES}
    for item in items:
        counts[item.category][0] += int(ours[item.id].value)
        counts[item.category][1] += 1
    assert tables(tmp_path / "out") == rounded(bfcl.columns(counts))


def tables(out):
    """The official tables' row, by the names of our columns."""
    (live,) = csv.DictReader((out / "score/data_live.csv").open())
    (non_live,) = csv.DictReader((out / "score/data_non_live.csv").open())
    names = {"non_live": "AST Summary", "simple": "Simple AST", "multiple": "Multiple AST", "parallel": "Parallel AST"}
    names |= {"parallel_multiple": "Parallel Multiple AST"}
    found = {ours: non_live[theirs] for ours, theirs in names.items()}
    names = {"live": "AST Summary", "live_simple": "Python Simple AST", "live_multiple": "Python Multiple AST"}
    names |= {"live_parallel": "Python Parallel AST", "live_parallel_multiple": "Python Parallel Multiple AST"}
    return found | {ours: live[theirs] for ours, theirs in names.items()}


def rounded(columns):
    return {name: f"{value:.2f}%" for name, value in columns.items() if name != "overall"}


@needs_runner
def test_right_answers_and_a_part_of_them(tmp_path):
    items = bfcl.items()
    replies = {item.id: right(item.example.answer) for item in items} | {"of another benchmark": ""}
    assert sum(bfcl_handler.evaluate(replies, tmp_path / "all").values()) == 2494
    found = tables(tmp_path / "all")
    assert (found["non_live"], found["live"], found["simple"]) == ("99.75%", "99.70%", "99.00%")
    some = {item.id: right(item.example.answer) for item in items if item.category == "simple_java"}
    some.pop("simple_java_1")
    official = bfcl_handler.evaluate(some, tmp_path / "some")
    assert [name for name, well in official.items() if not well] == ["simple_java_36", "simple_java_64", "simple_java_65"]
    with pytest.raises(ValueError, match="none of the replies"):
        bfcl_handler.evaluate({"x": ""}, tmp_path / "none")


@needs_runner
def test_the_program(tmp_path, monkeypatch, capsys):
    items = bfcl.items(["live_parallel"])
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps({"id": item.id, "text": right(item.example.answer[:2])}) + "\n" for item in items))
    monkeypatch.setattr("sys.argv", ["bfcl_handler", "--responses", str(path), "--out", str(tmp_path / "out")])
    bfcl_handler.main()
    assert "13 of 16 replies are right; eval.bfcl says otherwise of 0" in capsys.readouterr().out
