#!/usr/bin/env bash
# Start vLLM with foreword's plug-in for the base in BASE. What it needs of the registry is the blob store alone: no
# database, no other credentials. Arguments of this script go to `vllm serve` behind those that foreword prints.
#
#   BASE=/models/base FOREWORD_BLOB_URL=s3://foreword/blobs TENSOR_PARALLEL=2 deploy/vllm/serve.sh --max-num-seqs 256
#
# Printing the arguments reads the base's weights once, to know which base this is; the answer is kept under
# FOREWORD_HOME. Where that costs too much at each start, print them once and give the file as VLLM_COMMAND:
#
#   foreword vllm-args --base /models/base ... > vllm-command.sh
set -euo pipefail

: "${FOREWORD_HOME:=/var/lib/foreword}"
: "${SHUTDOWN_TIMEOUT:=120}"
export FOREWORD_HOME

if [[ -n "${VLLM_COMMAND:-}" ]]; then
  command=$(<"$VLLM_COMMAND")
else
  : "${BASE:?is the folder of the base}"
  : "${FOREWORD_BLOB_URL:?is where the versions are: s3://bucket/prefix, or a folder}"
  export FOREWORD_BLOB_URL
  options=(
    --base "$BASE"
    --host "${HOST:-0.0.0.0}" --port "${PORT:-8000}"
    --mode "${MODE:-plugin}" --dtype "${DTYPE:-auto}"
    --tensor-parallel "${TENSOR_PARALLEL:-1}" --pipeline-parallel "${PIPELINE_PARALLEL:-1}"
    --host-memory "${HOST_MEMORY:-4GiB}" --cache "$FOREWORD_HOME/cache"
  )
  if [[ -n "${NAME:-}" ]]; then options+=(--name "$NAME"); fi
  if [[ -n "${MAX_MODEL_LEN:-}" ]]; then options+=(--max-model-len "$MAX_MODEL_LEN"); fi
  if [[ "${ON_CPU:-}" == 1 ]]; then options+=(--cpu); fi
  # Without a database of its own, a throwaway file in FOREWORD_HOME stands for it.
  command=$(env -u FOREWORD_DATABASE_URL "${FOREWORD:-foreword}" vllm-args "${options[@]}")
fi

# The command is a shell line, quoted by foreword; env takes the variables that it may begin with.
eval "set -- $command $(printf '%q ' --shutdown-timeout "$SHUTDOWN_TIMEOUT" "$@")"
printf '%s\n' "$*" >&2
if [[ "${DRY_RUN:-}" == 1 ]]; then exit 0; fi
exec env "$@"
