# Everything runs from a virtual environment in the checkout; `make demo` and `make test` set it up themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests at a time, each in a process with one thread: as many as there are cores to spare.
WORKERS ?= 2

.PHONY: demo leaderboard test test-marked test-lowest lint types docs check clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "bench needs Python 3.11 or newer; say make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $(READY)

# The main job: all methods of the quick profile on built-in synthetic faces, CAM and its read-outs with a second seed, then table and picture.
demo: $(READY)
	$(BIN)/bench run --methods all --profile quick --seeds 0 --results runs/demo --data data
	$(BIN)/bench run --methods cam,gradcam,gradcampp,layercam --profile quick --seeds 0,1 --results runs/demo --data data
	$(BIN)/bench gallery --methods all --profile quick --seeds 0 --results runs/demo --data data --out runs/demo/gallery.png

# The published synthetic leaderboard: records, table, and their check. Forty minutes on two cores.
leaderboard: $(READY)
	$(BIN)/bench run --methods all --profile quick --seeds 0-4 --results results --data data --nproc 2 --procs-per-training 1 --device cpu \
		--metrics energy,pointing,ap
	$(BIN)/bench leaderboard --results results --format md --columns all --out results/LEADERBOARD.md
	$(BIN)/bench verify results --data data

test test-marked test-lowest: export OMP_NUM_THREADS = 1

test: $(READY)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# The tests that start several processes, and the long ones.
test-marked: $(READY)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m 'slow or dist'

# The tests with the lowest versions that pyproject.toml allows. Of another Python: make test VENV=.venv-3.13 PYTHON=python3.13
test-lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[test]'
	.venv-lowest/bin/pytest -n $(WORKERS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types are checked on the built wheel: there `bench.methods` is where every tool looks for it.
types: $(READY)
	rm -rf build/bdist.* build/lib build/types build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel . > /dev/null
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types build/wheel/*.whl
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p bench

# The documentation site, build/docs/index.html: reading it needs no network. Broken links and docstrings are errors.
$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going --builder html docs build/docs

check: lint types test test-marked

clean:
	rm -rf .venv .venv-* build runs
