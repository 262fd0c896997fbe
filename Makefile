# Every target sets itself up on a fresh machine and is safe to run twice.
SHELL := /bin/bash
PY := .venv/bin/python
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test up check format bench app engine tools compiled interpreted clean

help:
	@echo "make demo    one full turn of the loop on the practice model; writes var/demo/report.html"
	@echo "make up      everything on this machine, gateway on port 8080; MODEL=<path or hub name> or the practice model"
	@echo "make test    the whole test suite"
	@echo "make check   format, lint, types"
	@echo "make bench   the benchmarks of bench/"
	@echo "make compiled     the gateway's hot path as C extensions; make interpreted undoes it (docs/benchmarks.md)"

app:
	@scripts/install.sh app

engine:
	@scripts/install.sh engine

tools:
	@scripts/install_tools.sh

demo: app engine
	$(PY) -m pawl.cli.main demo

up: export HF_HUB_OFFLINE = 0
up: app engine
	$(PY) -m pawl.cli.main up $(if $(MODEL),--model $(MODEL))

# Three processes on two cores, since tests often wait for a process, a disk or a clock. And tests replace
# methods of classes that would be fixed when compiled.
test: app engine tools interpreted
	$(PY) -m pytest -n 3 --no-loadscope-reorder

check: app
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy .
	$(PY) scripts/compile_hot_path.py --check

format: app
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

compiled: app
	$(PY) scripts/compile_hot_path.py

interpreted: app
	$(PY) scripts/compile_hot_path.py --clean

bench: app engine tools
	$(PY) -m bench

clean:
	rm -rf var .venv .venv-engine .tools
