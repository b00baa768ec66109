# `make demo` and `make test` each set up $(VENV) when needed; they want Python 3.10 or newer and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
# DeepSpeed compiles a small extension with ninja, which it looks for on the PATH.
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"
STAMP := $(VENV)/.installed

.PHONY: demo test test-full campaign lint clean

demo: $(STAMP)
	rm -rf demo/data demo/shards demo/run
	$(RUN) python tools/make_demo_data.py --output_dir demo/data
	$(RUN) python tools/make_shards.py --annotations demo/data/annotations/captions_train.json \
	    --images demo/data/train --output_dir demo/shards --split train --samples_per_shard 250
	$(RUN) python tools/make_shards.py --annotations demo/data/annotations/captions_val.json \
	    --images demo/data/val --output_dir demo/shards --split val --samples_per_shard 120
	$(RUN) deepspeed --num_gpus 1 launch/train.py --ds_config ds_configs/zero1_fp32.json --recipe demo \
	    --train_data 'demo/shards/train-{000000..000007}.tar' --val_data 'demo/shards/val-{000000..000001}.tar' \
	    --output_dir demo/run
	$(RUN) python tools/plot_run.py demo/run --html
	@echo "The run: demo/run    its log: demo/run/train.log    its curves: demo/run/plot.png, demo/run/report/index.html"

test: $(STAMP)
	$(RUN) python -m pytest --numprocesses 2 --dist loadfile

# Also what is marked `full`, which takes minutes more.
test-full: $(STAMP)
	CONVCLIP_FULL=1 $(RUN) python -m pytest --numprocesses 2 --dist loadfile

# Broken inputs by the hundred: each must be refused in one line, counted, or make no difference.
campaign: $(STAMP)
	$(RUN) python -m tests.campaign --cases 1800 --seed 0

lint: $(STAMP)
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

clean:
	rm -rf demo/data demo/shards demo/run build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo "convclip needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1):" \
	    "install one and name it, as in: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || \
	    { echo "convclip needs a C++ compiler and '$${CXX:-c++}' is not there: install one (Debian: apt install g++)," \
	    "or name yours, as in: CXX=clang++ make $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	    sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	    { echo "Python's C headers are not there: install them (Debian: apt install python3-dev)" >&2; exit 1; }
	@echo "Installing into $(VENV): once, some minutes, up to 6 GB"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[test,video,report]'
	@# Here, and not at the first run's start.
	$(RUN) DS_ACCELERATOR=cpu python -c 'from convclip.engine.zero.launcher import build_extension; build_extension()'
	@touch $@
