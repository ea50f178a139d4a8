# podwall: what a developer and CI type. `make help` lists it.
# Every target installs what it needs, says what, and is quick when it is there already.

PYTHON      := .venv/bin/python
SYSTEM      := /usr/bin/python3
PACKAGES    := python3-nftables python3-venv nftables iproute2 openssl gcc libc6-dev libpython3-dev
BROWSER     := chromium
TESTS       ?= tests
NODES       ?= 2
CNI         ?= podwall
KUBE_PROXY  ?= none
PARALLEL    ?= 1
export NODES CNI KUBE_PROXY FOCUS SKIP PARALLEL

.DEFAULT_GOAL := help
.PHONY: help setup demo check format test reference cluster cluster-down e2e vm bench lock clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 16

setup: .venv/installed ## Debian packages and the Python environment

.venv/installed: pyproject.toml requirements-dev.lock
	@missing=$$(for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing Debian packages:" $$missing; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; fi
	@echo "installing Python packages into .venv (requirements-dev.lock)"
	@[ -x $(PYTHON) ] || $(SYSTEM) -m venv --system-site-packages .venv
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## two nodes of Pods on this machine, and who reaches whom (MODE=vxlan for the overlay)
	@$(PYTHON) -m agent.cli.main lab demo -f examples/hello $(if $(filter vxlan,$(MODE)),--vxlan)

check: setup ## formatting, lint, types, import layers
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

format: setup ## format the sources
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

# A browser for the tests of podwall's page: nothing but `make test` needs it.
.venv/browser: .venv/installed
	@dpkg -s $(BROWSER) >/dev/null 2>&1 || { echo "installing Debian packages: $(BROWSER)"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BROWSER) >/dev/null; }
	@touch $@

test: setup .venv/browser ## every test: pure, lab and real cluster (TESTS=tests/agent for some)
	@[ "$(TESTS)" != tests ] || $(PYTHON) -m tests.cluster build
	@$(PYTHON) -m pytest $(TESTS)

vm: setup ## tests on Debian's own kernel, in a slow virtual machine (TESTS=tests/lab for others, LIMIT=40 minutes)
	@$(PYTHON) -m tests.vm $(filter-out tests,$(TESTS))

bench: setup ## the benchmarks, peers side by side
	@for file in bench/[a-z]*.py; do PYTHONPATH=. $(PYTHON) $$file || exit 1; done

lock: setup ## pin the dependencies again
	@.venv/bin/uv pip compile --quiet --upgrade --generate-hashes --no-emit-index-url --no-header pyproject.toml -o requirements.lock
	@.venv/bin/uv pip compile --quiet --upgrade --generate-hashes --no-emit-index-url --no-header --group dev pyproject.toml -o requirements-dev.lock

reference: setup ## docs/commands.md, from the commands
	@$(PYTHON) -m agent.cli.reference > docs/commands.new && mv docs/commands.new docs/commands.md

cluster: setup ## a real kind cluster with podwall (NODES=3, CNI=none, KUBE_PROXY=nftables)
	@$(PYTHON) -m tests.cluster up

cluster-down: setup ## remove it
	@$(PYTHON) -m tests.cluster down

e2e: setup ## upstream's tests (FOCUS='regex' SKIP='regex' PARALLEL=4)
	@$(PYTHON) -m tests.cluster e2e

clean: setup ## remove whatever podwall's lab and cluster left on this machine; caches stay
	@.venv/bin/podwall lab down
	@$(PYTHON) -m tests.cluster down
