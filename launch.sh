#!/usr/bin/env bash
# Sets up .venv where that is needed, then runs the main job or any command in it.
#
#   ./launch.sh                          the main job on the embedded data (configs/quickstart.py)
#   ./launch.sh --config.FIELD=VALUE     the same with these flags
#   ./launch.sh configs/X.py [--flags]   the main job with that config
#   ./launch.sh COMMAND [ARGUMENT ...]   any command in the environment: ./launch.sh pytest
#   ./launch.sh --processes N ...        any of these as N processes of one run on this machine
#   sbatch --nodes=N launch.sh ...       any of these as one process per node; srun and mpirun: one per task
#   ./launch.sh --help                   these lines
#
# PYTHON names the interpreter to make the environment with (default: python3, at least 3.11). COORDINATOR_ADDRESS
# (HOST:PORT of process 0), NUM_PROCESSES and PROCESS_ID say by hand what SLURM and Open MPI say otherwise.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [ ! -f "$root/pyproject.toml" ]; then
    root=${SLURM_SUBMIT_DIR:-$PWD} # sbatch runs a copy of this file from a directory of its own
    [ -f "$root/pyproject.toml" ] || fail "$root is not a checkout of flax_dlvc; submit from one"
fi
venv=$root/.venv

processes=1
if [ "${1:-}" = --processes ]; then
    processes=${2:-}
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes takes a number, not '$processes'"
    shift 2
fi

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

# Whether the environment is what pyproject.toml describes; sets the extras to install and the note that it leaves.
is_ready() {
    local installed
    installed=$(cat "$venv/.installed" 2>/dev/null) || true
    extras="test"
    if has_gpu || [[ $installed == test,cuda12\ * ]]; then
        extras=test,cuda12 # stays where there is no GPU: nodes with and without share a checkout
    fi
    stamp="$extras $(cksum <"$root/pyproject.toml") $root"
    [ "$installed" = "$stamp" ]
}

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -c '^GPU ' >/dev/null
}

# Installs the package when the environment is new or what it was installed from has changed.
set_up() {
    if is_ready; then
        return
    fi
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "$python is not there; install Python 3.11 or newer, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON"
    printf 'setting up %s\n' "$venv" >&2
    "$python" -m venv "$venv" || fail "cannot make $venv; is Python's venv module installed?"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "${root}[$extras]" ||
        fail "cannot install flax_dlvc into $venv; see pip's message above"
    printf '%s\n' "$stamp" >"$venv/.installed"
}

# Processes that start at once take turns, so that only the first one installs; a checkout that is ready may be read-only.
if ! is_ready; then
    if command -v flock >/dev/null; then
        exec 9>"$root/.venv.lock"
        flock 9
        set_up
        exec 9>&-
    else
        set_up
    fi
fi

export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH

# Gives a process its share of the accelerators that it sees, as number $1 of $2 on this host.
share_devices() {
    local devices=0
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        devices=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    elif command -v nvidia-smi >/dev/null; then
        devices=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    fi
    local each=$((devices / $2))
    if [ "$2" -gt 1 ] && [ "$each" -gt 0 ] && [ -z "${LOCAL_DEVICE_IDS:-}" ]; then
        LOCAL_DEVICE_IDS=$(seq -s , $(($1 * each)) $(($1 * each + each - 1)))
        export LOCAL_DEVICE_IDS
    fi
}

# Process $1 of $2, number $3 of $4 on its host; process 0 is on host $5 and may use port $6.
join_run() {
    [ "$2" -gt 1 ] || return 0
    export PROCESS_ID=$1 NUM_PROCESSES=$2 COORDINATOR_ADDRESS=${COORDINATOR_ADDRESS:-$5:$6}
    if [[ $COORDINATOR_ADDRESS == 127.0.0.1:* ]]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
    fi
    share_devices "$3" "$4"
}

# The first host of a list such as gpu[03-05,9],big1: gpu03.
first_host() {
    local first=${1%%[,[]*} rest=
    if [[ $1 == "${first}["* ]]; then
        rest=${1#*[}
        first+=${rest%%[],-]*}
    fi
    printf '%s' "$first"
}

# Tasks on node $2 of a list such as 2(x3),1: nodes 0 to 2 have two.
tasks_on_node() {
    local part count nodes seen=0
    for part in ${1//,/ }; do
        count=${part%%(*} nodes=1
        [[ $part =~ \(x([0-9]+)\) ]] && nodes=${BASH_REMATCH[1]}
        seen=$((seen + nodes))
        if [ "$2" -lt "$seen" ]; then
            printf '%s' "$count"
            return
        fi
    done
}

# Runs a command as $1 processes, each in a process group of its own, so that Ctrl-C reaches it through us alone.
run_processes() {
    local count=$1 port pids=() codes=() number code status=0 failed_for=0 asked=
    shift
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    trap 'asked=TERM' TERM
    trap 'asked=INT' INT
    trap 'asked=HUP' HUP
    set -m
    for ((number = 0; number < count; number++)); do
        (
            join_run "$number" "$count" "$number" "$count" 127.0.0.1 "$port"
            exec "$@"
        ) &
        pids+=($!)
    done
    set +m # or the terminal would be the sleep's, and Ctrl-C with it
    while [ "${#codes[@]}" -lt "$count" ]; do
        sleep 0.2 || true
        if [ -n "$asked" ]; then
            kill -"$asked" "${pids[@]}" 2>/dev/null || true
            asked=
        fi
        for number in "${!pids[@]}"; do
            if [ -n "${codes[number]:-}" ] || kill -0 "${pids[number]}" 2>/dev/null; then
                continue
            fi
            code=0
            wait "${pids[number]}" || code=$?
            codes[number]=$code
            if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
                status=$code
                printf 'process %d of %d ended with exit code %d\n' "$number" "$count" "$code" >&2
            fi
        done
        # A process that the others wait for has failed; they end by themselves, or are ended.
        if [ "$status" -ne 0 ] && [ $((failed_for += 1)) -eq 225 ]; then
            kill -KILL "${pids[@]}" 2>/dev/null || true
        fi
    done
    exit "$status"
}

if [ $# -eq 0 ]; then
    cd "$root"
    set -- python -m flax_dlvc.main --config configs/quickstart.py
elif [[ $1 == -* ]]; then # stays where it is: paths in the flags are relative to there
    [[ " $* " =~ \ --?config[=\ ] ]] || set -- --config "$root/configs/quickstart.py" "$@"
    set -- python -m flax_dlvc.main "$@"
elif [[ $1 == *.py ]]; then
    set -- python -m flax_dlvc.main --config "$@"
fi

if [ "$processes" -gt 1 ]; then
    run_processes "$processes" "$@"
elif [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ] &&
    { [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] || [ "${SLURM_NTASKS:-1}" -gt 1 ]; }; then
    options=(--kill-on-bad-exit=1)
    [ -n "${SLURM_NTASKS_PER_NODE:-}${SLURM_NTASKS:-}" ] || options+=(--ntasks-per-node=1)
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    exec srun "${options[@]}" "$root/launch.sh" "$@"
elif [ -n "${SLURM_STEP_ID:-}" ]; then
    host=$(first_host "${SLURM_STEP_NODELIST:?}")
    port=$((12000 + (SLURM_JOB_ID * 31 + SLURM_STEP_ID) % 16000))
    if [ -n "${SLURM_GPUS_PER_TASK:-}${SLURM_GPU_BIND:-}${SLURM_TRES_PER_TASK:-}" ]; then
        here=1 # SLURM shows each task its own accelerators only
    else
        here=$(tasks_on_node "${SLURM_STEP_TASKS_PER_NODE:?}" "${SLURM_NODEID:?}")
    fi
    join_run "${SLURM_PROCID:?}" "${SLURM_STEP_NUM_TASKS:?}" "${SLURM_LOCALID:?}" "$here" "$host" "$port"
elif [ "${OMPI_COMM_WORLD_SIZE:-1}" -gt 1 ]; then
    if [ "$OMPI_COMM_WORLD_LOCAL_SIZE" -lt "$OMPI_COMM_WORLD_SIZE" ] && [ -z "${COORDINATOR_ADDRESS:-}" ]; then
        fail 'several hosts: mpirun -x COORDINATOR_ADDRESS=HOST:PORT, of the first host, a free port'
    fi
    port=$((12000 + $(cksum <<<"${PMIX_NAMESPACE:-$PPID}" | cut -d ' ' -f 1) % 16000))
    join_run "$OMPI_COMM_WORLD_RANK" "$OMPI_COMM_WORLD_SIZE" \
        "$OMPI_COMM_WORLD_LOCAL_RANK" "$OMPI_COMM_WORLD_LOCAL_SIZE" 127.0.0.1 "$port"
fi
exec "$@"
