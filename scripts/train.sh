#!/usr/bin/env bash
# Checks a run and trains it on every GPU of this machine, or in one process on the CPU.
#
#   ./scripts/train.sh                               configs/debug.toml
#   ./scripts/train.sh configs/moe_7b.toml           one of the paper's runs
#   ./scripts/train.sh CONFIG --training.steps 20    command line over TOML over recipe
#   NPROC=2 ./scripts/train.sh                       another number of processes
#
# Exits with 0, with 2 and one line on stderr when the configuration is wrong, with 130 after Ctrl-C.
# Launchers for many machines are beside this file.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

exec "$PYTHON" -m sonicmoe_titan.cli train "$@"
