# Conveniences; nothing depends on this file.
PYTHON ?= .venv/bin/python

.PHONY: check
check:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest
