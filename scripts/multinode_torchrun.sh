#!/usr/bin/env bash
# Trains on many nodes: run this same line on every node, at about the same time.
#
#   NNODES=8 HEAD=node01 RUN_ID=a ./scripts/multinode_torchrun.sh configs/moe_7b.toml [--KEY VALUE]
#
#   NNODES   how many nodes take part
#   HEAD     host or host:port, the same on all nodes; one of them, reachable from the others
#   RUN_ID   any word, the same on all nodes and different from other runs at the same HEAD
#   NPROC    processes per node; every GPU otherwise, and one where there is none
#   LOG_DIR  every rank's whole output; outputs/logs/RUN_ID otherwise
#   MAX_RESTARTS  how often all ranks start again from the last checkpoint when one of them fails
#   CHECKED=1     skip the check of the configuration (a launcher has made it)
#
# The repository, the dump folder and SONICMOE_CACHE belong on a file system that all nodes share.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
. "$REPOSITORY/scripts/cluster_env.sh"

for name in NNODES HEAD RUN_ID; do
  if [ -z "${!name:-}" ]; then
    echo "error: $name is not set; the head of ${BASH_SOURCE[0]} says what it is" >&2
    exit 2
  fi
done
if [ $# -eq 0 ] || [[ $1 == -* ]]; then
  echo "usage: NNODES=N HEAD=HOST[:PORT] RUN_ID=NAME $0 CONFIG [--KEY VALUE ...]" >&2
  exit 2
fi
config=$1
shift
[[ $HEAD == *:* ]] || HEAD=$HEAD:29500
NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}

# torchrun answers a mistake in the configuration with one traceback per node; this with one line
if [ "${CHECKED:-0}" != 1 ]; then
  "$PYTHON" -m sonicmoe_titan.cli check "$config" --nproc "$((NNODES * NPROC))" "$@"
fi

# --rdzv_conf: nodes of a large job come up minutes apart
# --tee 3 with --local-ranks-filter 0: everything into LOG_DIR, a node's first rank on the console
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NNODES" --nproc_per_node "$NPROC" \
  --rdzv_id "$RUN_ID" --rdzv_backend c10d --rdzv_endpoint "$HEAD" \
  --rdzv_conf "join_timeout=1800,read_timeout=600" \
  --max_restarts "${MAX_RESTARTS:-0}" \
  --log_dir "${LOG_DIR:-outputs/logs/$RUN_ID}" --tee 3 --local-ranks-filter 0 \
  -m sonicmoe_titan.train --job.config_file "$config" "$@"
