# The commands that people type. Each does all of its own set-up in .venv; PYTHON and TORCH choose other versions.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN := $(VENV)/bin/python
# a process per core, four at most; the tests of a file stay in one process, which makes their shared fixtures once; slow
# files (the emulator) come first, as they are collected, so that the processes end together
TEST := $(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder -p no:benchmark
SOURCES := $(shell find kernels csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \)) \
           CMakeLists.txt setup.py pyproject.toml constraints.txt
# FASTDIFF_CUDA: 1 builds the CUDA module as well (needs nvcc, no GPU)
export FASTDIFF_CUDA

.PHONY: demo test test-all lint bench kernels race gpu abi dist venv clean
.DELETE_ON_ERROR:

venv: $(VENV)/.built

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --upgrade pip

# torch comes first and alone: it is built against, and must be the CPU (or CUDA) wheel that is wanted.
$(VENV)/.built: $(VENV)/bin/pip $(SOURCES)
	$(VENV)/bin/pip install -q -c constraints.txt "$(TORCH)" numpy
	$(VENV)/bin/pip install -q -c constraints.txt setuptools wheel cmake ninja pybind11
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: venv                       ## train a DiT on handwritten digits for 5 minutes: runs/demo/
	$(RUN) -m fastdiff.demo

test: venv lint                  ## the test suite
	$(TEST)

test-all: venv lint              ## the test suite, with the whole grids of which `test` takes a covering array
	$(TEST) -m ""

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: venv                      ## benchmarks against eager PyTorch, torch.compile and the machine's bandwidth
	$(RUN) -m pytest benchmarks -q --ignore benchmarks/test_token_sampling.py
	FASTDIFF_BENCH_ALLOCATOR=default $(RUN) -m pytest benchmarks/test_token_sampling.py -q

kernels: venv                    ## compile every GPU kernel for every target: registers, spills, shared memory
	$(RUN) tools/kernels.py

race: venv                       ## the CUDA kernels under ThreadSanitizer, on the CPU (needs clang-19)
	$(RUN) tools/race.py

gpu: venv                        ## on a machine with a GPU: tests, compute-sanitizer, benchmarks, one report
	$(RUN) tools/gpu_report.py

abi: venv                        ## one binary for torch 2.13 and 2.14: this build's wheel in a fresh environment (large)
	$(RUN) tools/abi.py

dist: venv                       ## source distribution and wheel in dist/
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m build --no-isolation

clean:
	rm -rf build dist $(VENV)/.built fastdiff/*.so
