# Every target installs what it needs into .venv first; a stamp file remembers that, so a second call starts at once.

# The first that is there and new enough; 3.11 is what the constraints were chosen with.
OLD := import sys; sys.exit("bnbref needs Python 3.10 or later, got " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3.10 python3; do \
	$$p -c '$(OLD)' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2
VENV := .venv
BENCH_VENV := build/venv-bench
PIP_INSTALL = -m pip install --disable-pip-version-check -c constraints.txt

# Nothing here needs the network once it is installed: the demo model is part of the package.
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test matrix proofs bench docs board lint clean
.NOTPARALLEL:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.with-hf  ## quantize a small model, and see what changes
	$(VENV)/bin/python -m bnbref demo

test: $(VENV)/.with-test  ## all tests, doctests and code blocks of the pages, without the exhaustive proofs (JOBS=2)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

matrix:  ## the fast suite in fresh environments: versions of Python, torch and transformers, other CPUs; into docs/content/matrix.md
	$(PYTHON) tests/matrix.py --write $(ARGS)

proofs: $(VENV)/.with-test  ## the exhaustive proofs: every float32, every float16, every bfloat16; a table at the end
	$(VENV)/bin/python -m pytest -m slow $(ARGS)

bench: $(BENCH_VENV)/.with-bench  ## benchmarks beside bitsandbytes, torchao and quanto, in an environment of their own
	$(BENCH_VENV)/bin/python benchmarks/cpu.py $(ARGS)
	$(BENCH_VENV)/bin/python benchmarks/first_use.py

docs: $(VENV)/.with-docs  ## the documentation, into docs/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict -f docs/mkdocs.yml

board: $(VENV)/.with-test  ## the board of docs/content/conformance/*.json, as a page and as a drawing
	$(VENV)/bin/python -m bnbref board $(sort $(wildcard docs/content/conformance/*.json)) \
		--html docs/content/conformance/board.html --svg docs/content/board.svg

lint: $(VENV)/.with-test $(VENV)/.with-lint  ## ruff check, ruff format --check, mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:  ## remove everything that make made
	rm -rf $(VENV) build dist docs/site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone, so that the pin decides which build of it is taken; then bnbref, editable, with one extra.
%/bin/pip:
	$(if $(PYTHON),,$(error there is no Python 3.10 or later here: make PYTHON=/path/to/python3.12))
	@$(PYTHON) -c '$(OLD)'
	$(PYTHON) -m venv $*

%/.with-torch: constraints.txt | %/bin/pip
	$*/bin/python $(PIP_INSTALL) torch
	touch $@

define with
%/.with-$(1): pyproject.toml %/.with-torch
	$$*/bin/python $$(PIP_INSTALL) -e '.[$(1)]'
	touch $$@
endef
$(foreach extra,hf test lint docs bench,$(eval $(call with,$(extra))))

.PRECIOUS: %/bin/pip %/.with-torch
