"""Rows to prompts: `example` (a task), `jsonl` (files to tasks), `prompt` (tasks to tokens). No jax in here."""
