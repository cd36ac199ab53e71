#!/usr/bin/env bash
# Trains with several processes on this machine, as several hosts would.
#
#   launch/local.sh [--dry-run] N OPTIONS...      OPTIONS of `python -m launch.train`
#   launch/local.sh 2 --config configs/tabletop.py --run-dir runs/x
#
# --dry-run prints the commands. Ctrl-C or SIGTERM stops all of them; they save first. Exits with the code of the
# process that says most about what went wrong: 0 all well, 2 an error to mend, 3 a process is gone.
#
# Environment: DEVICES  simulated devices of each process on CPU (1); on GPUs set JAX_LOCAL_DEVICE_IDS instead
#              PYTHON   the interpreter (python)
#              MODULE   what to run (launch.train)
#              PORT     of the coordinator (a free one)
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true && shift; fi
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python}
if [[ -z ${PORT:-} ]]; then
  PORT=$("$python" -S -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
fi

if [[ $dry_run == false ]]; then set -m; fi # a process group each: Ctrl-C reaches them through the trap, once
pids=()
for ((i = 0; i < count; i++)); do
  command=(env "JAX_NUM_CPU_DEVICES=${DEVICES:-1}" "$python" -m "${MODULE:-launch.train}" "$@"
    --coordinator "localhost:$PORT" --num-processes "$count" --process-id "$i")
  if [[ $dry_run == true ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM

status=0
for pid in ${pids[@]+"${pids[@]}"}; do
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do # a signal for this script ended the wait, not the process
    code=0
    wait "$pid" || code=$?
  done
  if ((code != 0 && (status == 0 || code < status))); then status=$code; fi
done
exit "$status"
