#!/usr/bin/env bash
# vllm-project/router 0.1.17 between gateways and vLLM replicas: pip install vllm-router==0.1.17
#
#   deploy/router/vllm-router.sh PORT http://vllm-0:8000 http://vllm-1:8000 ...
#
# Retries and the circuit breaker are off on purpose. A version that cannot be loaded answers 500; with the defaults such
# an answer is asked for five times over and counts against a healthy replica, and after ten of them nobody is served for
# a minute. Gateways retry and break circuits themselves, and they know which failures are a version's own.
set -euo pipefail

if (($# < 2)); then
  echo "usage: $0 PORT URL..." >&2
  exit 2
fi
port=$1
shift

exec "${VLLM_ROUTER:-vllm-router}" \
  --host "${HOST:-127.0.0.1}" --port "$port" \
  --policy consistent_hash \
  --disable-retries --disable-circuit-breaker \
  --health-check-interval-secs 2 --health-failure-threshold 2 --health-success-threshold 1 --health-check-timeout-secs 2 \
  --prometheus-host "${HOST:-127.0.0.1}" --prometheus-port "${METRICS_PORT:-29000}" \
  --worker-urls "$@"
