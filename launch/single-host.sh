#!/usr/bin/env bash
# Train on all devices of one host, and go on after a preemption:
#
#   launch/single-host.sh configs/dpo-smollm2-hh.yaml [KEY=VALUE …]
#
# SIGTERM makes a run save and exit with 143; started again it goes on from there. A mistake of the config's or the data's
# exits with 2 and is not tried again.
set -uo pipefail

# JAX takes three quarters of a GPU's memory unless told otherwise; what is left serves nobody.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# Compiled programs outlive the process, so a restart reaches its first step in seconds.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jaxpo/xla}"

attempts=0
while true; do
  python -m jaxpo.launch train "$@"
  status=$?
  attempts=$((attempts + 1))
  if [ "$status" -ne 143 ] || [ "$attempts" -ge "${MAX_ATTEMPTS:-100}" ]; then
    exit "$status"
  fi
done
