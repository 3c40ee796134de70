"""The program from files to a folder: what is kept and counted, the same bytes each time, every option, every error."""

import io
import json
import random
import re
import resource
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from data import build, jsonl, toolace
from data.build import IN_BENCHMARK, Build

ROOT = Path(__file__).parents[2]
SHARED = Path(__file__).parents[3] / "shared" / "data"

TOOLS = [
    {"name": "weather", "description": "Weather of a city.", "parameters": {"city": {"type": "string"}}},
    {"name": "news", "description": "", "parameters": {"topic": {"type": "string"}}},
]
SYSTEM = "Here is a list of functions in JSON format that you can invoke:\n" + json.dumps(TOOLS) + ". \nShould you decide"
CALL = "[weather(city='Oslo')]"
DEEP = "[" * 100_000


def xlam(number, **changes):
    row = {"id": number, "query": f"How warm is it in city {number}?", "tools": json.dumps(TOOLS)}
    return {**row, "answers": json.dumps([{"name": "weather", "arguments": {"city": f"city {number}"}}]), **changes}


def talk(number, *texts, system=SYSTEM):
    """A conversation that begins with the user, whose first text bears the number; a tab before a text makes it a tool's."""
    roles = ["tool" if text.startswith("\t") else ("user", "assistant")[i % 2] for i, text in enumerate(texts)]
    numbered = [f"{texts[0]} ({number})", *texts[1:]]
    return {"system": system, "conversations": [{"from": role, "value": t} for role, t in zip(roles, numbered, strict=True)]}


# (a row made from its number, what becomes of each of its answers)
XLAM_ROWS = [
    (xlam, ["kept"]),
    (lambda n: xlam(n, tools=TOOLS, answers=[{"function": {"name": "news", "arguments": '{"topic": "a"}'}}]), ["kept"]),
    (lambda n: xlam(n, query=None, messages=[{"role": "user", "content": f"{n}"}], id=None), ["kept"]),
    (lambda n: xlam(0, id=n), [jsonl.DUPLICATE]),
    (lambda n: xlam(n, answers="[]"), [jsonl.NO_CALL]),
    (lambda n: xlam(n, answers="weather(city='Oslo')"), [jsonl.ANSWERS_DO_NOT_PARSE]),
    (lambda n: xlam(n, answers='[{"name": "weather"}]'), [jsonl.ANSWERS_DO_NOT_PARSE]),
    (lambda n: xlam(n, answers='[{"name": "Weather", "arguments": {}}]'), [jsonl.CALLS_UNOFFERED_TOOL]),
    (lambda n: xlam(n, answers='[{"name": "weather", "arguments": {"city": NaN}}]'), [jsonl.NOT_PLAIN_JSON]),
    (lambda n: xlam(n, tools=None), [jsonl.TOOLS_DO_NOT_PARSE]),
    (lambda n: xlam(n, tools="[{"), [jsonl.TOOLS_DO_NOT_PARSE]),
    (lambda n: xlam(n, query=" "), [jsonl.NO_QUERY]),
    (lambda n: xlam(n, query="half \ud800"), [jsonl.NOT_PLAIN_JSON]),
    (lambda n: xlam(n, messages="Hi"), [jsonl.MESSAGES_DO_NOT_PARSE]),
    (lambda n: [n], [jsonl.NOT_AN_OBJECT]),
    (lambda n: n, [jsonl.NOT_AN_OBJECT]),
]
TOOLACE_ROWS = [
    (lambda n: talk(n, "How warm?", CALL), ["kept"]),
    (lambda n: talk(n, "How warm?", "[weather(city='a, (b)=[c]', n=-1.5e3, ok=true), news()]"), ["kept"]),
    (lambda n: talk(n, "How warm?", CALL, "\t4", "Four.", "News?", "[news()]"), ["kept", jsonl.NO_CALL, "kept"]),
    (
        lambda n: talk(n, "How warm?", CALL, "\t4", "[news(topic=x)]", "?", CALL),
        ["kept", toolace.CALLS_DO_NOT_PARSE, toolace.AFTER_A_BAD_CALL],
    ),
    (lambda n: talk(0, "Twice?", CALL), [jsonl.DUPLICATE]),
    (lambda n: talk(n, "How warm?", "Where?"), [jsonl.NO_CALL]),
    (lambda n: talk(n, "How warm?", "[weather(city=Oslo)]"), [toolace.CALLS_DO_NOT_PARSE]),
    (lambda n: talk(n, "How warm?", "[weather(city=" + DEEP), [toolace.CALLS_DO_NOT_PARSE]),
    (lambda n: talk(n, "How warm?", "I call weather(city='Oslo')"), [toolace.CALLS_DO_NOT_PARSE]),
    (lambda n: talk(n, "How warm?", "[Weather()]", "\t", CALL), [jsonl.CALLS_UNOFFERED_TOOL, toolace.AFTER_A_BAD_CALL]),
    (lambda n: talk(n, "How warm?", CALL, "?", CALL, system="Be brief."), [jsonl.TOOLS_DO_NOT_PARSE] * 2),
    (lambda n: talk(n, "How warm?", CALL, system=SYSTEM.replace("[{", "[{{")), [jsonl.TOOLS_DO_NOT_PARSE]),
    (lambda n: talk(n, "How warm?"), [toolace.NO_ANSWER]),
    (lambda n: {"system": SYSTEM, "conversations": [{"from": "judge", "value": "x"}]}, [jsonl.MESSAGES_DO_NOT_PARSE]),
    (lambda n: {"system": SYSTEM}, [jsonl.MESSAGES_DO_NOT_PARSE]),
    (lambda n: "text", [jsonl.NOT_AN_OBJECT]),
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def silently(**options):
    return build.build(Build(**options), Console(file=io.StringIO()))


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.fixture
def both(tmp_path):
    """(options that name a file of ToolACE and one of xLAM with 60 good rows each, and a folder to make)."""
    calls = [f"[weather(city='c{n}')]" for n in range(60)]
    talks = [talk(n, "How warm is it?", call, "\t4", "Four degrees.") for n, call in enumerate(calls)]
    files = dict(toolace=write(tmp_path / "t.jsonl", talks), xlam=write(tmp_path / "x.jsonl", map(xlam, range(60))))
    return {**files, "out": str(tmp_path / "out")}


# ---------------------------------------------------------------- what is kept and counted


def test_every_row_of_adversarial_files_is_kept_or_counted(tmp_path):
    rng, expected, files = random.Random(0), {}, {}
    repeated = {"xlam": xlam, "toolace": lambda n: talk(n, "Twice?", CALL)}  # of which a copy is a duplicate
    for name, kinds in (("xlam", XLAM_ROWS), ("toolace", TOOLACE_ROWS)):
        chosen = [(repeated[name], ["kept"]), *kinds, *rng.choices(kinds, k=499 - len(kinds))]
        files[name] = write(tmp_path / f"{name}.jsonl", [make(number) for number, (make, _) in enumerate(chosen)])
        expected[name] = Counter(outcome for _, outcomes in chosen for outcome in outcomes)
    manifest = silently(out=str(tmp_path / "out"), **files)
    loaded = jsonl.load(tmp_path / "out")
    assert loaded.dropped == {}
    assert len(loaded.examples) == manifest["examples"] == sum(counts["kept"] for counts in expected.values())
    for source in manifest["sources"]:
        assert source["dropped"] == {reason: count for reason, count in expected[source["name"]].items() if reason != "kept"}
        assert sum(source["rows"].values()) == 500
        assert sum(source["answers"].values()) == expected[source["name"]].total()
        assert sum(source["kept"].values()) == expected[source["name"]]["kept"]
        for kind, answers in source["answers"].items():
            assert answers >= source["kept"].get(kind, 0)
    assert manifest["sources"][1]["rows"].keys() == {"single-turn"}


def test_what_is_written_is_what_was_read(both, tmp_path):
    with_more = {"source": "mine", "reasoning": "Oslo is a city.", "response": "full text", "weight": 3}
    turns = [
        {"role": "user", "content": "Hm"},
        {"role": "gpt", "tool_calls": [{"name": "news", "arguments": {}}]},
        {"role": "tool", "content": {"a": 1}},
    ]
    write(Path(both["xlam"]), [xlam(0), xlam(1, **with_more), xlam(2, messages=turns)])
    manifest = silently(**both)
    talks = [json.loads(line) for line in Path(both["toolace"]).read_text().splitlines()]
    outcomes = [outcome for number, row in enumerate(talks) for outcome in toolace.examples_of(row, str(number))]
    before = [outcome for outcome in outcomes if not isinstance(outcome, str)] + jsonl.load(both["xlam"]).examples
    after = jsonl.load(both["out"]).examples
    assert [example.id for example in after] == [example.id for example in before]
    assert [example.extra for example in after] == [example.extra for example in before]
    assert [example.source for example in after] == ["toolace"] * 60 + ["xlam", "mine", "xlam"]
    assert [dict(source["kept"]) for source in manifest["sources"]] == [{"multi-turn": 60}, {"single-turn": 2, "multi-turn": 1}]


def test_parquet_and_a_list_give_the_same_rows_as_lines(both, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    silently(**both)
    for name in ("toolace", "xlam"):
        rows = [json.loads(line) for line in Path(both[name]).read_text().splitlines()]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=1))
    for suffix in ("parquet", "json"):
        files = {name: str(tmp_path / f"{name}.{suffix}") for name in ("toolace", "xlam")}
        silently(**files, out=str(tmp_path / "other"))
        assert contents(tmp_path / "other")["part-00000.jsonl"] == contents(both["out"])["part-00000.jsonl"]


def test_rows_and_manifest_do_not_depend_on_when_and_where(both, tmp_path):
    options = dict(irrelevance=0.3, masking=0.5, no_call=True)
    silently(**both, **options)
    silently(**{**both, "out": str(tmp_path / "there" / "again")}, **options)
    first = contents(both["out"])
    assert first == contents(tmp_path / "there" / "again") and set(first) == {"manifest.json", "part-00000.jsonl"}
    silently(**both, **options, seed=1)
    assert contents(both["out"])["part-00000.jsonl"] != first["part-00000.jsonl"]


def test_what_is_drawn_for_a_row_does_not_depend_on_the_others(tmp_path):
    texts = []
    for rows in (range(60), range(59, 20, -1)):
        path = write(tmp_path / "x.jsonl", map(xlam, rows))
        silently(xlam=path, out=str(tmp_path / "out"), irrelevance=0.3, masking=0.5)
        texts.append(set((tmp_path / "out" / "part-00000.jsonl").read_text().splitlines()))
    assert texts[1] < texts[0] and len(texts[1]) == 39


def test_manifest(both, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROWS_PER_FILE", 50)
    manifest = silently(**both)
    assert json.loads(json.dumps(manifest)) == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [50, 50, 20]
    for shard in manifest["shards"]:
        file = tmp_path / "out" / shard["file"]
        assert shard["sha256"] == build._sha256(file) and file.read_bytes().count(b"\n") == shard["rows"]
    assert manifest["options"] == {
        "toolace": both["toolace"], "xlam": both["xlam"], "no_call": False, "irrelevance": 0.0, "masking": 0.0,
        "benchmarks": (), "test": 0.0, "limit": None, "seed": 0,
    }  # fmt: skip
    licences = [(source["public_set"]["hub_id"], source["public_set"]["licence"]) for source in manifest["sources"]]
    assert licences == [("Team-ACE/ToolACE", "Apache-2.0"), ("Salesforce/xlam-function-calling-60k", "CC-BY-4.0")]
    assert manifest["sources"][1]["sha256"] == {both["xlam"]: build._sha256(Path(both["xlam"]))}
    assert len(jsonl.load(both["out"]).examples) == 120


# ---------------------------------------------------------------- options


def test_no_call_keeps_answers_that_call_nothing_and_training_reads_them(both):
    Path(both["xlam"]).write_text(json.dumps(xlam(0, answers="[]")) + "\n" + json.dumps(xlam(1)) + "\n")
    silently(**both)
    assert len(jsonl.load(both["out"]).examples) == 61
    silently(**both, no_call=True)
    examples = jsonl.load(both["out"]).examples
    assert len(examples) == 122 and sum(example.answer == () for example in examples) == 61


def test_irrelevance(both):
    manifest = silently(**both, irrelevance=0.4)
    examples = jsonl.load(both["out"]).examples
    changed = [example for example in examples if example.source.endswith("-irrelevance")]
    assert len(examples) == 120 and 30 < len(changed) < 66
    assert all(example.answer == () and [tool["name"] for tool in example.tools] == ["news"] for example in changed)
    assert sum(source["made"]["irrelevance"] for source in manifest["sources"]) == len(changed)
    assert all(len(example.tools) == 2 and example.answer for example in examples if example not in changed)


def test_masking_is_of_rows_of_xlam(both):
    manifest = silently(**both, masking=1.0)
    sources = Counter(example.source for example in jsonl.load(both["out"]).examples)
    assert sources == {"toolace": 60, "xlam-masked": 60} and manifest["sources"][1]["made"] == {"masking": 60}
    for example in jsonl.load(both["out"]).examples[60:]:
        [call], names = example.answer, {tool["name"]: list(tool["parameters"]) for tool in example.tools}
        assert list(call["arguments"]) == names[call["name"]] and not {"weather", "news"} & set(names)


def test_both_at_once(both):
    manifest = silently(**both, masking=1.0, irrelevance=1.0)
    sources = Counter(example.source for example in jsonl.load(both["out"]).examples)
    assert sources == {"toolace-irrelevance": 60, "xlam-irrelevance-masked": 60}
    assert manifest["sources"][1]["made"] == {"masking": 60, "irrelevance": 60}


def test_rows_that_ask_what_a_benchmark_asks_are_dropped_and_counted(both, tmp_path):
    asked = ["how warm is it in city 3", "How warm is it in City 7 ?!", "never asked"]
    bfcl = [{"id": i, "question": [[{"role": "user", "content": text}]]} for i, text in enumerate(asked)]
    one = write(tmp_path / "one.jsonl", bfcl)
    two = write(tmp_path / "two.jsonl", [{"question": "user: How warm is it? (5)\n"}, {"question": asked[0]}])
    manifest = silently(**both, benchmarks=(one, two))
    assert manifest["benchmarks"] == {one: {"queries": 3, "dropped": 2}, two: {"queries": 2, "dropped": 2}}
    assert [source["dropped"] for source in manifest["sources"]] == [{IN_BENCHMARK: 1, jsonl.NO_CALL: 60}, {IN_BENCHMARK: 2}]
    left = [example.extra["row_id"] for example in jsonl.load(both["out"]).examples]
    assert left == [f"{n}#1" for n in range(60) if n != 5] + [str(n) for n in range(60) if n not in (3, 7)]


def test_benchmarks_without_a_hit_are_shown_with_what_was_compared(both, tmp_path):
    one = write(tmp_path / "one.jsonl", [{"question": "never asked"}, {"question": "nor this"}])
    screen = io.StringIO()
    build.build(Build(**both, benchmarks=(one,)), Console(file=screen, width=200))
    assert re.search(r"benchmark +. queries . toolace dropped . xlam dropped", screen.getvalue())
    assert re.search(r"one\.jsonl . +2 . +0 . +0 ", screen.getvalue())


def test_rows_to_test_on(both, tmp_path):
    """Apart from those to train on, unchanged, whole conversations, the same ones whatever else is read."""
    long = [talk(n, f"Warm in {n}?", CALL, "\t4", "Four.", "News?", "[news()]") for n in range(60)]
    write(Path(both["toolace"]), long)
    screen = io.StringIO()
    manifest = build.build(Build(**both, test=0.25, masking=1.0), Console(file=screen))
    train, test = jsonl.load(both["out"]).examples, jsonl.load(tmp_path / "out" / "test").examples
    assert len(train) == manifest["examples"] and len(train) + len(test) == 180 and 25 < len(test) < 65
    assert manifest["test"] == [
        {"file": "test/part-00000.jsonl", "rows": len(test), "sha256": build._sha256(tmp_path / "out/test/part-00000.jsonl")}
    ]
    assert sum(source["made"]["test"] for source in manifest["sources"]) == len(test)
    first = [{example.messages[0]["content"] for example in some} for some in (train, test)]
    assert not first[0] & first[1] and {example.source for example in test} == {"toolace", "xlam"}
    assert {example.source for example in train} == {"toolace", "xlam-masked"}
    assert f"{len(test)} rows to test on: {both['out']}/test" in screen.getvalue()
    silently(xlam=both["xlam"], out=both["out"], test=0.25)  # in place of the earlier one, whose folder is known
    some = {example.id for example in jsonl.load(tmp_path / "out" / "test").examples}
    assert some == {example.id for example in test if example.source == "xlam"}
    silently(xlam=both["xlam"], out=both["out"], test=0.25, seed=1)
    assert some != {example.id for example in jsonl.load(tmp_path / "out" / "test").examples}
    (tmp_path / "out" / "test" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files than those of an earlier build"):
        silently(**both)


def test_one_row_is_one_row(both, tmp_path):
    screen = io.StringIO()
    build.build(Build(xlam=both["xlam"], out=both["out"], limit=1), Console(file=screen))
    assert screen.getvalue().endswith(f"1 row in 1 file: --data.path {both['out']}\n")


def test_limit_is_of_each_source(both):
    manifest = silently(**both, limit=7, no_call=True)
    assert [sum(source["kept"].values()) for source in manifest["sources"]] == [7, 7]
    assert [sum(source["answers"].values()) for source in manifest["sources"]] == [7, 7]


def test_rows_given_twice_are_kept_once_whatever_file_they_are_in(both, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "ab":
        write(folder / f"{name}.jsonl", map(xlam, range(5)))
    manifest = silently(xlam=str(folder), out=both["out"])
    assert manifest["examples"] == 5 and manifest["sources"][0]["dropped"] == {jsonl.DUPLICATE: 5}


# ---------------------------------------------------------------- the hub


def hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


class Table(list):
    features = types.SimpleNamespace(arrow_schema=types.SimpleNamespace(names=["id", "query"]))


def test_the_word_hub_means_the_public_sets(tmp_path, monkeypatch):
    asked = []
    rows = {
        build.SETS["toolace"]["hub_id"]: Table([talk(0, "How warm?", CALL)]),
        build.SETS["xlam"]["hub_id"]: Table([xlam(0)]),
    }
    rows["me/mine"] = Table([xlam(1)])
    hub(monkeypatch, lambda name, split: asked.append((name, split)) or rows[name])
    monkeypatch.chdir(tmp_path)
    manifest = silently(toolace="hub", xlam="hub", out="out")
    assert asked == [("Team-ACE/ToolACE", "train"), ("Salesforce/xlam-function-calling-60k", "train")]
    assert manifest["examples"] == 2
    assert [list(source["sha256"]) for source in manifest["sources"]] == [[name] for name, _ in asked]
    assert all(len(digest) == 64 for source in manifest["sources"] for digest in source["sha256"].values())
    assert silently(xlam="me/mine", out="out")["examples"] == 1


GATED = "Dataset 'Salesforce/xlam-function-calling-60k' is a gated dataset on the Hub. You must be authenticated to access it."


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(GATED), f"at https://huggingface.co/datasets/{build.SETS['xlam']['hub_id']}, then log in with `hf"),
        (ConnectionError("Couldn't reach the hub\nat all"), r"nor on the hub \(Couldn't reach the hub\): give a file"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, capsys, error, line):
    def load_dataset(name, split):
        raise error

    hub(monkeypatch, load_dataset)
    monkeypatch.chdir(tmp_path)
    assert_one_line(monkeypatch, capsys, ["--xlam", "hub", "--out", "out"], line)


# ---------------------------------------------------------------- errors, and the folder


def run(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["data.build", *map(str, words)])
    build.main()


def assert_one_line(monkeypatch, capsys, words, line):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(line, error), error
    assert not [file for file in Path.cwd().iterdir() if ".partial" in file.name]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--out out", "no rows are named: give --toolace or --xlam"),
        ("--xlam nothing.jsonl --out out", "nothing.jsonl: no such file or folder"),
        ("--xlam good.jsonl --out out --masking 1.5", "--masking 1.5: give a share from 0 to 1"),
        ("--xlam good.jsonl --out out --irrelevance nan", "--irrelevance nan: give a share from 0 to 1"),
        ("--xlam good.jsonl --out out --limit 0", "--limit 0: give a number of rows from 1 on"),
        ("--toolace good.jsonl --out out --masking 0.5", "--masking is for rows of xLAM"),
        ("--xlam good.jsonl --out out --benchmarks nothing", "--benchmarks nothing: no such file or folder"),
        ("--xlam good.jsonl --out out --benchmarks bad.jsonl", "--benchmarks bad.jsonl: no user's text in it"),
        ("--xlam bad.jsonl --out out", r"bad.jsonl:1: not JSON \("),
        ("--toolace good.jsonl --out out", r"\(messages_do_not_parse 1\): these look like xLAM's rows: give --xlam"),
        ("--xlam talks.jsonl --out out", r"no row is kept \(no_query 1\): these look like ToolACE's .*: give --toolace"),
        ("--xlam good.jsonl --toolace good.jsonl --out out", r"--toolace: no row is kept .*: give --xlam"),
        ("--xlam empty.jsonl --out out", r"no row is kept \(not_an_object 1\): give other data"),
        ("--xlam good.jsonl --out out --test 1", "--test 1.0: give a share from 0 to below 1"),
        ("--xlam good.jsonl --out out --test 0.999999", "--test 0.999999 of 1 row leaves none to train on"),
        ("--xlam good.jsonl --out out --test 0.000001", "--test 1e-06 of 1 row leaves none to test on"),
        ("--xlam good.jsonl --out out --maskin 1", "unknown option '--maskin': did you mean '--masking'"),
        ("--xlam good.jsonl --out good.jsonl", "is where rows are read from"),
        ("--xlam good.jsonl --out .", "is where rows are read from"),
        ("--xlam good.jsonl --out full", "holds other files than those of an earlier build: give a new or empty folder"),
        ("--xlam good.jsonl --out bad.jsonl", "holds other files than those of an earlier build"),
        ("--xlam good.jsonl --out bad.jsonl/out", r"Not a directory|exists"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.jsonl", [xlam(0)])
    write(tmp_path / "talks.jsonl", [talk(0, "How warm?", CALL)])
    write(tmp_path / "empty.jsonl", [1])
    (tmp_path / "bad.jsonl").write_text("not JSON\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert_one_line(monkeypatch, capsys, words.split(), line)
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_an_earlier_build_is_replaced_whole_or_not_at_all(both, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROWS_PER_FILE", 50)
    silently(**both)
    silently(xlam=both["xlam"], out=both["out"])
    assert set(contents(both["out"])) == {"manifest.json", "part-00000.jsonl", "part-00001.jsonl"}
    before = contents(both["out"])
    with (Path(both["xlam"])).open("a") as file:
        file.write("not JSON\n")
    with pytest.raises(ValueError, match="x.jsonl:61: not JSON"):
        silently(xlam=both["xlam"], out=both["out"])
    assert contents(both["out"]) == before
    with pytest.raises(FileExistsError, match="is where rows are read from"):
        silently(xlam=both["out"], out=both["out"])
    (Path(both["out"]) / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files than those of an earlier build"):
        silently(toolace=both["toolace"], out=both["out"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "t.jsonl", "x.jsonl"]


KILLED_BEFORE = """
import os, signal, sys
from pathlib import Path
from data import build
kill = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)
match sys.argv.pop(1):
    case "manifest":
        build._manifest = kill
    case "rename":  # the second of the two that replace the earlier build
        Path.rename = lambda self, to, move=Path.rename: kill() if not Path(to).name.startswith(".") else move(self, to)
    case "remove":
        build.shutil.rmtree = lambda folder, **named: kill() if folder.exists() else None
build.main()
"""


@pytest.mark.parametrize("step", ["manifest", "rename", "remove"])
def test_after_a_kill_the_next_build_cleans_up_and_puts_the_earlier_one_back(both, tmp_path, step):
    silently(**both)
    before = contents(both["out"])
    words = [sys.executable, "-c", KILLED_BEFORE, step, "--xlam", both["xlam"], "--out", both["out"]]
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == -9
    assert len([file for file in tmp_path.iterdir() if file.name.startswith(".out.partial")]) > 1
    assert Path(both["out"]).exists() == (step != "rename")
    if step != "remove":
        screen = io.StringIO()
        (tmp_path / "bad.jsonl").write_text("not JSON")
        with pytest.raises(ValueError, match="not JSON"):
            build.build(Build(xlam=str(tmp_path / "bad.jsonl"), out=both["out"]), Console(file=screen))
        assert contents(both["out"]) == before
        assert ("was cut off as it was replaced, and is back" in screen.getvalue()) == (step == "rename")
        (tmp_path / "bad.jsonl").unlink()
    assert silently(xlam=both["xlam"], out=both["out"])["examples"] == 60
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "t.jsonl", "x.jsonl"]


def test_one_process_a_folder(both, tmp_path, monkeypatch):
    def second(*given):
        with pytest.raises(ValueError, match="another process is building it: wait for its end, or give another folder"):
            silently(**both)
        return move(*given)

    move = build._move
    monkeypatch.setattr(build, "_move", second)
    assert silently(**both)["examples"] == 120
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "t.jsonl", "x.jsonl"]


def test_an_interrupt_leaves_nothing(both, tmp_path, monkeypatch, capsys):
    def interrupted(row, source, keep_no_call):
        raise KeyboardInterrupt

    monkeypatch.setattr(jsonl, "example_of", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, ["--xlam", both["xlam"], "--out", both["out"]])
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.jsonl", "x.jsonl"]


def test_a_bug_shows_where(both, monkeypatch):
    monkeypatch.setattr(build, "_changed", lambda *given: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        run(monkeypatch, ["--xlam", both["xlam"], "--out", both["out"]])


def test_what_a_person_sees(both, tmp_path):
    words = [sys.executable, "-m", "data.build", "--no_call", "--masking", "1", "--irrelevance", "1"]
    for option, value in both.items():
        words += [f"--{option}", value]
    for again in ("", " (in place of the earlier build)"):
        shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.stdout.splitlines() if "│" in line]
        assert cells == [
            ["toolace", "multi-turn", "60", "120", "120"],
            ["xlam", "single-turn", "60", "60", "60"],
            ["irrelevance", "60", "60"],
            ["masking", "0", "60"],
        ]
        assert shown.stdout.endswith(f"180 rows in 1 file: --data.path {both['out']}{again}\n")


# ---------------------------------------------------------------- real rows, many rows


@pytest.mark.skipif(not SHARED.exists(), reason="the real rows are not here")
def test_real_rows(tmp_path):
    out = str(tmp_path / "out")
    manifest = silently(xlam=str(SHARED / "train_rows_xlam_format.jsonl"), out=out)
    assert manifest["examples"] == 407 and manifest["sources"][0]["dropped"] == {}
    no_call = str(SHARED / "train_rows_no_call.jsonl")
    assert silently(xlam=no_call, out=out, no_call=True)["examples"] == 23
    with pytest.raises(ValueError, match=r"no_call 23"):
        silently(xlam=no_call, out=out)


def many_rows(path, count):
    """Rows of about 1.8 kB, as long as xLAM's are on average, each with another query."""
    tools = [{**tool, "name": f"{tool['name']}_{i}", "description": "What it does. " * 10} for i in range(4) for tool in TOOLS]
    answers = json.dumps([{"name": "weather_2", "arguments": {"city": "Oslo"}}])
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps(xlam(number, tools=json.dumps(tools), answers=answers)) + "\n")
    return str(path)


@pytest.mark.parametrize("count", [2_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_sixty_thousand_rows_take_two_minutes_and_two_gigabytes(tmp_path, count):
    path = many_rows(tmp_path / "x.jsonl", count)
    words = ["-m", "data.build", "--xlam", path, "--out", str(tmp_path / "out"), "--masking", "0.67", "--irrelevance", "0.1"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{count} rows: {seconds:.1f} s of CPU, {after.ru_maxrss / 1024:.0f} MB")
    assert seconds < 3 + 120 * count / 60_000  # of CPU, on one core: other jobs do not count
    assert after.ru_maxrss < 2e6  # kB; the largest child so far
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["examples"] == count
