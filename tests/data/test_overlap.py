"""Every way in which benchmarks write questions, and what counts as the same question."""

import json
from pathlib import Path

import pytest

from data import overlap

SHARED = Path(__file__).parents[3] / "shared" / "data"


def user(text):
    return {"role": "user", "content": text}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"question": "How warm is it?"}, {"how warm is it"}),
        ({"query": "How warm is it?", "id": 3, "function": [user("no")]}, {"how warm is it"}),
        ({"question": [[user("How warm is it?")]]}, {"how warm is it"}),  # BFCL
        ({"question": [user("Hi")]}, {"hi"}),
        ({"question": [[{"role": "system", "content": "You are"}, user("Is it warm now?")]]}, {"is it warm now"}),
        ({"question": [[user("How warm is it?")], [], [user("And how warm tomorrow?")], [user("Yes, please")]]},
         {"how warm is it", "and how warm tomorrow"}),
        ({"question": "user: How warm is it?\nsystem: Where?\nuser: In Oslo:\nthe capital, of course.\n"},  # ACEBench
         {"how warm is it", "in oslo the capital of course"}),
        ({"question": "user: Hi\n"}, {"hi"}),
        ({"question": "The user: how warm is it?"}, {"the user how warm is it"}),
        ({"history": [user("Book a room, please."), {"role": "assistant", "content": "Which of them all?"},
                      {"role": "tool", "name": "f", "content": "x"}, user("The one with four beds")]},
         {"book a room please", "the one with four beds"}),  # API-Bank
        ({"messages": [{"role": "human", "content": "Hm?"}], "question": "Oh?"}, {"hm", "oh"}),
        ({"question": 3, "query": None, "messages": [[[3]], {"role": "user", "content": ["x"]}], "history": {}}, set()),
        ({"question": "?!"}, set()),
        ({"instruction": "Call.", "expected_output": "API-Request: [F(x='1')]",  # API-Bank, its authors' test-data
          "input": "User: Is it warm now?\nAI: Where?\nUser: Yes.\nAPI-Request: [F(x='1')]->How cold is it?\nAI: So.\n"
                   "User: And how warm tomorrow?\nGenerate API Request:\n"}, {"is it warm now", "and how warm tomorrow"}),
        ({"instruction": "Translate this.", "input": "How warm is it?"}, set()),
        ({"messages": [{"Role": "USER", "Text": "How warm is it?"}]}, {"how warm is it"}),
    ],
)  # fmt: skip
def test_every_way_of_writing_a_question(tmp_path, row, texts):
    for value in (row, [row], json.dumps(row) + "\n" + json.dumps({"id": 1}) + "\nnot JSON\n", json.dumps([row], indent=2)):
        assert overlap._queries(Path(write(tmp_path / "a.json", value))) == texts


def test_a_file_that_is_one_dialogue(tmp_path):
    turns = [
        ("User", "How warm is it?"),
        ("AI", "How cold is it now?"),
        ("User", "Yes, please"),
        ("user", "And in Oslo, tomorrow?"),
    ]
    lines = [json.dumps({"role": role, "text": text}) for role, text in turns]
    lines.insert(2, json.dumps({"role": "API", "api_name": "F", "param_dict": {}, "result": {"output": "It is very warm."}}))
    file = write(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
    assert overlap._queries(Path(file)) == {"how warm is it", "and in oslo tomorrow"}
    assert overlap.read([str(tmp_path)]).counts == {file: 2}


def test_the_same_question_in_other_case_spaces_and_punctuation():
    assert overlap.normalized("  Don't “ask”: Ａ\n CAFÉ, 3.5 €?") == overlap.normalized("don t ask a café 3 5")
    assert overlap.normalized("3.5") != overlap.normalized("35")


def test_files_with(tmp_path):
    a = write(tmp_path / "a.json", {"question": "How warm is it?"})
    b = write(tmp_path / "b.jsonl", {"query": "how warm is IT"})
    write(tmp_path / "notes.txt", {"query": "in no JSON file"})
    write(tmp_path / "other.json", {"ground_truth": "How cold is it?"})
    (tmp_path / "below").mkdir()
    c = write(tmp_path / "below" / "c.json", {"question": "Thanks!"})
    read = overlap.read([str(tmp_path)])
    assert read.counts == {a: 1, b: 1, c: 1}
    assert read.files_with([user("How warm is it"), {"role": "assistant", "content": "Thanks!"}]) == (a, b)
    assert read.files_with([user("How cold is it?")]) == ()
    assert read.files_with([user("thanks")]) == (c,)
    assert read.files_with([user("What a lovely day."), user("thanks")]) == ()  # says too little in a dialogue
    assert overlap.read([]).files_with([user("thanks")]) == ()


def test_paths_that_cannot_be_meant(tmp_path):
    with pytest.raises(FileNotFoundError, match="--benchmarks .*nothing: no such file or folder"):
        overlap.read([str(tmp_path / "nothing")])
    for path in (str(tmp_path), write(tmp_path / "a.json", "[" * 100_000), write(tmp_path / "b.json", {"id": 1})):
        with pytest.raises(ValueError, match="no user's text in it"):
            overlap.read([path])


@pytest.mark.skipif(not SHARED.exists(), reason="the benchmarks' files are not here")
def test_real_benchmarks():
    read = overlap.read([str(SHARED / "acebench_en"), str(SHARED / "apibank_level1_call.jsonl")])
    assert sum("possible_answer" in file for file in read.counts) == 0
    assert len(read.counts) == 9 and sum(read.counts.values()) > 1000
