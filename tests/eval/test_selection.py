"""Which benchmarks and items a command asks for, and what it says of those that are not there."""

import json

import pytest

from eval import selection
from eval.selection import AceBench, ApiBank, Bfcl
from tests.eval.test_acebench import RIGHT, write


def options(**given):
    return {"bfcl": Bfcl(), "api_bank": ApiBank(), "acebench": AceBench()} | given


def test_some_are_spread_evenly():
    assert selection.spread(range(10), 4) == [0, 2, 5, 7] and selection.spread(range(1053), 3) == [0, 351, 702]
    assert selection.spread([1, 2], 5) == selection.spread([1, 2], None) == [1, 2] and selection.spread([], 3) == []


def test_categories_and_limit_choose_items(tmp_path):
    for category in ("atom_bool", "atom_list", "single_turn_parallel_function"):
        write(tmp_path, category, [({}, {"Book.room": RIGHT})] * 4)
    for category in set(selection.MODULES["acebench"].CATEGORIES) - {*("atom_bool", "atom_list")}:
        write(tmp_path, category, [({}, {"Book.room": RIGHT})])
    of = options(acebench=AceBench(str(tmp_path), layout="turns"))
    [found] = selection.choose("acebench", "atom_list, atom_bool", 2, of)
    assert [item.id for item in found.items] == ["atom_bool_0", "atom_bool_2", "atom_list_0", "atom_list_2"]
    assert len(found.ids) == 14 and "single_turn_parallel_function_0" in found.ids
    assert found.options == {
        "path": str(tmp_path),
        "layout": "turns",
        "categories": ["atom_bool", "atom_list"],
        "limit": 2,
    }
    assert len(found.items[0].example.messages) > 2  # the layout arrives
    [same] = selection.choose("acebench", "atom_bool,atom_list", 2, options(acebench=AceBench(f"{tmp_path}/.", "turns")))
    assert found.settings() == same.settings() and "path" not in same.settings()  # the items count, not where they lie
    write(tmp_path, "atom_list", [({}, {"Book.room": RIGHT | {"city": "Oslo"}})] * 4)
    [other] = selection.choose("acebench", "atom_bool,atom_list", 2, of)
    assert found.settings() != other.settings()


def test_what_cannot_be_asked(tmp_path):
    rows = [{"id": "1", "tools": [{"name": "f", "description": "", "parameters": {}}], "history": [], "answer": {}}]
    rows[0]["answer"] = {"name": "f", "arguments": {}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    here = ApiBank(str(tmp_path / "rows.jsonl"))
    for names, categories, of, message in (
        (
            "bfcl,apibank",
            None,
            options(),
            "--benchmarks bfcl,apibank: no 'apibank': did you mean 'api_bank'[?] There are",
        ),
        (" ,", None, options(), "--benchmarks  ,: no ''"),
        (
            "api_bank",
            "cal",
            options(api_bank=here),
            "--categories cal: no 'cal': did you mean 'call'[?] There are call,",
        ),
        ("api_bank", "parallel", options(api_bank=here), "--categories parallel: no 'parallel'"),  # of another benchmark
        ("bfcl,api_bank", "call", options(api_bank=here), "--categories call: bfcl has none of them: leave it out"),
        ("api_bank", "call_book_hotel", options(api_bank=here), "rows.jsonl: it has no items of --categories call_book_hotel"),
        ("api_bank", None, options(), "^--api_bank.path is missing: download https://huggingface.co"),
        ("acebench", None, options(), "^--acebench.path is missing: git clone https://github.com/ACEBench"),
        (
            "api_bank",
            None,
            options(api_bank=ApiBank("no/where")),
            "no/where: API-Bank's level-1-api.json is not there",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            selection.choose(names, categories, None, of)
        assert "\n" not in str(error.value)
