#!/usr/bin/env bash
# Trains on several machines. Run the same line on each of them, at about the same time:
#
#   deploy/torchrun.sh MACHINES WORKERS_PER_MACHINE FIRST_MACHINE[:PORT] [settings of dmaml fit ...]
#
# The machines find each other at FIRST_MACHINE, which is any one of them. A worker that dies is started again, with all
# others, up to RESTARTS times. FOLDER must lie on a disk that all machines share.
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: deploy/torchrun.sh MACHINES WORKERS_PER_MACHINE FIRST_MACHINE[:PORT] [settings of dmaml fit ...]" >&2
  exit 2
fi
machines=$1 workers=$2 first=$3
shift 3
folder=${FOLDER:-mlruns/jobs/${JOB:-torchrun}}

exec torchrun \
  --nnodes "$machines" --nproc-per-node "$workers" \
  --rdzv-backend c10d --rdzv-endpoint "$first" --rdzv-id "${JOB:-dmaml}" \
  --max-restarts "${RESTARTS:-3}" \
  -m dmaml_pl fit --config "${CONFIG:-configs/sinusoid.yaml}" --checkpoint.dirpath "$folder" --ckpt_path auto "$@"
