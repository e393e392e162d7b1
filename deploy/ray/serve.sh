#!/usr/bin/env bash
# A service on a Ray cluster that runs already, as a Ray job that brings this checkout along.
#
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 deploy/ray/serve.sh NAME MODEL ARGUMENTS-OF-SERVE...
#
# Waits until the model has answered its first token and prints the server's line with the address. The
# server runs where Ray puts the job, on the head unless it offers resources; `ray job stop NAME` lets running
# replies finish, then ends it and its ranks. Every node needs the dependencies and the model at its path.
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "error: give NAME MODEL ARGUMENTS-OF-SERVE..." >&2
  exit 2
fi
name=$1
shift
checkout=$(cd "$(dirname "$0")/../.." && pwd)

# `submit` follows the job's log. Ending it does not end the job.
exec {log}< <(
  exec ray job submit --submission-id "$name" \
    --working-dir "$checkout" --runtime-env "$checkout/deploy/ray/checkout.yaml" \
    -- python -m runtime.cli serve "$@" --ray-address auto 2>&1
)
submit=$!
while read -r line <&"$log"; do
  if [[ $line == "tramontane: serving "* ]]; then
    kill "$submit" 2>/dev/null || true
    echo "$line"
    exit 0
  fi
  echo "$line" >&2
done
echo "error: the job $name ended before it served" >&2
exit 1
