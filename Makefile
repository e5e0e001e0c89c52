# make demo     one decode step of DeepSeek-V4, on the GPU or, without one, in the emulator (ARGS="--save plan.png")
# make test     the tests (ARGS="-k metadata")
# make fuzz     500 random problems for each function, under the sanitizers, and 500 with garbage
# make soak     100,000 calls over shapes, streams and threads; nothing may grow
# make bench    times on a card from SM89 up, into bench-<card>-<date>/ (ARGS="--quick")
# make silicon  ours beside NVIDIA's SM120 kernels, on SM120 or, with the MMA of both replaced, an H100
# make silicon-sparse  the same for sparse logits
# make silicon-step    the same for the whole indexer step, logits and top-k
# make report   docs/performance/: our kernels counted and modelled, beside NVIDIA's, which it fetches
# make wheel    the wheel, into dist/
# make lint     the style check
# make test-clients  SGLang's own classes on our wheel, in an environment of their own (Python 3.11 or later)
# make test-vllm     vLLM's indexer on our wheel; fetches vLLM's wheel, 0.3 GB (Python 3.11 or later)
# make test-upstream DeepGEMM's own tests of the logits, if the submodule is checked out (ARGS="--cases 40")
# make test-wheel  the full wheel where upstream's library loads: in an environment of its own, 5.5 GB
# make clean    removes the environments and what was built
# DG_UPSTREAM=none with any of them: without upstream's package, nothing of it is fetched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KIND := $(if $(filter none,$(DG_UPSTREAM)),lean,full)
SOURCES := setup.py pyproject.toml upstream.txt LICENSE NOTICE $(wildcard README.md) \
	$(shell find sm120 -name __pycache__ -prune -o -print)

.PHONY: demo test fuzz soak bench silicon silicon-sparse silicon-step report wheel lint test-clients test-vllm test-upstream test-wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.$(KIND)
	$(BIN)/python tools/demo.py $(ARGS)

test: $(VENV)/.$(KIND)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

fuzz: $(VENV)/.$(KIND)
	$(BIN)/python -m pytest --hypothesis-profile=fuzz tests/test_fuzz.py tests/test_garbage.py tests/test_topk_garbage.py $(ARGS)
	$(BIN)/python -m pytest --hypothesis-profile=fuzz -k "garbage or any_" tests/test_block_max.py tests/test_sparse_topk.py $(ARGS)

soak: $(VENV)/.$(KIND)
	$(BIN)/python -m pytest --soak=100000 tests/test_soak.py $(ARGS)

bench: $(VENV)/.$(KIND)
	$(BIN)/python tools/bench/bench.py $(ARGS)

silicon: $(VENV)/.$(KIND)
	$(BIN)/python tools/evidence/silicon.py $(ARGS)

silicon-sparse: $(VENV)/.$(KIND)
	$(BIN)/python tools/evidence/silicon_sparse.py run $(ARGS)

silicon-step: $(VENV)/.$(KIND)
	$(BIN)/python tools/evidence/silicon_step.py $(ARGS)

report: $(VENV)/.$(KIND)
	$(BIN)/python tools/evidence/report.py
	$(BIN)/python tools/evidence/schedules.py
	$(BIN)/python tools/evidence/sidebyside.py

wheel: dist/.$(KIND)
	@ls dist/*.whl

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-clients: $(VENV)-clients/.ready dist/.$(KIND)
	$(VENV)-clients/bin/pip install --quiet --no-deps --force-reinstall dist/*.whl
	$(VENV)-clients/bin/python -m pytest tests/client_sglang.py $(ARGS)

test-vllm: $(VENV)/.$(KIND) build/vllm/.ready
	DG_VLLM_WHEEL=$$(ls build/vllm/*.whl) $(BIN)/python -m pytest tests/client_vllm.py $(ARGS)

test-upstream: $(VENV)/.$(KIND)
	$(BIN)/python tools/run_upstream_tests.py $(ARGS)

test-wheel: $(VENV)-wheel/.ready dist/.full
	$(VENV)-wheel/bin/python -m pytest tests/full_wheel.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-clients $(VENV)-wheel build dist sm120/*.egg-info

# The third-party packages; their versions are in requirements.txt alone.
$(VENV)/.requirements: requirements.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

dist/.$(KIND): $(VENV)/.requirements $(SOURCES)
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	touch $@

# Our wheel, again whenever a source of it changed: tests and demo run what a user installs, not the source tree.
$(VENV)/.$(KIND): dist/.$(KIND)
	$(BIN)/pip install --quiet --no-deps --force-reinstall dist/*.whl
	rm -f $(VENV)/.lean $(VENV)/.full
	touch $@

$(VENV)-clients/.ready: requirements.txt requirements-clients.txt
	test -x $(VENV)-clients/bin/pip || $(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/pip install --quiet --requirement requirements.txt
	$(VENV)-clients/bin/pip install --quiet --no-deps --requirement requirements-clients.txt
	touch $@

build/vllm/.ready: $(VENV)/.requirements
	rm -rf build/vllm
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --dest build/vllm vllm==0.33.0
	touch $@

# PyTorch's CUDA build, of the release that upstream's library is built against, and the test runner.
$(VENV)-wheel/.ready: requirements.txt
	test -x $(VENV)-wheel/bin/pip || $(PYTHON) -m venv $(VENV)-wheel
	grep -E '^(pytest|hypothesis)==' requirements.txt | \
		$(VENV)-wheel/bin/pip install --quiet --requirement /dev/stdin torch==2.14.1
	touch $@
