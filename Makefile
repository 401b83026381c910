# make pretrain   from a fresh clone to a pretrained BERT          make test        the test suite
# make install    the .venv alone                                  make test-full   the long tests as well
# make lint | bench | aot
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/
PIP    := $(RUN)python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*)
OUT    ?= runs/mini

.PHONY: install pretrain test test-full lint bench aot clean

install: $(VENV)/.built

$(VENV)/.dependencies: pyproject.toml constraints.txt
	test -x $(RUN)python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip "setuptools>=77" wheel
	$(PIP) install -q -c constraints.txt torch ninja pybind11
	touch $@

$(VENV)/.built: $(VENV)/.dependencies setup.py $(SOURCES)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

pretrain: install
	$(RUN)bertfast pretrain --out $(OUT) --resume --preset mini --lr 1e-3 --steps 1000 --dropout 0

test: install
	$(RUN)python -m pytest -m "not full" tests

test-full: install
	$(RUN)python -m pytest tests

lint: install
	$(RUN)ruff check .
	$(RUN)mypy

bench: install
	$(RUN)python -m pytest benchmarks

aot: install
	$(RUN)python benchmarks/aot.py

clean:
	rm -rf build *.egg-info bertfast/*.so
