PYTHON ?= python

.PHONY: run pipeline test lint bench gpu

run:  ## prepare the default text and train the tiny model on it
	$(PYTHON) train/pretrain.py

pipeline:  ## every stage, from nothing to a model that says who it is; the same command goes on after a kill
	$(PYTHON) train/pipeline.py --recipe tiny --resume auto

test:  ## everything that is not slow: a quarter of an hour on two CPU cores
	$(PYTHON) -m pytest -n auto --dist worksteal

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench:  ## the HRM step against the published behaviour
	$(PYTHON) bench/hrm_step.py

gpu:  ## everything that waits for a GPU: parity, races, times, a training run, in parts of eight minutes
	$(PYTHON) bench/gpu.py
