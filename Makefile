# Targets create .venv and install the package there. With PYTHON=/path/to/python they use that
# interpreter instead and install nothing; the package is imported from this checkout.

ifdef PYTHON
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := .venv/bin/python
READY := .venv/installed
endif

# If pytest-xdist is installed, run the test files in parallel, each file in one worker.
WORKERS = $$($(PY) -c 'import importlib.util as u; print("-n auto --dist loadfile" if u.find_spec("xdist") else "")')
# Tests whose kernels are their own: arguments of all kinds, TMA, Gluon.
PTX_OWN = ptx_arguments ptx_gluon ptx_tma
# What `make test` runs on compiled PTX: every kernel once and, for sm_90, models whose losses show
# the numbers, and some kernels of the tests.
PTX_PART = tests/test_sanitize.py tests/test_ptx_training.py $(PTX_OWN:%=tests/test_%.py) \
	-k "reach_every_kernel or fluid or members_of_tuples or projection or producer or fence"
# The files whose tests launch kernels.
PTX_OPS = query_pooling gated_cross_attention topk_routing grouped_mlp masked_info_nce
PTX_FILES = benchmarks export flops fuse_attention fuse_moe fuzz gpu_slices on_cuda ptx_training sanitize \
	strides switch $(PTX_OWN)
PTX_TESTS = $(wildcard $(PTX_OPS:%=tests/test_%*.py)) $(PTX_FILES:%=tests/test_%.py)
# The folder of another Triton, which is downloaded if it is missing.
TRITON_FOLDER = $$(PYTHONPATH=tools $(PY) -c 'import compile_matrix as m; print(m.triton_folder("$(TRITON)"))')
.PHONY: help demo test ptx docs bench results end-to-end lint lint-github gpu compile-matrix newest fuzz peers

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=interpreter to use instead of .venv; OUT=folder for the results of demo, bench and gpu;"
	@echo "fuzz: MINUTES, SEED, JOBS; peers: CHECKOUTS, SUITES; gpu: BUDGET=seconds after which it stops,"
	@echo "SLICES='bench-* test-card' to run (listed in tools/gpu.py), DRY=1 for small sizes on a CPU."

demo: $(READY) ## train FLUID with two backends, time query pooling and draw the curves (OUT, default: demo_out)
	$(PY) -m mmfused demo --out $(or $(OUT),demo_out)

test: $(READY) ## run the test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(WORKERS)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(subst loadfile,load,$(WORKERS)) --ptx 90 $(PTX_PART)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(subst loadfile,load,$(WORKERS)) --ptx 80 tests/test_sanitize.py -k reach_every_kernel

ptx: $(READY) ## run all tests of kernels as compiled for sm_80 and sm_90, on a CPU (ARCHS, TRITON=3.6.0)
	set -e; $(if $(TRITON),folder=$(TRITON_FOLDER); export PYTHONPATH=$$folder:$$PYTHONPATH;) \
	for arch in $(or $(ARCHS),80 90); do \
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(WORKERS) --ptx $$arch --ptx-schedules all $(PTX_TESTS); done

docs: $(READY) ## build the site in docs/_build/html and run the examples of its pages and docstrings
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	$(PY) -m sphinx -W --keep-going -q -b doctest docs docs/_build/doctest

bench: $(READY) ## check and time every op on this machine
	set -e; for op in $$($(PY) -c 'from mmfused.ops import OPS; print(*OPS)'); do $(PY) benchmarks/run.py $$op $(if $(OUT),--out $(OUT)); done

results: $(READY) ## update the numbers and pictures of README and docs from benchmarks/results
	$(PY) tools/results_pages.py

end-to-end: $(READY) ## count and time the ops' share of whole training steps (MODELS, OUT)
	$(PY) tools/end_to_end.py $(MODELS) $(if $(OUT),--out $(OUT))

lint: $(READY) lint-github ## check style, formatting, types, and the files in .github
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) tools/check_types.py

# Also run by .pre-commit-config.yaml. zizmor is a program without a Python module.
SCHEMA = $(PY) -m check_jsonschema --builtin-schema
lint-github: $(READY)
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/zizmor --offline --quiet .github

fuzz: $(READY) ## compare random calls of every public function with the float64 reference, for MINUTES (default 10)
	OMP_NUM_THREADS=1 $(PY) tests/fuzzing.py --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--workers $(JOBS))

compile-matrix: $(READY) ## compile every kernel (of OP) for every supported GPU architecture and Triton version; resumes
	$(PY) tools/compile_matrix.py $(if $(OP),--op $(OP))

newest: $(READY) ## compile a few kernels with the newest Triton of the package index
	$(PY) tools/compile_matrix.py --newest

peers: $(READY) ## run tests of sentence-transformers, open_clip and transformers without and with mmfused, from clones in CHECKOUTS
	$(PY) tools/peers.py $(if $(CHECKOUTS),--checkouts $(CHECKOUTS)) $(SUITES)

gpu: $(READY) ## run tests, compute-sanitizer and benchmarks on a CUDA GPU; resumes
	$(PY) tools/gpu.py $(if $(BUDGET),--budget-seconds $(BUDGET)) $(if $(OUT),--out $(OUT)) $(if $(DRY),--dry-run) $(SLICES)

.venv/installed: pyproject.toml setup.py
	python3 -c 'import sys; sys.version_info >= (3, 10) or sys.exit("mmfused needs python3 to be Python 3.10 or newer.")'
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --editable ".[dev]"
	touch $@
