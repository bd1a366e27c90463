# make demo: train an ODE-Net on the digits and compare it under many solvers; make test: everything CI checks.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-lowest clean

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

# The oldest versions that pyproject.toml allows, in an environment of their own; not a part of every test.
LOWEST := torch==2.11.0 torchvision==0.26.0 torchdiffeq==0.2.5 torchsde==0.2.6 pytorch-lightning==2.6.0 \
	jsonargparse==4.51.0 rich==12.3.0 torchmetrics==1.7.0

test-lowest: .venv-lowest/installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest --numprocesses 2 --dist loadfile tests/cli tests/training tests/models tests/solvers

.venv-lowest/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --editable '.[dev]' $(LOWEST)
	touch $@

clean:
	rm -rf .venv .venv-lowest demo
