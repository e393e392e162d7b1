#!/usr/bin/env bash
# What a container runs that is a Ray node and, unless it is a worker, a server on top.
#
#   tramontane-node gateway HEAD:PORT ARGUMENTS...   join HEAD's cluster, then `tramontane serve ARGUMENTS`
#   tramontane-node leader PORT ARGUMENTS...         start a cluster, then `tramontane serve ARGUMENTS`
#   tramontane-node worker HEAD:PORT                 join HEAD's cluster and hold what Ray places here
#
# A Ray driver needs a raylet on its own host, so a gateway is a node too, one that offers nothing. Whichever
# of the two ends first ends the other, and the container with it. SIGTERM goes to the server alone, which
# drains; its raylet follows when it is done. Knows nothing of Kubernetes; the token is Ray's own affair
# (RAY_AUTH_MODE, RAY_AUTH_TOKEN).
set -euo pipefail

HEAD_SECONDS=1800     # for a head that starts after this node; it may be waiting for a download
OBJECT_STORE=83886080     # bytes; nothing of Tramontane's goes through the object store

say() { echo "tramontane-node: $*" >&2; }
fail() {
  echo "error: $*" >&2
  exit "${STATUS:-1}"
}
usage() { STATUS=2 fail "give one of: gateway HEAD:PORT ARGUMENTS..., leader PORT ARGUMENTS..., worker HEAD:PORT"; }

# Says why it waits, once a reason. A token that differs will not come right by waiting.
wait_for_head() {
  local said="" reason
  until reason=$(timeout 15 ray health-check --address "$1" 2>&1); do
    [[ $reason != *AuthenticationError* ]] || fail "the Ray head at $1 refuses the token here: see RAY_AUTH_TOKEN"
    reason=${reason##*$'\n'}
    reason=${reason##*: }
    reason=${reason:-no answer}
    ((SECONDS < HEAD_SECONDS)) || fail "no Ray head at $1 within $HEAD_SECONDS s: $reason"
    [[ $reason == "$said" ]] || say "waiting for the Ray head at $1: $reason"
    said=$reason
    sleep 2
  done
}

# beside_raylet ADDRESS SERVE-ARGUMENTS... -- RAY-START-ARGUMENTS...: runs both; ends as the server ends.
beside_raylet() {
  local address=$1 status=0
  local -a serve=()
  shift
  while [[ $1 != -- ]]; do
    serve+=("$1")
    shift
  done
  shift
  ray start "$@" --object-store-memory "$OBJECT_STORE" --block >&2 &
  raylet=$!
  trap 'kill -TERM "$raylet" 2>/dev/null || true' EXIT
  wait_for_head "$address"
  tramontane serve "${serve[@]}" --ray-address "$address" &
  server=$!
  trap 'kill -TERM "$server" 2>/dev/null || true' TERM INT
  # A signal ends `wait` early: go on until one of the two has really ended.
  while kill -0 "$server" 2>/dev/null && kill -0 "$raylet" 2>/dev/null; do
    wait -n "$server" "$raylet" || true
  done
  if kill -0 "$server" 2>/dev/null; then
    kill -TERM "$server"
    wait "$server" || true
    fail "Ray ended on this node, and the server with it"
  fi
  wait "$server" || status=$?
  trap - EXIT
  kill -TERM "$raylet" 2>/dev/null || true
  wait "$raylet" || true
  exit "$status"
}

# The first process of a container ignores SIGTERM unless it says otherwise.
trap 'exit 143' TERM
trap 'exit 130' INT
[[ $# -ge 2 ]] || usage
role=$1
place=$2
shift 2
export RAY_USAGE_STATS_ENABLED=0

case $role in
  gateway)
    wait_for_head "$place"
    beside_raylet "$place" "$@" -- --address "$place" --num-cpus 0 --num-gpus 0
    ;;
  leader)
    # A node that is silent for some 5 s is lost, and its replica built again on what is left.
    export RAY_health_check_initial_delay_ms=2000 RAY_health_check_period_ms=1000
    export RAY_health_check_timeout_ms=1000 RAY_health_check_failure_threshold=5
    beside_raylet "127.0.0.1:$place" "$@" -- --head --port "$place" --num-cpus 0 --num-gpus 0 --include-dashboard false
    ;;
  worker)
    [[ $# -eq 0 ]] || usage
    wait_for_head "$place"
    exec ray start --address "$place" --object-store-memory "$OBJECT_STORE" --block
    ;;
  *) usage ;;
esac
