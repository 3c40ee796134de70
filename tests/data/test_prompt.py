"""The prompt holds everything that the row says, whatever the model's chat template does with tools."""

import json
import os
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import prompt
from data.example import make
from grpo_jax.reward import judge, parse_calls

# ChatML that writes roles and contents and drops all else without a word, like many small models'.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the manner of Qwen2.5: a system text of its own if there is none, its own instructions and format for tools, and the
# results that follow each other in one user turn.
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nI am somebody.<|im_end|>\n{% endif %}"
    "{% if tools %}<|im_start|>system\nAnswer in XML.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role in ('system', 'user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the manner of Llama 3: contents are trimmed, headers are made of whatever a role is called.
LLAMA_3 = (
    "{{ '<|begin|>' }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# In the manner of Llama 3.1: besides, one call a turn, and results under a role of their own; a text is iterable, too.
LLAMA_31 = (
    "{{ '<|begin|>' }}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only one call') }}{% endif %}"
    "{% elif m.role == 'tool' or m.role == 'ipython' %}<|start|>ipython<|end|>\n\n"
    "{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}<|eot|>"
    "{% else %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# In the manner of Mistral: user and assistant by turns, the system text inside the first user turn.
STRICT = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}<|start|>{% if loop.first and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}<|end|>{% else %}{{ m.content }}<|eot|>{% endif %}"
    "{% endfor %}"
)
# In the manner of later Mistrals: a role for results, but with the id of a call that must stand before it.
WITH_IDS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if m.tool_call_id is not defined %}"
    "{{ raise_exception('a result without an id') }}{% endif %}<|start|>results{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"

TOOLS = [
    {"name": "find_train", "description": "Trains {from} → to.", "parameters": {"to": {"type": "string"}}},
    {"name": "book seat", "description": 'A "seat".', "parameters": {"train": {"type": "integer"}}},
]
FIRST_CALLS = [
    {"name": "find_train", "arguments": {"to": "Zürich HB", "via": ["Köln", "Basel"], "day": {"y": 2031, "w": 7}}},
    {"name": "find_train", "arguments": {"to": 'the "old" town\nby night', "fast": True, "limit": None, "fare": 12.50}},
]
SECOND_CALLS = [{"name": "book seat", "arguments": {"train": 4711, "note": "a < b && {tools} {{x}} 🚆", "car": ""}}]
RESULTS = ['[{"train": 4711, "at": "06:31"}]', "no train: 北京 <none>", "seat 61 🪑"]
LAST_CALLS = [{"name": "find_train", "arguments": {"to": "Oslo"}}]
TURNS = [
    {"role": "system", "content": "Today is Thursday, 17 April 2031."},
    {"role": "user", "content": "Where can I go?"},
    {"role": "assistant", "content": "Let me see what runs.", "calls": FIRST_CALLS},
    {"role": "tool", "content": RESULTS[0], "name": "find_train"},
    {"role": "tool", "content": RESULTS[1]},
    {"role": "assistant", "content": "To Zürich."},
    {"role": "assistant", "content": "", "calls": SECOND_CALLS},
    {"role": "tool", "content": RESULTS[2]},
    {"role": "user", "content": "And a train to Oslo?"},
]
EXAMPLE = make(TURNS, TOOLS, LAST_CALLS, "test")
SINGLE = make([{"role": "user", "content": "And a train to Oslo?"}], TOOLS, LAST_CALLS, "test")


def byte_tokenizer(chat_template):
    """One token a byte, so that decoding gives back the very text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|start|>", "<|end|>", "<|eot|>"]
    bpe.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    # A model's tokenizer may put a token in front of every text; a rendered prompt already has it.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|begin|>", chat_template=chat_template, clean_up_tokenization_spaces=False
    )


def real_qwen():
    """Qwen2.5's own tokenizer, where the environment names its folder."""
    if folder := os.environ.get("GRPO_JAX_QWEN_TOKENIZER"):
        yield AutoTokenizer.from_pretrained(folder)


FAMILIES = {
    "chatml": CHATML, "qwen": QWEN, "llama 3": LLAMA_3, "llama 3.1": LLAMA_31, "strict": STRICT, "with ids": WITH_IDS,
}  # fmt: skip


@pytest.fixture(params=[*FAMILIES, "real qwen"])
def tokenizer(request):
    if request.param == "real qwen":
        return next(real_qwen(), None) or pytest.skip("GRPO_JAX_QWEN_TOKENIZER names no folder with Qwen2.5's tokenizer")
    return byte_tokenizer(FAMILIES[request.param])


def leaves(value):
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in [key, *leaves(part)]]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


def test_prompt_holds_every_value_of_every_earlier_turn(tokenizer):
    ids = prompt.encode(EXAMPLE, tokenizer)
    assert type(ids) is list and all(type(i) is int for i in ids)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    position = text.index("Where can I go?")
    for calls, results in ((FIRST_CALLS, RESULTS[:2]), (SECOND_CALLS, RESULTS[2:])):
        for call in calls:
            position = text.index(json.dumps(call["name"]), position)
            for leaf in leaves(call["arguments"]):
                position = text.index(json.dumps(leaf, ensure_ascii=False), position)
        for result in results:
            as_json = f"<|start|>ipython<|end|>\n\n{json.dumps(result, ensure_ascii=False)}<|eot|>"
            plain = f"<tool_response>\n{result}\n</tool_response>"
            position = text.index(as_json if "ipython" in tokenizer.chat_template else plain, position)
    assert text.index("And a train to Oslo?", position) > text.index("Let me see what runs.") > 0
    assert text.count("Today is Thursday, 17 April 2031.") == 1
    assert text.index("Today is Thursday") < text.index("Where can I go?")


def test_prompt_has_our_system_text_once_and_opens_the_assistant_turn(tokenizer):
    for example in (EXAMPLE, SINGLE):
        text = tokenizer.decode(prompt.encode(example, tokenizer), clean_up_tokenization_spaces=False)
        system = prompt.messages(example)[0]["content"]
        assert text.count(system) == 1
        lines = system[system.index("<tools>\n") + 8 : system.index("\n</tools>")].split("\n")
        assert [json.loads(line) for line in lines] == [{"type": "function", "function": tool} for tool in TOOLS]
        assert "I am somebody" not in text and "Answer in XML" not in text and "Alibaba" not in text
        assert text.count("<|begin|>") == (1 if "<|begin|>" in tokenizer.chat_template else 0)
        last = example.messages[-1]["content"]
        after = text[text.rindex(last) + len(last) :]
        assert after in ("<|im_end|>\n<|im_start|>assistant\n", "<|eot|><|start|>assistant<|end|>\n\n", "<|end|>")


def test_messages_are_one_system_text_then_user_and_assistant_by_turns():
    chat = prompt.messages(EXAMPLE)
    assert [set(turn) for turn in chat] == [{"role", "content"}] * 6
    assert [turn["role"] for turn in chat] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert chat[2]["content"] == prompt.reply(FIRST_CALLS, "Let me see what runs.")
    assert chat[4]["content"] == "To Zürich.\n" + prompt.reply(SECOND_CALLS, "Next I call book seat.")
    assert chat[5]["content"] == f"<tool_response>\n{RESULTS[2]}\n</tool_response>\nAnd a train to Oslo?"
    assert [parse_calls(turn["content"]) for turn in chat[2:5:2]] == [FIRST_CALLS, SECOND_CALLS]


def test_results_have_the_role_that_the_template_has_for_them():
    """Or, where it has none (a header made of any role's name, a refusal, a silence), they are user text."""

    def rendered(chat_template):
        tokenizer = byte_tokenizer(chat_template)
        as_text = tokenizer.apply_chat_template(prompt.messages(EXAMPLE), add_generation_prompt=True, tokenize=False)
        return tokenizer.decode(prompt.encode(EXAMPLE, tokenizer)), as_text

    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    others_are_users = CHATML.replace("{{ m.role }}", "{{ m.role if m.role in ('system', 'assistant') else 'user' }}")
    loud = CHATML.replace("m.role", "(m.role | upper)")
    only_after_replies = (
        "{% for m in messages %}{% if m.role == 'user' and loop.previtem and loop.previtem.role == 'tool' %}"
        "{{ raise_exception('a user after a result') }}{% endif %}{% endfor %}" + QWEN
    )
    for without in (CHATML, LLAMA_3, STRICT, WITH_IDS, silent, others_are_users, loud, only_after_replies):
        text, as_text = rendered(without)
        assert text == as_text and text.count("<tool_response>") == 3, without

    known = CHATML.replace("{{ m.role }}", "{{ {'tool': 'RESULT'}.get(m.role, m.role) }}")
    refusing = (
        "{% for m in messages if m.role not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception('?') }}{% endfor %}"
    )
    for chat_template, opening in ((known, "<|im_start|>RESULT\n"), (refusing + CHATML, "<|im_start|>tool\n")):
        text, as_text = rendered(chat_template)
        assert [text.count(opening + result + "<|im_end|>\n") for result in RESULTS] == [1, 1, 1]
        assert text.count("<tool_response>") == 0 and text != as_text

    text, _ = rendered(LLAMA_31)
    results = re.findall(r"<\|start\|>ipython<\|end\|>\n\n(.*?)<\|eot\|>", text)
    assert [json.loads(result) for result in results] == RESULTS
    assert re.findall(r"<\|start\|>(\w+)<\|end\|>", text) == [
        "system", "user", "assistant", "ipython", "ipython", "assistant", "ipython", "user", "assistant",
    ]  # fmt: skip


def test_qwen_has_the_same_tokens_under_either_role():
    """Of turns in which nothing but results follows a reply. A user turn after them is Qwen's own second one."""
    for tokenizer in (byte_tokenizer(QWEN), *real_qwen()):

        def both(turns, tokenizer=tokenizer):
            example = make(turns, TOOLS, LAST_CALLS, "test")
            chat = prompt.messages(example)
            before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
            return prompt.encode(example, tokenizer), list(before)

        for turns in (TURNS[:2], TURNS[:5], TURNS[:8], [*TURNS[:3], *TURNS[7:8]]):
            now, before = both(turns)
            assert now == before
        now, before = both(TURNS)
        joint = "</tool_response><|im_end|>\n<|im_start|>user\nAnd a train"
        assert joint in tokenizer.decode(now) and joint not in tokenizer.decode(before)
        assert tokenizer.decode(now) == tokenizer.decode(before).replace("</tool_response>\nAnd a train", joint)


def test_a_result_before_anything_else_is_still_there():
    turns = [{"role": "tool", "content": "It rains."}, {"role": "user", "content": "So?"}, {"role": "tool", "content": "Yes."}]
    for chat_template in (CHATML, QWEN, LLAMA_3, LLAMA_31, WITH_IDS):
        tokenizer = byte_tokenizer(chat_template)
        text = tokenizer.decode(prompt.encode(make(turns, TOOLS, LAST_CALLS, "test"), tokenizer))
        assert text.index("It rains.") < text.index("So?") < text.index("Yes.")


def test_a_system_turn_in_the_middle_goes_to_the_top():
    turns = [*TURNS, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well?"}]
    chat = prompt.messages(make(turns, TOOLS, LAST_CALLS, "test"))
    assert chat[0]["content"].endswith("</tool_call>\n\nToday is Thursday, 17 April 2031.\n\nBe brief.")
    assert chat[-1]["content"].endswith("And a train to Oslo?\nWell?")


def test_own_template_replaces_one_token_and_no_other_brace(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text('Tools: {tools}. Say {"name": {x}} or {{tools}}.\n', encoding="utf-8")
    template = prompt.load_template(path)
    example = make(SINGLE.messages, [{"name": "f", "description": "{tools}"}], [], "test")
    line = '{"type": "function", "function": {"name": "f", "description": "{tools}"}}'
    chat = prompt.messages(example, template)
    assert chat[0]["content"] == f'Tools: {line}. Say {{"name": {{x}}}} or {{{line}}}.'
    ids = prompt.encode(example, byte_tokenizer(CHATML), template)
    assert len(ids) < 300 < len(prompt.encode(example, byte_tokenizer(CHATML)))


def test_templates_that_cannot_be_used(tmp_path):
    path = tmp_path / "mine.txt"
    with pytest.raises(FileNotFoundError, match=rf"^{path}: no such template file: .*\{{tools\}}$"):
        prompt.load_template(path)
    path.write_text("Here are {tool}.")
    with pytest.raises(ValueError, match=rf"^{path}: no \{{tools\}} in it: write \{{tools\}} where"):
        prompt.load_template(path)
    with pytest.raises(ValueError, match=r"^the template 'Here are \{tool\}\.': no \{tools\} in it"):
        prompt.messages(SINGLE, "Here are {tool}.")
    path.write_bytes(b"{tools} \xff")
    with pytest.raises(ValueError, match=rf"^{path}: not UTF-8 text"):
        prompt.load_template(path)


def test_default_template_shows_the_format_that_is_rewarded():
    template = prompt.load_template()
    assert template == prompt.load_template(prompt.DEFAULT_TEMPLATE) and template.count("{tools}") == 1
    example_reply = template[template.rindex("<think>") :]
    calls = parse_calls(example_reply)
    assert len(calls) == 2 and judge(example_reply, calls, "binary").value == 1.0
    thought = re.search(r"<think>\n(.*)\n</think>", example_reply)[1]
    assert example_reply.strip() == prompt.reply(calls, thought)


@pytest.mark.parametrize(
    "calls",
    [
        [],
        LAST_CALLS,
        FIRST_CALLS + SECOND_CALLS,
        [{"name": "f</tool_call>", "arguments": {"<think>": "</tool_call><tool_call>", "x": ["</think>", "\\u003c"]}}],
    ],
)
@pytest.mark.parametrize("reasoning", ["", " It is asked for. ", "A <tool_call> after </think>, <<think>> before."])
def test_the_reward_reads_back_what_reply_writes(calls, reasoning):
    text = prompt.reply(calls, reasoning)
    assert parse_calls(text) == calls
    assert judge(text, calls, "binary").value == 1.0
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        assert text.count(tag) == 1


def test_reply_to_the_letter():
    expected = '<think>\nWhy.\n</think>\n<tool_call>\n[{"name": "f", "arguments": {"a": "é"}}]\n</tool_call>'
    assert prompt.reply([{"name": "f", "arguments": {"a": "é"}, "id": "1"}], "\nWhy. ") == expected
    assert prompt.reply([], "") == "<think>\n\n</think>\n<tool_call>\n[]\n</tool_call>"
    assert prompt.reply([], "see <tool_call>") == "<think>\nsee [tool_call]\n</think>\n<tool_call>\n[]\n</tool_call>"


def test_target_is_the_response_else_the_answer_after_the_reasoning():
    def target(**extra):
        return prompt.target(make(TURNS, TOOLS, LAST_CALLS, "test", extra))

    assert target() == prompt.reply(LAST_CALLS, "")
    assert target(reasoning="Oslo.") == prompt.reply(LAST_CALLS, "Oslo.")
    assert target(reasoning="Oslo.", response=" as it is ") == " as it is "


def test_the_calls_alone_are_right_but_for_the_think_block():
    text = prompt.target(make(TURNS, TOOLS, LAST_CALLS, "test", {"reasoning": "Oslo.", "response": "other"}), "calls")
    assert text == prompt.reply(LAST_CALLS, "").removeprefix("<think>\n\n</think>\n") and "think" not in text
    assert judge(text, LAST_CALLS, "binary").reason == "no_format"
    assert judge(text, LAST_CALLS, "binary_no_reasoning").value == 1.0


def test_a_template_that_refuses_the_conversation_is_one_clear_error():
    refusing = byte_tokenizer(NO_SYSTEM + CHATML)
    with pytest.raises(ValueError, match=rf"^the chat template .* example {SINGLE.id}, roles system, user") as e:
        prompt.encode(SINGLE, refusing)
    assert "(System role not supported)" in str(e.value) and "\n" not in str(e.value)
    greeted = make([{"role": "assistant", "content": "Hello."}, *SINGLE.messages], TOOLS, LAST_CALLS, "test")
    with pytest.raises(ValueError, match=r"roles system, assistant, user \(roles must alternate\)"):
        prompt.encode(greeted, byte_tokenizer(STRICT))


def test_tokenizer_without_chat_template_and_unknown_role():
    with pytest.raises(ValueError, match="has no chat template: take the tokenizer of an instruct model"):
        prompt.encode(SINGLE, byte_tokenizer(None))
    odd = make([{"role": "critic", "content": "Hm."}], TOOLS, LAST_CALLS, "test")
    with pytest.raises(ValueError, match=rf"^example {odd.id}: a turn of role 'critic': use system, user"):
        prompt.messages(odd)


def test_sample_rows_render_with_their_query_and_tools():
    path = Path(__file__).parents[3] / "shared" / "data" / "train_rows_xlam_format.jsonl"
    if not path.is_file():
        pytest.skip(f"sample rows not here: {path}")
    from data.jsonl import load

    tokenizer = byte_tokenizer(CHATML)
    for example in load(path, limit=50).examples:
        text = tokenizer.decode(prompt.encode(example, tokenizer), clean_up_tokenization_spaces=False)
        assert example.messages[0]["content"] in text
        assert all(json.dumps(tool, ensure_ascii=False) in text for tool in example.tools)
        assert judge(prompt.target(example), list(example.answer), "binary").value == 1.0
