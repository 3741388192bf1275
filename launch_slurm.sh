#!/usr/bin/env bash
#SBATCH --job-name=megatron-dump
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#
# GRPO post-training on any number of nodes: one torchrun a node, one process a GPU. From any folder:
#
#   sbatch --nodes=2 --gpus-per-node=8 --partition=gpu launch_slurm.sh --config-name=kk_qwen2.5_7b_8gpu model.optim.lr=1e-6
#
# Options before the script's name are sbatch's own and win over the #SBATCH lines: partition, account, nodes, time.
# Arguments after it go to examples/train_gpt_grpo.py: options first, then key=value. trainer.num_nodes and
# trainer.devices are filled in from the allocation. After a node failure Slurm requeues the job under the same id, and
# the run resumes from its last checkpoint if exp_manager.resume_if_exists is true.
#
# Site settings come from the environment, or from a file launch_slurm.env beside this script (plain shell, sourced; a
# line `: "${PYTHON:=/opt/venv/bin/python}"` gives way to the environment):
#   PYTHON            the interpreter on the nodes, or inside the container            (python)
#   NPROC_PER_NODE    processes a node; needed where there are no GPUs                 (SLURM_GPUS_ON_NODE)
#   CONTAINER_IMAGE   run in this image, through pyxis                                 (no container)
#   CONTAINER_MOUNTS  more mounts beside the repository itself: /data:/data,/ckpt:/ckpt
#   SECRETS_FILE      a file of NAME=value lines (WANDB_API_KEY, HF_TOKEN), exported and never printed
#   REPO_DIR          the repository, where it cannot be told from the job
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and the like are passed on as they are.
#
# Not here yet: a checkpoint on a signal before the time limit, a bound on requeues, exclusion of bad nodes, pre-flight
# checks, and finding the network interface by itself.
set -euo pipefail

fail() { echo "launch_slurm.sh: $*" >&2; exit 1; }

# Slurm runs a copy of this script from its spool folder: the job's record tells where the script itself lies.
find_repository() {
    local script=${BASH_SOURCE[0]}
    if [[ ! -f $(dirname "$script")/examples/train_gpt_grpo.py ]]; then
        script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
        script=${script%" $*"} # the record holds the arguments too
    fi
    (cd "$(dirname "$script")" && pwd)
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "no Slurm job: start it with sbatch, or inside salloc"
repo=${REPO_DIR:-$(find_repository "$@")}
[[ -f $repo/examples/train_gpt_grpo.py ]] || fail "no examples/train_gpt_grpo.py in '$repo': set REPO_DIR"

if [[ -f $repo/launch_slurm.env ]]; then
    set -a
    # shellcheck source=/dev/null
    source "$repo/launch_slurm.env"
    set +a
fi
if [[ -n ${SECRETS_FILE:-} ]]; then
    set +x # not even under bash -x
    secrets=$(realpath -- "$SECRETS_FILE")
    # bash quotes a line that it cannot run in its error message: a trial first, and nothing the file prints is shown
    bash -euc 'source "$1"' _ "$secrets" >/dev/null 2>&1 || fail "SECRETS_FILE=$secrets: not NAME=value lines"
    set -a
    # shellcheck source=/dev/null
    source "$secrets" >/dev/null 2>&1
    set +a
fi

nodes=$SLURM_JOB_NUM_NODES
nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
[[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "'$nproc' processes a node: ask for --gpus-per-node, or set NPROC_PER_NODE"

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
head_ip=$(getent ahostsv4 "$head_node" | awk 'NR == 1 {print $1}') || true # the next line says it better
[[ -n $head_ip ]] || fail "node $head_node has no IPv4 address in the name service"
port=$((20000 + SLURM_JOB_ID % 10000)) # below the ephemeral ports; two jobs on one node do not meet

srun_args=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1)
srun_args+=(--cpu-bind=none) # one task a node must not mean one core a node
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    mounts=$repo:$repo${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    srun_args+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$repo")
fi

# The static rendezvous keeps rank 0 on the head node and ranks of a node together, in Slurm's node order.
torchrun_args=(
    --nnodes="$nodes" --nproc-per-node="$nproc" --max-restarts=0
    --rdzv-backend=static --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head_ip:$port"
)

cd "$repo"
echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $nodes nodes x $nproc, head $head_node at $head_ip:$port"
# SLURM_NODEID is known only inside the step, hence the inner shell, on each node
# shellcheck disable=SC2016
exec srun "${srun_args[@]}" bash -c 'exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' \
    "${PYTHON:-python}" "${torchrun_args[@]}" \
    examples/train_gpt_grpo.py "$@" trainer.num_nodes="$nodes" trainer.devices="$nproc"
