# Each target sets up what it needs and can be run first, second or again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHARED := ../shared
REAL := $(or $(WLORA_MERGE_REAL_MODELS),$(HOME)/.cache/wlora_merge/real-models)

# Threads that spin while they wait slow everything down many times where something else shares the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart test test-fast test-servers lint format generate bench bench-onnx bench-start bench-fit zoo clean test-trust

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[onnx,quantize,report,quickstart,dev]'
	touch $@

quickstart: $(VENV)/.ready
	$(BIN)/python recipes/quickstart --out quickstart-out

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# WORKERS processes, of one thread each. ROOM=mixture tests that room alone.
PYTEST := OMP_NUM_THREADS=1 WLORA_MERGE_REAL_MODELS=$(REAL) $(BIN)/pytest -n $(or $(WORKERS),2) --dist worksteal
test: lint real-models
	$(PYTEST) $(if $(ROOM),tests/$(ROOM)_tests)

# What says soonest that something is broken: every room, without real models, tracing, processes and quantizers.
test-fast: $(VENV)/.ready
	$(PYTEST) -m "not real and not slow"

# The long form of the tests of trust, with counts: CASES hostile files of each kind, ROUNDS kills of each command.
test-trust: $(VENV)/.ready
	WLORA_MERGE_FUZZ_CASES=$(or $(CASES),300) WLORA_MERGE_TRUST_ROUNDS=$(or $(ROUNDS),150) $(BIN)/pytest -s \
		tests/trust tests/io_tests/test_staging.py tests/io_tests/test_locks.py tests/io_tests/test_signals.py \
		tests/exporters_tests/test_verify_files.py tests/io_tests/test_untrusted.py

# The two real base models that some tests use; the tests skip, with a reason, where the tool that fetches them is absent.
.PHONY: real-models
real-models: $(VENV)/.ready
	@if [ -f $(SHARED)/tools/get_real_models.py ] && [ ! -f $(REAL)/smollm2/model.safetensors ]; then \
		PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(SHARED)/tools/get_real_models.py $(REAL) || \
		echo "real models could not be had; tests that need them will skip"; fi

# The export against PEFT's merge and cp, on a synthetic Llama of 1.1 B parameters; SIZE=125m is smaller.
bench: $(VENV)/.ready
	$(BIN)/python recipes/bench_export.py --size $(or $(SIZE),1b)

# A refold and a kept graph against exporting to ONNX again, on SmolLM2 and four adapters of the shared zoo; ROUNDS=2 is shorter.
bench-onnx: $(VENV)/.ready real-models
	$(BIN)/python recipes/bench_onnx.py --base $(REAL)/smollm2 --rounds $(or $(ROUNDS),4) \
		$(foreach name,mpqa sst2 subj trec,--adapter $(SHARED)/zoo/smollm2-tasks/$(name))

# From Enter to the answer: common mistakes and inspect, on SmolLM2 and four adapters of the shared zoo.
bench-start: $(VENV)/.ready real-models
	$(BIN)/python recipes/bench_start.py --base $(REAL)/smollm2 --rounds $(or $(ROUNDS),5) \
		$(foreach name,mpqa sst2 subj trec,--adapter $(SHARED)/zoo/smollm2-tasks/$(name))

# Few shots: every method on the same tasks, and a training step against the base's own. Hours: JOBS, SHOTS and SEEDS make it shorter.
bench-fit: $(VENV)/.ready real-models
	WLORA_MERGE_REAL_MODELS=$(REAL) $(BIN)/python recipes/bench_fit speed
	WLORA_MERGE_REAL_MODELS=$(REAL) $(BIN)/python recipes/bench_fit quality $(if $(JOBS),--jobs $(JOBS)) \
		$(if $(SHOTS),--shots $(SHOTS)) $(if $(SEEDS),--seeds $(SEEDS))

# Adapters to measure on: 72 of MiniLM and 24 of SmolLM2, from the data of the shared folder; OUT=folder says where.
zoo: $(VENV)/.ready real-models
	WLORA_MERGE_REAL_MODELS=$(REAL) $(BIN)/python recipes/zoo --out $(or $(OUT),zoo-out)

# Real programs (vLLM, llama.cpp, transformers.js in Chromium, ...) load exports and agree with transformers; each has an environment
# in .servers. SERVERS=vllm asks one; gigabytes and half an hour the first time.
test-servers: $(VENV)/.ready real-models
	WLORA_MERGE_REAL_MODELS=$(REAL) $(BIN)/python recipes/servers $(SERVERS)

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What is made from the options and the records of files: schemas, the reference page of the command line, parts of other pages.
generate: $(VENV)/.ready
	$(BIN)/python -m wlora_merge.cli.recipe_schema > wlora_merge/cli/schemas/recipe.schema.json
	$(BIN)/python -m wlora_merge.cli.file_schemas
	$(BIN)/python -m wlora_merge.cli.reference > docs/cli-reference.md
	$(BIN)/python docs/fill.py
	$(BIN)/python docs/draw_way.py > docs/way.svg

clean:
	rm -rf $(VENV) quickstart-out bench-out zoo-out
