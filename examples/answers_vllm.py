"""Let vLLM answer prompts for training a head: many times faster on GPUs than `hf-jetflow train`.

    python examples/answers_vllm.py --target Qwen/Qwen3-8B --prompts prompts.jsonl --output answers.jsonl
    hf-jetflow train --target Qwen/Qwen3-8B --answers answers.jsonl --output runs/qwen3-8b

Prompts are JSON lines as `hf-jetflow train --prompts` reads them. A killed run continues where it stopped.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer

from hf_jetflow.jsonl import append_jsonl
from hf_jetflow.prompts import encode_chat, read_prompts
from hf_jetflow.training.answers import answered_ids


PROMPTS_AT_A_TIME = 1024  # answered before they are written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="Hub id or folder")
    parser.add_argument("--prompts", type=Path, action="append", required=True, help="JSON lines; several times")
    parser.add_argument("--output", type=Path, required=True, help="file that answers are appended to")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=2048, help="prompt and answer together")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--gpus", type=int, default=1, help="that share the target")
    args = parser.parse_args()
    if find_spec("vllm") is None:
        raise SystemExit("error: vLLM is not installed here; run `pip install vllm` in an environment of its own")

    settings = {name: getattr(args, name) for name in ("target", "max_new_tokens", "max_length", "temperature")}
    done = answered_ids(args.output, settings)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    waiting = []
    for prompt in read_prompts(args.prompts):
        ids = encode_chat(tokenizer, prompt["messages"])
        if prompt["id"] not in done and len(ids) + 2 <= args.max_length:
            waiting.append({"id": prompt["id"], "source": prompt["source"], "prompt_ids": ids})
    print(f"{len(waiting)} prompts to answer, {len(done)} answered before")
    if not waiting:
        return

    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(model=args.target, max_model_len=args.max_length, tensor_parallel_size=args.gpus, seed=0)
    sampling = SamplingParams(temperature=args.temperature, max_tokens=args.max_new_tokens)
    for start in range(0, len(waiting), PROMPTS_AT_A_TIME):
        batch = waiting[start : start + PROMPTS_AT_A_TIME]
        outputs = engine.generate([TokensPrompt(prompt_token_ids=record["prompt_ids"]) for record in batch], sampling)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        append_jsonl(args.output, [{**record, "answer_ids": ids} for record, ids in zip(batch, answers, strict=True)])
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
