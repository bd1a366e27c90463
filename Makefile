# make demo: train an ODE-Net on the digits and compare it under many solvers; make test: everything CI checks.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

# One thread: for states as small as these, two spend their time on waiting for each other.
demo: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/continuum fit --config experiments/digits/demo.yaml
	OMP_NUM_THREADS=1 $(BIN)/continuum compare demo/digits/checkpoints/last.ckpt --out demo/compare \
		--solver euler:h=1 --solver euler:h=0.25 --solver midpoint:h=0.5 --solver rk4:h=1 --solver rk4:h=0.25 \
		--solver adams_bashforth:order=3,h=0.125 --solver bosh3:rtol=1e-3,atol=1e-3 \
		--solver dopri5:rtol=1e-3,atol=1e-3 --solver dopri5:rtol=1e-5,atol=1e-5

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo
