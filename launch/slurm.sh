#!/usr/bin/env bash
#SBATCH --job-name=vla_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Trains on a SLURM cluster: one task per GPU, which is what JAX expects there (no other option says who is who).
#
#   sbatch [SBATCH OPTIONS] launch/slurm.sh OPTIONS...      OPTIONS of `python -m launch.train`
#   sbatch --nodes=4 launch/slurm.sh --config configs/tabletop.py --run-dir /shared/runs/x
#   launch/slurm.sh --dry-run OPTIONS...                    prints what would run in the job
#
# Three minutes before the time limit, and when the job is preempted, SLURM sends SIGTERM: the run saves and ends. A
# preempted job is queued again by itself; after a time limit submit the same command again. Where a process dies, the
# run is started again in the same job, RESTARTS times at most. Where a node dies, SLURM ends the job (NODE_FAIL) and
# queues it again (--requeue) for nodes that are there; RESTARTS counts anew.
#
# Environment: PYTHON    the interpreter (.venv/bin/python)
#              RESTARTS  how often to start again after a process was lost (3)
set -euo pipefail

command=(srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" -m launch.train)
if [[ ${1:-} == --dry-run ]]; then
  shift
  printf '%q ' "${command[@]}" "$@"
  echo
  exit
fi
if [[ $# == 0 || -z ${SLURM_JOB_ID:-} ]]; then
  sed -n '/^# Trains/,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi

lost=3 # the exit code of launch.train where another process is the reason
for ((start = 0; ; start++)); do
  status=0
  "${command[@]}" "$@" || status=$?
  if ((status != lost && status < 128)) || ((start >= ${RESTARTS:-3})); then exit "$status"; fi
  echo "a process was lost (code $status); start $((start + 1)) of ${RESTARTS:-3} more" >&2
done
