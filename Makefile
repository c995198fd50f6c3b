# make demo        train on handwritten digits, sample with DDIM and DDPM, compute the likelihood, name the pictures
# make prepare     a dataset as array_record files: DATASET=celeb_a [DATA_DIR=…] [MANUAL_DIR=…], needs TensorFlow
# make test        the test suite, in minutes
# make test-slow   what takes longer: the demo's quality, likelihoods of a trained run
# make peers       comparisons with PyTorch and diffusers, in an environment of their own
# make chaos       kill a run at random moments, damage its checkpoints, fill its disk; KILLS=100 for the long form
# make bench       the numbers of the README; with VENV=.venv-peers EXTRAS=test,peers beside PyTorch's
# make lint        style and format
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
KILLS ?= 8
CORRUPTIONS ?= 40

python := $(VENV)/bin/python
demo := runs/digits
main := $(python) main.py --config=configs/digits.py --workdir=$(demo)

.PHONY: demo prepare test test-slow test-versions peers chaos bench lint install clean

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
	$(main) --mode=likelihood --config.likelihood.num_images=16 --config.likelihood.samples=2
	@echo; echo 'Pictures to open:'; ls $(demo)/samples/*/grid.png $(demo)/likelihood/*/terms.png
	@echo 'and how it learned, in $(demo)/samples/progress/'

prepare:
	$(if $(DATASET),,$(error say which: make prepare DATASET=celeb_a, or DATASET=folder:/path NAME=mine))
	$(MAKE) install VENV=.venv-prepare EXTRAS=prepare
	.venv-prepare/bin/python -m diffusion.data.prepare "$(DATASET)" $(if $(DATA_DIR),--data_dir="$(DATA_DIR)") \
	  $(if $(MANUAL_DIR),--manual_dir="$(MANUAL_DIR)") $(if $(NAME),--name="$(NAME)")

test: install
	$(python) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

test-slow: install
	$(python) -m pytest -m slow

# With OTHER=path/to/python of an environment that has another version of JAX: runs go on from one to the other.
test-versions: install
	OTHER_PYTHON="$(abspath $(OTHER))" $(python) -m pytest tests/test_versions.py

# In an environment of its own: PyTorch is large, and nothing else needs it.
peers:
	$(MAKE) install VENV=.venv-peers EXTRAS=test,peers
	.venv-peers/bin/python -m pytest -m peers

chaos: install
	$(python) -m tests.chaos --kills=$(KILLS) --corruptions=$(CORRUPTIONS)

bench: install
	$(python) -m benchmarks.cost
	$(python) -m benchmarks.digits $(demo)/samples/*/samples.npz
	$(python) -m benchmarks.input
	$(python) -m benchmarks.saving
	$(python) -m benchmarks.peers
	$(python) -m benchmarks.report

lint: install
	$(python) -m ruff check .
	$(python) -m ruff format --check .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
