# make demo    set up and run the main job on the embedded task
# make test    set up and run the tests; `make test-all` adds the long ones
# make build   rebuild the native core in place (incremental, seconds)
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CUDA_BUILD := build/cuda-check
STAMP := $(VENV)/.installed
NATIVE := $(VENV)/.native
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One process a core; threads that wait asleep, for spinning ones would take the other processes' cores.
PYTEST := $(OFFLINE) OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n logical --maxprocesses 8 --dist worksteal
CXX_SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f -name '*.cpp' -o -type f -name '*.h' -o -type f -name '*.cu')

.PHONY: setup build demo test test-all lint format bench learn gpu cuda-check clean
.DELETE_ON_ERROR:

setup: $(STAMP) $(NATIVE)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"fastalign needs Python 3.11 or newer, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)

# torch goes first: it is the large one, and the same requirement gives the CPU or the CUDA build of the machine.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PY) -m pip install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	touch $@

# pip installs the package and leaves the native core to the next rule, which rebuilds only what has changed.
$(STAMP): pyproject.toml constraints.txt | $(VENV)/.torch
	FASTALIGN_NATIVE=later $(PY) -m pip install -q -c constraints.txt -e '.[dev,math]'
	touch $@

$(NATIVE): $(CXX_SOURCES) | $(STAMP)
	$(PY) setup.py -q build_ext --inplace --build-temp build
	touch $@

# Rebuild the native core whatever the time stamps say; still incremental.
build:
	$(PY) setup.py -q build_ext --inplace --build-temp build
	touch $(NATIVE)

demo: setup
	$(OFFLINE) $(PY) -m fastalign demo --output_dir runs/demo

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix-only -q .
	$(PY) -m ruff format .

# The ops against torch and the peers that are installed; QUICK=--quick for small shapes and few rounds.
bench: setup
	$(OFFLINE) $(PY) -m bench.suite --json runs/bench/suite.json $(QUICK)

# Every offline method learns the demo's task: table, picture and JSON in docs/; ONLY="dpo kto" for some of them.
learn: setup
	$(OFFLINE) $(PY) -m bench.learn --table docs/learning.md --plot docs/learning.png --json bench/results/learn-cpu.json $(if $(ONLY),--only $(ONLY))

# Everything that needs a GPU, on a machine that has one, with its own Python as it is (no venv, nothing downloaded): native build,
# gpu tests, benches in at most 9 minutes; leaves bench/results/gpu-<device>-<date>.json. WHEELS=folder: wheels of peers.
gpu:
	$(PYTHON) -m bench.gpu $(if $(WHEELS),--wheels $(WHEELS)) $(OPTIONS)

# Compiles every CUDA kernel for sm_80 and sm_90 (SASS and PTX) with warnings as errors; needs nvcc, no GPU.
cuda-check: setup
	$(PY) -m cmake -S . -B $(CUDA_BUILD) -G Ninja -DPython_EXECUTABLE=$(abspath $(PY)) -DFASTALIGN_OUTPUT=$(abspath $(CUDA_BUILD)) \
	  -DFASTALIGN_CUDA=on -DFASTALIGN_WERROR=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) --log-level=WARNING
	$(PY) -m cmake --build $(CUDA_BUILD) --target cuda_kernels

clean:
	rm -rf build dist *.egg-info fastalign/_C*.so runs .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(NATIVE)
