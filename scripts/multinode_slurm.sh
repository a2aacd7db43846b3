#!/usr/bin/env bash
# Trains on many nodes under SLURM. Submit from the repository:
#
#   sbatch --nodes 8 --time 24:00:00 scripts/multinode_slurm.sh configs/moe_7b.toml [--KEY VALUE]
#
# The same job, submitted once, lives through time limits, node failures and crashes: it is queued
# again and resumes from its last checkpoint, at most checkpoint.interval steps behind.
#
#   SRUN_ARGS        more arguments for srun, e.g. "--container-image=IMAGE" (pyxis)
#   REQUEUE_AFTER_S  a crash before this many seconds is an error of the run and ends it (600)
#   NPROC, LOG_DIR, SONICMOE_PYTHON, NCCL_...: as in multinode_torchrun.sh and cluster_env.sh
#
#SBATCH --job-name=sonicmoe
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
# --signal: three minutes before the time limit, to this script alone (B:)
set -euo pipefail

# SLURM runs a copy of this file, so its own path says nothing
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
if [ ! -f scripts/multinode_torchrun.sh ]; then
  echo "error: $PWD is not the repository: submit from its root" >&2
  exit 2
fi
. scripts/env.sh
if [ $# -eq 0 ] || [[ $1 == -* ]]; then
  echo "usage: sbatch --nodes N scripts/multinode_slurm.sh CONFIG [--KEY VALUE ...]" >&2
  exit 2
fi
config=$1
shift

# a requeued job keeps its id, so it finds its own checkpoints; a --dump_folder of yours wins
set -- --dump_folder "outputs/${SLURM_JOB_NAME:-sonicmoe}-$SLURM_JOB_ID" "$@"

export NNODES=$SLURM_JOB_NUM_NODES
export NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD=${head%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a host, apart
export RUN_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}         # ranks of an earlier attempt, out
"$PYTHON" -m sonicmoe_titan.cli check "$config" --nproc "$((NNODES * NPROC))" "$@"
export CHECKED=1

out_of_time=0
# --kill-on-bad-exit: a node that fails ends the others at once, which would wait for it
# --cpu-bind=none: one task starts all ranks of a node and must not sit on one core
# shellcheck disable=SC2086  # SRUN_ARGS is a list of words
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none --label ${SRUN_ARGS:-} \
  bash scripts/multinode_torchrun.sh "$config" "$@" &
step=$!
trap 'out_of_time=1; kill -TERM $step 2>/dev/null' USR1

code=0
wait "$step" || code=$?
if [ "$out_of_time" = 1 ]; then # the first wait ended with the signal
  code=0
  wait "$step" || code=$?
fi

# scancel and a finished run must not come back; a crash does, when it was not at the start
state=$(scontrol show job "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n 's/^JobState=//p')
if [ "$code" != 0 ] && [ "$state" = RUNNING ] &&
  { [ "$out_of_time" = 1 ] || [ "$SECONDS" -ge "${REQUEUE_AFTER_S:-600}" ]; }; then
  echo "queued again after $SECONDS s (exit code $code); resumes from the last checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
