#!/usr/bin/env bash
# Trains on several hosts that can be reached by ssh and see the same directory, one process on each.
#
#   launch/ssh.sh [--dry-run] "HOST0 HOST1 ..." DIRECTORY OPTIONS...      OPTIONS of `python -m launch.train`
#   launch/ssh.sh "gpu0 gpu1" /shared/vla_jax --config configs/tabletop.py --run-dir /shared/runs/x
#
# DIRECTORY is the repository on the hosts. --dry-run prints the commands. Ctrl-C asks the run to save and stop.
#
# Environment: PYTHON  the interpreter on the hosts (.venv/bin/python)
#              PORT    of the coordinator, which is HOST0 (8476)
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true && shift; fi
if (($# < 3)); then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
read -ra hosts <<<"$1"
directory=$2
shift 2
coordinator=${hosts[0]#*@}:${PORT:-8476}

if [[ $dry_run == false ]]; then set -m; fi # Ctrl-C must not end the ssh clients: the trap asks the run to stop
pids=()
for i in "${!hosts[@]}"; do
  train=("${PYTHON:-.venv/bin/python}" -m launch.train "$@"
    --coordinator "$coordinator" --num-processes "${#hosts[@]}" --process-id "$i")
  remote="cd $(printf '%q' "$directory") && echo \$\$ > .train-$i.pid && exec$(printf ' %q' "${train[@]}")"
  if [[ $dry_run == true ]]; then
    printf 'ssh %s %q\n' "${hosts[$i]}" "$remote"
  else
    # shellcheck disable=SC2029 # it is meant to be made here
    ssh "${hosts[$i]}" "$remote" &
    pids+=($!)
  fi
done

# shellcheck disable=SC2029,SC2329 # the trap calls it
stop() { # one process is enough: they agree on the step
  ssh "${hosts[0]}" "kill -TERM \$(cat $(printf '%q' "$directory")/.train-0.pid)" || true
}
trap stop INT TERM

status=0
for pid in ${pids[@]+"${pids[@]}"}; do
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do
    code=0
    wait "$pid" || code=$?
  done
  if ((code != 0 && (status == 0 || code < status))); then status=$code; fi
done
exit "$status"
