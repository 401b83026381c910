# make pretrain   from a fresh clone to a pretrained BERT          make test        the test suite
# make install    the .venv alone                                  make test-full   the long tests as well
# make gpu-check  what a GPU must show before it is believed
# make lint | aot | bench-quick | bench [DATA=prepared set]
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/
PIP    := $(RUN)python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*)
OUT    ?= runs/mini
BENCH  := $(RUN)bertfast bench
RESULTS ?= benchmarks/results
TEXT   := $(if $(DATA),--data $(DATA))

.PHONY: install pretrain test test-full lint bench bench-quick aot gpu-check clean

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
	$(RUN)bertfast pretrain --out $(OUT) --resume --preset mini --lr 1e-3 --steps 1200 --dropout 0

test: install
	$(RUN)python -m pytest -m "not full" tests

test-full: install
	$(RUN)python -m pytest tests

lint: install
	$(RUN)ruff check .
	$(RUN)mypy

bench: install
	$(BENCH) pretrain --preset mini --rounds 5 $(TEXT) --out $(RESULTS)/pretrain_mini.json
	$(BENCH) pretrain --preset small --rounds 5 --at-once 6 $(TEXT) --out $(RESULTS)/pretrain_small.json
	$(BENCH) pretrain --preset base --tokens 1024 --rounds 3 --at-once 4 $(TEXT) --out $(RESULTS)/pretrain_base.json
	$(BENCH) pretrain --quick --preset mini --rounds 5 --length 512 $(TEXT) --out $(RESULTS)/pretrain_mini_512.json
	$(BENCH) pretrain --quick --preset mini --rounds 5 --fill 0.75 $(TEXT) --out $(RESULTS)/pretrain_mini_fill75.json
	$(BENCH) pretrain --quick --preset mini --rounds 5 --fill 0.5 $(TEXT) --out $(RESULTS)/pretrain_mini_fill50.json
	$(BENCH) pretrain --quick --preset mini --rounds 5 --threads 1 $(TEXT) --out $(RESULTS)/pretrain_mini_1thread.json
	$(BENCH) memory --quick --preset mini $(TEXT) --out $(RESULTS)/memory_mini.json
	$(BENCH) memory --quick --preset base --tokens 1024 --at-once 4 $(TEXT) --out $(RESULTS)/memory_base.json
	$(BENCH) ops --out $(RESULTS)/ops.json
	$(if $(DATA),$(BENCH) quality --data $(DATA) --steps 1200 --dropout 0 --out $(RESULTS)/quality.json)
	$(BENCH) roofline --preset mini --out $(RESULTS)/roofline_mini.json
	$(BENCH) roofline --preset base --tokens 32768 --out $(RESULTS)/roofline_base.json
	$(BENCH) profile --preset mini --out $(RESULTS)/profile_mini.json
	$(BENCH) profile --preset small --out $(RESULTS)/profile_small.json
	$(BENCH) profile --preset base --tokens 1024 --out $(RESULTS)/profile_base.json
	$(if $(wildcard $(OUT)/loss.png),$(BENCH) job $(OUT) --out $(RESULTS)/job.json)
	$(BENCH) report $(RESULTS) --readme README.md --readme benchmarks/README.md

bench-quick: install
	$(BENCH) pretrain --quick --preset mini --tokens 1024 --rounds 4 $(TEXT) --out runs/bench/pretrain.json
	$(BENCH) ops --quick --rounds 4 --out runs/bench/ops.json
	$(BENCH) roofline --out runs/bench/roofline.json
	$(BENCH) report runs/bench

aot: install
	$(RUN)python benchmarks/aot.py

gpu-check: install
	$(RUN)python benchmarks/gpu_check.py

clean:
	rm -rf build *.egg-info bertfast/*.so $(VENV)/.built
