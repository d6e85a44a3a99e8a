PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/

.PHONY: chat test lint format types bench wheel clean-cache clean

$(VENV)/bin/edgellm:  # the virtual environment with everything that the tests use, except the judges
	$(PYTHON) -m venv $(VENV)
	$(RUN)pip install -q -e '.[test,dev]'

chat: $(VENV)/bin/edgellm  # talk to the small default model
	$(RUN)edgellm chat

test: $(VENV)/bin/edgellm  # fetch the two small models and run all tests
	$(RUN)edgellm pull smollm2 gemma3-270m
	$(RUN)python -m pytest

lint: $(VENV)/bin/edgellm types  # ruff and mypy
	$(RUN)ruff check .
	$(RUN)ruff format --check .

format: $(VENV)/bin/edgellm  # let ruff mend what it can
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

types: $(VENV)/bin/edgellm  # mypy
	.ci/types $(RUN)python

bench: $(VENV)/bin/edgellm  # tokens per second on this machine
	$(RUN)edgellm bench

wheel: $(VENV)/bin/edgellm  # build the wheel into dist/
	$(RUN)pip wheel -q --no-deps -w dist .

clean-cache: $(VENV)/bin/edgellm  # throw away the compiled kernels
	$(RUN)edgellm doctor --clear-cache

clean:  # throw away what was built
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
