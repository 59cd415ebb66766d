# Two commands do all set-up: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tested versions, for what is installed and for what the build hook uses (older pips take the first for both).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test longhaul lint bench clean setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard proto/slmfleet/v1/*.proto)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "slmfleet needs Python 3.11 or newer; $(PYTHON) is older: set PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/pip install --quiet --editable '.[all,test]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python deploy/demo/demo.py $(if $(ONCE),--once) $(DEMO_ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# The reliability tests in full: minutes of outage compressed 60 times, or as they are with REAL=1 (many hours).
longhaul: $(STAMP)
	@SLMFLEET_LONGHAUL=$(if $(REAL),real,short) GRPC_VERBOSITY=NONE $(BIN)/python -m pytest -s tests/reliability $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(STAMP)
	@$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) build dist slmfleet/v1 *.egg-info
