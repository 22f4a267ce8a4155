# Every target sets up what it needs, once: a virtual environment in .venv, made again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
# One process a core, of one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: benchmark test check check-lowest docs format wheel-check clean

benchmark: .venv/.installed  ## train, distil and compare on the embedded suite; the board lands in runs/quick
	$(BIN)/kd benchmark run

test: .venv/.installed-dev  ## run the tests, but for the slow ones
	$(PYTEST) -m "not slow"

check: .venv/.installed-dev docs  ## format, lint, types, docs, all tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

docs: .venv/.installed-dev  ## the docs site, in build/site; links that lead nowhere are errors; no network is needed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Each requirement of pyproject.toml at its lower bound, for Python 3.11, which all of them have wheels for.
LOWEST := import re, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	wanted = [*project["dependencies"], *(r for e in ("transformers", "ultralytics") for r in project["optional-dependencies"][e])]; \
	print(*(re.sub(">=([0-9.]+)", r"==\1", r) for r in wanted), sep="\n")

check-lowest:  ## the tests of detectors, adapters, data and training with the oldest versions that pyproject.toml allows
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) -c '$(LOWEST)' > .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install -r .venv-lowest/requirements.txt pytest hypothesis
	.venv-lowest/bin/python -m pip install --no-deps -e .
	.venv-lowest/bin/python -m pytest tests/detectors tests/adapters tests/data tests/engine tests/benchmark \
		tests/test_adapt.py tests/test_distiller.py tests/test_models.py tests/test_cli.py tests/test_imports.py

format: .venv/.installed-dev  ## mend format and what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel-check: .venv/.installed-dev  ## build the wheel and run `kd` from it, away from the source tree
	rm -rf build dist .venv/wheel
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .
	$(BIN)/python -m venv .venv/wheel
	.venv/wheel/bin/python -m pip install -q --no-deps dist/*.whl
	cd .venv/wheel && PYTHONPATH="$$(../bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		bin/python -c 'import importlib.resources as r, kdtoolkit.benchmark as b; assert "wheel" in b.__file__, b.__file__; \
			assert r.files(b).joinpath("report/templates/page.html").is_file(), "the wheel lacks the template of boards"' && \
		PYTHONPATH="$$(../bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		bin/kd benchmark suites

clean:  ## remove the environment and build products; runs/ stays
	rm -rf .venv .venv-lowest build dist *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kdtoolkit needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e .
	@touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@ .venv/.installed
