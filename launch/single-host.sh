#!/usr/bin/env bash
# Train on all devices of one host:
#
#   launch/single-host.sh configs/dpo-smollm2-hh.yaml [KEY=VALUE …]
#
# SIGTERM makes a run save and exit with 143; the same command goes on from there. A mistake in the config or the data
# exits with 2.
set -euo pipefail

# JAX takes three quarters of a GPU's memory unless told otherwise; what is left serves nobody.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# Compiled programs outlive the process, so a restart reaches its first step in seconds.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jaxpo/xla}"

exec python -m jaxpo.launch train "$@"
