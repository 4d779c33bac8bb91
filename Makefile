# Conveniences; nothing depends on this file.
PYTHON ?= .venv/bin/python

.PHONY: install train smoke resume evaluate curves test mutants check benchmark ladder speed readme clean

install: ## the environment of tests and runs
	python3 -m venv .venv && $(PYTHON) -m pip install -r requirements-dev.txt

train: ## the default run, less than a minute
	$(PYTHON) train_grpo.py

smoke: ## does everything work here?
	$(PYTHON) train_grpo.py --config configs/cpu_smoke.yaml

resume: ## go on with an interrupted run
	$(PYTHON) train_grpo.py --resume

evaluate: ## the trained model against its base, on problems never used to choose anything
	$(PYTHON) evaluate.py checkpoints/final --compare tiny --data data/math_tasks_test.jsonl

curves: ## redraw the picture of the run
	$(PYTHON) -m grpo.run.plots checkpoints

test: ## everything but the slow tests
	$(PYTHON) -m pytest -q -m "not slow"

mutants: ## break the code on purpose, see the tests notice
	$(PYTHON) -m tests.mutants

check: ## what a commit must pass
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest

benchmark: ## learning: ten seeds and two controls, a quarter of an hour
	$(PYTHON) -m benchmarks.toy

ladder: ## what each idea is worth: every row of docs/ABLATIONS.md, an hour and a half; goes on where it stopped
	$(PYTHON) -m benchmarks.ladder
	$(PYTHON) -m benchmarks.ladder.picture

speed: ## time and memory, beside TRL and Hugging Face's generate, 22 minutes
	$(PYTHON) -m benchmarks

readme: ## carry measured numbers into the READMEs
	$(PYTHON) -m benchmarks.readme

clean: ## caches of the tools; runs stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
