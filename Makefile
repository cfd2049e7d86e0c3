# make demo    set everything up in .venv and make a video in demo/
# make test    set everything up in .venv and run the tests
# make lint    ruff and mypy
# make bench   every benchmark that this machine can run
# make gpu     on a machine with a GPU: build, single instructions, GPU tests, sanitizers, benchmarks
#              with their results kept, and kernels that are right and fast there verified: see git
#              diff, commit what is true. make gpu GPU="--stages test --minutes 9 --resume" does
#              some of it; .venv/bin/python scripts/gpu.py --help, docs/gpu.md
# make native  rebuild the C++ and CUDA code in place
# make clean   remove what was built; .venv stays

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo/red-circle-moving-right.mp4

.PHONY: demo test lint bench gpu native clean

demo:
	@$(PYTHON) scripts/bootstrap.py
	@mkdir -p demo
	$(BIN)/hunyuan-fast generate "a red circle moving right" -o $(DEMO) --overwrite
	@echo "The video is $(DEMO)"

test:
	@$(PYTHON) scripts/bootstrap.py --extra dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint:
	@$(PYTHON) scripts/bootstrap.py --extra dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench:
	@$(PYTHON) scripts/bootstrap.py --extra dev
	$(BIN)/python -m benchmarks

gpu:
	@nvidia-smi -L || { echo "make gpu needs a machine with an NVIDIA GPU and its driver"; exit 1; }
	@HUNYUAN_FAST_REQUIRE_EXT=cuda $(PYTHON) scripts/bootstrap.py --extra dev
	$(BIN)/python scripts/gpu.py $(GPU)

native:
	@$(PYTHON) scripts/bootstrap.py --extra dev
	HUNYUAN_FAST_REQUIRE_EXT=cpu $(BIN)/python setup.py --quiet build_ext --inplace

clean:
	rm -rf build dist demo *.egg-info hunyuan_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
