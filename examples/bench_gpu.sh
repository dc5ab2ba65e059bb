#!/usr/bin/env bash
# Tables of a CUDA machine, in stages of less than ten minutes each. Run it again to go on: finished stages are skipped.
#
#   bash examples/bench_gpu.sh                    all stages that are not finished
#   bash examples/bench_gpu.sh tests rounds       some of them
#
#   tests      exactness on this device
#   rounds     a random Qwen3-8B with a head of 5 layers: round times, waits and a profile at 1 to 256 nodes
#   scored     the same with path correction and n-grams
#   compiled   `rounds` with compiled forwards
#   context    round times behind 1,000, 8,000 and 32,000 tokens, attention by one masked kernel
#   split      the same, attention to the prefix without a mask (`MIN_PREFIX` in target/split_attention.py)
#   pair       a bench of TARGET with HEAD on PROMPTS
#   sampled    the same at temperatures 0.7 and 1
#   static     the same with compiled static caches
#   memory     time of a verify by context, peak memory
#
# The last four need weights. TARGET is SmolLM2-135M-Instruct if not given, HEAD the head of this repository.
#
#   PYTHON=python3  OUT=gpu-results  PROMPTS="math.jsonl chat.jsonl"  LIMIT=580 (seconds per stage)  SHAPE=qwen3-8b
#   WHEELS=folder   installs its wheels beside OUT first, without a network (gguf, pytest)
#   PARTS=folder    pieces of one TARGET file in the order of their names, where a machine takes small files only
#   SHAPE=tiny ALLOW_CPU=1 ROUND_ARGS="--new 20 --repeats 1"   a dry run; ROUND_ARGS are options of round_times.py
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
out=${OUT:-gpu-results}
limit=${LIMIT:-580}
shape=${SHAPE:-qwen3-8b}
all=(tests rounds scored compiled context split pair sampled static memory)
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PYTHONUNBUFFERED=1 PYTHONPATH="$here/..:$out/site${PYTHONPATH:+:$PYTHONPATH}"

stages=("$@")
[ $# -gt 0 ] || stages=("${all[@]}")
for stage in "${stages[@]}"; do
    [[ " ${all[*]} " == *" $stage "* ]] || { echo "error: unknown stage '$stage'; choose from ${all[*]}" >&2; exit 1; }
    if [[ " pair sampled static " == *" $stage "* ]]; then
        : "${PROMPTS:?give files of prompts: PROMPTS=\"math.jsonl chat.jsonl\"}"
    fi
done
[ -n "${ALLOW_CPU:-}" ] ||
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "error: torch sees no CUDA device here")'
mkdir -p "$out"
if [ -n "${WHEELS:-}" ] && [ ! -d "$out/site" ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$out/site" "$WHEELS"/*.whl
fi
if [ -n "${PARTS:-}" ]; then
    export TARGET=$out/target.gguf
    [ -f "$TARGET" ] || cat "$PARTS"/* > "$TARGET"
fi

round_times() {  # later options win
    "$python" "$here/round_times.py" --shape "$shape" --seconds $((limit * 3 / 4)) "$@" ${ROUND_ARGS:-}
}
long_contexts() { round_times --nodes 64 256 --contexts 1000 8000 32000 "$@"; }
bench() {
    local options=()
    for file in $PROMPTS; do options+=(--prompts "$file"); done
    "$python" -m hf_jetflow bench --target "${TARGET:-$("$python" "$here/smollm2.py")}" \
        --head "${HEAD:-$here/heads/smollm2-135m-instruct}" "${options[@]}" --node-budgets 16,64,128,256,auto "$@"
}
run() {
    case $1 in
    tests) "$python" -m pytest -q -m gpu -p no:cacheprovider -c "$here/../pyproject.toml" "$here/../tests/test_gpu.py" ;;
    rounds) round_times --profile 64 --json "$out/rounds.json" ;;
    scored) round_times --correction path --ngrams --profile 64 --json "$out/rounds_scored.json" ;;
    compiled) round_times --caches compiled --json "$out/rounds_compiled.json" ;;
    context) long_contexts --min-prefix 1000000000 --json "$out/rounds_context.json" ;;
    split) long_contexts --min-prefix 1 --json "$out/rounds_split.json" ;;
    pair) bench --methods plain,chain,jetflow,native-dflash,prompt-lookup --json "$out/bench.json" ;;
    sampled) bench --methods plain,jetflow --temperature 0.7,1 --json "$out/bench_sampled.json" ;;
    static) bench --methods plain,jetflow --cache compiled --json "$out/bench_compiled.json" ;;
    memory)
        target=${TARGET:-$("$python" "$here/smollm2.py")}
        "$python" "$here/time_verify.py" --target "$target" --nodes 64 256 --json "$out/verify_context.json"
        "$python" "$here/measure_memory.py" --target "$target" --head "${HEAD:-$here/heads/smollm2-135m-instruct}" \
            --json "$out/memory.json"
        ;;
    esac
}
export -f run round_times long_contexts bench
export here python out limit shape

status=0
for stage in "${stages[@]}"; do
    [ ! -f "$out/$stage.done" ] || { echo "## $stage: finished before"; continue; }
    if timeout -k 10 "$limit" bash -c "set -euo pipefail; run $stage" > >(tee -a "$out/$stage.log") 2>&1; then
        touch "$out/$stage.done"
        echo "## $stage: finished"
    else
        echo "## $stage: not finished (see $out/$stage.log); run this again to go on" >&2
        status=1
    fi
done
exit $status
