# make demo    the quickstart: two networks that don't train, and what gets them going
# make test    the tests
# make check   format, lint, types, tests and a wheel that imports elsewhere
# make bench   what the kernels cost, as ratios to the usual alternatives: 10 minutes on an idle machine
# make compat  the tests but the slow ones on every Python found and on the oldest torch and lightning, and a table of it.
#              PYTHONS="3.10 3.13" chooses, VERSIONS=oldest or newest too; ALL=1 takes the slow tests, too
#
# Each makes what it needs in .venv. PYTHON=... chooses the interpreter, ARGS=... adds arguments.

PYTHON ?= python3
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-fast bench check format lint types wheel compat clean

demo: $(VENV)/.examples
	$(RUN) examples/quickstart.py $(ARGS)

test: $(VENV)/.dev
	$(RUN) -m pytest -n 2 $(ARGS)

test-fast: $(VENV)/.dev
	$(RUN) -m pytest -n 2 -m 'not slow' $(ARGS)

check: format lint types test wheel

format: $(VENV)/.dev
	$(RUN) -m ruff format --check .

lint: $(VENV)/.dev
	$(RUN) -m ruff check .

types: $(VENV)/.dev
	$(RUN) -m mypy

# The source archive, a wheel from it, and an import of that wheel from outside the repository: with a compiler at hand it
# has the kernels compiled.
wheel: $(VENV)/.dev
	@set -e; out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(RUN) -m build --outdir "$$out" . > "$$out/log" || { cat "$$out/log"; exit 1; }; \
	$(PIP) --no-deps --target "$$out/site" "$$out"/*.whl; \
	cd "$$out" && PYTHONPATH="$$out/site" "$(CURDIR)/$(RUN)" -c "import lightning_noisy as l, pathlib; \
	home = pathlib.Path(l.__file__).parent; assert str(home).startswith('$$out'), home; \
	assert (home / 'py.typed').exists() and (home / 'kernels/gaussian.h').exists(); print('wheel imports:', l.__version__)"; \
	if command -v cc > /dev/null; then cd "$$out" && \
	PYTHONPATH="$$out/site" XDG_CACHE_HOME="$$out" CC=false "$(CURDIR)/$(RUN)" -c "from lightning_noisy.kernels import \
	build, gaussian, lstm, noisy, normalized, sums; assert build.library(), build.why_not(); \
	assert all([gaussian._load()[0], lstm._load(), noisy._compiled(), normalized._compiled(), sums._load()]); \
	print('its kernels were compiled with it')"; fi

bench: $(VENV)/.examples
	$(RUN) benchmarks/activations.py --threads 2 $(ARGS)
	$(RUN) benchmarks/activations.py --threads 1 $(ARGS)
	$(RUN) benchmarks/step_cost.py $(ARGS)
	$(RUN) benchmarks/gradient_noise.py $(ARGS)

compat:
	$(PYTHON) .ci/compat.py --pythons='$(PYTHONS)' --versions=$(or $(VERSIONS),both) --pytest='$(ARGS)' $(if $(ALL),--all)

clean:
	rm -rf $(VENV) .venv-compat build dist quickstart_logs .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "lightning_noisy needs Python 3.10 or newer; $(PYTHON) is not. Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	{ echo "$(PYTHON) can't make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PIP) --upgrade 'pip>=25.1'  # the first that knows --group
	@touch $@

$(VENV)/.examples: $(VENV)/.pip pyproject.toml
	$(PIP) --editable '.[examples]'
	@touch $@

$(VENV)/.dev: $(VENV)/.examples pyproject.toml
	$(PIP) --group dev
	@touch $@
