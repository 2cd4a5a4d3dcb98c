#!/usr/bin/env bash
# Train on all devices of one host, with one process:
#
#   launch/single-host.sh configs/dpo-smollm2-hh.yaml [KEY=VALUE …]
#
# To change: nothing. CUDA_VISIBLE_DEVICES=0,1 leaves it two GPUs.
# Environment: launch/environment.sh.
# Ends with 0 when the run is done, and with 2 over a mistake in the config, the data or a checkpoint. SIGTERM makes it
# save and end with 143. The same command goes on from the last checkpoint, whatever ended it.
#
# When it hangs: `nvidia-smi` says which other process holds the GPU's memory; `kill -ABRT PID` ends the run with the
# stacks of its threads, `py-spy dump --pid PID` (pip install py-spy) shows them and lets it go on.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec python -m jaxpo.launch train "$@"
