# make demo     train on handwritten digits, sample with DDIM and DDPM, and say which pictures to open
# make test     the test suite
# make lint     style and format
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test

python := $(VENV)/bin/python
demo := runs/digits
main := $(python) main.py --config=configs/digits.py --workdir=$(demo)

.PHONY: demo test test-slow lint install clean

install: $(VENV)/installed

$(VENV)/installed: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version): try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: install
	$(main)
	$(main) --mode=sample
	$(main) --mode=sample --config.sample.eta=1 --config.sample.num_steps=1000 --config.sample.num_images=100
	@echo; echo 'Pictures to open:'; ls $(demo)/samples/*/grid.png $(demo)/samples/progress/*.png

test: install
	$(python) -m pytest

test-slow: install
	$(python) -m pytest -m slow

lint: install
	$(python) -m ruff check .
	$(python) -m ruff format --check .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
