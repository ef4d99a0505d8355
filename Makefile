# Every target creates .venv. PYTHON=/path/to/python uses that interpreter as it is instead: nothing
# is installed, the network is not used, and the package runs from this checkout.

ifdef PYTHON
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := .venv/bin/python
READY := .venv/installed
endif

# A file of tests a worker, one thread each, if pytest-xdist is installed: the suite is mostly Python.
WORKERS = $$($(PY) -c 'import importlib.util as u; print("-n auto --dist loadfile" if u.find_spec("xdist") else "")')
.PHONY: help demo test bench readme lint gpu compile-matrix newest fuzz peers

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=interpreter, used as it is; MINUTES, SEED, JOBS of fuzz; CHECKOUTS, SUITES of peers; OUT=folder for the results of demo, bench and gpu; of gpu: BUDGET=seconds"
	@echo "after which it ends, SLICES='bench-* test-card' only these (tools/gpu.py lists them), DRY=1 small, on a CPU"

demo: $(READY) ## train FLUID with two backends, time the op, draw the curves (OUT, default demo_out)
	$(PY) -m mmfused demo --out $(or $(OUT),demo_out)

test: $(READY) ## run the test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(WORKERS)

bench: $(READY) ## check and time every op on this machine
	set -e; for op in $$($(PY) -c 'from mmfused.ops import OPS; print(*OPS)'); do $(PY) benchmarks/run.py $$op $(if $(OUT),--out $(OUT)); done

readme: $(READY) ## make README's numbers and pictures from benchmarks/results
	$(PY) tools/readme.py

lint: $(READY) ## check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) tools/check_types.py

fuzz: $(READY) ## random calls of every public function against the float64 reference, for MINUTES (default 10), with new seeds
	OMP_NUM_THREADS=1 $(PY) tests/fuzzing.py --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--workers $(JOBS))

compile-matrix: $(READY) ## compile every kernel for every supported GPU and Triton; resumes
	$(PY) tools/compile_matrix.py

newest: $(READY) ## compile a few kernels on the newest Triton of the package index
	$(PY) tools/compile_matrix.py --newest

peers: $(READY) ## run suites of sentence-transformers, open_clip and transformers plain and fused, from their clones in CHECKOUTS
	$(PY) tools/peers.py $(if $(CHECKOUTS),--checkouts $(CHECKOUTS)) $(SUITES)

gpu: $(READY) ## on a CUDA GPU: suite, sanitizer, benchmarks, choices; resumes (BUDGET, SLICES, DRY)
	$(PY) tools/gpu.py $(if $(BUDGET),--budget-seconds $(BUDGET)) $(if $(OUT),--out $(OUT)) $(if $(DRY),--dry-run) $(SLICES)

.venv/installed: pyproject.toml setup.py
	python3 -c 'import sys; sys.version_info >= (3, 10) or sys.exit("mmfused needs Python 3.10 or newer as python3.")'
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --editable ".[dev]"
	touch $@
