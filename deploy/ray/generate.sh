#!/usr/bin/env bash
# One reply as a Ray job that brings this checkout along: loads the model, answers, ends.
#
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 deploy/ray/generate.sh MODEL PROMPT ARGUMENTS-OF-GENERATE...
#
# Prints what the job prints, between Ray's own lines, and ends with its status.
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "error: give MODEL PROMPT ARGUMENTS-OF-GENERATE..." >&2
  exit 2
fi
model=$1
prompt=$2
shift 2
checkout=$(cd "$(dirname "$0")/../.." && pwd)

exec ray job submit --working-dir "$checkout" --runtime-env "$checkout/deploy/ray/checkout.yaml" \
  -- python -m runtime.cli generate "$model" --prompt "$prompt" "$@" --ray-address auto
