# The commands that people type. Each does all of its own set-up in .venv, with these settings:
#   PYTHON, TORCH         the Python that .venv is made of, and the torch to install and to build against
#   FASTDIFF_CUDA         1 builds the CUDA module as well (needs nvcc, no GPU), 0 does not; empty: see setup.py
#   FASTDIFF_CUDA_ARCHS   its architectures, such as 87;90; empty: those of CMakeLists.txt
# .venv/.built remembers them: one that is not given stays as it was, one that changes builds again.
VENV ?= .venv
$(eval $(file <$(VENV)/.built))
PYTHON ?= $(or $(BUILT_PYTHON),python3)
TORCH ?= $(or $(BUILT_TORCH),torch==2.13.0)
FASTDIFF_CUDA ?= $(BUILT_CUDA)
FASTDIFF_CUDA_ARCHS ?= $(BUILT_CUDA_ARCHS)
export FASTDIFF_CUDA FASTDIFF_CUDA_ARCHS
RUN := $(VENV)/bin/python
# a process per core, four at most; the tests of a file stay in one process, which makes their shared fixtures once; slow
# files (the emulator) come first, as they are collected, so that the processes end together
TEST := $(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder -p no:benchmark
SOURCES := $(shell find kernels csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \)) \
           CMakeLists.txt kernels/CMakeLists.txt setup.py pyproject.toml constraints.txt

define SETTINGS
BUILT_PYTHON := $(PYTHON)
BUILT_TORCH := $(TORCH)
BUILT_CUDA := $(FASTDIFF_CUDA)
BUILT_CUDA_ARCHS := $(FASTDIFF_CUDA_ARCHS)
BUILT_VENV := $(abspath $(VENV))
BUILT_FOLDER := $(CURDIR)
endef

.PHONY: demo test test-all lint docs bench kernels race fuzz fuzz-files gpu abi abi-aarch64 dist venv clean FORCE
.DELETE_ON_ERROR:

venv: $(VENV)/.built

# Another Python is another environment; so is one that was copied or moved, since its scripts hold its old path.
ifneq ($(PYTHON) $(abspath $(VENV)),$(or $(BUILT_PYTHON),$(PYTHON)) $(or $(BUILT_VENV),$(abspath $(VENV))))
$(VENV)/bin/pip: FORCE
endif
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(if $(BUILT_VENV),--clear) $(VENV)
	$(RUN) -m pip install -q --upgrade pip

# torch comes first and alone: it is built against, and must be the CPU (or CUDA) wheel that is wanted.
ifneq ($(SETTINGS),$(file <$(VENV)/.built))
$(VENV)/.built: FORCE
endif
$(VENV)/.built: export SETTINGS := $(SETTINGS)
$(VENV)/.built: $(VENV)/bin/pip $(SOURCES)
	@echo "[1/5] install: torch and the tools of the build"
	$(RUN) -m pip install -c constraints.txt "$(TORCH)" numpy
	$(RUN) -m pip install -q -c constraints.txt setuptools wheel cmake ninja pybind11
	@echo "[2/5] build: the kernels (a line for each file), then the packages that fastdiff uses"
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) setup.py -q build_ext --inplace
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@printf '%s\n' "$$SETTINGS" > $@

demo: venv                       ## train a DiT on handwritten digits for 5 minutes: runs/demo/
	$(RUN) -m fastdiff.demo

test: venv lint                  ## the test suite
	$(TEST)

test-all: venv lint              ## the test suite, with the whole grids of which `test` takes a covering array
	$(TEST) -m ""

fuzz-files: venv                 ## 10 000 damaged files to every reader: ten minutes (FUZZ_FILES=… for another number)
	$(RUN) tests/data/damaged_files.py --count $(or $(FUZZ_FILES),10000) --keep build/damaged_files

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: venv                      ## benchmarks against eager PyTorch, torch.compile and the machine's bandwidth
	$(RUN) -m pytest benchmarks -q --ignore benchmarks/test_token_sampling.py
	FASTDIFF_BENCH_ALLOCATOR=default $(RUN) -m pytest benchmarks/test_token_sampling.py -q

docs: $(VENV)/bin/pip            ## the documentation as a site: build/site/index.html
	$(RUN) -m pip install -q -c constraints.txt mkdocs-material
	$(RUN) tools/docs.py

kernels: venv                    ## compile every GPU kernel for every target: registers, spills, shared memory
	$(RUN) tools/kernels.py

race: venv                       ## the CUDA kernels under ThreadSanitizer, on the CPU (needs clang-19)
	$(RUN) tools/race.py

fuzz: venv                       ## a million calls of the raw operators with right and wrong operands, under sanitizers
	$(RUN) tools/fuzz.py

gpu: venv                        ## on a machine with a GPU: correctness, speed, models, tests; one report (MINUTES=8)
	$(RUN) tools/gpu_report.py --minutes $(or $(MINUTES),8)

abi: venv                        ## one binary for torch 2.10 to 2.14: the operators' tests on others (OTHER="torch==2.11.0"; large)
	$(RUN) tools/abi.py $(OTHER)

abi-aarch64: venv                ## the operators' tests on an aarch64 torch, under qemu (OTHER="torch==2.10.0 --every 10": hours without)
	$(RUN) tools/abi_aarch64.py $(OTHER)

dist: venv                       ## source distribution and wheel in dist/
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m build --no-isolation

clean:
	rm -rf build dist $(VENV)/.built fastdiff/*.so
