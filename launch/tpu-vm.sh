#!/usr/bin/env bash
# Train on a Cloud TPU slice, with one process on each of its hosts; this script runs on all of them. From your machine:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='
#     cd jaxpo && launch/tpu-vm.sh configs/dpo-qwen2.5-code.yaml output_dir=/shared/runs/code [KEY=VALUE …]'
#
# Before, once, with the same `ssh --worker=all`: bring this repository to each host, `pip install '.[tpu]'`, and mount
#   a folder that all hosts share, with locks and renames (Filestore; Cloud Storage FUSE has neither).
# To change: NAME, ZONE, and the shared folder. A slice of one host needs nothing else; several slices (multislice) are
#   not what this is for.
# Environment: launch/environment.sh; let JAX_COMPILATION_CACHE_DIR be in the shared folder, too. The machine's
#   metadata tells each host its place.
#
# Ends with 0 when the run is done and with 2 over a mistake. SIGTERM to one process saves and ends all, with 143:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=0 --command='pkill -TERM -f "[j]axpo.launch"'
# The same command goes on from there. A connection that is lost ends a run, too: keep gcloud in tmux.
#
# When it hangs: every host's last line is the message of the one that failed first, and one that is gone is given up
#   after a minute. "did not find each other" at the start, or after five minutes "DEADLINE_EXCEEDED … RegisterTask": a
#   host has not started, or port 8476 of the first one is closed to the others (`ss -ltn` there). A chip that is in
#   use: a process of an earlier run still lives (`pgrep -f "[j]axpo.launch"`). Anywhere: `py-spy dump --pid PID`, or
#   `kill -ABRT PID`, on each host.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

attribute() {
  curl --fail --silent --show-error --retry 5 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" ||
    { echo "error: the metadata of this machine has no $1; expected a host of a Cloud TPU." >&2; return 2; }
}

# The hosts of the slice in the order of their numbers, each as NAME:ID:ADDRESS, or as its address alone.
endpoints="$(attribute worker-network-endpoints)"
IFS=, read -ra hosts <<<"$endpoints"
export JAX_COORDINATOR_ADDRESS="${hosts[0]##*:}:8476"
export JAX_NUM_PROCESSES="${#hosts[@]}"
JAX_PROCESS_ID="$(attribute agent-worker-number)"
export JAX_PROCESS_ID

exec python -m jaxpo.launch train "$@"
