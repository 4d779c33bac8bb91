# Shortcuts for common commands. Nothing depends on this file.
PYTHON ?= .venv/bin/python

.PHONY: install train smoke resume evaluate curves test mutants check benchmark ladder speed readme clean

install: ## create the environment for runs and tests
	python3 -m venv .venv && $(PYTHON) -m pip install -r requirements-dev.txt

train: ## start the default run, which takes less than a minute
	$(PYTHON) train_grpo.py

smoke: ## test that everything works, with a run of about ten seconds
	$(PYTHON) train_grpo.py --config configs/cpu_smoke.yaml

resume: ## continue an interrupted run
	$(PYTHON) train_grpo.py --resume

evaluate: ## compare the trained model with its base, on problems that were used for no choice
	$(PYTHON) evaluate.py checkpoints/final --compare tiny --data data/math_tasks_test.jsonl

curves: ## redraw the picture of the run
	$(PYTHON) -m grpo.run.plots checkpoints

test: ## run all tests except the slow ones
	$(PYTHON) -m pytest -q -m "not slow"

mutants: ## insert bugs into the code and check that tests fail
	$(PYTHON) -m tests.mutants

check: ## run all checks that a commit must pass
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest

benchmark: ## measure learning: ten seeds and two controls, 15 minutes
	$(PYTHON) -m benchmarks.toy

ladder: ## measure every row of docs/ABLATIONS.md, an hour and a half; continues where it stopped
	$(PYTHON) -m benchmarks.ladder
	$(PYTHON) -m benchmarks.ladder.picture

speed: ## measure time and memory, compared with TRL and Hugging Face's generate, 22 minutes
	$(PYTHON) -m benchmarks

readme: ## write the measured numbers into the READMEs
	$(PYTHON) -m benchmarks.readme

clean: ## delete the caches of the tools; runs are kept
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
