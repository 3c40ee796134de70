"""The demo's tasks can be solved by copying, its annotator slips as often as stated, its tokenizer loses nothing."""

import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import demo, prompt
from grpo_jax.reward import judge, parse_calls

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean"}


@pytest.fixture(scope="module")
def held_out():
    return demo.tasks(4000, seed=1, held_out=True)


@pytest.fixture(scope="module")
def rows():
    return demo.sft_rows(5000, seed=0, careless=1.0)


@pytest.fixture(scope="module")
def tokenizer(rows):
    return demo.build_tokenizer(demo.tokenizer_texts(rows), demo.VOCAB_SIZE)


def strings(examples):
    return {value for e in examples for call in e.answer for value in call["arguments"].values() if type(value) is str}


def tool_names(examples):
    return {tool["name"] for example in examples for tool in example.tools}


def test_tasks_are_the_same_every_time_and_different_for_other_arguments():
    first = demo.tasks(300, seed=3, held_out=False)
    assert demo.tasks(300, seed=3, held_out=False) == first
    assert demo.tasks(100, seed=3, held_out=False) == first[:100]
    assert len({example.id for example in first}) == 300
    assert not {e.id for e in first} & {e.id for e in demo.tasks(300, seed=4, held_out=False)}
    # A constant: neither the platform nor Python's version may change a task.
    assert demo.tasks(1, seed=0, held_out=True)[0].id == "8fce95d6690f299b"


def test_a_hundred_thousand_tasks_take_seconds():
    start = time.process_time()
    demo.tasks(5000, seed=5, held_out=False)
    assert time.process_time() - start < 1.5  # 20 times that: 30 s


def test_training_and_held_out_tasks_share_no_tool_and_no_string(rows, held_out):
    assert len(tool_names(rows)) > 250 and len(tool_names(held_out)) > 250
    assert not tool_names(rows) & tool_names(held_out)
    assert len(strings(rows)) > 2000 and len(strings(held_out)) > 1000
    assert not strings(rows) & strings(held_out)
    nouns = {name.split("_")[1] for name in tool_names(rows)}
    assert not nouns & set(demo.NEW_NOUNS)
    new = [e for e in held_out if any(call["name"].split("_")[1] in demo.NEW_NOUNS for call in e.answer)]
    assert 0.5 < len(new) / len(held_out) < 0.9


def test_the_words_of_tools_parameters_and_phrasings_do_not_mix():
    groups = [demo.VERBS, demo.NOUNS, demo.NEW_NOUNS, *demo.PARAMETERS.values(), [demo.INVENTED[0]]]
    words = list(itertools.chain(*groups))
    assert len(words) == len(set(words))
    glue = set(re.findall(r"[a-z]+", " ".join(demo.PHRASINGS + demo.SECOND_PHRASINGS).lower())) - {"task", "values"}
    assert not glue & set(words)


@pytest.mark.parametrize("held", [False, True])
def test_every_call_can_be_copied_from_the_query(held):
    sources = Counter()
    for example in demo.tasks(3000, seed=2, held_out=held):
        sources[example.source] += 1
        query = example.messages[0]["content"]
        schemas = {tool["name"]: tool["parameters"] for tool in example.tools}
        assert 2 <= len(example.tools) <= 3 and len(schemas) == len(example.tools)
        for call in example.answer:
            verb, noun = call["name"].split("_")
            assert f"{verb} a {noun}" in query
            types = {parameter: spec["type"] for parameter, spec in schemas[call["name"]].items()}
            assert {parameter: KINDS[type(value)] for parameter, value in call["arguments"].items()} == types
            for parameter, value in call["arguments"].items():
                beside = rf"\b{parameter}(?: |: |=){re.escape(demo.spoken(value))}(?=[,.?])(?!\.\d)"
                assert re.search(beside, query), (parameter, value, query)
        texts = [value for call in example.answer for value in call["arguments"].values() if type(value) is str]
        assert len(set(texts)) == len(texts)
        assert len({json.dumps(call, sort_keys=True) for call in example.answer}) == len(example.answer)
    assert 0.75 < sources["demo/single"] / sources.total() < 0.82
    assert set(sources) == {"demo/single", "demo/parallel"}


def test_clean_replies_are_rewarded_and_careless_ones_keep_the_format(held_out):
    rng = random.Random(0)
    for example in held_out[:500]:
        assert judge(demo.clean_reply(example), example.answer).value == 1.0
        careless = demo.careless_reply(example, rng)
        assert judge(careless, example.answer, "format").value >= 0.2  # the think block is there
        assert len(parse_calls(careless)) == len(example.answer)


def test_sft_rows_mix_clean_and_careless_replies():
    tasks = demo.tasks(400, seed=9, held_out=False)
    for share in (0.0, 0.5, 1.0):
        rows = demo.sft_rows(400, seed=9, careless=share)
        assert [row.id for row in rows] == [task.id for task in tasks]
        clean = [row.extra["response"] == demo.clean_reply(row) for row in rows]
        written_clean = 1 - share + share * 0.2  # one careless reply in five has no slip
        assert sum(clean) / 400 == pytest.approx(written_clean, abs=0.08)
        assert all(prompt.target(row) == row.extra["response"] for row in rows)
    with pytest.raises(ValueError, match=r"careless is 1\.5"):
        demo.sft_rows(1, seed=0, careless=1.5)


def occasions(example):
    """The choices of the annotator while writing the calls of `example`: [probability of right, of each slip]."""
    for call in example.answer:
        others = len(example.tools) - 1
        yield [1 - demo.SLIPS["wrong_tool"], *[demo.SLIPS["wrong_tool"] / others] * others]
        typed = [f"{KINDS[type(value)]}_as_string" for value in call["arguments"].values() if type(value) is not str]
        left_out = ["argument_left_out"] if len(call["arguments"]) > 1 else []
        for slip in ["dot_for_underscore", "argument_invented", *typed, *left_out]:
            yield [1 - demo.SLIPS[slip], demo.SLIPS[slip]]


def chance_of_right(example, temperature):
    """Of a model that has learned the annotator's distribution exactly, each choice being one token.

    Which tool, and whether an argument follows, may take two tokens; that changes the means by far less than 0.01.
    """
    if temperature == 0:
        return float(all(p[0] == max(p) for p in occasions(example)))
    return math.prod(p[0] ** (1 / temperature) / sum(q ** (1 / temperature) for q in p) for p in occasions(example))


def test_a_perfect_student_is_right_as_often_as_the_docstring_says(held_out):
    for temperature, stated in ((0, 37), (0.7, 27), (1, 20)):
        expected = statistics.fmean(chance_of_right(example, temperature) for example in held_out)
        assert expected == pytest.approx(stated / 100, abs=0.015)
        assert f"{stated} %" in demo.__doc__


def test_groups_of_eight_samples_leave_something_to_learn(held_out):
    chances = [chance_of_right(example, 0.7) for example in held_out]
    equal = statistics.fmean(p**8 + (1 - p) ** 8 for p in chances)
    assert equal < 0.35  # the share of groups without a gradient


def test_the_annotator_is_right_as_often_as_the_table_says(held_out):
    rng = random.Random(1)
    right = [judge(demo.careless_reply(e, rng), e.answer).value for e in held_out]
    expected = [chance_of_right(e, 1.0) for e in held_out]
    sigma = math.sqrt(sum(p * (1 - p) for p in expected)) / len(expected)
    assert abs(statistics.fmean(right) - statistics.fmean(expected)) < 4 * sigma


def test_each_slip_is_as_frequent_as_the_table_says(held_out):
    rng = random.Random(2)
    seen: dict[str, list[bool]] = {slip: [] for slip in demo.SLIPS}
    for example in held_out:
        reply = json.loads(demo.careless_reply(example, rng).split("\n")[-2])
        for right, written in zip(example.answer, reply, strict=True):
            arguments = right["arguments"]
            seen["wrong_tool"].append(written["name"].replace(".", "_") != right["name"])
            seen["dot_for_underscore"].append("." in written["name"])
            seen["argument_invented"].append(written["arguments"].pop("note", None) == "none")
            if len(arguments) > 1:
                seen["argument_left_out"].append(list(written["arguments"]) != list(arguments))
            for parameter, value in written["arguments"].items():
                if type(arguments[parameter]) is not str:
                    seen[f"{KINDS[type(arguments[parameter])]}_as_string"].append(type(value) is str)
                    assert (json.loads(value) if type(value) is str else value) == arguments[parameter]
    for slip, hits in seen.items():
        probability = demo.SLIPS[slip]
        assert len(hits) > 500
        tolerance = 4 * math.sqrt(probability * (1 - probability) / len(hits))
        assert statistics.fmean(hits) == pytest.approx(probability, abs=tolerance), slip


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_tokenizer_loses_nothing(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


DIFFICULT = [
    *("", "  two  spaces \n\n", " lead", "\t\r\n\0", "<think>\n</tool_call>"),
    *("Zürich 東京 नमस्ते", "👩‍👩‍👧 🇵🇹", "e\u0301\u200b\u00a0"),
]


@pytest.mark.parametrize("text", DIFFICULT)
def test_the_tokenizer_loses_nothing_of_what_is_difficult(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_and_tags(tokenizer):
    assert len(tokenizer) == demo.VOCAB_SIZE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids([*demo.SPECIAL_TOKENS, *demo.TAG_TOKENS]) == list(range(7))
    ids = tokenizer.encode("<|im_start|><think>\nx\n</think><tool_call>[]</tool_call><|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\nx\n</think><tool_call>[]</tool_call>"
    with pytest.raises(ValueError, match="at least 263"):
        demo.build_tokenizer([], 262)
    assert len(demo.build_tokenizer(["a"], 263)) == 263


def test_words_and_values_have_the_same_tokens_in_query_and_call(tokenizer, held_out):
    words = {*demo.VERBS, *demo.NOUNS, *demo.NEW_NOUNS, *itertools.chain(*demo.PARAMETERS.values())}
    for word in sorted(words | strings(held_out[:300])) + ["4", "120", "3.5"]:
        ids = tokenizer.encode(word)
        for before, after in ((" ", ","), ("=", "."), (": ", "?"), ('": "', '"}}]\n'), ('": ', ', "'), ("_", '", "')):
            if word.replace(".", "").isdigit() and (before == "_" or after == "."):
                continue
            whole = tokenizer.encode(f"city{before}{word}{after}")
            around = len(tokenizer.encode("city")) + len(tokenizer.encode(before)), len(tokenizer.encode(after))
            assert whole[around[0] : len(whole) - around[1]] == ids, (before, word, after)
    assert len(tokenizer.encode('": "')) == len(tokenizer.encode('", "')) == len(tokenizer.encode('"}}}}\n{"')) == 1


def test_prompts_and_replies_are_short(tokenizer, held_out):
    template = prompt.load_template(demo.TEMPLATE)
    prompts = [len(prompt.encode(example, tokenizer, template)) for example in held_out[:1000]]
    assert 110 < statistics.fmean(prompts) < 140 and max(prompts) < 200
    replies = {"demo/single": [], "demo/parallel": []}
    for example in held_out[:1000]:
        replies[example.source].append(len(tokenizer.encode(demo.clean_reply(example))) + 1)
    assert 30 < statistics.fmean(replies["demo/single"]) < 45 and max(replies["demo/single"]) < 60
    assert max(replies["demo/parallel"]) < 90


def test_held_out_replies_need_hardly_any_token_that_training_replies_lack(tokenizer, rows, held_out):
    seen = Counter(itertools.chain.from_iterable(tokenizer.encode(row.extra["response"]) for row in rows))
    rare = [min(seen[i] for i in tokenizer.encode(demo.clean_reply(example))) < 10 for example in held_out[:1000]]
    assert statistics.fmean(rare) < 0.04


def test_the_chat_template_is_chatml(tokenizer):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U\n"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU\n<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text.removesuffix("<|im_start|>assistant\n")


def test_the_tokenizer_is_the_same_in_every_process(tmp_path):
    script = (
        "import sys; from data import demo; rows = demo.sft_rows(300, 0, 1.0);"
        "demo.build_tokenizer(demo.tokenizer_texts(rows), 400).save_pretrained(sys.argv[1])"
    )
    root = Path(__file__).parents[2]
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run([sys.executable, "-c", script, tmp_path / seed], check=True, cwd=root, env=environment)
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
