# Every target sets up what it needs. `make train` and `make test` work on a fresh machine with python3 (3.11-3.13) and g++.
PYTHON ?= python3
BIN := .venv/bin
STAMPS := .stamps
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh csrc/*.py)
# 0: no CUDA library, 1: must be built, unset: built if nvcc is found. Another value builds anew.
CUDA_STAMP := $(STAMPS)/cuda-$(or $(ADCERT_CUDA),auto)
CPP := $(wildcard $(foreach folder,csrc tests/emulation,$(addprefix $(folder)/*.,cpp h cu cuh)))
TRAIN ?= --model vgg11-bn --data photos --epochs 1 --steps 50 --batch-size 128

.PHONY: setup build train test lint bench fuzz sanitize clean
.DELETE_ON_ERROR:

setup: $(STAMPS)/requirements
build: $(STAMPS)/build

train: build
	$(BIN)/adcert train $(TRAIN)

# The CUDA kernels run on an emulator in the tests (tests/emulation), with or without a GPU.
test: build
	$(BIN)/python tests/emulation/build.py
	$(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

# Saved only when all of it ran; then rendered into README.md.
bench: build
	mkdir -p build benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=build/cpu.json
	mv build/cpu.json benchmarks/results/cpu.json
	$(BIN)/python benchmarks/render.py benchmarks/results/cpu.json --write README.md

# Campaigns: the hypothesis tests with many more cases, and the tests marked fuzz.
fuzz: build
	$(BIN)/python -m pytest tests --hypothesis-profile=fuzz -m "fuzz or hypothesis"

# The operators' tests against builds that watch every access; g++'s runtimes have to be loaded first.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(STAMPS)/requirements
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r adcert tests csrc setup.py pyproject.toml LICENSE build/sanitize/
	rm -f build/sanitize/adcert/_C.* build/sanitize/adcert/_cuda.so
	cd build/sanitize && ADCERT_CUDA=0 CFLAGS="$(SANITIZE) -g -DADCERT_SANITIZE" LDFLAGS="$(SANITIZE)" \
	    ../../$(BIN)/python setup.py -q build_ext --inplace
	cd build/sanitize && CFLAGS="$(SANITIZE) -g -DADCERT_SANITIZE" LDFLAGS="$(SANITIZE)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ../../$(BIN)/python -m pytest -q -p no:cacheprovider \
	    tests/test_ops.py tests/test_resolve.py tests/test_emulation.py tests/test_kernel_campaign.py

clean:
	rm -rf build .stamps *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks adcert/_C.* adcert/_cuda.so

$(STAMPS)/venv:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'adcert needs Python 3.11 or later')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	mkdir -p $(STAMPS) && touch $@

# torch comes first: the build of the extension has to see it.
$(STAMPS)/requirements: $(STAMPS)/venv $(wildcard requirements/*.txt)
	$(BIN)/python -m pip install -q -r requirements/torch.txt
	$(BIN)/python -m pip install -q -r requirements/run.txt -r requirements/test.txt -r requirements/lint.txt
	touch $@

$(CUDA_STAMP): | $(STAMPS)/requirements
	rm -f $(STAMPS)/cuda-*
	touch $@

# pip shows nothing of a build that succeeds: what was built, and the registers of each kernel, are shown after it.
$(STAMPS)/build: $(STAMPS)/requirements $(CUDA_STAMP) $(SOURCES)
	rm -f build/built.txt build/cuda/resources.txt
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	@test ! -f build/cuda/resources.txt || cat build/cuda/resources.txt
	@cat build/built.txt
	@$(BIN)/python -c "from adcert._load import load; load()"
	touch $@
