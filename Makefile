# make demo         train on handwritten digits, sample with DDIM and DDPM, compute the likelihood, name the pictures
# make test         the tests for every commit, in minutes
# make lint         style, format and types
# make test-slow    the other tests: the demo's quality, real hosts, killed processes, other settings
# make chaos        kill a run at random moments, damage its checkpoints, fill its disk; KILLS=100 for the long form
# make peers        comparisons with other projects, in an environment of their own
# make test-plan    programs compiled for a GPU and a TPU that are not here, in an environment of their own
# make bench        the numbers in docs/numbers.md; with VENV=.venv-peers EXTRAS=test,peers also PyTorch's
# make prepare      a TFDS dataset as array_record files: DATASET=celeb_a [DATA_DIR=…] [MANUAL_DIR=…]; uses TensorFlow
# make install      the environment alone; EXTRAS=test,cuda12 for NVIDIA GPUs, EXTRAS=test,tpu for TPUs
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
KILLS ?= 8
CORRUPTIONS ?= 40

python := $(VENV)/bin/python
demo := runs/digits
main := $(python) main.py --config=configs/digits.py --workdir=$(demo)
in_parallel := --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
pytest := $(python) -m pytest $(in_parallel)

# What depends most on the versions of Python, JAX, Flax, Orbax and Diffrax: about a third of the time of all tests.
version_tests := tests/networks tests/runtime tests/data tests/modes/test_train.py tests/modes/test_sample.py \
  tests/likelihood/test_flow.py tests/test_sampler.py tests/test_cli.py tests/test_layers.py tests/test_package.py

.PHONY: demo prepare test test-slow test-newer test-versions test-plan peers chaos bench lint install clean

install: $(VENV)/installed-$(EXTRAS)

$(VENV)/installed-$(EXTRAS): setup.cfg constraints.txt
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
	@echo 'and samples during training, in $(demo)/samples/progress/'

prepare:
	$(if $(DATASET),,$(error name a dataset: make prepare DATASET=celeb_a, or DATASET=folder:/path NAME=mine))
	$(MAKE) install VENV=.venv-prepare EXTRAS=prepare
	.venv-prepare/bin/python -m diffusion.data.prepare "$(DATASET)" $(if $(DATA_DIR),--data_dir="$(DATA_DIR)") \
	  $(if $(MANUAL_DIR),--manual_dir="$(MANUAL_DIR)") $(if $(NAME),--name="$(NAME)")

lint: install
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

test: install
	$(pytest)

test-slow: install
	$(pytest) -m 'slow and not optimized'
	$(pytest) -m optimized

# With PYTHON and VENV of a newer Python, for which newer versions of JAX exist.
test-newer: install
	$(pytest) $(version_tests)

# With OTHER=path/to/python of an environment with another version of JAX: each resumes the other's runs.
test-versions: install
	OTHER_PYTHON="$(abspath $(OTHER))" $(python) -m pytest tests/test_versions.py

# In an environment of its own, because PyTorch is large and nothing else needs it. torchvision lies in a folder beside
# the other packages, for the one test that needs it: its wheel is for GPUs, and diffusers would stumble over it.
peers:
	$(MAKE) install VENV=.venv-peers EXTRAS=test,peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
	  clean-fid pytorch-fid torch-fidelity
	test -d .venv-peers/torchvision || .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps -c constraints.txt --target .venv-peers/torchvision torchvision
	.venv-peers/bin/python -m pytest $(in_parallel) -m peers

# In an environment of its own, because JAX looks for the accelerators whose compilers it has.
test-plan:
	$(MAKE) install VENV=.venv-plan EXTRAS=test,plan
	.venv-plan/bin/python -m pytest -m 'slow or not slow' tests/modes/test_plan.py

chaos: install
	$(python) -m tests.chaos --kills=$(KILLS) --corruptions=$(CORRUPTIONS)

bench: demo
	$(python) -m benchmarks.cost
	$(python) -m benchmarks.digits $(demo)/samples/*/samples.npz
	$(python) -m benchmarks.input
	$(python) -m benchmarks.saving
	$(python) -m benchmarks.peers
	$(python) -m benchmarks.report

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
