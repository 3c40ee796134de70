"""Tool-calling tasks made by the program, small enough to learn from nothing on two CPU cores.

The built-in demo's model, of less than a million parameters, learns twice: by supervised training it learns right replies
and then those of a *careless annotator*; by reinforcement learning it then learns to stop slipping. This module makes
everything that takes except the weights:

- `tasks`: queries with typed tools and the right calls. A query names the action by the words of the tool and gives
  each value after the name of its parameter and a space, so that the ability to learn is *copying from the query*. One
  call, or (about one task in five) two: of two tools, or of one tool twice. Two tools are offered, in any order; the
  distractor, where there is one, often shares a verb or a noun with the right one.
- `clean_reply`, `careless_reply`: the right reply, and the same reply with slips. `sft_rows` joins tasks and replies.
- `build_tokenizer`, `tokenizer_texts`, `TEMPLATE`: a byte-level BPE tokenizer, the texts to train it on, and the file
  of the system template (for `data.prompt.load_template`). A prompt has 152 tokens on average (120 to 180), a right reply
  45 with its end token: 39 with one call, 67 with two.

Held-out tasks have other tools and other strings. A tool's name is a (verb, noun) pair, and a hash holds out one pair in
four: every verb and every noun is in training tools too, beside other words. The same hash splits the string values.
The parameters of a tool are drawn anew for each task, unlike in life: a model so small would learn a fixed list by heart
and not read the query. Copying is kept unambiguous: the invented strings of one task share no syllable, its integers and
numbers share no digit until nearly all are used.

The careless annotator reads well and writes badly: the thought is always right, every slip is made while writing
the call, and the format is always right. A slip is a convention that is followed by chance, independently on each
occasion, with the probabilities of `SLIPS`. Those above one half are what a perfect student of these
replies does *always* when it decodes greedily. Such a student is right on 36 % of the held-out tasks greedily, on 27 %
sampled at temperature 0.7, and on 20 %, as often as the annotator, at temperature 1. Chance leaves it a loss of
0.061 nats a reply token (2.8 a reply) on careless rows, and none on right ones: on fresh rows no model gets below
that. `tests/data/test_demo.py` computes these figures. Nothing but conventions is wrong with such a student, so RL can
bring it to nearly 100 %.
"""

from __future__ import annotations

import functools
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import prompt
from data.example import Example, make

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The probability of each slip on each occasion.
SLIPS = {
    "integer_as_string": 0.65,  # each integer: "people": "4"
    "boolean_as_string": 0.65,  # each boolean: "outdoor": "true"
    "number_as_string": 0.15,  # each number: "price": "3.5"
    "dot_for_underscore": 0.35,  # each call: "name": "book.table"
    "argument_left_out": 0.15,  # each call with two arguments or three: the last one is missing
    "argument_invented": 0.15,  # each call: INVENTED is appended, which no tool has
    "wrong_tool": 0.15,  # each call: the name of one of the other tools offered, the arguments of the right one
}
INVENTED = ("note", "none")

OFFERED = 2  # tools
PARALLEL_SHARE = 0.2  # tasks with two calls
TWICE_SHARE = 1 / 4  # of these, the share that calls one tool twice
HELD_OUT_ONE_IN = 4  # (verb, noun) pairs and string values

# Nouns start with a consonant sound: "book a table". A verb or a noun is in no parameter list, and vice versa.
VERBS = (
    "book", "find", "send", "open", "rent", "order", "plan", "track", "print", "paint",
    "share", "check", "move", "sell", "repair", "store",
)  # fmt: skip
NOUNS = (
    "table", "room", "car", "ticket", "letter", "parcel", "lamp", "report", "meeting", "taxi", "pizza", "garden",
    "boat", "concert", "camera", "bike", "message", "flight", "photo", "song", "door", "desk", "video", "class",
)  # fmt: skip
NAME_PARAMETERS = ("city", "guest", "owner", "street")
PARAMETERS = {
    "string": NAME_PARAMETERS + ("color", "label", "topic", "brand", "code", "team"),
    "integer": ("people", "days", "count", "size", "floor", "hours", "level", "seats"),
    "number": ("price", "weight", "width", "score"),
    "boolean": ("outdoor", "urgent", "public", "gift", "fast", "quiet"),
}
TYPE_WEIGHTS = {"string": 0.53, "integer": 0.24, "number": 0.08, "boolean": 0.15}

# A token that no reply of the training rows has is one that the model cannot write. Those of `NAMES` that the hash holds
# out (the last twelve) are therefore spelled in `SYLLABLES`, of which most values are made.
NAMES = (
    "Lisbon", "Paris", "Berlin", "Madrid", "Vienna", "Milan", "Porto", "Dublin", "Delhi", "Geneva", "Boston", "Dallas",
    "Toronto", "Rome", "Bogota", "Manila", "Verona", "Lima", "Pisa", "Malaga", "Anna", "Maria", "Peter", "Laura",
    "David", "Martin", "Daniel", "Clara", "Oliver", "Robert", "Felix", "Carmen", "Leon", "Diana", "Sofia", "Marina",
    "Toledo", "Tobago", "Malabo", "Mali", "Salome", "Vida", "Kali", "Sofi", "Bela", "Loki", "Remi", "Lode",
)  # fmt: skip
SYLLABLES = (
    "ba", "be", "bo", "da", "de", "do", "fa", "fe", "fi", "ga", "go", "gu", "ka", "ke", "ki", "la", "le", "li", "lo",
    "ma", "me", "mi", "mo", "na", "ne", "no", "pa", "pe", "pi", "po", "ra", "re", "ri", "sa", "se", "so", "ta", "ti",
    "to", "va", "ve", "vi",
)  # fmt: skip
UNWANTED = re.compile("dago|kike|pedo|rape")  # what syllables make by chance, and nobody wants to read

# {task} is "book a table", {values} is "city Lisbon, people 4".
PHRASINGS = (
    "Please {task}: {values}.",
    "Can you {task} with {values}?",
    "I want to {task}, {values}.",
    "We need to {task}: {values}.",
    "With {values}, {task}.",
)
SECOND_PHRASINGS = ("Also {task}: {values}.", "Then {task} with {values}.")

TEMPLATE = Path(__file__).with_name("demo_template.txt")  # short: a prompt of the demo has about 150 tokens
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAG_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # text, not special: decoding keeps them
# How Qwen2.5 cuts a text into words: a digit alone, letters with the sign or space before them, signs, spaces.
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def is_held_out(text: str) -> bool:
    """Which side of the split a "verb_noun" or a string value is on (a fixed hash of the text)."""
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


@functools.cache
def tool_names(held_out: bool) -> tuple[str, ...]:
    """All "verb_noun" names of the training tools, or of the held-out ones."""
    names = [f"{verb}_{noun}" for verb in VERBS for noun in NOUNS]
    return tuple(name for name in names if is_held_out(name) == held_out)


def tasks(count: int, seed: int, held_out: bool) -> list[Example]:
    """`count` different tasks (different ids), the same ones for the same arguments; fewer is a prefix of more."""
    rng = random.Random(f"demo tasks {seed} {held_out}")
    found: dict[str, Example] = {}
    while len(found) < count:
        example = _task(rng, held_out)
        if not UNWANTED.search(json.dumps(example.answer).lower()):  # the whole task, so that all others stay what they are
            found[example.id] = example
    return list(found.values())


def sft_rows(count: int, seed: int, careless: float) -> list[Example]:
    """`count` training tasks with a reply to imitate in `extra["response"]`.

    `careless` in [0, 1] is the share of rows that the careless annotator wrote, the others are right.
    """
    if not 0.0 <= careless <= 1.0:
        raise ValueError(f"careless is {careless}: give the share of careless rows, between 0 and 1")
    rng = random.Random(f"demo replies {seed}")
    rows = []
    for example in tasks(count, seed, held_out=False):
        response = careless_reply(example, rng) if rng.random() < careless else clean_reply(example)
        rows.append(replace(example, extra={**example.extra, "response": response}))
    return rows


def thought(example: Example) -> str:
    """What is to be done, in the words of the tools: "book a table; find a room."."""
    return "; ".join(_action(call["name"]) for call in example.answer) + "."


def spoken(value: str | int | float | bool) -> str:
    """A value as a query gives it: yes or no for a boolean, else as JSON without quotes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def clean_reply(example: Example) -> str:
    """The right reply to a task of this module: the thought and the right calls."""
    return prompt.reply(example.answer, thought(example))


def careless_reply(example: Example, rng: random.Random) -> str:
    """The reply of the careless annotator: the same thought, the calls with the slips of `SLIPS` drawn from `rng`."""
    offered = [tool["name"] for tool in example.tools]
    return prompt.reply(tuple(_slip(call, offered, rng) for call in example.answer), thought(example))


def tokenizer_texts(rows: Iterable[Example]) -> Iterator[str]:
    """What to train the tokenizer on, from rows of `sft_rows`: roles and contents of the messages, and the replies."""
    template = prompt.load_template(TEMPLATE)
    for row in rows:
        for message in [*prompt.messages(row, template), {"role": "assistant", "content": row.extra["response"]}]:
            yield from message.values()


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens (fewer where the texts give no more), fixed by the texts.

    Text is cut as Qwen2.5 cuts it (`QWEN_WORDS`), and then letters from the sign or space before them, so that a word or a
    value has the same tokens in a query and in a call. Cutting finer than Qwen2.5 matters for users of the export too:
    transformers 5 reads any tokenizer beside a Qwen2 model with Qwen's own cuts, and no merge learned here crosses one.
    640 tokens hold the demo's words and syllables, one each; with more, pairs of syllables, each rare, become tokens.
    Lossless on any text. Ids 0 to 2 are `SPECIAL_TOKENS`, 3 to 6 `TAG_TOKENS`; <|im_end|> ends a sequence,
    <|endoftext|> pads. Raises ValueError for a `vocab_size` below 263: the added tokens and the 256 bytes.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast  # here: seconds to import, and the tasks do not need it

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    added = SPECIAL_TOKENS + TAG_TOKENS
    least = len(added) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}: give at least {least}, the bytes and the added tokens")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"\p{L}+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in added],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    # Added before training, a tag is cut out of the texts and costs no merges. That holds only while it is special:
    # as plain added tokens the tags would be learned again, letter by letter.
    bpe.add_special_tokens(list(trainer.special_tokens))
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in SPECIAL_TOKENS
    # <|im_start|> is special in the state; named again as an extra token it would trouble transformers 4.
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _action(name: str) -> str:
    verb, noun = name.split("_")
    return f"{verb} a {noun}"


def _slip(call: dict[str, Any], offered: Sequence[str], rng: random.Random) -> dict[str, Any]:
    """One call as the careless annotator writes it."""
    name, arguments = call["name"], dict(call["arguments"])
    others = [other for other in offered if other != name]
    if others and rng.random() < SLIPS["wrong_tool"]:
        name = rng.choice(others)
    if rng.random() < SLIPS["dot_for_underscore"]:
        name = name.replace("_", ".")
    for parameter, value in arguments.items():
        kind = {bool: "boolean", int: "integer", float: "number"}.get(type(value))
        if kind and rng.random() < SLIPS[f"{kind}_as_string"]:
            arguments[parameter] = json.dumps(value)
    if len(arguments) > 1 and rng.random() < SLIPS["argument_left_out"]:
        arguments.popitem()
    if rng.random() < SLIPS["argument_invented"]:
        arguments[INVENTED[0]] = INVENTED[1]
    return {"name": name, "arguments": arguments}


def _task(rng: random.Random, held_out: bool) -> Example:
    parallel = rng.random() < PARALLEL_SHARE
    twice = parallel and rng.random() < TWICE_SHARE
    names = _names(rng, held_out, called=2 if parallel and not twice else 1)
    called = [names[0], names[0]] if twice else names[: 1 + parallel]
    schemas: dict[str, dict[str, str]] = {}
    for name in names:
        taken = {parameter for other in schemas if other in called for parameter in schemas[other]}
        schemas[name] = _schema(rng, most=2 if parallel else 3, taken=taken if name in called else set())

    values = _Values(rng, held_out)
    calls, clauses = [], []
    for i, name in enumerate(called):
        order = list(schemas[name])
        if rng.random() < 0.4:
            rng.shuffle(order)
        arguments = {parameter: values.draw(parameter, schemas[name][parameter]) for parameter in order}
        while twice and calls and arguments == calls[0]["arguments"]:  # two booleans, say
            arguments = {parameter: values.draw(parameter, schemas[name][parameter]) for parameter in order}
        told = ", ".join(f"{parameter} {spoken(value)}" for parameter, value in arguments.items())
        phrasing = rng.choice(SECOND_PHRASINGS if i else PHRASINGS)
        clauses.append(phrasing.format(task=_action(name), values=told))
        calls.append({"name": name, "arguments": arguments})

    rng.shuffle(names)
    example = make(
        messages=[{"role": "user", "content": " ".join(clauses)}],
        tools=[_tool(name, schemas[name]) for name in names],
        answer=calls,
        source="demo/parallel" if parallel else "demo/single",
    )
    return replace(example, extra={"reasoning": thought(example)})


def _names(rng: random.Random, held_out: bool, called: int) -> list[str]:
    """The tools offered, the first `called` of them to be called; two to be called share no word, a distractor often does."""
    pool, by_word = tool_names(held_out), _names_by_word(held_out)
    names = [rng.choice(pool)]
    while len(names) < OFFERED:
        word = rng.choice(names[0].split("_"))
        similar = len(names) >= called and rng.random() < 0.6
        name = rng.choice(by_word[word] if similar else pool)
        distinct = not set(name.split("_")) & set(names[0].split("_")) if len(names) < called else name not in names
        if distinct:
            names.append(name)
    return names


@functools.cache
def _names_by_word(held_out: bool) -> dict[str, tuple[str, ...]]:
    names = tool_names(held_out)
    words = {word for name in names for word in name.split("_")}
    return {word: tuple(name for name in names if word in name.split("_")) for word in words}


def _schema(rng: random.Random, most: int, taken: set[str]) -> dict[str, str]:
    """The parameters of one tool and their types: one to `most`, none of those `taken`."""
    count = min(most, rng.choices((1, 2, 3), (30, 45, 25))[0])
    schema: dict[str, str] = {}
    while len(schema) < count:
        kind = rng.choices(tuple(TYPE_WEIGHTS), tuple(TYPE_WEIGHTS.values()))[0]
        parameter = rng.choice(PARAMETERS[kind])
        if parameter not in taken:
            schema[parameter] = kind
    return schema


class _Values:
    """Draws the values of one task and holds the syllables that were used and the digits that were not."""

    def __init__(self, rng: random.Random, held_out: bool):
        self.rng, self.held_out = rng, held_out
        self.used: set[str] = set()
        self.digits: list[str] = []

    def draw(self, parameter: str, kind: str) -> str | int | float | bool:
        match kind:
            case "boolean":
                return self.rng.random() < 0.5
            case "integer":
                return int(self._digit("0") + "".join(self._digit() for _ in range(self.rng.choice((0, 0, 1, 1, 2)))))
            case "number":
                return float(f"{self._digit('0')}.{self._digit('0')}")
            case _:
                return self._string(is_name=parameter in NAME_PARAMETERS)

    def _digit(self, unwanted: str = "") -> str:
        if not set(self.digits) - set(unwanted):
            self.digits = self.rng.sample("0123456789", 10)
        return self.digits.pop(-2 if self.digits[-1] == unwanted else -1)

    def _string(self, is_name: bool) -> str:
        while True:
            if is_name and self.rng.random() < 0.25:
                parts = [self.rng.choice(NAMES)]
            else:
                parts = self.rng.sample(SYLLABLES, self.rng.choice((2, 2, 3)))
            value = "".join(parts).capitalize() if is_name else "".join(parts)
            if is_held_out(value) == self.held_out and not self.used.intersection(parts):
                self.used.update(parts)
                return value


def _tool(name: str, schema: dict[str, str]) -> dict[str, Any]:
    parameters = {parameter: {"type": kind} for parameter, kind in schema.items()}
    return {"name": name, "description": _action(name), "parameters": parameters}
