"""Let SmolLM2-135M-Instruct answer three prompts, without and with its draft head, through `model.generate`.

make demo
python examples/demo.py --max-new-tokens 200 --node-budget 32 --temperature 0.7
"""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from smollm2 import gguf_path
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from hf_jetflow import JetFlowHead
from hf_jetflow.target.loading import load_target


HEAD = Path(__file__).parent / "heads" / "smollm2-135m-instruct"
PROMPTS = {
    "math": "A bakery sells 24 muffins in the morning and twice as many in the afternoon. Each muffin costs $3. "
    "How much money does the bakery make that day?",
    "code": "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "chat": "What should I pack for a three-day hike in the mountains in autumn?",
}

console = Console(highlight=False)


class TimedStreamer(TextStreamer):
    """Prints text on the terminal as it is generated."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        console.print(text, end="\n" if stream_end else "", markup=False, style="dim")


def answer(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    args: argparse.Namespace,
    head: JetFlowHead | None,
) -> tuple[list[int], float]:
    """New token ids and seconds of one `generate` call; the text is streamed."""
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    start = time.perf_counter()
    output = target.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=args.max_new_tokens,
        streamer=TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        assistant_model=head,
        **sampling,
    )
    return output[0, input_ids.shape[1] :].tolist(), time.perf_counter() - start


@torch.no_grad()
def explain_difference(target: PreTrainedModel, prompt: torch.Tensor, plain: list[int], drafted: list[int]) -> str:
    """Where two texts differ first, and the margin between the target's two best tokens there."""
    pairs = list(zip(plain, drafted, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    prefix = torch.cat([prompt, torch.tensor([plain[:first]], dtype=torch.long)], dim=1)
    best = torch.log_softmax(target(prefix).logits[0, -1].float(), -1).topk(2).values
    return (
        f"the texts differ from token {first + 1} on, where the target's two best tokens are "
        f"{float(best[0] - best[1]):.3f} nats apart: in {str(target.dtype).removeprefix('torch.')} a forward over "
        "many rows rounds differently than one over a single row, which decides near-ties (float32 has no difference)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument(
        "--node-budget", type=int, default=None, help="rows verified per round; the head's own if not given"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument(
        "--dtype", default="auto", help="auto is bfloat16 where the device computes in it, float32 elsewhere"
    )
    args = parser.parse_args()

    console.print("Loading SmolLM2-135M-Instruct and its draft head ...")
    target, tokenizer = load_target(gguf_path(), args.dtype)
    head = JetFlowHead.from_pretrained(HEAD, dtype=target.dtype).to(target.device)
    if args.node_budget is not None:
        head.generation_config.node_budget = args.node_budget
    settings = f"{str(target.dtype).removeprefix('torch.')}, node budget {head.generation_config.node_budget}"
    console.print(f"{settings}, {torch.get_num_threads()} threads\n")
    warm_up = torch.tensor([tokenizer("Hello").input_ids], device=target.device)
    warm = dict(attention_mask=torch.ones_like(warm_up), min_new_tokens=48, max_new_tokens=48)
    for assistant in (None, head):  # node budget "auto" takes its first measurements
        target.generate(warm_up, assistant_model=assistant, **warm)

    summary = []
    for name, prompt in PROMPTS.items():
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        input_ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], device=target.device)
        console.print(f"[bold]{name}[/]: {prompt}")
        console.print("\n[bold]plain[/]")
        plain, plain_seconds = answer(target, tokenizer, input_ids, args, None)
        console.print("\n[bold]with the draft head[/]")
        drafted, head_seconds = answer(target, tokenizer, input_ids, args, head)
        stats = head.last_stats
        rates = len(plain) / plain_seconds, len(drafted) / head_seconds
        summary.append(
            f"{name:5} {rates[0]:5.1f} -> {rates[1]:5.1f} tokens/s  speedup {rates[1] / rates[0]:.2f}  "
            f"{stats.tokens_per_round:.2f} tokens per round  {'identical' if plain == drafted else 'texts differ'}"
        )
        console.print("\n" + summary[-1], style="green")
        sizes = ", ".join(f"{count} of {nodes}" for nodes, count in sorted(stats.rounds_by_nodes.items()))
        console.print(f"rounds by number of nodes: {sizes}", style="dim")
        if plain != drafted:
            console.print(explain_difference(target, input_ids, plain, drafted), style="yellow")
        console.print()
    console.print("\n".join(["[bold]summary[/]", *summary]))


if __name__ == "__main__":
    main()
