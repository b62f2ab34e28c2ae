# make run: train on the embedded market. make test: the test suite. Both set up .venv themselves, once.
# Knobs: make run ARGS="--seed 3"; make venv PYTHON=python3.12 TORCH="torch==2.13.0 --index-url URL_OF_A_CUDA_BUILD"
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
# make test-oldest OLDEST=/path/to/python3.10
OLDEST ?= python3.10

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help run test test-oldest venv clean
.DEFAULT_GOAL := help

help:
	@echo "make run    train tqc_film_batch.py for 300 s on synthetic:regime (ARGS='--seed 3' appends flags)"
	@echo "make test   run the tests that need neither a GPU nor long hours (ARGS='-k pool' appends flags)"
	@echo "make test-oldest  run every script with the oldest versions that requirements.txt allows (OLDEST=$(OLDEST))"
	@echo "make venv   set up .venv only (PYTHON=$(PYTHON), TORCH=$(TORCH))"
	@echo "make clean  remove .venv and caches; runs/ and data/ stay"

run: .venv/.run
	$(BIN)/python cleanrl_crypto/tqc_film_batch.py --ent-coef auto_0.5 --timeout 300 $(ARGS)

test: .venv/.test
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 $(ARGS)

# uv installs the lowest versions; every script trains, writes its report and is evaluated again
test-oldest: .venv-oldest/.run
	.venv-oldest/bin/python -m pytest tests/test_bundle.py -k a_file_runs $(ARGS)

venv: .venv/.run

# a stamp is written last: a set-up that was interrupted starts again
.venv/.run: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
		|| { echo "$(PYTHON) is older than 3.10: set PYTHON=, e.g. make venv PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install $(TORCH)
	$(PIP) install -r requirements.txt
	@touch $@

.venv/.test: requirements-test.txt .venv/.run
	$(PIP) install -r requirements-test.txt
	@touch $@

.venv-oldest/.run: requirements.txt
	test -x .venv-oldest/bin/python || $(OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check install uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct \
		-r requirements.txt "pytest>=8.0" "pytest-xdist>=3.5"
	@touch $@

clean:
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
