"""Let SmolLM2-135M-Instruct answer prompts, without and with its draft head, through `model.generate`.

make demo
python examples/demo.py --max-new-tokens 200 --node-budget 32 --temperature 0.7

The first prompt is answered in float32, where both texts are identical. The others follow in the dtype that is
fastest on this machine, plain and with the head in turn. The texts of the first runs are shown; speeds are medians.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status
from smollm2 import gguf_path
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils.logging import disable_progress_bar

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.runs import new_answers, padded_inputs
from hf_jetflow.prompts import encode_chat
from hf_jetflow.target.loading import fast_dtype, load_target


HEAD = Path(__file__).parent / "heads" / "smollm2-135m-instruct"
PROOF = "Why is the sky blue?"
PROMPTS = {
    "math": "A bakery sells 24 muffins in the morning and twice as many in the afternoon. Each muffin costs $3. "
    "How much money does the bakery make that day?",
    "code": "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "chat": "What should I pack for a three-day hike in the mountains in autumn?",
}

PAGE = "docs/benchmarks.md#where-drafting-pays-little"
DECODED_PLAINLY = (
    'Mostly plain rounds: node budget "auto" measured that a tree takes longer here than its tokens save. '
    f"A speedup below 1 is then what the probes cost, or other work on this machine ({PAGE})."
)
SLOWER = (
    "Speedup below 1: on a CPU without bf16 instructions each further row of a forward costs almost a whole one. "
    f"Heads are for GPUs and for CPUs with AMX or AVX-512 bf16 ({PAGE})."
)
SLOWER_THOUGH_FAST = f"Speedup below 1: other work slowed a run down, or the text is hard to draft ({PAGE})."

console = Console(highlight=False)


class TimedStreamer(TextStreamer):
    """Prints text on the terminal as it is generated."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        console.print(text, end="\n" if stream_end else "", markup=False, style="dim")


def waiting(line: str) -> Status:
    """Shows a line on the terminal while nothing else is shown; it is drawn rarely, as timed runs go on below it."""
    return console.status(f"[dim]{line} ...[/]", refresh_per_second=2)


class Demo:
    """A target with its head, and how they answer."""

    def __init__(self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace):
        self.target, self.tokenizer, self.args = target, tokenizer, args
        self.notes: set[str] = set()  # why drafting did not pay, for the summary
        self.head = JetFlowHead.from_pretrained(HEAD, dtype=target.dtype).to(target.device)
        if args.node_budget is not None:
            self.head.generation_config.node_budget = args.node_budget

    def options(self) -> dict[str, Any]:
        """Keywords of `generate`."""
        temperature = self.args.temperature
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        return {"max_new_tokens": self.args.max_new_tokens, **sampling}

    def encode(self, prompt: str) -> list[int]:
        return encode_chat(self.tokenizer, [{"role": "user", "content": prompt}])

    def answer(self, prompt: str, head: JetFlowHead | None, silently: str | None = None) -> tuple[list[int], float]:
        """New token ids and seconds of one `generate` call. Its text is shown or, if it runs `silently`, that line."""
        streamer = None if silently else TimedStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = padded_inputs(self.target, [self.encode(prompt)])
        torch.manual_seed(0)
        with waiting(silently) if silently else nullcontext():
            start = time.perf_counter()
            output = self.target.generate(**inputs, assistant_model=head, streamer=streamer, **self.options())
            seconds = time.perf_counter() - start
        return new_answers(self.target, inputs, output)[0], seconds

    def warm_up(self) -> None:
        """One short call each; node budget "auto" takes its first measurements."""
        inputs = padded_inputs(self.target, [self.encode("Hello")])
        with waiting("warming up"):
            for head in (None, self.head):
                self.target.generate(**inputs, assistant_model=head, min_new_tokens=48, max_new_tokens=48)

    def prove(self) -> None:
        """Answer one prompt in float32, plain and with the head: the texts are identical."""
        if self.head.generation_config.node_budget == "auto":
            self.head.generation_config.node_budget = 16  # nothing was timed yet
        console.print(f"[bold]float32[/]: {PROOF}")
        console.print("(plain decoding answers unseen first, then the head's answer is shown)", style="dim")
        plain, _ = self.answer(PROOF, None, "plain decoding answers")
        drafted, _ = self.answer(PROOF, self.head)
        verdict = "identical to plain decoding, token for token" if plain == drafted else "NOT IDENTICAL: report it"
        console.print(f"{len(drafted)} tokens, {self.rounds()}: {verdict}\n", style="green")

    def rounds(self) -> str:
        return f"{self.head.last_stats.tokens_per_round:.2f} tokens per round"

    def compare(self, name: str, prompt: str) -> tuple[str, list[int], bool]:
        """
        Answer a prompt, plain and with the head in turn.

        Returns:
            The line of the summary, the plain answer's ids, and whether the head's answer is the same.
        """
        console.print(f"[bold]{name}[/]: {prompt}")
        ids: dict[str, list[int]] = {}
        seconds: dict[str, list[float]] = {"plain": [], "with the draft head": []}
        for run in range(self.args.runs):
            for method, head in zip(seconds, (None, self.head), strict=True):
                if run == 0:
                    console.print(f"\n[bold]{method}[/]")
                silently = f"run {run + 1} of {self.args.runs}: {method}" if run else None
                new_ids, duration = self.answer(prompt, head, silently)
                seconds[method].append(duration)
                ids.setdefault(method, new_ids)
        plain, drafted = ids.values()
        rates = [[len(ids[method]) / each for each in seconds[method]] for method in seconds]
        speedups = [drafting / alone for alone, drafting in zip(*rates, strict=True)]
        rates, limit = [statistics.median(each) for each in rates], self.head.last_stats.tokens_per_round
        speedup = statistics.median(speedups)
        shown = f"speedup {speedup:.2f}" if speedup <= limit else "no speedup stated: other work slowed a run down"
        if max(speedups) <= limit and len(speedups) > 1:
            shown += f" ({min(speedups):.2f} - {max(speedups):.2f})"
        line = (
            f"{name:5} {rates[0]:5.1f} -> {rates[1]:5.1f} tokens/s  {shown}  {self.rounds()}  "
            f"{'identical' if plain == drafted else 'texts differ'}"
        )
        console.print("\n" + line, style="green")
        by_nodes = self.head.last_stats.rounds_by_nodes
        sizes = ", ".join(f"{n} plain" if nodes == 1 else f"{n} of {nodes}" for nodes, n in sorted(by_nodes.items()))
        console.print(f"rounds by number of nodes: {sizes}", style="dim")
        if 2 * by_nodes.get(1, 0) > self.head.last_stats.num_rounds:
            self.notes.add(DECODED_PLAINLY)
        elif speedup < 1:
            self.notes.add(SLOWER if fast_dtype() == "float32" else SLOWER_THOUGH_FAST)
        if plain != drafted:
            prompt_ids = torch.tensor([self.encode(prompt)], device=self.target.device)
            console.print(explain_difference(self.target, prompt_ids, plain, drafted), style="yellow")
        console.print()
        return line, plain, plain == drafted

    def batched(self) -> list[list[int]]:
        """Plain answers to all prompts in one batch of four."""
        inputs = padded_inputs(self.target, [self.encode(prompt) for prompt in [*PROMPTS.values(), PROOF]])
        return new_answers(self.target, inputs, self.target.generate(**inputs, **self.options()))


@torch.no_grad()
def explain_difference(target: PreTrainedModel, prompt: torch.Tensor, plain: list[int], drafted: list[int]) -> str:
    """Where two texts differ first, and the margin between the target's two best tokens there."""
    pairs = list(zip(plain, drafted, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    prefix = torch.cat([prompt, torch.tensor([plain[:first]], dtype=torch.long, device=prompt.device)], dim=1)
    best = torch.log_softmax(target(prefix).logits[0, -1].float(), -1).topk(2).values
    return (
        f"the texts differ from token {first + 1} on, where the target's two best tokens are "
        f"{float(best[0] - best[1]):.3f} nats apart: in {dtype_name(target)} a forward over many rows rounds "
        "differently than one over a single row, which decides near-ties (float32 has no difference)"
    )


def dtype_name(target: PreTrainedModel) -> str:
    return str(target.dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3, help="runs of each prompt, plain and with the head in turn")
    parser.add_argument(
        "--node-budget", type=int, default=None, help="rows verified per round; the head's own if not given"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument(
        "--dtype", default="auto", help="auto is bfloat16 where the device computes in it, float32 elsewhere"
    )
    args = parser.parse_args()

    if not console.is_terminal:
        disable_progress_bar()  # of loading
    console.print("Loading SmolLM2-135M-Instruct and its draft head ...")
    target, tokenizer = load_target(gguf_path(), "float32")
    Demo(target, tokenizer, args).prove()

    dtype = fast_dtype() if args.dtype == "auto" else args.dtype
    if args.dtype == "auto" and dtype == "float32":
        console.print("This processor does not compute in bfloat16, so speeds are measured in float32 as well.")
    demo = Demo(target.to(getattr(torch, dtype)), tokenizer, args)
    settings = f"{dtype}, node budget {demo.head.generation_config.node_budget}"
    console.print(f"{settings}, {torch.get_num_threads()} threads, medians of {args.runs} runs\n")
    demo.warm_up()
    lines, answers, are_same = zip(*(demo.compare(name, prompt) for name, prompt in PROMPTS.items()), strict=True)
    console.print("\n".join(["[bold]summary[/]", *lines]))
    for note in sorted(demo.notes):
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    if not args.temperature:  # a batch draws other random numbers
        num_same = sum(plain == alone for plain, alone in zip(demo.batched(), answers, strict=False))
        console.print(
            f"same text as plain decoding alone, {dtype_name(target)}: {sum(are_same)} of {len(PROMPTS)} with the "
            f"head, {num_same} of {len(PROMPTS)} for plain decoding in a batch of four"
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
