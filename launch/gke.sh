#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: through XPK where it is installed, else as a JobSet through kubectl.
#
#   launch/gke.sh [--dry-run] NAME IMAGE OPTIONS...      OPTIONS of `python -m launch.train`
#   TPU_TYPE=v5litepod-256 SLICES=2 CLUSTER=c ZONE=us-west4-a PROJECT=p \
#     launch/gke.sh pi0 us-docker.pkg.dev/p/vla/train --config configs/tabletop.py --run-dir gs://bucket/pi0
#
# IMAGE has this repository installed (`pip install .[tpu,gcs]`) as its working directory. --dry-run prints the command
# and the JobSet. A pod that ends with an error (a process gone: code 3) restarts the whole set, RESTARTS times.
#
# Environment, both: SLICES (1), RESTARTS (10), GRACE seconds between SIGTERM and SIGKILL (180)
#              XPK: CLUSTER, ZONE, PROJECT, TPU_TYPE such as v5litepod-256
#          kubectl: ACCELERATOR (tpu-v5-lite-podslice), TOPOLOGY (4x4), HOSTS per slice (4), CHIPS per host (4)
#                   LAUNCHER=kubectl chooses it even where XPK is installed
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true && shift; fi
if (($# < 3)); then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
export NAME=$1 IMAGE=$2
shift 2
launcher=${LAUNCHER:-$(command -v xpk >/dev/null && echo xpk || echo kubectl)}
export SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-10} GRACE=${GRACE:-180}
COMMAND="exec python -m launch.train$(printf ' %q' "$@")"
export COMMAND

if [[ $launcher == xpk ]]; then
  command=(xpk workload create --workload "$NAME" --docker-image "$IMAGE"
    --cluster "${CLUSTER:?is needed by XPK}" --zone "${ZONE:?is needed by XPK}"
    --project "${PROJECT:?is needed by XPK}" --tpu-type "${TPU_TYPE:?is needed by XPK}"
    --num-slices "$SLICES" --max-restarts "$RESTARTS"
    --termination-grace-period-seconds "$GRACE" --command "$COMMAND")
  if [[ $dry_run == true ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
  exit
fi

export ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} TOPOLOGY=${TOPOLOGY:-4x4} HOSTS=${HOSTS:-4} CHIPS=${CHIPS:-4}
COMMAND=$(printf '%s' "$COMMAND" | sed "s/'/''/g") # quoted in YAML
text=$(<"$(dirname "$0")/cluster/jobset.yaml")
for variable in NAME IMAGE COMMAND SLICES RESTARTS GRACE ACCELERATOR TOPOLOGY HOSTS CHIPS; do
  text=${text//"\${$variable}"/"${!variable}"}
done
if [[ $dry_run == true ]]; then
  printf '%s\n' "$text"
else
  printf '%s\n' "$text" | kubectl apply -f -
fi
