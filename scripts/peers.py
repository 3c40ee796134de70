"""Other people's programs at the work of scripts/bench.py, in float32 on the CPU, with as many threads as it has cores.

    generate    transformers.generate: samples the groups with every prompt copied
    trl_steps   TRL's GRPOTrainer: whole steps, of sampling, reference and update

Both get prompts as token ids and make responses of exactly the wanted length, with the end of turn suppressed until then.
Each has its batch setting chosen by trying: one run of every number of rows given, the fastest kept.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scripts.timing import peak_memory

PACKAGES = {"transformers": ("torch", "transformers"), "trl": ("torch", "transformers", "trl")}


@dataclass(frozen=True)
class Peer:
    """A peer at its best setting."""

    setting: str
    run: Callable[..., Any]


@dataclass(frozen=True)
class Work:
    """What both sides compute."""

    folder: str  # the model, of Hugging Face
    tokenizer: Any
    prompts: Sequence[np.ndarray]  # N of int32 [P], all of one length
    group_size: int
    response_tokens: int
    temperature: float


def require(name: str) -> None:
    """Raises ValueError where a package that the peer needs is not installed."""
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"--against {name}: {', '.join(missing)} is not installed; pip install -e '.[trl]' has all it needs")


def generate(work: Work, row_counts: Sequence[int]) -> Peer:
    """transformers.generate on the copied prompts; `run()` returns the number of response tokens made."""
    import torch

    torch.set_num_threads(os.cpu_count())
    model = _model(work).eval()
    ids = torch.tensor(np.repeat(np.stack(work.prompts), work.group_size, axis=0), dtype=torch.long)
    r = work.response_tokens

    def run(rows: int) -> int:
        made = 0
        for some in ids.split(rows):
            out = model.generate(
                some, attention_mask=torch.ones_like(some), do_sample=True, temperature=work.temperature, top_k=0, top_p=1.0,
                min_new_tokens=r, max_new_tokens=r, pad_token_id=0,
            )  # fmt: skip
            made += out.shape[0] * (out.shape[1] - some.shape[1])
        return made

    rows = _fastest(row_counts, run)
    return Peer(f"{rows} rows at once", lambda: run(rows))


def _model(work: Work) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32)


def _fastest(row_counts: Sequence[int], run: Callable[[int], Any]) -> int:
    if len(row_counts) == 1:
        return row_counts[0]
    seconds = {}
    for rows in row_counts:
        began = time.perf_counter()
        run(rows)
        seconds[rows] = time.perf_counter() - began
    return min(seconds, key=seconds.get)


def trl_steps(work: Work, row_counts: Sequence[int]) -> Peer:
    """GRPOTrainer; `run(steps, between)` trains and returns (seconds of each step, facts of the last one).

    `between()` is called after every step, outside of its time. The trainer has no per-layer recomputation (its default has,
    which costs a third more), loss and generation at its defaults, KL against the initial model, and random rewards.
    """
    import torch

    torch.set_num_threads(os.cpu_count())
    rows = _fastest(row_counts, lambda rows: _train(work, rows, 1, lambda: None))
    setting = f"{rows} rows a backward pass, {len(work.prompts) * work.group_size // rows} of them, no recomputation"
    return Peer(setting, lambda steps, between: _train(work, rows, steps, between))


def _train(work: Work, rows: int, steps: int, between: Callable[[], None]) -> tuple[list[float], dict[str, float]]:
    import datasets
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []
    facts: dict[str, float] = {}
    rng = np.random.default_rng(0)

    class Timer(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            peak_memory()
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.began)
            facts.update(peak_memory())
            between()

    def reward(completion_ids, **kwargs):
        facts["response_tokens"] = sum(map(len, completion_ids))
        return rng.random(len(completion_ids)).tolist()

    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, max_steps=steps, use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=rows, gradient_accumulation_steps=len(work.prompts) * work.group_size // rows,
            num_generations=work.group_size, max_completion_length=work.response_tokens, temperature=work.temperature,
            generation_kwargs={"min_new_tokens": work.response_tokens}, beta=1e-3, learning_rate=1e-6, shuffle_dataset=False,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows_of_data = datasets.Dataset.from_dict({"prompt": [str(i) for i in range(len(work.prompts))]})
        trainer = GRPOTrainer(
            _model(work), reward, args, train_dataset=rows_of_data, processing_class=work.tokenizer, callbacks=[Timer()]
        )
        trainer.remove_callback(PrinterCallback)
        if not callable(getattr(trainer, "_tokenize_prompts", None)):
            raise ValueError("--against trl: this TRL has another way of tokenizing prompts; install trl>=1.0")
        # A row's text is its number: no text would be sure to encode to a given count of random ids.
        trainer._tokenize_prompts = lambda texts: ([work.prompts[int(text)].tolist() for text in texts], None, {})
        trainer.train()
    return seconds, facts
