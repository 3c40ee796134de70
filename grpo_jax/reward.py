"""Rewards: from the text of a response to a number, in plain Python on the host.

    text -> think_span, block_span -> _decode -> parse_calls -> judge -> Scored(value, reason, parts)
    resolve("binary" | ... | "package.module:function") -> (responses of one group, example) -> one Scored a response
    each(reward) -> the groups of a batch, one after the other; `forgiving` of what a user's own reward does wrong

The rules are those of Tool-N1 (arXiv 2505.00024, section 4.3, Table 4 and the released reward code). Nothing here
raises on any text, and the work is linear in its length (sorting an object's keys adds a logarithm). A user's own
reward is another matter: grpo_jax.workers calls it in processes of its own.

Which text is read:
- A tool-call block is what `<tool_call>(.*?)</tool_call>` finds (dot matches all, non-overlapping, left to right), and
  the last one counts, wherever it stands. So a block runs from the *first* opening tag after the previous block to the
  next closing tag: an opening tag in between is part of its content (hence bad JSON), one that is never closed opens
  no block, and a closing tag inside a JSON string ends the block.
- A think block is a `<think>` with a `</think>` anywhere after it (the released code takes the tags in any order).

What is a list of calls:
- JSON without Python's extras: `NaN` and `Infinity` are not JSON. Of a repeated key the last one wins. Lone surrogates
  are ordinary characters. Whitespace around the content, Unicode's too, is dropped.
- One object is a list of one. A string that holds JSON is decoded once more, and only once.
- Every item is an object with a `name` that is a string and `arguments` that is an object, not a text that holds one
  (the released code keeps such an item, as a call that can never match). Other keys are dropped.
- Too large counts as not JSON: an integer of over 4300 digits (`MAX_DIGITS`), a number that overflows a float
  (`1e999`), nesting deeper than 500 (`MAX_DEPTH`: Python's own limit depends on how deep the caller stands, and a
  verdict must not). So all numbers that come out are finite, and callers may walk the values recursively.
- Calls match as a multiset of (name, arguments as JSON with sorted keys): `1`, `1.0` and `true` differ.

What each kind pays is `_value`. Why a response got it is the first of `REASONS` that holds; only `binary_no_reasoning`
forgives a missing think block (right calls without one pay 1.0 under `lexicographic` and still say `no_format`).
"""

import difflib
import importlib
import itertools
import json
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.example import Example, is_deeper

KINDS = ("binary", "binary_no_reasoning", "format", "format_and_names", "lexicographic")

REASONS = (
    "no_format",  # no think block or no tool_call block
    "bad_json",  # the block is not a list of calls
    "correct",  # the calls match
    "wrong_count",  # more or fewer calls than in the answer
    "wrong_name",  # as many calls, other functions
    "wrong_arguments",  # the same functions, other arguments
)
CUSTOM = "custom"  # the reason of a bare number that a user's own reward returned
# The reason of all responses of a group whose call of a user's own reward came to nothing; each of them scores 0.
ERROR = "reward_error"  # it raised, or did not return a finite number (or a `Scored` with one) for each response
TIMEOUT = "reward_timeout"  # it took longer than --reward.timeout; its process was ended
CRASH = "reward_crash"  # its process ended by itself

MAX_DIGITS = 4300  # int() is quadratic; Python's own limit has this default, but can be switched off
MAX_DEPTH = 500
_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Response:
    """One sampled response, as a reward sees it."""

    text: str  # the decoded response
    token_count: int  # sampled tokens, the end-of-turn token included
    truncated: bool  # cut at the length limit: no end-of-turn token was sampled


@dataclass(frozen=True)
class Scored:
    """A reward and where it comes from."""

    value: float  # what the advantage is computed from
    reason: str  # one of REASONS; a user's own reward may use others
    parts: dict[str, float]  # findings by name; those of `judge`: think, tool_call, parsed, names, match, each 0 or 1
    trace: str = ""  # where the reason is ERROR, TIMEOUT or CRASH: what happened


Reward = Callable[[Sequence[Response], Example], list[Scored]]
Asked = tuple[Sequence[Response], Example]  # one group, to be scored
# The groups of a batch -> their scores, in order. The second is told now and then how many are done; what it raises ends it.
Rewards = Callable[[Sequence[Asked], Callable[[int], None]], list[list[Scored]]]


def parse_calls(response: str) -> list[dict] | None:
    """The calls in the last tool-call block of a response, by the rules of the module's docstring.

    Returns a list (empty for `[]`) of {"name": str, "arguments": dict}, or None where there is no block or its content
    is not a list of calls. Never raises.
    """
    text = _plain(response)
    block = block_span(text)
    return None if block is None else _calls(_content(text, block))


def judge(response: str, answer: Sequence[dict], kind: str = "binary") -> Scored:
    """Scores one response against the right calls.

    answer: {"name", "arguments"} objects, trusted; empty where the right reply is `[]`, a block that calls nothing.
    kind: one of KINDS; any other is a ValueError. Never raises on any text.
    """
    if kind not in KINDS:
        raise ValueError(_unknown(kind))
    text = _plain(response)
    think, block = think_span(text) is not None, block_span(text)
    calls = None if block is None else _calls(_content(text, block))
    parsed = calls is not None
    names = parsed and Counter(call["name"] for call in calls) == Counter(call["name"] for call in answer)
    match = names and _multiset(calls) == _multiset(answer)

    if block is None or not (think or kind == "binary_no_reasoning"):
        reason = "no_format"
    elif not parsed:
        reason = "bad_json"
    elif match:
        reason = "correct"
    elif len(calls) != len(answer):
        reason = "wrong_count"
    else:
        reason = "wrong_arguments" if names else "wrong_name"

    found = {"think": think, "tool_call": block is not None, "parsed": parsed, "names": names, "match": match}
    parts = {name: float(holds) for name, holds in found.items()}
    return Scored(_value(kind, think, parsed, names, match), reason, parts)


def score(response: str, answer: Sequence[dict], kind: str = "binary") -> float:
    """The value of `judge`."""
    return judge(response, answer, kind).value


def resolve(kind: str) -> Reward:
    """The reward that a name stands for, as a function of one group.

    kind: one of KINDS, or the path `package.module:function` of a user's own reward, which is called once a group as
    function(responses, example) and returns a number or a `Scored` for each response, in order.
    Raises ValueError, in one line, for an unknown name and for a path that leads to no function. The function returned
    raises ValueError, naming the user's, where that gives a wrong count, or something that is not a finite number;
    what the user's own code raises passes through.
    """
    if kind in KINDS:
        return lambda responses, example: [judge(response.text, example.answer, kind) for response in responses]
    if not is_path(kind):
        raise ValueError(_unknown(kind))
    return checked(imported(kind, "reward"), f"reward {kind!r}")


def is_path(text: str) -> bool:
    """Whether it has the form `package.module:function`."""
    module_name, _, name = text.partition(":")
    return all(part.isidentifier() for part in [*module_name.split("."), name])


def imported(path: str, what: str) -> Callable[..., Any]:
    """The function that a path (`is_path`) leads to; `what` it is for stands in errors.

    Raises ValueError, in one line, where the module cannot be imported or has no such function.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{what} {path!r}: cannot import the module {module_name!r}: {message}") from error
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, set(dir(module)) - {name}, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} {path!r}: the module {module_name!r} has no function {name!r}{hint}")
    return function


def checked(function: Callable[..., Any], label: str) -> Reward:
    """A user's function of one group as a reward: its values as `Scored`, or a ValueError that begins with the label."""
    return lambda responses, example: _checked(label, function(responses, example), len(responses))


def each(score_group: Reward) -> Rewards:
    """A reward of one group as one of many, in this process."""

    def score(asked: Sequence[Asked], progress: Callable[[int], None]) -> list[list[Scored]]:
        scored = []
        for responses, example in asked:
            progress(len(scored))
            scored.append(score_group(responses, example))
        return scored

    return score


def forgiving(score_group: Reward) -> Reward:
    """A user's own reward, of which no error ends a run: the group scores 0, by `failed`, and no response of it is better
    than another, so that nothing is learned from it."""

    def score(responses: Sequence[Response], example: Example) -> list[Scored]:
        try:
            return score_group(responses, example)
        except Exception as error:
            return failed(ERROR, len(responses), trace_of(error))

    return score


def failed(reason: str, count: int, trace: str) -> list[Scored]:
    """The scores of a group of `count` responses that a user's own reward gave none."""
    return [Scored(0.0, reason, {}, trace)] * count


def trace_of(error: BaseException) -> str:
    """Where an error was raised, from the user's code on; of what is wrong with the result, the message alone."""
    found = traceback.TracebackException.from_exception(error)
    ours = str(Path(__file__).parent)
    frames = list(itertools.dropwhile(lambda frame: frame.filename.startswith(ours), found.stack))
    found.stack = traceback.StackSummary.from_list(frames)
    return "".join(found.format()).strip() if frames else str(error)


def _value(kind: str, think: bool, parsed: bool, names: bool, matched: bool) -> float:
    """What each kind pays (Table 4; `lexicographic` is in the released code only). All arguments but kind: findings."""
    match kind:
        case "binary":
            return float(think and matched)
        case "binary_no_reasoning":
            return float(matched)
        case "format":
            return 0.2 * think + 0.8 * matched
        case "format_and_names":
            return 0.2 * think + (0.8 if matched else 0.2 * names)
    if matched:  # lexicographic
        return 1.2 if think else 1.0
    return -0.2 if think and parsed else 0.0


def _plain(text: str) -> str:
    """The text as exactly a str: a subclass may override, and break, any method used here."""
    return str.__str__(text)


def think_span(text: str) -> tuple[int, int] | None:
    """Where `<think>.*?</think>` is first found, in linear time: (begin, end) with its tags; None where it is not."""
    start = text.find("<think>")
    end = text.find("</think>", start + len("<think>")) if start >= 0 else -1
    return None if end < 0 else (start, end + len("</think>"))


def block_span(text: str) -> tuple[int, int] | None:
    """Where the last match of `<tool_call>(.*?)</tool_call>` is, in linear time: (begin, end) with its tags, or None.

    An opening tag without a closing one after it ends the search, since none of the later opening tags has one either.
    """
    last, position = None, 0
    while (start := text.find(_OPENING, position)) >= 0:
        end = text.find(_CLOSING, start + len(_OPENING))
        if end < 0:
            break
        position = end + len(_CLOSING)
        last = (start, position)
    return last


def _content(text: str, block: tuple[int, int]) -> str:
    return text[block[0] + len(_OPENING) : block[1] - len(_CLOSING)]


def _calls(block: str) -> list[dict] | None:
    value = _decode(block.strip())
    if isinstance(value, str):
        value = _decode(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(map(_is_call, value)):
        return None
    return [{"name": call["name"], "arguments": call["arguments"]} for call in value]


def _is_call(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("arguments"), dict)


def _decode(text: str) -> Any:
    """The value of a JSON text, or None where it is none (or is `null`, which is no list of calls either)."""
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_constant)
    except (ValueError, RecursionError):
        return None
    return None if is_deeper(value, MAX_DEPTH) else value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS + digits.startswith("-"):
        raise ValueError(f"an integer of over {MAX_DIGITS} digits")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError("a number that overflows a float")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _multiset(calls: Sequence[dict]) -> Counter:
    return Counter((call["name"], canonical(call["arguments"])) for call in calls)


def canonical(value: Any) -> str:
    """A text that two JSON values share if and only if they are equal with their keys in any order.

    Built with a stack of its own, since json.dumps recurses. Integers are written in hexadecimal: str() of a long one
    is quadratic and refuses over 4300 digits; as text rather than as int, because the hash of a text is seeded and a
    response made of integers that collide would make the multiset quadratic.
    """
    written: list[str] = []
    stack: list[tuple[bool, Any]] = [(False, value)]  # (whether it is text ready to be written, the text or a value)
    while stack:
        ready, item = stack.pop()
        if ready:
            written.append(item)
        elif isinstance(item, dict):
            written.append("{")
            stack.append((True, "}"))
            for key in sorted(item, reverse=True):
                stack += [(False, item[key]), (True, json.dumps(key) + ":")]
        elif isinstance(item, (list, tuple)):
            written.append("[")
            stack.append((True, "]"))
            stack += [(False, child) for child in reversed(item)]
        elif isinstance(item, int) and not isinstance(item, bool):
            written.append(hex(item) + ",")
        else:
            written.append(json.dumps(item) + ",")
    return "".join(written)


def _checked(label: str, results: Any, count: int) -> list[Scored]:
    """What a user's reward returned for a group of `count` responses, as Scored, or a ValueError that begins with the label."""
    if not isinstance(results, Iterable):
        raise ValueError(f"{label} returned {results!r:.80}; return a list, one value for each response")
    results = list(itertools.islice(results, count + 1))  # it may be endless
    if len(results) != count:
        returned = f"over {count}" if len(results) > count else f"{len(results)}"
        raise ValueError(f"{label} returned {returned} values for {count} responses; return one for each")
    scored = []
    for index, result in enumerate(results):
        own = result if isinstance(result, Scored) else Scored(result, CUSTOM, {})
        try:
            value = math.nan if isinstance(own.value, (str, bytes)) else float(own.value)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{label} returned {result!r:.80} for response {index}; return finite numbers")
        if not isinstance(own.reason, str):
            raise ValueError(f"{label} gives {own.reason!r:.80} as the reason of response {index}; give a text")
        scored.append(replace(own, value=value, trace=""))
    return scored


def _unknown(kind: str) -> str:
    nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
    return (
        f"unknown reward {kind!r}: did you mean {nearest!r}? Known: {', '.join(KINDS)}, or package.module:function for your own"
    )
