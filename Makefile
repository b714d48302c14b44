# make demo     set up what is missing, then make a tiny checkpoint and generate from it: on the GPU if there is one
# make test     set up what is missing, then run the tests
# make gpu      everything that needs a GPU: the tests there, the sanitizer, the benchmarks (GPU='--peers DIR': beside
#               other implementations; benchmarks/peers.py says what may be there)
# make bench    the benchmarks alone
# make lint     style, formatting, types
# make format   rewrite the sources in the project's format
#
# A python3 that already has torch is used as it is; otherwise an environment is made in .venv. Nothing is downloaded
# where everything is there already, so all of this works without a network, too.

PYTHON ?= python3
# What is installed where there is no torch yet: the release that CI runs. Any torch from 2.11 on will do.
TORCH ?= torch==2.13.0
# More arguments for pytest: make test PYTEST='-x tests/test_gemm.py'
PYTEST ?=
# More arguments for benchmarks/gpu_suite.py
GPU ?=

has_torch := $(shell $(PYTHON) -c 'import importlib.util as u; print("yes" if u.find_spec("torch") else "")')
py := $(if $(has_torch),$(PYTHON),.venv/bin/python)
environment := $(if $(has_torch),,.venv/ready)
clang_format = $(py) -c 'from clang_format import clang_format as run; run()'
cpp = $(shell find benchmarks csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')

.PHONY: demo test gpu bench lint format
demo: $(environment)
	$(py) tools/install.py
	rm -rf build/demo
	$(py) -m deepseek_ops tiny build/demo
	$(py) -m deepseek_ops generate build/demo --prompt 'Once upon a time' --max-new-tokens 32 --ignore-eos
	@echo '(random weights: noise is what they should give)'
	$(py) -m deepseek_ops ops

test: $(environment)
	$(py) tools/install.py test
	$(py) -m pytest -q $(PYTEST)

gpu: $(environment)
	$(py) tools/install.py test
	$(py) benchmarks/gpu_suite.py $(GPU)

bench: $(environment)
	$(py) tools/install.py test
	$(py) -m pytest -q benchmarks --benchmark-columns=median,iqr,rounds $(PYTEST)

lint: $(environment)
	$(py) tools/install.py lint
	$(py) -m ruff check
	$(py) -m ruff format --check
	$(py) -m mypy
	$(clang_format) --dry-run -Werror $(cpp)

format: $(environment)
	$(py) tools/install.py lint
	$(py) -m ruff check --fix
	$(py) -m ruff format
	$(clang_format) -i $(cpp)

.venv/ready:
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q '$(TORCH)'
	touch .venv/ready
