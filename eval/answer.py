"""A model that answers tasks: by the sampler and the prompt of training, on this host's devices.

open_model         a Policy (a Hugging Face folder, a hub id or a finished run, read by grpo_jax.inputs) -> Model
respond            Model and Examples -> Responses
response_tokens, template_of     how long a response may be and what the prompt says, where nobody says otherwise
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data import prompt
from data.example import Example
from grpo_jax import batch, checkpoint, config, hosts, inputs, mesh, reward, rollout
from grpo_jax.group import Group
from grpo_jax.inputs import Policy, Task
from grpo_jax.reward import Response
from grpo_jax.rollout import Sampling
from grpo_jax.run import free_memory
from models.decoder import Params

MOST_TOKENS = 4096  # of a response, where neither a run nor the user says how many
TOO_LONG = "prompt_too_long"  # the reason of a task that the model's context has no room for; it counts as wrong


@dataclass(frozen=True)
class Model:
    """A model that is ready to answer."""

    policy: Policy
    params: Params  # by layer, in the compute dtype
    local: Mesh
    free: int | None  # bytes of a device beside the weights; None: not known
    fingerprint: str  # of the weights


def open_model(policy: Policy, tensor: int | None = None) -> Model:
    """Loads its weights. Raises ValueError or FileNotFoundError for what does not fit."""
    dtype = inputs.compute_dtype(config.Learner())
    tensor = tensor or mesh.rollout_tensor(policy.model, dtype, jax.local_device_count(), hosts.memory())
    try:
        local = mesh.local(tensor)
        mesh.shardings(local, policy.model, section="rollout")  # refuses what does not divide
    except ValueError as error:
        raise ValueError(str(error).replace("--rollout.tensor", "--tensor")) from None
    free = free_memory(policy.model, dtype, local)
    stored = inputs.load_params(policy, local, None)
    print_of_weights = checkpoint.fingerprint(checkpoint.checksums(stored))
    return Model(policy, mesh.host_copy(stored, policy.model, dtype, tensor), local, free, print_of_weights)


def respond(
    model: Model,
    examples: Sequence[Example],
    template: str | None = None,
    max_response_tokens: int = MOST_TOKENS,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    attempts: Sequence[int] | None = None,
    rows: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    finished: Callable[[int, str, list[Response]], None] = lambda place, prompt, responses: None,
) -> list[list[Response]]:
    """`samples` responses to each example, in their order; none where its prompt leaves no room for them.

    `template` is the text of one, as `data.prompt.load_template` returns it. At temperature 0, the default, greedy; above,
    the same ones each time (of seed 0), if `attempts` are those of `rollout.sample`, where only some of the examples are asked.
    `finished` gets the place of each example, its prompt as the model saw it and its responses, as soon as they are there.
    """
    policy, room = model.policy, room_for_prompt(model.policy, max_response_tokens)
    text = functools.partial(policy.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    encoded = [np.array(prompt.encode(example, policy.tokenizer, template), np.int32) for example in examples]
    fit = [i for i, ids in enumerate(encoded) if len(ids) <= room]
    tasks = [Task(examples[i], encoded[i]) for i in fit]
    answered: list[list[Response]] = [[] for _ in examples]

    def ended(index: int, group: Group) -> None:
        place = fit[index]
        # A reward that hands back what it is given: so the texts are those that training scores.
        _, [answered[place]] = batch.score(policy, [tasks[index]], [group], reward.each(lambda responses, example: responses))
        finished(place, text(group.prompt), answered[place])

    for place in sorted({*range(len(examples))} - {*fit}):
        finished(place, text(encoded[place]), [])
    longest = max((len(task.prompt) for task in tasks), default=1)
    learner, sampling = config.Learner(), Sampling(policy.end_tokens, samples, max_response_tokens, temperature)
    dtype, shards = inputs.compute_dtype(learner), mesh.shards(model.local)
    found, cache = rollout.pool_size(policy.model, dtype, sampling, longest, model.free, shards)
    rollout.sample(
        policy.model,
        model.params,
        [task.prompt for task in tasks],
        replace(sampling, rows=rows or found, cache_bytes=cache),
        mesh=model.local,
        kernel=inputs.attention_kernel(learner, policy.model),
        attempts=None if attempts is None else [attempts[i] for i in fit],
        progress=progress,
        finished=ended,
    )
    return answered


def room_for_prompt(policy: Policy, max_response_tokens: int) -> int:
    """Tokens of the context that responses leave. Raises ValueError for none."""
    room = policy.model.max_positions - max_response_tokens
    if room < 1:
        raise ValueError(
            f"--max_response_tokens {max_response_tokens:,} leaves no room for a prompt: {policy.path} is made for "
            f"{policy.model.max_positions:,} tokens; lower it"
        )
    return room


def response_tokens(path: str, policy: Policy, examples: Sequence[Example], template: str) -> int:
    """--max_response_tokens where it is left out: the run's, else what the longest prompt leaves of the context.

    A prompt of more than half the context is no reason to stop all others. Without examples, half of it.
    """
    if rollout_config := (_run_config(path) or {}).get("rollout"):  # a supervised run has none
        return rollout_config["max_response_tokens"]
    context = policy.model.max_positions
    longest = max((len(prompt.encode(example, policy.tokenizer, template)) for example in examples), default=context)
    return min(MOST_TOKENS, max(context - longest, context // 2))


def template_of(model: str, template: str | None, demo: bool = False) -> str:
    """The text of the template: the one given, else that of the run, else the demo's for the demo's tasks, else our own."""
    run = None if template else _run_config(model)
    if run:
        template = run["data"]["template"]
    elif template is None and demo:
        template = str(config.DEMO_TEMPLATE)
    return prompt.load_template(template)


def _run_config(path: str) -> dict[str, Any] | None:
    """The config of the finished run in the folder; None where there is none."""
    if not path:  # the name of a server's model may be left out; it is not the folder where one stands
        return None
    file = Path(path) / "config.json"
    return json.loads(file.read_text()) if (Path(path) / "hf").is_dir() and file.is_file() else None
