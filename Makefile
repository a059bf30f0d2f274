# `make demo` is the place to start. Everything is installed into .venv, by the pins of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# For example: make demo DEMO_ARGS="--seed 1", make test TEST_ARGS="tests/test_faults.py"
DEMO_ARGS ?=
TEST_ARGS ?=
PROMETHEUS ?= http://127.0.0.1:9090

.PHONY: help demo test test-faults servers lint types docs pictures bench bench-seeds bench-rescue clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a small model three times: clean, with faults, with faults and sosa (2 minutes)"
	@echo "make test    run the tests; as root it installs Prometheus, Alertmanager, systemd and Chromium for them"
	@echo "make test-faults  process faults in real jobs, from three seeds (make test has one), and the longer tests of faults between ranks"
	@echo "make lint    check style and formatting"
	@echo "make types   check types"
	@echo "make docs    build the pages of docs/ into site/, with strict links"
	@echo "make pictures  draw the dashboards and sosa watch again, after make demo DEMO_ARGS=--prometheus"
	@echo "make bench   run the benchmarks; make bench-seeds: the demo from ten seeds (20 minutes)"
	@echo "make bench-rescue  what is rescued of 68 sick trainings, and what others rescue (2 hours, resumable)"
	@echo "make clean   remove what the targets above made"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --upgrade pip
	@echo "Installing torch, the largest part: a minute or more"
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[agent,grafana,replay,report,watch]' --group dev
	@touch $@

demo: $(STAMP)
	@$(BIN)/sosa demo $(DEMO_ARGS)

test: $(STAMP) servers
	$(BIN)/python -m pytest --numprocesses 2 $(TEST_ARGS)

test-faults: $(STAMP)
	$(BIN)/python -m benchmarks.drills
	$(BIN)/python -m pytest --numprocesses 2 -m faults --ignore tests/distributed/test_drills.py

# Alerts, dashboards, the exporter, the unit and reports are tested against the real ones, which no package index of Python has.
servers:
	@missing=""; for each in prometheus:prometheus prometheus-alertmanager:prometheus-alertmanager systemd-analyze:systemd openssl:openssl chromium:chromium; do \
		command -v $${each%:*} >/dev/null || missing="$$missing $${each#*:}"; done; \
	if [ -z "$$missing" ]; then exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get -qq update; apt-get -qq install --yes --no-install-recommends $$missing || \
			echo "apt could not install$$missing: the tests that need them will fail"; \
	else echo "Missing:$$missing. The tests that need them will fail; get them by: sudo apt-get install$$missing"; fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

# After make demo DEMO_ARGS=--prometheus, while that Prometheus runs. Needs npm and chromium, and says so.
pictures: $(STAMP)
	$(BIN)/python grafana/pictures/pictures.py $(PROMETHEUS)
	$(BIN)/python docs/images/watch.py sosa-demo docs/images/watch.svg

bench: $(STAMP)
	$(BIN)/python -m benchmarks

bench-seeds: $(STAMP)
	$(BIN)/python -m benchmarks.demo_seeds

bench-rescue: $(STAMP)
	$(BIN)/python -m benchmarks.rescue --held-out --write

clean:
	rm -rf $(VENV) sosa-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
