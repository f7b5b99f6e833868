# make demo and make test set themselves up on a fresh clone: a virtual environment in .venv, pinned versions, the package.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest transformers that is supported, and the one that serving environments install; $(VENV) has the newest.
OTHER_TRANSFORMERS := 5.16.0 5.19.0
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint types unit compatibility clean

demo: $(VENV)/.installed
	$(BIN)/hylo demo --quick --out runs/demo

test: lint types unit compatibility

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

unit: $(VENV)/.installed
	$(BIN)/pytest

compatibility: $(OTHER_TRANSFORMERS:%=compatibility-%)

compatibility-%: $(VENV)/.transformers-%
	PYTHONPATH=$(VENV)/transformers-$* $(BIN)/python -m pytest tests/modeling tests/parity

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Another transformers in a folder of its own, with the hub client and tokenizers that it asks for.
$(VENV)/.transformers-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --target $(VENV)/transformers-$* transformers==$*
	touch $@

clean:
	rm -rf $(VENV) runs
