"""From an Example to the tokens that a model continues, and to the text that it should have written.

    Example --messages--> [{"role", "content"}] --encode--> token ids       the prompt
    Example --target--> text, written by `reply`                            what supervised training imitates

The first message is ours: a template (the text file `thinking.txt`, or the user's own) with the row's tools in place
of `{tools}`, one JSON object a line. The structure is that of Tool-N1 (arXiv 2505.00024, section 3): think inside
`<think>`, then give one JSON list of calls inside `<tool_call>`. Training, evaluation and distillation share it.

The model's chat template gets nothing but roles (system, user, assistant, by turns) and plain text; results of tools have
a role of their own where the template knows one. All else that concerns tools is written here, because chat templates
differ: some drop `tool_calls` without a word, some write calls in a format other than the one asked for, some refuse a
`tool` role or two user turns in a row. So

- the calls of an earlier assistant turn become a reply in the thinking format, as if the model itself had written it.
  What the assistant said beside its calls becomes the thought. Where it said nothing, the thought is one sentence that
  names the tools: an empty block, in the context, would be an example of not thinking;
- a tool's result is written as the model was taught to read it: `encode` gives it to the template under the role `tool`
  (Qwen2.5 puts it into a user turn inside `<tool_response>`, Llama 3.1 under the header `ipython`, as a JSON string). A
  template that has no such role (`_knows_tool_role`) gets the text that `messages` gives everybody: user text inside
  `<tool_response>`, which for Qwen2.5 is the same tokens;
- turns of one side that follow each other become one, but for results under a role of their own: how several of those
  are put together, and whether a user turn may follow them, is the template's affair;
- a system turn of the row, wherever it stood, goes to the end of our system message.

`json.dumps` keeps non-ASCII characters: escapes would cost tokens and hide words. In the calls alone, a format tag
inside a string has its `<` written as `\\u003c`, which reads back as the same string and cannot end the block; inside
thoughts, which are free text, such a tag gets square brackets.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from data.example import Example

PLACEHOLDER = "{tools}"
DEFAULT_TEMPLATE = Path(__file__).with_name("thinking.txt")
_TAGS = ("think", "/think", "tool_call", "/tool_call")
_OTHER_ROLE = "stranger"  # a role that no template knows


def load_template(path: str | Path | None = None) -> str:
    """The text of a system template file; None means the project's own, `thinking.txt`.

    `{tools}` marks the place of the tools; every other brace is literal. Raises FileNotFoundError where there is no
    such file and ValueError where it is no UTF-8 text or lacks the placeholder.
    """
    path = DEFAULT_TEMPLATE if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such template file: give the path of a text file that holds {PLACEHOLDER}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}): save the template as UTF-8") from error
    return _checked(text, str(path))


def messages(example: Example, template: str | None = None) -> list[dict[str, str]]:
    """The prompt as chat messages with "role" and "content" only: one system message, then user and assistant by turns.

    Any model and any server takes them; `encode` differs in the results of tools, where the model has a role for them.
    `template` is a template's text as `load_template` returns it; None means the project's own. Raises ValueError for
    a template without `{tools}` and for a turn with a role other than system, user, assistant and tool.
    """
    return _chat(example, template, tool_role=False)


def encode(example: Example, tokenizer: Any, template: str | None = None) -> list[int]:
    """The prompt's token ids [P], up to and including the header that opens the assistant's turn.

    `tokenizer` is one of transformers, with a chat template. Raises ValueError where it has none, where its template
    refuses the conversation, and as `messages` does.
    """
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path or "without a name"
        raise ValueError(f"the tokenizer {name} has no chat template: take the tokenizer of an instruct model")
    has_results = any(turn["role"] == "tool" for turn in example.messages)
    chat = _chat(example, template, tool_role=has_results and _knows_tool_role(tokenizer))
    try:
        # return_dict: transformers 5 would return a BatchEncoding by default, transformers 4 a list.
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    except (TemplateError, TypeError) as error:
        roles, name = ", ".join(turn["role"] for turn in chat), tokenizer.name_or_path or "without a name"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"the chat template of the tokenizer {name} refuses example {example.id}, roles {roles} ({reason}): take a "
            "model whose template accepts them, or leave the row out"
        ) from error
    return list(ids)


def reply(calls: Sequence[dict[str, Any]], reasoning: str | None) -> str:
    """A reply in the thinking format: the thought in a think block (empty where it is ""), then one list of calls.

    With None for the thought there is no think block. calls: {"name": str, "arguments": dict}; other keys are left out.
    The reward's parser reads the same calls back.
    """
    listed = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    listed_text = _retagged(json.dumps(listed, ensure_ascii=False), r"\u003c{}>")
    block = f"<tool_call>\n{listed_text}\n</tool_call>"
    return block if reasoning is None else f"{think(reasoning)}\n{block}"


def think(reasoning: str) -> str:
    """A thought as the block that a reply begins with; format tags inside it get square brackets."""
    return f"<think>\n{_retagged(reasoning.strip(), '[{}]')}\n</think>"


def _retagged(text: str, form: str) -> str:
    """The text with each of the format's tags in another form, "[{}]" say."""
    for tag in _TAGS:
        text = text.replace(f"<{tag}>", form.format(tag))
    return text


def target(example: Example, replies: Literal["reasoning", "calls"] = "reasoning") -> str:
    """The text that supervised training imitates, without the end-of-turn token.

    reasoning: `extra["response"]` as it is where the row has one, else the right calls after `extra["reasoning"]`.
    calls: the right calls alone, without a think block, whatever else the row has.
    """
    if replies == "calls":
        return reply(example.answer, None)
    if "response" in example.extra:
        return example.extra["response"]
    return reply(example.answer, example.extra.get("reasoning", ""))


@functools.cache
def _default_template() -> str:
    return load_template()


def _checked(template: str, where: str) -> str:
    if PLACEHOLDER not in template:
        raise ValueError(f"{where}: no {PLACEHOLDER} in it: write {PLACEHOLDER} where the tools are to stand")
    return template


def _system_text(example: Example, template: str | None) -> str:
    template = _default_template() if template is None else _checked(template, f"the template {template[:40]!r}")
    lines = [json.dumps({"type": "function", "function": tool}, ensure_ascii=False) for tool in example.tools]
    ours = template.replace(PLACEHOLDER, "\n".join(lines)).strip()
    return "\n\n".join([ours, *(turn["content"] for turn in example.messages if turn["role"] == "system")])


def _chat(example: Example, template: str | None, tool_role: bool) -> list[dict[str, str]]:
    """What `messages` returns; with `tool_role`, results of tools are messages of that role, one each."""
    chat = [{"role": "system", "content": _system_text(example, template)}]
    for turn in example.messages:
        if turn["role"] == "system":
            continue
        if turn["role"] == "tool" and tool_role:
            chat.append({"role": "tool", "content": turn["content"]})
            continue
        role, content = _as_text(turn, example.id)
        if chat[-1]["role"] == role:
            chat[-1]["content"] += "\n" + content
        else:
            chat.append({"role": role, "content": content})
    return chat


def _knows_tool_role(tokenizer: Any) -> bool:
    """Whether the chat template does something of its own with the role `tool`. It is asked, rather than read.

    A conversation with results in all places where rows may have them (after a reply, after another result, before a
    user turn) must be accepted, with every result in what is written. And a role that no template knows, in their
    place, must not give the same text but for the role's name: that would be a header made of whatever the role is
    called, or a turn for all the rest, and the model has never seen such a turn.
    """
    results = [f"result{number}" for number in range(3)]

    def written(role: str) -> str | None:
        first, second, third = ({"role": role, "content": result} for result in results)
        user, assistant = {"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}
        chat = [{"role": "system", "content": "rules"}, user, assistant, first, second, assistant, third, user]
        try:
            return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError):
            return None

    text, other = written("tool"), written(_OTHER_ROLE)
    if text is None or not all(result in text for result in results):
        return False
    return other is None or other.lower().replace(_OTHER_ROLE, "tool") != text.lower()


def _as_text(turn: dict[str, Any], example_id: str) -> tuple[str, str]:
    """One turn as (role, text), the role being user or assistant."""
    content = turn["content"]
    match turn["role"]:
        case "user":
            return "user", content
        case "tool":
            return "user", f"<tool_response>\n{content}\n</tool_response>"
        case "assistant":
            calls = turn.get("calls")
            return "assistant", reply(calls, content.strip() or _stand_in_thought(calls)) if calls else content
        case other:
            raise ValueError(f"example {example_id}: a turn of role {other!r}: use system, user, assistant or tool")


def _stand_in_thought(calls: Sequence[dict[str, Any]]) -> str:
    return f"Next I call {' and '.join(dict.fromkeys(call['name'] for call in calls))}."
