# Every target makes .venv by itself. PYTHON=/path/to/python uses that interpreter as it is instead: nothing is installed,
# no network is touched, and the package runs from this checkout.
OPS := query_pooling masked_info_nce topk_routing grouped_mlp gated_cross_attention

ifdef PYTHON
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := .venv/bin/python
READY := .venv/installed
endif

# A file of tests to a worker, a thread to each, where pytest-xdist is there: the suite is mostly Python.
WORKERS = $$($(PY) -c 'import importlib.util as u; print("-n auto --dist loadfile" if u.find_spec("xdist") else "")')
GPU_BENCHES := $(OPS:%=gpu-bench-%)
.PHONY: help demo test bench readme lint gpu gpu-check gpu-test $(GPU_BENCHES)

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=interpreter, used as it is; OUT=folder for the results of demo, bench and gpu"

demo: $(READY) ## train FLUID with two backends, time the op, draw the curves (OUT, default demo_out)
	$(PY) -m mmfused demo --out $(or $(OUT),demo_out)

test: $(READY) ## run the test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(WORKERS)

bench: $(READY) ## gate and time every op on this machine
	set -e; for op in $(OPS); do $(PY) benchmarks/run.py $$op $(if $(OUT),--out $(OUT)); done

readme: $(READY) ## make README's numbers and pictures from benchmarks/results
	$(PY) benchmarks/readme.py

lint: $(READY) ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# One recipe, not prerequisites: neither -j nor -k may start a benchmark beside or after a red suite.
gpu: ## on a CUDA GPU: the suite, then the benchmarks; each slice below also runs alone
	@set -e; for slice in gpu-test $(GPU_BENCHES); do $(MAKE) --no-print-directory $$slice; done

gpu-test: gpu-check ## one slice: the suite on the card
	$(PY) -m pytest -q

$(GPU_BENCHES): gpu-bench-%: gpu-check
	$(PY) benchmarks/run.py $* $(if $(OUT),--out $(OUT))

gpu-check: $(READY)
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu needs a CUDA GPU: torch finds none here.")'

.venv/installed: pyproject.toml setup.py
	python3 -c 'import sys; sys.version_info >= (3, 10) or sys.exit("mmfused needs Python 3.10 or newer as python3.")'
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --editable ".[dev]"
	touch $@
