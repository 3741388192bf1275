#!/usr/bin/env bash
#SBATCH --job-name=megatron-dump
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=slurm-%x-%j.out
#
# GRPO post-training on any number of nodes: one torchrun a node, one process a GPU. From any folder:
#
#   sbatch --nodes=2 --gpus-per-node=8 --partition=gpu launch_slurm.sh --config-name=kk_qwen2.5_7b_8gpu model.optim.lr=1e-6
#
# Options before the script's name are sbatch's own and win over the #SBATCH lines: partition, account, nodes, time.
# Arguments after it go to examples/train_gpt_grpo.py: options first, then key=value. trainer.num_nodes and
# trainer.devices are filled in from the allocation. docs/slurm.md says what happens when time runs out, a rank crashes
# or a node dies, and how to run chains, arrays and separate generator nodes.
#
# Site settings come from the environment, or from a file launch_slurm.env beside this script (plain shell, sourced; a
# line `: "${PYTHON:=/opt/venv/bin/python}"` gives way to the environment):
#   PYTHON            the interpreter on the nodes, or inside the container            (python)
#   NPROC_PER_NODE    processes a node; needed where there are no GPUs                 (SLURM_GPUS_ON_NODE)
#   CONTAINER_IMAGE   run in this image, through pyxis                                 (no container)
#   CONTAINER_MOUNTS  more mounts beside the repository and the job's folder: /data:/data,/ckpt:/ckpt
#   MODULES           environment modules to load: "cuda/12.8 python/3.12"
#   SECRETS_FILE      a file of NAME=value lines (WANDB_API_KEY, HF_TOKEN), exported and never printed
#   JOB_FOLDER        logs, on a disk that all nodes share        (slurm-<name>-<job id> where sbatch was called)
#   REPO_DIR          the repository, where it cannot be told from the job
#   MAX_FAILURES      crashes in a row, without a new checkpoint, after which the job ends               (3)
#   SPARE_NODES       nodes of the allocation that wait to replace a bad one                             (0)
#   GENERATOR_NODES   nodes of the allocation that only generate, as a Ray cluster; a job of two components
#                     (sbatch … : …) generates on its second                                           (0)
#   REQUEUE           no: a run that was stopped by its time limit is not put back into the queue      (yes)
#   PREFLIGHT         no: start without checking the nodes                                             (yes)
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME: found by themselves where they are not set; all else is passed on as it is.
set -euo pipefail

say() { echo "launch_slurm.sh: $*"; }
fail() { echo "launch_slurm.sh: $*" >&2; exit 1; }

# Slurm runs a copy of this script from its spool folder: the job's record tells where the script itself lies.
find_repository() {
    local script=${BASH_SOURCE[0]}
    if [[ ! -f $(dirname "$script")/examples/train_gpt_grpo.py ]]; then
        script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
        script=${script%" $*"} # the record holds the arguments too
    fi
    (cd "$(dirname "$script")" && pwd)
}

read_settings() {
    if [[ -f $repo/launch_slurm.env ]]; then
        set -a
        # shellcheck source=/dev/null
        source "$repo/launch_slurm.env"
        set +a
    fi
    if [[ -n ${SECRETS_FILE:-} ]]; then
        set +x # not even under bash -x
        local secrets
        secrets=$(realpath -- "$SECRETS_FILE")
        # bash quotes a line that it cannot run in its error message: a trial first, and nothing the file prints is shown
        bash -euc 'source "$1"' _ "$secrets" >/dev/null 2>&1 || fail "SECRETS_FILE=$secrets: not NAME=value lines"
        set -a
        # shellcheck source=/dev/null
        source "$secrets" >/dev/null 2>&1
        set +a
    fi
    if [[ -n ${MODULES:-} ]]; then
        set +u # module's own code does not bear it
        # shellcheck disable=SC2086
        module load $MODULES || fail "MODULES=$MODULES: cannot be loaded"
        set -u
    fi
}

# The nodes to use: those of the allocation that have not failed twice, without the spare ones.
choose_nodes() {
    local allocated node bad=()
    mapfile -t allocated < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    want=$((${#allocated[@]} - ${SPARE_NODES:-0}))
    ((want > ${GENERATOR_NODES:-0})) || fail "${#allocated[@]} nodes, SPARE_NODES=${SPARE_NODES:-0}," \
        "GENERATOR_NODES=${GENERATOR_NODES:-0}: no node is left to train on; ask for more --nodes"
    nodes=()
    for node in "${allocated[@]}"; do
        if (($(strikes "$node") < 2)); then nodes+=("$node"); else bad+=("$node"); fi
    done
    if ((${#nodes[@]} < want)); then
        if enough_elsewhere; then
            requeue "without ${bad[*]}, which failed twice"
        fi
        say "warning: ${bad[*]} failed twice, but the partition has too few other nodes: used again"
        nodes+=("${bad[@]}")
        # Slurm's own order decides the ranks
        mapfile -t nodes < <(printf '%s\n' "${allocated[@]}" | grep -Fxf <(printf '%s\n' "${nodes[@]:0:want}"))
    fi
    nodes=("${nodes[@]:0:want}")
}

strikes() { grep -cFx -- "$1" "$job_folder/strikes" || true; } # grep's 1 for none

struck_out() { sort "$job_folder/strikes" | uniq -c | awk '$1 > 1 {print $2}'; }

enough_elsewhere() {
    local usable
    usable=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,alloc,mix,comp -o %N | sort -u \
        | grep -vcFxf <(struck_out; echo)) || true # grep's 1 for none
    ((usable >= want + ${SPARE_NODES:-0}))
}

# Put the job back into the queue, under the same id, not to run on nodes that failed twice. Does not return.
requeue() {
    local bad
    bad=$(struck_out | paste -sd,)
    say "back into the queue: $1"
    trap '' TERM # Slurm ends this script once the job is queued again, and the next line is still to be done
    scontrol requeue "$SLURM_JOB_ID" || fail "Slurm did not requeue the job; submit it again: the run resumes"
    if [[ -n $bad ]] && enough_elsewhere; then
        scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="$bad" || say "warning: Slurm did not exclude $bad"
    fi
    exit 0
}

# Wait for a child. A trapped signal interrupts bash's own wait, which then returns 128 and more.
wait_for() {
    local before code=0 last
    while :; do
        before=$signals last=$code code=0
        wait "$1" || code=$?
        ((code != 127)) || code=$last # it had been collected just before the signal came
        ((signals > before)) || return "$code"
    done
}

# Slurm says that the time is nearly over. srun passes the signal on to every rank. Where that does not end the run in
# time, the job is requeued with seconds to spare: at its limit Slurm would end it for good.
on_signal() {
    signals=$((signals + 1))
    say "signal: save and stop"
    if [[ -n $step ]] && ((signals == 1)); then
        insist "$step" &
    fi
}

insist() {
    trap '' TERM USR1
    while kill -USR1 "$1" 2>/dev/null; do
        if [[ -n ${SLURM_JOB_END_TIME:-} ]] && (($(date +%s) > SLURM_JOB_END_TIME - 30)); then
            requeue "the run did not stop in time and goes on from its last checkpoint"
        fi
        sleep 5
    done
}

# A Python program as one task on each of the nodes named; its output goes to <attempt>/<node><suffix>. SIGUSR1 is
# ignored until it is taken up again: torchrun must not die of it. Becomes srun: call it in a subshell or with `&`.
on_nodes() {
    local suffix=$1 count=$2 list=$3
    shift 3
    exec srun --overlap --nodes="$count" --nodelist="$list" --ntasks="$count" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=1 --wait=60 --export=ALL --output="$attempt/%N$suffix" --open-mode=append \
        "${container[@]}" "${srun_options[@]}" \
        bash -c "trap '' USR1; exec \"\$@\"" _ "$python" "$@" 2>>"$attempt/srun.log"
}

# Show what srun says from this line of its log on, while a step lasts. Not through a pipe, which may still hold what
# count_failure looks for.
show_srun() { tail -q -s 0.2 -n +"$1" -f --pid="$2" "$attempt/srun.log" >&2; }

next_line() { echo $((1 + $(wc -l <"$attempt/srun.log"))); }

join_by_comma() { local IFS=,; echo "$*"; }

# Check the nodes, and the arguments. 0: go; 1: bad nodes, or something that may pass; 2: it can never run.
preflight() {
    local code=0 line srun_options=(--kill-on-bad-exit=0) # each node says what it found
    [[ ${PREFLIGHT:-yes} != no ]] || return 0
    line=$(next_line)
    on_nodes .preflight.log "${#nodes[@]}" "$node_list" tools/slurm/preflight.py --folder "$attempt/preflight" \
        --nodes "${#nodes[@]}" --training-nodes "${#trainers[@]}" --nproc "$nproc" --head "$head_ip:$((port + 1))" -- "${training[@]:1}" &
    step=$!
    show_srun "$line" "$step" &
    local said=$!
    wait_for "$step" || code=$?
    step=
    wait "$said" || true
    cat "$attempt/$head_node.preflight.log"
    ((code != 0)) || return 0
    [[ ! -e $attempt/preflight/refused ]] || return 2
    return 1
}

# Ray over the generator nodes, with its head, which runs nothing, on the first training node.
start_ray() {
    local list
    # Others share the network; Ray runs what it is sent. Newer Rays want a token, older ones do not look at it.
    read -r RAY_AUTH_TOKEN _ < <(head -c 32 /dev/urandom | sha256sum)
    export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
    list=$(join_by_comma "${generators[@]}")
    on_nodes .ray.log 1 "$head_node" tools/slurm/run_ray.py head "$head_ip:$((port + 2))" &
    ray_steps+=($!)
    (
        [[ -z ${SLURM_HET_SIZE:-} ]] || srun_options=(--het-group=1)
        on_nodes .ray.log "${#generators[@]}" "$list" tools/slurm/run_ray.py worker "$head_ip:$((port + 2))"
    ) &
    ray_steps+=($!)
    (on_nodes .ray.log 1 "$head_node" tools/slurm/run_ray.py wait "$head_ip:$((port + 2))" \
        --nodes="$((1 + ${#generators[@]}))")
}

stop_ray() {
    local pid
    for pid in "${ray_steps[@]}"; do
        kill -TERM "$pid" 2>/dev/null || true
    done
    ray_steps=()
}

# One run of the trainer on the chosen nodes, until it ends. Its rank 0's output is shown here as well.
train() {
    local code=0 log=$attempt/$head_node.log line ray=()
    line=$(next_line)
    if ((${#generators[@]})); then
        start_ray || {
            tail -n +"$line" "$attempt/srun.log" >&2
            return 1
        }
        ray=(trainer.grpo.inference_backend.ray.enabled=true
            "trainer.grpo.inference_backend.ray.address=$head_ip:$((port + 2))")
    fi
    touch "$log"
    on_nodes .log "${#trainers[@]}" "$(join_by_comma "${trainers[@]}")" tools/slurm/run_node.py --head "$head_ip:$port" \
        --ranks "$attempt/ranks" \
        --nnodes="${#trainers[@]}" --nproc-per-node="$nproc" --max-restarts=0 --rdzv-id="$SLURM_JOB_ID" \
        "${training[@]}" "${ray[@]}" exp_manager.outcome_file="$attempt/outcome.json" &
    step=$!
    tail -n +1 -F --pid="$step" "$log" 2>/dev/null &
    local shown=$!
    show_srun "$line" "$step" &
    local said=$!
    wait_for "$step" || code=$?
    step=
    wait "$shown" "$said" || true
    stop_ray
    return "$code"
}

# How the attempt ended: finished, stopped (to be continued), ended, refused; "" after a crash.
outcome() { sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p' "$attempt/outcome.json" 2>/dev/null || true; }

# Nodes that are certainly at fault: named by the pre-flight, by srun, or by Slurm.
lost_nodes() {
    {
        cat "$attempt/preflight/bad_nodes" 2>/dev/null || true
        sed -n 's/.* failed on node \([^: ]*\):.*/\1/p' "$attempt/srun.log"
        sinfo -h -N -n "$node_list" -o '%N %t' | awk '$2 ~ /\*|down|fail/ {print $1}'
    } | sort -u
}

# A crash: who was it? Its node gets a strike, a lost node two, and the job another try, unless there were too many
# without progress. Losing a node is not counted, the first time: another takes its place.
count_failure() {
    local node replaced=0
    say "attempt $number failed with exit code $1"
    if grep -q "Unable to create step" "$attempt/srun.log"; then # seen where a node has just come back
        one_more_failure
        requeue "Slurm cannot start a step in this allocation"
    fi
    if [[ -d $attempt/ranks ]]; then # else the pre-flight has told
        "$host_python" tools/slurm/first_failure.py "$attempt" || say "warning: tools/slurm/first_failure.py failed"
    fi
    for node in $(lost_nodes); do
        (($(strikes "$node") > 1)) || replaced=1
        say "node $node is lost"
        printf '%s\n' "$node" "$node" >>"$job_folder/strikes"
    done
    if [[ -s $attempt/failed_node ]]; then
        say "a strike for node $(cat "$attempt/failed_node")"
        cat "$attempt/failed_node" >>"$job_folder/strikes"
    fi
    ((replaced)) || one_more_failure
}

one_more_failure() {
    failures=$((failures + 1))
    echo "$failures" >"$job_folder/failures"
    ((failures < ${MAX_FAILURES:-3})) || fail "$failures failures in a row without a new checkpoint: no further try;" \
        "logs are in $job_folder"
}

# Failures count in a row: a new checkpoint since the last start clears them.
note_progress() {
    local step best
    step=$(cat "$attempt/preflight/resume_step" 2>/dev/null || echo -1)
    best=$(cat "$job_folder/best_step" 2>/dev/null || echo -1)
    if ((step > best)); then
        echo "$step" >"$job_folder/best_step"
        failures=0
        echo 0 >"$job_folder/failures"
    fi
}

run_attempt() {
    local code=0
    choose_nodes
    trainers=("${nodes[@]:0:want - ${GENERATOR_NODES:-0}}")
    generators=("${nodes[@]:want - ${GENERATOR_NODES:-0}}")
    if [[ -n ${SLURM_HET_SIZE:-} ]]; then
        mapfile -t generators < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
    fi
    node_list=$(join_by_comma "${nodes[@]}")
    head_node=${nodes[0]}
    head_ip=$(getent ahostsv4 "$head_node" | awk 'NR == 1 {print $1}') || true # the next line says it better
    [[ -n $head_ip ]] || fail "node $head_node has no IPv4 address in the name service"
    training=(examples/train_gpt_grpo.py "$@" trainer.num_nodes="${#trainers[@]}" trainer.devices="$nproc")

    attempt=$job_folder/attempt_$number
    mkdir -p "$attempt"
    touch "$attempt/srun.log"
    say "job $SLURM_JOB_ID, attempt $number: ${#nodes[@]} nodes x $nproc, head $head_node at $head_ip:$port; logs in $attempt"
    preflight || code=$?
    ((code != 2)) || fail "refused before the start; logs are in $attempt"
    if ((code == 0 && signals == 0)); then
        note_progress
        train || code=$?
    fi
    case $(outcome) in
        finished | ended) exit 0 ;;
        refused) fail "the run refused its input; logs are in $attempt" ;;
        stopped) continue_later ;;
    esac
    if ((signals > 0)); then
        say "the signal came before the run could stop by itself; is --time long enough for --signal=B:USR1@300?"
        continue_later
    fi
    count_failure "$code"
}

# An attempt that ended before its first new checkpoint, as when the signal came too early, is a failure too: a job must
# not go round for ever.
continue_later() {
    local step
    step=$(sed -n 's/.*"step": *\([0-9]*\).*/\1/p' "$attempt/outcome.json" 2>/dev/null || echo -1)
    ((${step:--1} > $(cat "$job_folder/best_step" 2>/dev/null || echo -1))) || one_more_failure
    if [[ ${REQUEUE:-yes} == no ]]; then
        say "stopped, to be continued: submit it again"
        exit 0
    fi
    requeue "the run goes on from its last checkpoint"
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "no Slurm job: start it with sbatch, or inside salloc"
repo=${REPO_DIR:-$(find_repository "$@")}
[[ -f $repo/examples/train_gpt_grpo.py ]] || fail "no examples/train_gpt_grpo.py in '$repo': set REPO_DIR"
read_settings

nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
[[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "'$nproc' processes a node: ask for --gpus-per-node, or set NPROC_PER_NODE"
python=${PYTHON:-python}
host_python=$python
[[ -z ${CONTAINER_IMAGE:-} ]] || host_python=python3 # of the batch host, for the standard library alone
port=$((20000 + SLURM_JOB_ID % 2500 * 4)) # below the ephemeral ports; two jobs on one node do not meet
job_folder=${JOB_FOLDER:-$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_NAME-$SLURM_JOB_ID}
mkdir -p "$job_folder" || fail "JOB_FOLDER=$job_folder: cannot be written; name a folder that all nodes share"
touch "$job_folder/strikes"

container=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    mounts=$repo:$repo,$job_folder:$job_folder${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$repo")
fi
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
# Slurm sets this itself since 23.02; a variable inherited from another job would be wrong
unset SLURM_JOB_END_TIME
end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*EndTime=\([0-9T:-]*\).*/\1/p' | head -n 1)
[[ -z $end ]] || SLURM_JOB_END_TIME=$(date -d "$end" +%s)
export SLURM_JOB_END_TIME

signals=0 step='' ray_steps=() srun_options=()
trap on_signal USR1
failures=$(cat "$job_folder/failures" 2>/dev/null || echo 0)
cd "$repo"
while :; do
    number=$(find "$job_folder" -maxdepth 1 -name 'attempt_*' | wc -l)
    run_attempt "$@"
    sleep "${RETRY_WAIT:-10}" # Slurm may have something to say about the node
done
