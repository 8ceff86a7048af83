# make run    set up what is missing and serve a demo volume in the foreground
# make test   set up what is missing, then lint, types and every test, real clients and servers
#             included
# make check  format, lint, types and the fast tests
# make torture  what make test does a little of, at length: fuzzing for TORTURE_MINUTES, a million
#             states of power cuts, every fault, …; TORTURE="--only PART" for one: docs/testing.md
# make dist   the source distribution and the wheel, in dist/
# make install  what a package has: program, units, manual pages, completion, configuration;
#             with PREFIX=/usr/local and DESTDIR= as everywhere: docs/packaging.md
# make deb    a Debian package of that, in dist/
# make bench  measure beside nbdkit and qemu-nbd; BENCH="--quick" only sees that it runs
# make bench-repo  measure repositories beside restic and borg, with BENCH as above
# make conformance  check nbdserve and its peers against the specification; writes
#             docs/conformance.md

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
# What make install and make deb install instead of building it, and further options of pip.
WHEEL ?=
PIP_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
# Where the demo listens: a TCP port on the loopback address.
PORT ?= 10809
# Options of the benchmarks: --rounds N, --seconds N, --quick, --directory DIR, --results DIR; of
# that of repositories also --size SIZE and --data SIZE.
BENCH ?=
# How long torture fuzzes, and what else it is told: see python -m tests.torture --help.
TORTURE_MINUTES ?= 10
TORTURE ?=
STORAGE_TESTS := tests/backends tests/durability tests/snapshots
# What waits for virtual machines, and for daemons that are killed.
MACHINE_TESTS := $(foreach name,kernel attach attach_connecting real_power_cuts restart crash,\
  tests/integration/test_$(name).py)
# Python without the suffix that tools find it by.
SCRIPTS := scripts/kernel-vm scripts/s3-test-server scripts/nbd-conformance scripts/conformance-table

.PHONY: run dist install deb test fast-tests storage-tests integration-tests machine-tests s3-tests check lint torture bench bench-repo conformance
.DELETE_ON_ERROR:

# What running it needs; as root on Debian also the parts of Python that are packages of their own.
$(VENV)/base: pyproject.toml
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	  if [ "$$(id -u)" -eq 0 ] && [ "$(PYTHON)" = python3 ] && command -v apt-get >/dev/null; then \
	    apt-get --quiet update && \
	    DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes install --no-install-recommends python3-venv; \
	  else \
	    echo "$(PYTHON) with its module venv is needed; on Debian, as root: apt-get install --yes python3-venv" >&2; \
	    exit 1; \
	  fi; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Setting up $(VENV), which is done once and takes a minute or so"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# What developing it needs.
$(VENV)/installed: $(VENV)/base
	@echo "Installing into $(VENV) what the tests need"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: $(VENV)/base
	@scripts/demo $(PORT)

dist: $(VENV)/installed
	$(BIN)/python -m build --no-isolation

install deb: export DESTDIR := $(DESTDIR)
install deb: export PREFIX := $(PREFIX)
install deb: export WHEEL := $(WHEEL)
install deb: export PIP := $(BIN)/python -m pip
install deb: export PIP_OPTIONS := $(PIP_OPTIONS)
install deb: export PYTHON := $(PYTHON)

install: $(VENV)/base
	@scripts/install

deb: $(VENV)/base
	@scripts/make-deb

# Five parts side by side: the last three wait for other programs most of the time.
test: lint
	@scripts/install-test-dependencies
	@$(MAKE) --no-print-directory --jobs=5 fast-tests storage-tests integration-tests \
	  machine-tests s3-tests

fast-tests: $(VENV)/installed
	$(BIN)/python -m pytest -m 'not integration' --durations=10 $(STORAGE_TESTS:%=--ignore=%)

storage-tests: $(VENV)/installed
	$(BIN)/python -m pytest --durations=10 $(STORAGE_TESTS)

integration-tests: $(VENV)/installed
	$(BIN)/python -m pytest -m 'integration and not s3' --durations=10 $(MACHINE_TESTS:%=--ignore=%)

machine-tests: $(VENV)/installed
	$(BIN)/python -m pytest -m 'not s3' --durations=10 $(MACHINE_TESTS)

s3-tests: $(VENV)/installed
	$(BIN)/python -m pytest -m s3 --durations=10

lint: $(VENV)/installed
	$(BIN)/ruff format --check . $(SCRIPTS)
	$(BIN)/ruff check . $(SCRIPTS)
	$(BIN)/mypy
	$(BIN)/mypy --scripts-are-modules $(SCRIPTS)

check: lint fast-tests storage-tests

torture: $(VENV)/installed
	@scripts/install-test-dependencies
	@$(BIN)/python -m tests.torture --minutes $(TORTURE_MINUTES) $(TORTURE)

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

bench: $(VENV)/installed-bench
	@scripts/install-test-dependencies --bench
	@$(BIN)/python -m scripts.bench $(BENCH)

bench-repo: $(VENV)/installed
	@scripts/install-test-dependencies --bench
	@$(BIN)/python -m scripts.bench_repository $(BENCH)

conformance: $(VENV)/installed
	@scripts/install-test-dependencies
	@$(BIN)/python scripts/conformance-table
