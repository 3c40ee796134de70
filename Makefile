# Two commands that do everything by themselves: `make demo` and `make test`.
PYTHON ?= python3

demo: .venv/demo
	.venv/bin/python -m grpo_jax.train demo --run.dir runs/demo

test: .venv/test
	.venv/bin/python -m pytest -n 2

.venv/%: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet --editable '.$(if $(filter test,$*),[test])'
	touch $@

# The versions with which the tests are run, for .ci/run: those that are installed here (a local version, "+cpu", is left out).
requirements.lock: .venv/test
	.venv/bin/python -m pip freeze --all --exclude-editable | sed 's/+.*//' > $@

.PHONY: demo test
