#!/usr/bin/env bash
# The tables of a CUDA machine: exactness, speed by node budget and method, with growing and with compiled static
# caches, verify by context length, peak memory. Results go to $OUT as JSON and figures; nothing is kept of a run that fails.
#
#   TARGET=org/model HEAD=org/head PROMPTS="math.jsonl chat.jsonl" bash examples/bench_gpu.sh
#
# Without TARGET it is SmolLM2-135M-Instruct with the head of this repository.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
: "${PROMPTS:?give files of prompts: PROMPTS=\"math.jsonl chat.jsonl\"}"
target=${TARGET:-$("$python" "$here/smollm2.py")}
head=${HEAD:-$here/heads/smollm2-135m-instruct}
out=${OUT:-gpu-results}
options=()
for file in $PROMPTS; do options+=(--prompts "$file"); done

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "error: torch sees no CUDA device here")'
mkdir -p "$out"
(cd "$here/.." && "$python" -m pytest -q -m gpu tests/test_gpu.py)
bench() {
    "$python" -m hf_jetflow bench --target "$target" --head "$head" "${options[@]}" --node-budgets 16,32,64,128,256,auto "$@"
}
bench --methods plain,chain,jetflow,native-dflash,prompt-lookup --json "$out/bench.json" --plot "$out/bench.png"
bench --methods plain,chain,jetflow --temperature 0.7,1 --json "$out/bench_sampled.json"
bench --methods plain,chain,jetflow --cache compiled --json "$out/bench_compiled.json" --plot "$out/bench_compiled.png"
"$python" "$here/time_verify.py" --target "$target" --nodes 64 256 --json "$out/verify_context.json"
"$python" "$here/measure_memory.py" --target "$target" --head "$head" --json "$out/memory.json"
