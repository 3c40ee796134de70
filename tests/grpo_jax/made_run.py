"""Folders of runs for tests of the report, written in moments: any number of steps and groups, no model needed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from grpo_jax.metrics import Log
from grpo_jax.reward import REASONS, judge

WORDS = ("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "larch", "quartz", "river")
_LETTERS = random.Random(0)
LEXICON = ["".join(_LETTERS.choices("etaoinshrdlu", k=_LETTERS.randrange(2, 10))) for _ in range(20_000)]  # hard to compress
TOOLS = [
    {
        "name": f"{verb}_{noun}",
        "description": f"{verb.capitalize()} the {noun} of a place.",
        "parameters": {name: {"type": "string", "description": f"The {name}."} for name in ("place", "day", "count", "exact")},
    }
    for verb in ("get", "find", "book")
    for noun in ("weather", "hotel", "train", "table")
]
CONFIG = {
    "program": "grpo_jax.train",
    "run": {"dir": "runs/made", "steps": 20, "seed": 0},
    "model": {"path": "models/demo"},
    "rollout": {"group_size": 4, "prompts_per_step": 4, "refills": 0},
    "optimizer": {"learning_rate": 1e-6},
    "update": {"recompute_old_logp": False},
}


def make(
    folder: Path, steps: int = 20, groups: int = 4, size: int = 4, longer: int = 0, seed: int = 0, **settings: Any
) -> Path:
    """A run of so many steps, of `groups` groups of `size` responses each; `longer`: characters of thought more.

    settings: "section.field" as keyword section__field, over CONFIG.
    """
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    config["run"] |= {"dir": str(folder), "steps": steps}
    for name, value in settings.items():
        section, field = name.split("__")
        config[section][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    chance = random.Random(seed)
    log = Log.open(folder, 0, tensorboard=False)
    log.step(
        {"step": 0, "val/accuracy": 0.25, "val/count": 200, "val/reason/correct": 0.25, "val/reason/wrong_arguments": 0.75}
    )
    tasks = [task(chance, i) for i in range(max(1, steps * groups // 3))]  # three epochs
    for step in range(1, steps + 1):
        rows = [group(chance, step, chance.choice(tasks), step / steps, size, longer) for _ in range(groups)]
        log.rollouts(rows)
        log.step(row_of(step, steps, rows, chance))
    log.close()
    return folder


def task(chance: random.Random, number: int) -> dict[str, Any]:
    """A prompt in Qwen2.5's form, with tools one a line, and its right call."""
    tools = chance.sample(TOOLS, 4)
    arguments = {"place": f"{chance.choice(WORDS)} {number}", "count": chance.randrange(9), "exact": chance.random() < 0.5}
    system = (
        "Think in <think>, call in <tool_call>.\n<tools>\n"
        + "\n".join(json.dumps({"type": "function", "function": tool}) for tool in tools)
        + "\n</tools>"
    )
    request = f"Please {tools[0]['name'].replace('_', ' the ')} at {arguments['place']} for {arguments['count']}."
    prompt = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
    return {"id": f"{number:016x}", "prompt": prompt, "answer": [{"name": tools[0]["name"], "arguments": arguments}]}


def group(chance: random.Random, step: int, task: dict[str, Any], skill: float, size: int, longer: int = 0) -> dict[str, Any]:
    """A row of rollouts.jsonl: responses that are right with the probability `skill`, else wrong in one of nine ways."""
    texts = [
        reply(chance, task["answer"][0], 0 if chance.random() < skill else chance.randrange(1, 10), longer) for _ in range(size)
    ]
    scored = [judge(text, task["answer"]) for text in texts]
    mean = sum(one.value for one in scored) / size
    responses = [
        {
            "text": t,
            "token_count": len(t) // 4,
            "truncated": False,
            "value": s.value,
            "reason": s.reason,
            "advantage": s.value - mean,
        }
        for t, s in zip(texts, scored, strict=True)
    ]
    return {"step": step, **task, "learned": True, "responses": responses}


def reply(chance: random.Random, right: dict[str, Any], way: int, longer: int = 0) -> str:
    """A response: right (0), or with another type, value, an argument missing or too many, another tool, a call too many, no
    call, no JSON, no thought (1 to 9)."""
    name, arguments = right["name"], dict(right["arguments"])
    calls = [{"name": name, "arguments": arguments}]
    match way:
        case 1:
            arguments["count"] = str(arguments["count"])
        case 2:
            arguments["place"] = "elsewhere"
        case 3:
            del arguments["exact"]
        case 4:
            arguments["day"] = "today"
        case 5:
            calls[0]["name"] = name.replace("_", ".")
        case 6:
            calls.append({"name": "find_hotel", "arguments": {}})
        case 7:
            calls = []
    thought = " ".join(chance.choices(WORDS, k=12) + chance.choices(LEXICON, k=longer // 6))
    block = json.dumps(calls)[: -1 if way == 8 else None]
    return ("" if way == 9 else f"<think>\n{thought}\n</think>\n") + f"<tool_call>\n{block}\n</tool_call>"


def row_of(step: int, steps: int, rows: list[dict], chance: random.Random) -> dict[str, Any]:
    """The metrics of a step."""
    responses = [response for row in rows for response in row["responses"]]
    reasons = Counter(response["reason"] for response in responses)
    equal = [len({response["value"] for response in row["responses"]}) == 1 for row in rows]
    row = {
        "step": step,
        "epoch": 3 * step / steps,
        "learning_rate": 1e-6,
        "reward/mean": sum(response["value"] for response in responses) / len(responses),
        "groups/zero_variance": sum(equal) / len(equal),
        "response_tokens/mean": 60 + chance.random(),
        "response_tokens/min": 40,
        "response_tokens/truncated_share": 0.0,
        **{f"reason/{code}": reasons[code] / len(responses) for code in REASONS},
        "loss": chance.gauss(0, 0.01),
        "grad_norm": chance.random(),
        "kl/mean": 0.001 * step,
        "entropy/mean": 1.0 / (1 + step),
        "clip_fraction": 0.01 * chance.random(),
        "rollout/logp_mismatch": 1e-6 * (1 + chance.random()),
        "rollout/logp_mismatch_max": 1e-5 * (1 + chance.random()),
        "rollout/tokens_per_second": 1500 + 100 * chance.random(),
        "learner/tokens_per_second": 2500 + 100 * chance.random(),
        "time/rollout": 0.6,
        "time/reward": 0.01,
        "time/reference": 0.3,
        "time/update": 1.1,
        "time/step": 2.05,
        "memory/host_gb": 2.0,
        "strange/metric": 1.0,
    }
    if step % 5 == 0 or step == steps:
        right = round(200 * (0.25 + 0.7 * step / steps)) / 200
        row |= {"val/accuracy": right, "val/count": 200, "val/reason/correct": right, "val/reason/wrong_arguments": 1 - right}
    return row
