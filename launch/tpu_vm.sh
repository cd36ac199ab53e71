#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice of any size, through gcloud.
#
#   launch/tpu_vm.sh [--dry-run] create  NAME ZONE TYPE       e.g. v5litepod-16; SPOT=1 for a spot slice
#   launch/tpu_vm.sh [--dry-run] install NAME ZONE            copies this repository's HEAD and installs it, on all workers
#   launch/tpu_vm.sh [--dry-run] train   NAME ZONE OPTIONS... starts in the background; --run-dir gs://... is best
#   launch/tpu_vm.sh [--dry-run] logs    NAME ZONE            follows worker 0's output
#   launch/tpu_vm.sh [--dry-run] stop    NAME ZONE            saves and stops
#   launch/tpu_vm.sh [--dry-run] delete  NAME ZONE
#
# OPTIONS are those of `python -m launch.train`; the workers find each other by themselves. `train` again continues.
#
# Environment: VERSION  runtime of `create` (by the type's name), PROJECT (gcloud's own), SPOT
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true && shift; fi
if (($# < 3)); then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
action=$1 name=$2 zone=$3
shift 3

run() {
  if [[ $dry_run == true ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpu=(gcloud compute tpus tpu-vm)
where=("--zone=$zone" ${PROJECT:+"--project=$PROJECT"})
on() { # on WORKERS COMMAND
  run "${tpu[@]}" ssh "$name" "${where[@]}" "--worker=$1" --command="$2"
}

case $action in
  create)
    type=${1:?create needs a TYPE, such as v5litepod-16}
    case $type in # https://cloud.google.com/tpu/docs/runtimes
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      *) runtime="tpu-ubuntu2204-base" ;;
    esac
    run "${tpu[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" \
      "--version=${VERSION:-$runtime}" ${SPOT:+--spot}
    ;;
  install)
    archive=$(mktemp -d)/vla_jax.tar.gz
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    run git archive --format=tar.gz --output="$archive" HEAD
    run "${tpu[@]}" scp "$archive" "$name:" "${where[@]}" --worker=all
    on all "mkdir -p vla_jax && tar xzf vla_jax.tar.gz -C vla_jax && cd vla_jax &&
      python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,gcs]'"
    ;;
  train)
    options=$(printf ' %q' "$@")
    on all "cd vla_jax && (nohup .venv/bin/python -m launch.train$options > train.log 2>&1 & echo \$! > train.pid)"
    ;;
  logs) on 0 "tail -n 100 -F vla_jax/train.log" ;;
  stop) on 0 "kill -TERM \$(cat vla_jax/train.pid)" ;; # one is enough: they agree on the step
  delete) run "${tpu[@]}" delete "$name" "${where[@]}" --quiet ;;
  *)
    echo "error: unknown action $action; $0 alone lists them" >&2
    exit 2
    ;;
esac
