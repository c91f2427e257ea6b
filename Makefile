# PYTHON is any Python from 3.10 to 3.13; everything else lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint sweep papers bench bench-lower clean

demo: $(VENV)/installed-demo
	$(BIN)/vmkd demo --out demo-out

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sweep: $(VENV)/installed-test
	$(BIN)/vmkd sweep --out sweep-out
	$(BIN)/vmkd sweep --engines --out sweep-out
	(cat sweep-out/coverage.md; echo; cat sweep-out/engines.md) > docs/coverage.md

papers: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/papers.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/distillation_cost.py --out docs/papers.md

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/lowering_cost.py
	$(BIN)/python benchmarks/tracing_cost.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/task_overhead.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/teacher_cache.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/input_pipeline.py

bench-lower: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/lowering.py --out docs/lowering.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/riformer_speed.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/lowering_scaling.py

clean:
	rm -rf $(VENV) demo-out sweep-out papers-out bench-out

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,rtx]'
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,rtx,dev]'
	touch $@
