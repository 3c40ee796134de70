"""Which rows are used, which are dropped and why, what stops the program, and what the split depends on."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from data import jsonl
from data.example import make
from data.jsonl import example_of, load, split

SHARED = Path(__file__).parents[3] / "shared" / "data"

TOOL = {"name": "weather", "description": "Weather of a city.", "parameters": {"city": {"type": "string"}}}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
ROW = {"query": "How warm is Oslo?", "tools": [TOOL], "answers": [CALL]}
PLAIN = make([{"role": "user", "content": "How warm is Oslo?"}], [TOOL], [CALL], "test")
DEEP = "[" * 100_000


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count):
    return [{**ROW, "query": f"question {i}"} for i in range(count)]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tools": json.dumps([TOOL]), "answers": json.dumps([CALL])},  # xLAM
        {"tools": [{"type": "function", "function": TOOL}], "answers": [{"type": "function", "function": CALL}]},
        {"tools": [{**TOOL, "parameters": json.dumps(TOOL["parameters"])}]},
        {"answers": [{"name": "weather", "arguments": '{"city": "Oslo"}'}]},
        {"answers": [{"id": "call_1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"messages": [{"role": "user", "content": "How warm is Oslo?"}], "query": None},
        {"messages": [{"role": "human", "content": "How warm is Oslo?"}], "query": "not this one"},
        {"messages": json.dumps([{"role": "user", "content": "How warm is Oslo?"}])},
        {"source_guess": "unknown columns are ignored", "weight": float("nan")},
    ],
)
def test_every_way_of_writing_a_row_is_the_same_example(change):
    assert example_of({**ROW, **change}, "test") == PLAIN


def test_optional_columns():
    row = {**ROW, "id": 7, "source": "mine", "reasoning": "Oslo is a city.", "response": "full text"}
    example = example_of(row, "file name")
    assert (example.id, example.source) == (PLAIN.id, "mine")
    assert example.extra == {"row_id": "7", "reasoning": "Oslo is a city.", "response": "full text"}
    assert example_of({**ROW, "reasoning": None, "response": " "}, "test").extra == {}


def test_tool_without_description_and_parameters_gets_empty_ones_and_keeps_other_keys():
    bare = example_of({**ROW, "tools": [{"name": "weather", "required": ["city"]}]}, "test").tools
    assert bare == ({"name": "weather", "description": "", "parameters": {}, "required": ["city"]},)


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"tool_calls": [{"type": "function", "function": CALL}]},
        {"tool_calls": [CALL]},
        {"calls": [CALL], "tool_calls": None},
    ],
)
def test_earlier_turns(calls):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "human", "content": "Oslo?"},
        {"role": "gpt", "content": None, **calls},
        {"role": "observation", "name": "weather", "content": {"celsius": 4, "sky": "grå"}, "tool_call_id": "1"},
        {"role": "assistant", "content": "4 degrees."},
        {"role": "user", "content": "And now?"},
    ]
    assert example_of({**ROW, "messages": turns}, "test").messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": "", "calls": [CALL]},
        {"role": "tool", "content": '{"celsius": 4, "sky": "grå"}', "name": "weather"},
        {"role": "assistant", "content": "4 degrees."},
        {"role": "user", "content": "And now?"},
    )


USER = {"role": "user", "content": "Oslo?"}
BAD_ROWS = [
    (["a", "list"], jsonl.NOT_AN_OBJECT),
    (None, jsonl.NOT_AN_OBJECT),
    ({"tools": [TOOL], "answers": [CALL]}, jsonl.NO_QUERY),
    ({**ROW, "query": " \n"}, jsonl.NO_QUERY),
    ({**ROW, "query": None, "messages": []}, jsonl.NO_QUERY),
    ({**ROW, "query": 5}, jsonl.MESSAGES_DO_NOT_PARSE),
    ({**ROW, "messages": "Oslo?"}, jsonl.MESSAGES_DO_NOT_PARSE),
    ({**ROW, "messages": ["Oslo?"]}, jsonl.MESSAGES_DO_NOT_PARSE),
    ({**ROW, "messages": [{"role": "critic", "content": "no"}]}, jsonl.MESSAGES_DO_NOT_PARSE),
    ({**ROW, "messages": [{"role": ["user"], "content": "no"}]}, jsonl.MESSAGES_DO_NOT_PARSE),
    ({**ROW, "messages": [{"role": "user", "content": None}]}, jsonl.MESSAGES_DO_NOT_PARSE),
    ({**ROW, "messages": [USER, {"role": "assistant", "content": "Hm."}]}, jsonl.MESSAGES_DO_NOT_PARSE),
    ({**ROW, "messages": [{"role": "system", "content": "alone"}]}, jsonl.MESSAGES_DO_NOT_PARSE),
    ({**ROW, "messages": [{"role": "gpt", "calls": [{"name": "weather"}]}, USER]}, jsonl.MESSAGES_DO_NOT_PARSE),
    ({"query": "Oslo?", "answers": [CALL]}, jsonl.TOOLS_DO_NOT_PARSE),
    ({**ROW, "tools": "[{"}, jsonl.TOOLS_DO_NOT_PARSE),
    ({**ROW, "tools": DEEP}, jsonl.TOOLS_DO_NOT_PARSE),
    ({**ROW, "tools": [{"description": "no name"}]}, jsonl.TOOLS_DO_NOT_PARSE),
    ({**ROW, "tools": [{**TOOL, "description": 3}]}, jsonl.TOOLS_DO_NOT_PARSE),
    ({**ROW, "tools": [{**TOOL, "parameters": ["city"]}]}, jsonl.TOOLS_DO_NOT_PARSE),
    ({**ROW, "tools": TOOL}, jsonl.TOOLS_DO_NOT_PARSE),
    ({"query": "Oslo?", "tools": [TOOL]}, jsonl.ANSWERS_DO_NOT_PARSE),
    ({**ROW, "answers": "weather(city='Oslo')"}, jsonl.ANSWERS_DO_NOT_PARSE),
    ({**ROW, "answers": [{"name": "weather"}]}, jsonl.ANSWERS_DO_NOT_PARSE),
    ({**ROW, "answers": [{"name": 3, "arguments": {}}]}, jsonl.ANSWERS_DO_NOT_PARSE),
    ({**ROW, "answers": [{"name": "weather", "arguments": "Oslo"}]}, jsonl.ANSWERS_DO_NOT_PARSE),
    ({**ROW, "answers": []}, jsonl.NO_CALL),
    ({**ROW, "answers": "[]"}, jsonl.NO_CALL),
    ({**ROW, "answers": [CALL, {"name": "Weather", "arguments": {}}]}, jsonl.CALLS_UNOFFERED_TOOL),
    ({**ROW, "tools": []}, jsonl.CALLS_UNOFFERED_TOOL),
    ({**ROW, "query": "half \ud800 pair"}, jsonl.NOT_PLAIN_JSON),
    ({**ROW, "reasoning": "half \ud800 pair"}, jsonl.NOT_PLAIN_JSON),
    ({**ROW, "answers": '[{"name": "weather", "arguments": {"city": NaN}}]'}, jsonl.NOT_PLAIN_JSON),
    ({**ROW, "answers": '[{"name": "weather", "arguments": {"city": 1e999}}]'}, jsonl.NOT_PLAIN_JSON),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[f"{i}-{bad[1]}" for i, bad in enumerate(BAD_ROWS)])
def test_bad_rows_are_dropped_with_their_reason(row, reason):
    assert example_of(row, "test") == reason


def test_a_plain_tool_or_call_may_have_a_key_called_function():
    tool = {**TOOL, "function": {"name": "other"}}
    assert example_of({**ROW, "tools": [tool]}, "test").tools == (tool,)


def test_load_counts_every_row_once(tmp_path):
    rows = [bad for bad, reason in BAD_ROWS] + [ROW, {**ROW, "id": "again"}]
    loaded = load(write(tmp_path / "rows.jsonl", rows))
    assert [example.id for example in loaded.examples] == [PLAIN.id]
    assert loaded.examples[0].source == "rows"
    expected = {reason: sum(reason == other for _, other in BAD_ROWS) for _, reason in BAD_ROWS}
    assert loaded.dropped == {**expected, jsonl.DUPLICATE: 1}
    assert sum(loaded.dropped.values()) + len(loaded.examples) == len(rows)


def test_rows_without_a_call_can_be_kept(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**ROW, "answers": []}, {**ROW, "answers": "[]", "tools": []}, ROW])
    assert load(path).dropped == {"no_call": 2}
    assert [example.answer for example in load(path, keep_no_call=True).examples] == [(), (), (CALL,)]


def test_a_row_may_say_that_no_call_is_right():
    for mark, outcome in ((True, ()), (False, jsonl.NO_CALL), ("true", jsonl.NO_CALL), (None, jsonl.NO_CALL)):
        example = example_of({**ROW, "answers": [], "no_call": mark}, "test")
        assert (example if isinstance(example, str) else example.answer) == outcome
    assert example_of({**ROW, "no_call": True}, "test") == PLAIN


def test_a_row_made_of_an_example_is_read_back_as_it():
    turns = [
        {"role": "user", "content": "How warm?"},
        {"role": "gpt", "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": "4", "name": "weather"},
    ]
    more = {"id": 3, "source": "mine", "reasoning": "why", "response": "all", "messages": turns}
    for row in (ROW, {**ROW, **more}, {**ROW, "answers": [], "no_call": True}):
        example = example_of(row, "test")
        assert example_of(json.loads(json.dumps(jsonl.row_of(example))), "other") == example


def test_folder_is_read_by_file_name_and_other_files_are_left_alone(tmp_path):
    rows = numbered(6)
    write(tmp_path / "b.jsonl", rows[2:4])
    (tmp_path / "a.json").write_text("\n  " + json.dumps(rows[:2], indent=1))  # one list
    write(tmp_path / "c.json", [rows[4], rows[0]])  # lines in a .json
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "manifest.json").write_text('{"made_by": "data.build"}')
    (tmp_path / "d.jsonl").mkdir()
    loaded = load(tmp_path)
    assert [example.messages[0]["content"] for example in loaded.examples] == [f"question {i}" for i in range(5)]
    assert [example.source for example in loaded.examples] == ["a", "a", "b", "b", "c"]
    assert loaded.dropped == {"duplicate": 1}
    assert load(str(tmp_path)) == loaded


def test_blank_lines_byte_order_mark_and_line_separators_in_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({**ROW, "query": f"a\u2028b\x85 {i}"}, ensure_ascii=False) for i in range(2)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n \n".join(lines).encode())
    assert [example.messages[0]["content"] for example in load(path).examples] == ["a\u2028b\x85 0", "a\u2028b\x85 1"]


def test_limit_stops_reading(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**ROW, "answers": []}, *numbered(3)])
    path.write_text(path.read_text() + "not JSON, never reached\n")
    loaded = load(path, limit=2)
    assert [example.messages[0]["content"] for example in loaded.examples] == ["question 0", "question 1"]
    assert loaded.dropped == {"no_call": 1}
    with pytest.raises(ValueError, match="limit = 0"):
        load(path, limit=0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"query": "Os', r"Unterminated string starting at column 11, near '\{\"query\": \"Os'"),
        (b"hello", "Expecting value at column 1, near 'hello'"),
        (b'{"query": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
        (DEEP.encode(), "recursion"),
        (b'{"query": "a"} {"query": "b"}', "Extra data at column 16"),
    ],
)
def test_a_line_that_is_not_json_is_an_error_that_names_it(tmp_path, line, why):
    path = write(tmp_path / "rows.jsonl", [ROW, ROW])
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n" + b"{}\n")
    with pytest.raises(ValueError, match=rf"^{path}:4: not JSON \(.*{why}.*\): mend or delete the line$") as caught:
        load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_list_that_is_not_json_names_the_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[\n{},\n{]\n]")
    with pytest.raises(ValueError, match=rf"^{path}:3: not JSON \(.* column 2, .*\): mend the file$"):
        load(path)


def test_no_usable_row_is_an_error_with_counts(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**ROW, "answers": []}, {**ROW, "tools": None}, {**ROW, "answers": "[]"}])
    with pytest.raises(ValueError, match=rf"^{path}: no usable row \(no_call 2, tools_do_not_parse 1\): "):
        load(path)
    with pytest.raises(ValueError, match=r"no usable row \(it holds no rows\)"):
        load(write(tmp_path / "empty.jsonl", []))


def test_paths_that_do_not_exist(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    for path in [tmp_path / "nothing", tmp_path / "nothing.jsonl", "nothing", "folder/rows.jsonl", "/a/b", "a/b/c"]:
        with pytest.raises(FileNotFoundError, match="no such file or folder: give a file .* or a hub id org/name$"):
            load(path)
    with pytest.raises(ValueError, match=r"rows.csv: not a data file by its name: give a file that ends in \.jsonl"):
        load(tmp_path / "rows.csv")
    with pytest.raises(FileNotFoundError, match="no data file in this folder"):
        load(tmp_path)


def test_parquet_of_json_strings(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [
        {**row, "id": i, "tools": json.dumps(row["tools"]), "answers": json.dumps(row["answers"])}
        for i, row in enumerate([*numbered(2500), {**ROW, "answers": []}])
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(texts), path)
    loaded = load(path)
    assert len(loaded.examples) == 2500 and loaded.dropped == {"no_call": 1}
    assert loaded.examples[2400].extra == {"row_id": "2400"}
    assert loaded.examples[7].id == example_of(numbered(8)[7], "").id

    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"^{path}: not readable as Parquet \(.*\): copy or write it again$"):
        load(path)


def test_a_parquet_file_with_a_wrong_byte_is_read_or_refused_in_one_line(tmp_path):
    """pyarrow tells of some with an OSError of two lines, which names no file."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    row = {**ROW, "tools": json.dumps(ROW["tools"]), "answers": json.dumps(ROW["answers"])}
    pq.write_table(pa.Table.from_pylist([row]), path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xD5]) + whole[place + 1 :])
        try:
            load(path)
        except ValueError as error:
            refused += str(error).startswith(f"{path}: not readable as Parquet (")
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > 20


def test_parquet_of_structs(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    other = {"name": "stock", "description": "", "parameters": {"symbol": {"type": "string"}}}
    rows = [
        {**ROW, "answers": [{"name": "weather", "arguments": json.dumps(CALL["arguments"])}]},
        {"query": "NVDA?", "tools": [other], "answers": [{"name": "stock", "arguments": '{"symbol": null, "n": 1}'}]},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = load(path).examples
    assert first.id == PLAIN.id  # Arrow's nulls for the other row's parameters are gone
    assert second.tools == (other,) and second.answer[0]["arguments"] == {"symbol": None, "n": 1}

    for answers in ([CALL], [{"type": "function", "function": CALL}]):
        pq.write_table(pa.Table.from_pylist([{**ROW, "answers": answers}]), path)
        with pytest.raises(ValueError, match=rf"^{path}: the arguments in the column 'answers' are Arrow structs"):
            load(path)


def test_a_revision_of_the_hub_is_asked_for(monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []

    def load_dataset(name, split, revision=None):
        asked.append((name, split, revision))
        return datasets.Dataset.from_list([{**ROW, "tools": json.dumps([TOOL]), "answers": json.dumps([CALL])}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("org/rows@v1.0").examples[0].source == "org/rows"
    assert asked == [("org/rows", "train", "v1.0")]
    assert jsonl.is_hub_id("org/rows@0123abc") and not jsonl.is_hub_id("org/rows@") and not jsonl.is_hub_id("rows@main")


def test_hub_id_goes_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "tools": json.dumps(row["tools"]), "answers": json.dumps(row["answers"])} for row in numbered(3)]
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load("some-org/tool.rows_1k", limit=2)
    assert asked == [("some-org/tool.rows_1k", "train")]
    assert [example.source for example in loaded.examples] == ["some-org/tool.rows_1k"] * 2

    def fails(name, split):
        raise ConnectionError("no network\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(FileNotFoundError, match=r"^org/name: no such .*, nor on the hub \(no network\): give [^\n]*$"):
        load("org/name")


def test_split_does_not_depend_on_the_order_of_rows():
    examples = [example_of(row, "") for row in numbered(101)]
    train, validation = split(examples, 0.1, seed=3)
    assert (len(train), len(validation)) == (91, 10)
    assert {example.id for example in train + validation} == {example.id for example in examples}
    shuffled = list(examples)
    random.Random(0).shuffle(shuffled)
    assert split(shuffled, 0.1, seed=3) == (train, validation)
    assert split(examples, 0.1, seed=4) != (train, validation)
    assert [example.id for example in train] != sorted(example.id for example in train)


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [(10, 0, 0), (10, 0.001, 1), (2, 0.99, 1), (1, 0.5, 0), (0, 0.5, 0), (10, 0.25, 2), (10, 0.99, 9), (3, 1 / 3, 1)],
)
def test_split_sizes(count, fraction, held_out):
    train, validation = split([example_of(row, "") for row in numbered(count)], fraction, seed=0)
    assert (len(train), len(validation)) == (count - held_out, held_out)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_split_refuses_other_fractions(fraction):
    with pytest.raises(ValueError, match="held-out fraction"):
        split([], fraction, seed=0)


def shared_rows(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"sample rows not here: {path}")
    return path


def test_sample_rows_of_xlam_and_toolace():
    loaded = load(shared_rows("train_rows_xlam_format.jsonl"))
    assert len(loaded.examples) == 407 and loaded.dropped == {}
    calls = Counter(len(example.answer) for example in loaded.examples)
    assert calls == {1: 215, 2: 132, 3: 39, 4: 16, 5: 5}
    assert sum(len(example.tools) for example in loaded.examples) == 1246
    train, validation = split(loaded.examples, 0.1, seed=0)
    assert (len(train), len(validation)) == (366, 41)


def test_sample_rows_with_reasoning():
    loaded = load(shared_rows("train_rows_reasoning.jsonl"))
    assert len(loaded.examples) == 338 and loaded.dropped == {}
    assert all(example.extra["reasoning"] for example in loaded.examples)


def test_sample_rows_without_a_call():
    path = shared_rows("train_rows_no_call.jsonl")
    with pytest.raises(ValueError, match=r"no usable row \(no_call 23\)"):
        load(path)
    assert [example.answer for example in load(path, keep_no_call=True).examples] == [()] * 23
