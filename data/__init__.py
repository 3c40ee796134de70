"""Rows to prompts: `example` (what a task is), `jsonl` (files to tasks), `prompt` (tasks to tokens). Never imports jax."""
