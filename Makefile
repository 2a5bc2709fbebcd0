# `make` prints the targets. Everything is made inside the checkout, nearly all of it in .venv;
# downloads land in the package cache. Settings: PYTHON=..., UV=..., PYTEST_ARGS=...

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.stamps/project
LOCK := requirements/dev.txt
IMAGE_LOCK := requirements/image.txt
BENCH_LOCK := requirements/bench.txt
PYTEST_ARGS ?=

# An ordinary user may have no home that can be written: then the cache moves into the checkout.
UV_CACHE_DIR ?= $(shell cache="$${XDG_CACHE_HOME:-$$HOME/.cache}/uv"; \
    if mkdir -p "$$cache" 2>/dev/null && [ -w "$$cache" ]; then echo "$$cache"; else echo "$(CURDIR)/$(VENV)/.cache/uv"; fi)
# Hard links would share files with the cache (servers from wheels get their owner changed) and warn across file systems.
UV_LINK_MODE ?= copy
# Companies' proxies sign with authorities that only the system's bundle knows, where there is one.
UV_SYSTEM_CERTS ?= $(if $(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem),true,false)
UV_NO_PROGRESS ?= 1
export UV_CACHE_DIR UV_LINK_MODE UV_SYSTEM_CERTS UV_NO_PROGRESS
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# The checkout may lie inside another virtual environment's shell: ours is named explicitly everywhere.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH
# Without bytecode each process of a test run compiles every module it imports: two thirds of its start.
unexport PYTHONDONTWRITEBYTECODE

say = @printf '%s\n' '-- $(1)'

.PHONY: help
help: ## Print this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

# ---------------------------------------------------------------- environment

.PHONY: setup
setup: $(READY) ## Make .venv: a Python >= 3.11, the locked packages, this project

$(VENV)/.stamps/python:
	@PYTHON="$(PYTHON)" UV="$(UV)" LOCK="$(LOCK)" sh tools/make_venv.sh $(VENV)
	@mkdir -p $(@D) && touch $@

$(VENV)/.stamps/lock: $(LOCK) $(VENV)/.stamps/python
	$(call say,installing the locked packages from $(LOCK))
	@uv=$$(sh tools/find_uv.sh $(VENV) "$(UV)") && \
	    "$$uv" pip install --quiet --python $(BIN)/python --require-hashes -r $(LOCK)
	@touch $@

# In a command of its own: --require-hashes refuses an editable install beside it. The build backend is in the lock.
$(READY): pyproject.toml $(VENV)/.stamps/lock
	$(call say,installing this project)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: up
up: $(READY) ## Run a local Postgres and Redis in the foreground, until Ctrl-C
	$(call say,starting Postgres and Redis on free local ports; Ctrl-C stops them)
	@exec $(BIN)/python -m docket_celery.devserver

.PHONY: clean
clean: ## Remove everything that make created, the environment included
	$(call say,removing the environment and all caches and build results)
	@rm -rf $(VENV) .docket dist build htmlcov .coverage .coverage.* .hypothesis .pytest_cache .mypy_cache \
	    .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --------------------------------------------------------------------- checks

.PHONY: fmt
fmt: $(READY) ## Format the code and apply safe fixes
	$(call say,formatting)
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --quiet .

.PHONY: lint
lint: $(READY) ## Check format, lint rules, spelling, prose, project file, changelog fragments
	$(call say,format and rules; spelling; project file; changelog fragments)
	@fault=0; $(BIN)/ruff format --check . || fault=1; $(BIN)/ruff check . || fault=1; $(BIN)/codespell || fault=1; \
	    $(BIN)/python tools/prose.py || fault=1; \
	    $(BIN)/validate-pyproject pyproject.toml || fault=1; \
	    $(BIN)/towncrier build --draft --version next > /dev/null || fault=1; exit $$fault

.PHONY: types
types: $(READY) ## Check types: mypy strict and pyright strict
	$(call say,mypy and pyright)
	@fault=0; $(BIN)/mypy || fault=1; $(BIN)/basedpyright || fault=1; exit $$fault

.PHONY: arch
arch: $(READY) ## Check that modules import downward only
	$(call say,import contracts)
	@PYTHONPATH=. $(BIN)/lint-imports --no-cache --no-logo

.PHONY: proto
proto: $(READY) ## Generate *_pb2.py and *_pb2.pyi beside each .proto
	@$(BIN)/python tools/proto.py

.PHONY: docs
docs: $(READY) ## Write the generated parts of docs/errors.md, docs/reference.md and docs/contributing/map.md
	@$(BIN)/python -m tests.error_page
	@$(BIN)/python -m tools.draw_map
	@$(BIN)/python -m tools.reference

.PHONY: proto-check
proto-check: $(READY) ## Check that the committed generated code is what the .proto files give
	@$(BIN)/python tools/proto.py --check

# ---------------------------------------------------------------------- tests

# The tests' scratch folders: inside the checkout too, and numbered per run.
PYTEST := mkdir -p $(VENV)/.scratch && PYTEST_DEBUG_TEMPROOT=$(VENV)/.scratch $(BIN)/pytest

# Most tests wait for real workers: more processes than cores. A file stays in one process, as its worker does;
# files start in the order of tests/conftest.py.
AT_ONCE ?= 4
PARALLEL := -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder
MOST := not slow and not faults and not rabbitmq

.PHONY: test
test: $(READY) ## Run the suite without its slow rest, from nothing: servers included; AT_ONCE=4 processes
	$(call say,pytest)
	@$(PYTEST) $(PARALLEL) -m "$(MOST)" $(PYTEST_ARGS)

.PHONY: test-all
test-all: $(READY) ## Run the whole suite: also nested test runs, killed demos, all examples
	$(call say,pytest)
	@$(PYTEST) $(PARALLEL) $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(READY) ## Run what `make test-all` runs beyond `make test`
	@$(PYTEST) $(PARALLEL) -m slow $(PYTEST_ARGS)

.PHONY: test-unit
test-unit: $(READY) ## Run the tests that start no server
	@$(PYTEST) $(PARALLEL) tests/unit $(PYTEST_ARGS)

.PHONY: test-integration
test-integration: $(READY) ## Run the tests on real servers and workers
	@$(PYTEST) $(PARALLEL) tests/conformance tests/integration $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: $(READY) ## Kill children at random moments, in KILL_BATCHES=2 batches too; many random graphs; takes minutes
	@PROPERTY_EXAMPLES=20 $(PYTEST) tests/unit/test_properties_runs.py tests/unit/test_properties_series.py -o timeout=1800 -o faulthandler_timeout=0 $(PYTEST_ARGS)
	@# These take minutes: pytest's dump of what runs for 100 s looks at frames that change meanwhile, and has crashed.
	@$(PYTEST) -m faults -o faulthandler_timeout=0 $(PYTEST_ARGS)

.PHONY: rabbitmq
rabbitmq: ## Install RabbitMQ, as root on Debian or Ubuntu, or say how
	@sh tools/rabbitmq.sh

.PHONY: test-rabbitmq
test-rabbitmq: $(READY) ## Run the tests that need a RabbitMQ, on one of their own
	@sh tools/rabbitmq.sh check
	@$(PYTEST) tests/integration -m rabbitmq $(PYTEST_ARGS)

.PHONY: demo
demo: $(READY) ## Show the main job: a graph in parallel, a killed worker, one charge
	$(call say,the demo: real servers and a real worker)
	@exec $(BIN)/python -m examples.demo

# ----------------------------------------------------------------- benchmarks

# The peers' packages have an environment of their own: they must not decide what the tests run with.
PEERS := $(VENV)/bench

$(VENV)/.stamps/bench: $(BENCH_LOCK) $(VENV)/.stamps/lock
	$(call say,installing the peers from $(BENCH_LOCK))
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(PEERS)
	@$(BIN)/uv pip install --quiet --python $(PEERS)/bin/python --require-hashes -r $(BENCH_LOCK)
	@touch $@

.PHONY: bench
bench: $(READY) $(VENV)/.stamps/bench ## Measure beside the peers, resuming; ONLY=persisted_chain FRESH=1 FULL=1
	@exec $(BIN)/python -m benchmarks run --only "$(ONLY)" $(if $(FRESH),--fresh) $(if $(FULL),--full)

.PHONY: bench-compare
bench-compare: $(READY) ## Measure this library at REF=COMMIT and as it is, in turns; ONLY=...
	@exec $(BIN)/python -m benchmarks compare "$(REF)" --only "$(ONLY)"

.PHONY: bench-keep
bench-keep: $(READY) ## Make what `make bench` measured of this code the committed results, and write the page
	@$(BIN)/python -m benchmarks keep
	@$(MAKE) bench-report

.PHONY: bench-report
bench-report: $(READY) $(VENV)/.stamps/bench ## Write docs/performance.md and its plots from the committed results
	@$(BIN)/python -m benchmarks report
	@$(PEERS)/bin/python -m benchmarks.plots

.PHONY: simulate
simulate: $(READY) ## Measure what runs cost on each server, simulate larger sites, write docs/scaling.md
	@exec $(BIN)/python -m benchmarks.simulate --measure

# ---------------------------------------------------------- lock and delivery

COMPILE := pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
    --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'
COMPILE_DEV := $(COMPILE) --extra dev --extra gevent --group dev pyproject.toml
COMPILE_IMAGE := $(COMPILE) --group image pyproject.toml
COMPILE_BENCH := $(COMPILE) --group bench pyproject.toml

.PHONY: lock
lock: $(READY) ## Bring requirements/*.txt up to date with pyproject.toml; UPGRADE=1 takes newer versions
	$(call say,resolving)
	@$(BIN)/uv $(COMPILE_DEV) $(if $(UPGRADE),--upgrade) -o $(LOCK) > /dev/null
	@$(BIN)/uv $(COMPILE_IMAGE) $(if $(UPGRADE),--upgrade) --constraint $(LOCK) -o $(IMAGE_LOCK) > /dev/null
	@$(BIN)/uv $(COMPILE_BENCH) $(if $(UPGRADE),--upgrade) --constraint $(LOCK) -o $(BENCH_LOCK) > /dev/null

# Resolves again with the committed pins as preferences: a lock that satisfies pyproject.toml comes back unchanged.
.PHONY: lock-check
lock-check: $(READY) ## Check that requirements/*.txt are what pyproject.toml asks for
	$(call say,lock)
	@mkdir -p $(VENV)/.stamps/lock-check && cp $(LOCK) $(IMAGE_LOCK) $(BENCH_LOCK) $(VENV)/.stamps/lock-check/
	@for try in 1 2 3; do \
	    if $(BIN)/uv $(COMPILE_DEV) -o $(VENV)/.stamps/lock-check/dev.txt > /dev/null && \
	        $(BIN)/uv $(COMPILE_IMAGE) --constraint $(LOCK) -o $(VENV)/.stamps/lock-check/image.txt > /dev/null && \
	        $(BIN)/uv $(COMPILE_BENCH) --constraint $(LOCK) -o $(VENV)/.stamps/lock-check/bench.txt > /dev/null; \
	    then break; elif [ $$try = 3 ]; then exit 1; else sleep $$((try * 5)); fi; done
	@for lock in $(LOCK) $(IMAGE_LOCK) $(BENCH_LOCK); do \
	    diff -u $$lock $(VENV)/.stamps/lock-check/$${lock##*/} || { echo "$$lock is out of date: run make lock" >&2; exit 1; }; \
	    done

.PHONY: wheel
wheel: $(READY) ## Build the wheel and prove it: its content, and an import outside the checkout
	$(call say,wheel)
	@rm -rf dist && $(BIN)/uv build --quiet --no-build-isolation --python $(BIN)/python --wheel --sdist
	@$(BIN)/python tools/check_wheel.py dist

.PHONY: ci
ci: ## Run exactly what CI runs
	@bash .ci/run
