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

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data import demo, prompt
from grpo_jax.reward import judge, parse_calls
from models import decoder, hf
from scripts.make_demo_model import VOCABULARY

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean"}


@pytest.fixture(scope="module")
def held_out():
    return demo.tasks(4000, seed=1, held_out=True)


@pytest.fixture(scope="module")
def rows():
    return demo.sft_rows(5000, seed=0, careless=1.0)


@pytest.fixture(scope="module")
def tokenizer():
    """As scripts/make_demo_model.py builds it."""
    return demo.build_tokenizer(demo.tokenizer_texts(demo.sft_rows(5000, 0, 0.0)), VOCABULARY)


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
    assert demo.tasks(1, seed=0, held_out=True)[0].id == "2bac1af556e24720"


def test_a_hundred_thousand_tasks_take_seconds():
    start = time.process_time()
    demo.tasks(5000, seed=5, held_out=False)
    assert time.process_time() - start < 1.5  # 20 times that: 30 s


def test_training_and_held_out_tasks_share_no_tool_and_no_string(rows, held_out):
    assert len(tool_names(rows)) == 296 and len(tool_names(held_out)) == 88  # of 16 x 24
    assert not tool_names(rows) & tool_names(held_out)
    assert len(strings(rows)) > 2000 and len(strings(held_out)) > 1000
    assert not strings(rows) & strings(held_out)


def test_every_word_of_a_held_out_tool_is_one_of_training_tools(rows, held_out):
    for examples in (rows, held_out):
        verbs, nouns = zip(*(name.split("_") for name in tool_names(examples)), strict=True)
        assert set(verbs) == set(demo.VERBS) and set(nouns) == set(demo.NOUNS)
    names = [name for name in demo.NAMES if demo.is_held_out(name)]
    assert names == list(demo.NAMES[-12:])
    spelled = re.compile(f"({'|'.join(demo.SYLLABLES)})+")
    assert all(spelled.fullmatch(name.lower()) for name in names)


def test_the_words_of_tools_parameters_and_phrasings_do_not_mix():
    groups = [demo.VERBS, demo.NOUNS, *demo.PARAMETERS.values(), [demo.INVENTED[0]]]
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
        assert len(example.tools) == len(schemas) == 2
        for call in example.answer:
            verb, noun = call["name"].split("_")
            assert f"{verb} a {noun}" in query
            types = {parameter: spec["type"] for parameter, spec in schemas[call["name"]].items()}
            assert {parameter: KINDS[type(value)] for parameter, value in call["arguments"].items()} == types
            for parameter, value in call["arguments"].items():
                beside = rf"\b{parameter} {re.escape(demo.spoken(value))}(?=[,.?])(?!\.\d)"
                assert re.search(beside, query), (parameter, value, query)
        texts = [value for call in example.answer for value in call["arguments"].values() if type(value) is str]
        assert len(set(texts)) == len(texts)
        assert len({json.dumps(call, sort_keys=True) for call in example.answer}) == len(example.answer)
        names = [call["name"] for call in example.answer]
        words = list(itertools.chain(*(name.split("_") for name in set(names))))
        assert len(words) == len(set(words))  # which of two tools is meant is never in doubt
        if len(names) == 2:
            sources["twice"] += names[0] == names[1]
        actions = [f"{verb} a {noun}" for verb, noun in (name.split("_") for name in names)]
        assert demo.thought(example) == "; ".join(actions) + "."
    twice = sources.pop("twice")
    assert sources["demo/parallel"] / sources.total() == pytest.approx(demo.PARALLEL_SHARE, abs=0.03)
    assert twice / sources["demo/parallel"] == pytest.approx(demo.TWICE_SHARE, abs=0.08)
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
    """The choices of the annotator who writes the calls of `example`: how often each comes up, [p of right, p of each slip]."""
    for call in example.answer:
        others = len(example.tools) - 1
        yield 1.0, [1 - demo.SLIPS["wrong_tool"], *[demo.SLIPS["wrong_tool"] / others] * others]
        several = len(call["arguments"]) > 1
        for slip in ["dot_for_underscore", "argument_invented", *["argument_left_out"] * several]:
            yield 1.0, [1 - demo.SLIPS[slip], demo.SLIPS[slip]]
        for i, value in enumerate(call["arguments"].values(), 1):
            if type(value) is not str:
                p = demo.SLIPS[f"{KINDS[type(value)]}_as_string"]
                shown = 1 - demo.SLIPS["argument_left_out"] * (several and i == len(call["arguments"]))
                yield shown, [1 - p, p]


def chance_of_right(example, temperature):
    """Of a model that has learned the annotator's distribution exactly, each choice being one token.

    Which tool, and whether an argument follows, may take two tokens; that changes the means by far less than 0.01.
    """
    if temperature == 0:
        return float(all(p[0] == max(p) for _, p in occasions(example)))
    return math.prod(p[0] ** (1 / temperature) / sum(q ** (1 / temperature) for q in p) for _, p in occasions(example))


def test_a_perfect_student_is_right_as_often_as_the_docstring_says(held_out):
    for temperature, stated in ((0, 36), (0.7, 27), (1, 20)):
        expected = statistics.fmean(chance_of_right(example, temperature) for example in held_out)
        assert expected == pytest.approx(stated / 100, abs=0.015)
        assert f"{stated} %" in demo.__doc__


def test_the_least_loss_on_careless_rows_is_what_the_docstring_says(rows, tokenizer):
    """The entropy of the slips, in nats, over the tokens of the replies, end tokens included."""
    nats = sum(-share * sum(q * math.log(q) for q in p) for row in rows for share, p in occasions(row))
    tokens = sum(len(tokenizer.encode(prompt.target(row))) + 1 for row in rows)
    assert nats / tokens == pytest.approx(0.061, abs=0.001)
    assert nats / len(rows) == pytest.approx(2.8, abs=0.1)
    assert "0.061 nats a reply token (2.8 a reply)" in demo.__doc__.replace("\n", " ")


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
    assert len(tokenizer) == VOCABULARY
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids([*demo.SPECIAL_TOKENS, *demo.TAG_TOKENS]) == list(range(7))
    ids = tokenizer.encode("<|im_start|><think>\nx\n</think><tool_call>[]</tool_call><|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\nx\n</think><tool_call>[]</tool_call>"
    with pytest.raises(ValueError, match="at least 263"):
        demo.build_tokenizer([], 262)
    assert len(demo.build_tokenizer(["a"], 263)) == 263


def test_words_and_values_have_the_same_tokens_in_query_and_call(tokenizer, held_out):
    words = {*demo.VERBS, *demo.NOUNS, *itertools.chain(*demo.PARAMETERS.values())}
    assert all(len(tokenizer.encode(word)) == 1 for word in (*words, *demo.SYLLABLES))
    for word in sorted(words | strings(held_out[:300])) + ["4", "120", "3.5"]:
        ids = tokenizer.encode(word)
        for before, after in ((" ", ","), (" ", "."), (" ", "?"), ('": "', '"}}]\n'), ('": ', ', "'), ("_", '", "')):
            if word.replace(".", "").isdigit() and (before == "_" or after == "."):
                continue
            whole = tokenizer.encode(f"city{before}{word}{after}")
            around = len(tokenizer.encode("city")) + len(tokenizer.encode(before)), len(tokenizer.encode(after))
            assert whole[around[0] : len(whole) - around[1]] == ids, (before, word, after)


def test_transformers_reads_an_export_with_the_same_tokens(tokenizer, held_out, tmp_path):
    """AutoTokenizer of transformers 5 cuts words as Qwen does beside a Qwen2 config.json, whatever tokenizer.json says."""
    eos = (tokenizer.eos_token_id,)
    config = decoder.DecoderConfig("qwen2", len(tokenizer), 8, 8, 1, 2, 1, 4, 1e4, max_positions=256, eos_token_ids=eos)
    hf.save(tmp_path / "model", config, decoder.init(config, jax.random.key(0)), tokenizer)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "qwen2"
    theirs, template, rng = (
        AutoTokenizer.from_pretrained(tmp_path / "model"),
        prompt.load_template(demo.TEMPLATE),
        random.Random(3),
    )
    for example in held_out[:200]:
        assert prompt.encode(example, theirs, template) == prompt.encode(example, tokenizer, template)
        for reply in (demo.clean_reply(example), demo.careless_reply(example, rng)):
            ids = tokenizer.encode(reply)
            assert theirs.encode(reply) == ids
            assert theirs.decode(ids) == tokenizer.decode(ids) == reply
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_prompts_and_replies_are_as_long_as_the_docstring_says(tokenizer, held_out):
    template = prompt.load_template(demo.TEMPLATE)
    prompts = [len(prompt.encode(example, tokenizer, template)) for example in held_out[:1000]]
    assert statistics.fmean(prompts) == pytest.approx(152, abs=2) and 115 < min(prompts) < max(prompts) < 190
    replies = {"demo/single": [], "demo/parallel": []}
    for example in held_out[:1000]:
        replies[example.source].append(len(tokenizer.encode(demo.clean_reply(example))) + 1)
    for source, mean, longest in (("demo/single", 39, 55), ("demo/parallel", 67, 80)):
        assert statistics.fmean(replies[source]) == pytest.approx(mean, abs=1) and max(replies[source]) < longest
    assert statistics.fmean(itertools.chain(*replies.values())) == pytest.approx(45, abs=1)


def test_held_out_replies_need_hardly_any_token_that_training_replies_lack(tokenizer, rows, held_out):
    seen = Counter(itertools.chain.from_iterable(tokenizer.encode(row.extra["response"]) for row in rows))
    rarest = [min(seen[i] for i in tokenizer.encode(demo.clean_reply(example))) for example in held_out[:1000]]
    assert statistics.fmean(count == 0 for count in rarest) < 0.01
    assert statistics.fmean(count < 10 for count in rarest) < 0.07


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
