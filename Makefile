# One command for each thing to do with this checkout. `make` lists them.

PYTHON ?= python3
CARGO ?= cargo
export HRA_CUDA TORCH_WHEEL WHEELS HRA_TEST_THREADS HRA_TEST_CPU

TASK ?= canny
KILLS ?= 200
INPUTS ?= 20000
LIMITS ?= 60
SEEDS ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup build demo demo-control compare compare-quick frontier test test-everywhere test-python test-cuda torture fuzz gpu-bundle lint bench

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "variables: PYTHON=python3.12     the Python that runs the set-up"
	@echo "           TASK=canny|segmentation  what make demo-control teaches"
	@echo "           HRA_CUDA=yes|no       whether NVIDIA's libraries are installed (default: where there is a driver)"
	@echo "           WHEELS=DIR            take wheels from this folder before pip downloads them"
	@echo "           TORCH_WHEEL=FILE      take libtorch from this wheel"
	@echo "           HRA_TEST_THREADS=2    threads that tests compute with (default 1)"
	@echo "           HRA_TEST_CPU=avx2     make test as on a processor with no more: default (SSE), avx2, avx512"

setup: ## install libtorch into .libtorch/ (unless LIBTORCH is set)
	@$(PYTHON) tools/setup.py

build: setup ## build target/release/hra
	$(CARGO) build --release --locked

demo: build ## train on the embedded model and compare samples, in runs/demo/
	@if [ -e runs/demo ] && [ ! -f runs/demo/config.toml ]; then \
	  echo "runs/demo is there but is no run (no config.toml in it): move it away first" >&2; exit 1; fi
	rm -rf runs/demo
	target/release/hra train configs/demo.toml --output_dir runs/demo
	target/release/hra sample --model assets/tiny-sd --adapter runs/demo --with-base --prompt-file assets/demo-prompts.txt --num-images 2 --steps 30 --guidance 4 --seed 7 --output runs/demo/compare

demo-control: build ## control by edges (or TASK=segmentation) on the embedded model, in runs/control-$(TASK)/ (goes on where it stopped)
	target/release/hra compare configs/control-$(TASK).toml

compare: build ## compare seven methods on the embedded model, in runs/compare/ (goes on where it stopped)
	target/release/hra compare configs/compare.toml

compare-quick: build ## compare two methods in a minute or two, in runs/compare-quick/
	target/release/hra compare configs/compare-quick.toml

frontier: build ## likeness at the same drift: eleven methods, seven subjects, in runs/frontier/ (SEEDS=0,1,2 goes on)
	target/release/hra compare configs/frontier.toml --seeds $(SEEDS)

test: setup ## run the Rust tests
	@CARGO='$(CARGO)' $(PYTHON) tools/run_tests.py

test-everywhere: setup ## run them as on older processors too, on one and on two threads
	@CARGO='$(CARGO)' $(PYTHON) tools/run_tests.py --everywhere

test-python: build ## compare with the Python peers (installs them into .venv/)
	@$(PYTHON) tools/setup.py venv
	.venv/bin/python -m pytest tests/python

test-cuda: build ## prove that all of it works on an NVIDIA GPU, in runs/gpu-check/; skipped where there is none
	@if $(PYTHON) tools/setup.py has-driver; then $(CARGO) test --locked --test cuda --no-run && \
	  $(PYTHON) tools/setup.py venv && tools/gpu_check.sh --python .venv/bin/python --out runs/gpu-check; \
	  else echo "test-cuda: skipped, no NVIDIA driver on this machine"; fi

torture: build ## kill, starve and mislead the program (KILLS=, LIMITS=, INPUTS=, SEED=, MINUTES=, JOBS=); about an hour and a half
	@$(PYTHON) tools/torture --kills $(KILLS) --limits $(LIMITS) --inputs $(INPUTS) $(if $(SEED),--seed $(SEED)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(JOBS),--jobs $(JOBS))

fuzz: setup ## feed every reader with damaged files for MINUTES=10 (SEED=, JOBS=)
	@CARGO='$(CARGO)' $(PYTHON) tools/fuzz.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs $(JOBS))

gpu-bundle: build ## pack what tools/gpu_check.sh needs on a GPU machine without Rust, in .gpu/
	$(CARGO) test --locked --test cuda --no-run
	@tests=$$($(CARGO) test --locked --test cuda --no-run 2>&1 | sed -n 's/.*(\(.*cuda-[0-9a-f]*\)).*/\1/p') && \
	  $(PYTHON) tools/gpu_bundle.py --program target/release/hra --tests "$$tests" --out .gpu

lint: setup ## check format and lints, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --all-targets -- -D warnings

bench: setup ## run the benchmarks
	$(CARGO) bench --locked
