# Every target sets up what it needs in .venv and can be the first command on a bare machine that
# has python3 (with venv), make and g++.

PYTHON ?= python3
JOBS ?= 2
# Threads that wait for each other spin only shortly, so that a busy machine costs its share of time
# and not many times as much; sleeping at once would cost a quiet one a factor of two.
export GOMP_SPINCOUNT ?= 1000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CPP := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
TEST_CPP := $(wildcard tests/*/*.cpp tests/*/*.h)
PY := ato_fast kernels benchmarks tests setup.py

.PHONY: install lint format test test-gpu zoo sanitize bench bench-accuracy demo clean

install: $(STAMP)

# torch first: the extension is built against it, without build isolation.
$(STAMP): setup.py pyproject.toml constraints.txt $(CPP)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); } \
	  || { echo "$(PYTHON) -m venv failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja numpy torch
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP) $(TEST_CPP)
	.ci/banned $(PY) csrc

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(TEST_CPP)

# Two processes of one thread each: faster than one of two, and they do not fight over the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

# Every network of the zoo in both scopes, every CNN exported, and 500 random networks: an hour on two
# cores. The tables in docs/ are made by python -m benchmarks.zoo and benchmarks.exports.
zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m zoo

# The CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer; part of `test` too.
sanitize: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/test_sanitizers.py

# Kernels one by one, under two minutes; python -m benchmarks.run compares them with torch's.
bench: $(STAMP)
	$(BIN)/python -m pytest -q benchmarks --benchmark-sort=name \
	  --benchmark-columns=median,iqr,rounds

bench-accuracy: $(STAMP)
	$(BIN)/python -m benchmarks.accuracy --data digits --model resnet20 --macs 0.5 \
	  --seeds 0 1 2 --json runs/accuracy.json

demo: $(STAMP)
	$(BIN)/ato-fast train --data digits --model resnet20 --macs 0.5 \
	  --output runs/demo --overwrite --json runs/demo/result.json

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .benchmarks *.egg-info
	find ato_fast -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
