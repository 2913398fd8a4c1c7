# Needs make and Python 3.11 or newer; everything else goes into .venv.
#
#   make setup      create or update .venv; nothing to do while its inputs are unchanged
#   make demo       build the shipped specs and run the demo, in Triton's interpreter
#   make test       all tests that need no GPU
#   make check      all tests that need no GPU, and make static, at once
#   make static     lint, formatting, types, and that generated/ is up to date
#   make test-lowest  fast tests on the lowest releases that pyproject.toml allows, in .venv-lowest
#   make soak       long runs of random requests, forks and ends, and of mixed calls: 20 minutes
#   make test-shapes  kernels of shapes drawn anew, in BUDGET=600 seconds of computing; and what
#                   make test leaves uncompiled, or out of the interpreter
#   make gpu-test   the tests for a GPU; PY=python3 uses an environment of yours
#   make sanitize   some of them under compute-sanitizer: stray accesses and races; SANITIZE_JOBS=8;
#                   SANITIZE=sanitize_short has each algorithm once, sooner done with the kernels
#                   compiled before by SANITIZE_ARGS='--tool none'; SANITIZE_ARGS='--minutes 6'
#                   ends in time, and '--part 1/4' takes a part
#   make docs       build the documentation into site/, a folder of static pages
#   make generate   regenerate what is committed: specs/spec.schema.json, generated/, parts of docs/
#   make clean      remove .venv and caches

PYTHON ?= python3
PY     ?= .venv/bin/python
JOBS   ?= auto
BUDGET ?= 600
SPECS  := specs/llama8b.yaml specs/tiny.yaml
STAMP  := .venv/.stamp

SANITIZER ?= compute-sanitizer
SANITIZE_JOBS ?= 8
SANITIZE ?= sanitize
SANITIZE_ARGS ?=

# One thread a test process: the processes already use every core.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal
# Without a GPU: one process imports and collects, and forks those that run tests.
FORKED := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(PY) -m pytest -q -p tests.forks --forks $(JOBS)
# The interpreter must not see a GPU: it is what stands in for one.
INTERPRETED := TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
# nsagen is not installed there; some tests start processes in other folders.
LOWEST := PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 .venv-lowest/bin/python

# The first process that imports a module stores its bytecode for the many others.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-plain test-interpreter soak test-shapes test-lowest check static gpu-test sanitize docs generate clean

setup: $(STAMP)

$(STAMP): export PIP_CONSTRAINT = constraints.txt
$(STAMP): export PIP_BUILD_CONSTRAINT = constraints.txt
$(STAMP): INSTALL = .venv/bin/python -m pip install --quiet --no-compile
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	# Ahead of all at once, which takes one core: some packages a process, the largest first.
	-sed '/^#/d' constraints.txt | sort -r | xargs -P 3 -n 10 $(INSTALL) --no-deps
	$(INSTALL) --editable '.[dev]'
	# By itself: it asks for an older datasets than trl installs, and its models import none.
	$(INSTALL) --no-deps torchtitan
	touch $@

demo: $(STAMP)
	$(PY) -m nsagen build $(SPECS)
	$(INTERPRETED) $(PY) examples/demo.py

# Two runs, because Triton reads TRITON_INTERPRET when it decorates a kernel.
test: $(STAMP)
	$(MAKE) test-plain
	$(MAKE) test-interpreter

# What is in tests/kernels runs in the interpreter or on a GPU.
test-plain: $(STAMP)
	$(FORKED) -m "not slow and not interpreter and not gpu" --ignore tests/kernels

# Only files that may have such tests: what is collected is imported.
test-interpreter: $(STAMP)
	$(INTERPRETED) $(LATER) env $(FORKED) -m "(kernel or interpreter) and not slow" \
	  tests/kernels $$(grep -rlE 'mark\.(interpreter|kernel)' tests --include='test_*.py')

# Kernels through the interpreter; and what uses torch, pydantic, YAML, Jinja and the command line.
test-lowest: .venv-lowest/.stamp
	$(INTERPRETED) $(LOWEST) -m pytest -q -n $(JOBS) \
	  tests/kernels/test_quick_interpreter.py tests/kernels/test_many_sequences.py
	$(LOWEST) -m pytest -q -n $(JOBS) -m "not slow" \
	  tests/core tests/records tests/spec tests/codegen tests/aot/test_cubin.py \
	  tests/ops/test_api.py tests/ops/test_custom_ops.py

.venv-lowest/.stamp: pyproject.toml lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -r lowest.txt pytest pytest-xdist hypothesis
	touch $@

# 2000 events each; make test has a few.
soak: $(STAMP)
	$(PYTEST) -m slow tests/model/test_soak.py tests/model/test_sharing.py
	$(INTERPRETED) $(PYTEST) -m slow tests/kernels/test_soak.py

# A failure prints the command that runs its shape again.
test-shapes: $(STAMP)
	SHAPES_SECONDS=$(BUDGET) $(INTERPRETED) $(PYTEST) tests/kernels/test_any_shape.py -k many
	SHAPES_SECONDS=$(BUDGET) $(PYTEST) tests/aot/test_any_target.py -k many -rP
	$(PYTEST) -m slow tests/aot tests/codegen/test_selected_attention_backward.py
	$(INTERPRETED) $(FORKED) -m slow tests/kernels \
	  --ignore tests/kernels/test_any_shape.py --ignore tests/kernels/test_soak.py

# At once: many plain tests wait for processes, and leave their core to the others meanwhile. They
# come first: at the end there is only what keeps every core busy.
check: $(STAMP)
	$(MAKE) -j 3 test-plain test-interpreter static LATER='nice -n 5'

static: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m nsagen build --check $(SPECS)
	$(LATER) $(PY) -m pyright --pythonpath $(PY)

gpu-test:
	$(PY) -m pytest -q -m gpu

sanitize:
	$(PY) tests/sanitize.py --sanitizer $(SANITIZER) --jobs $(SANITIZE_JOBS) \
	  --list tests/kernels/$(SANITIZE).txt $(SANITIZE_ARGS)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	$(PY) docs/gallery.py site/gallery
	@echo "open site/index.html"

generate: $(STAMP)
	$(PY) -m nsagen inspect --schema > specs/spec.schema.json
	$(PY) docs/generate.py --support
	$(PY) -m nsagen build --compile $(SPECS)

clean:
	rm -rf .venv .venv-lowest .pytest_cache .ruff_cache .hypothesis site
