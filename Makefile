# Commands: serve, test, unit (the tests without torch), test-clients, check, bench, tidepool, proto. Each first installs what it needs into .venv.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 13)))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PROTO := tidegate/v1/inference.proto


.PHONY: serve test unit test-clients check bench tidepool proto clean

serve: $(VENV)/.serve
	$(BIN)/tidegate serve $(ARGS)

# All tests, with one process more than usable CPUs, or in a single process if there is a GPU. ARGS="-n 0": always a single process.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# The tests that need no torch and start no server. They take seconds.
unit: $(VENV)/.dev
	$(BIN)/python -m pytest --torch-free -n auto $(ARGS)

# The tests with real clients of OpenAI's API and of gRPC, each in an environment of its own under build/clients: see
# docs/clients.md. CLIENTS=ci: the clients that CI runs; or names of environments with commas.
CLIENTS := all
test-clients: $(VENV)/.dev
	$(BIN)/python -m tests.clients.install $(CLIENTS)
	$(BIN)/python -m pytest -n 0 --clients=$(CLIENTS) tests/clients $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m loadtest.bench $(ARGS)

# Train the bundled model from its sources: see train/README.md.
tidepool: $(VENV)/.dev
	$(BIN)/python -m train $(ARGS)

# The mapping in -I makes the modules of the generated code import each other as server.rpc.pb.tidegate.v1.
proto: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -I server/rpc/pb=protos --python_out=. --pyi_out=. --grpc_python_out=. protos/$(PROTO)

# Debian has venv in a separate package, which root installs here. A virtual environment whose creation failed is removed.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Tidegate needs Python 3.11 or 3.12: install one, or name it with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq python3-venv; } || \
		{ echo "$(PYTHON) cannot make a venv: install its venv package (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch is installed first and alone, so that pip takes the CPU build of torch if the machine is set up to offer one.
$(VENV)/.serve: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build/clients .pytest_cache .mypy_cache .ruff_cache .hypothesis
