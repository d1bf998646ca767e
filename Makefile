# Every target does its own set-up: `make quickstart` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: help quickstart test test-all lint format bench faults gpu gpu-finetune clean
help:
	@echo "make quickstart  train a small model on Python's standard library, about 6 minutes on 2 cores"
	@echo "make test        the tests, about 9 minutes on 2 cores      make test-all  the slow ones too"
	@echo "make lint        ruff and mypy                              make format    ruff, changing files"
	@echo "make bench       speed against other programs, an hour      make gpu       tests and benchmarks on a CUDA GPU"
	@echo "make faults      kills, damage, mistakes: docs/faults.md, docs/bad-input.md"

# The range of torch in pyproject.toml lets pip take a CPU build where one is at hand.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "modelyard needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

quickstart: $(READY)
	$(BIN)/python examples/quickstart/run.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'slow or not slow'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	for name in train_step sft finetune prepare start_up checkpoint; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/tables.py --write

# Kills, damage, mutated configs and mistakes; about half an hour.
faults: $(READY)
	$(BIN)/python benchmarks/faults.py --write-docs
	$(BIN)/python benchmarks/bad_input.py --write-docs

# Runs with the python that is there: no virtual environment, no network, torch >= 2.11 alone. The core; PART=1 to 4: the rest.
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(PART),--part $(PART))

# Full, LoRA and QLoRA of three shapes, and the longest sequences that fit; about half an hour.
gpu-finetune:
	$(PYTHON) benchmarks/finetune_gpu.py

clean:
	rm -rf $(VENV) build quickstart
