"""Ways to weigh a head's training loss by depth: each continues the same head with the same data and updates.

    python examples/loss_weights.py --target model.gguf --head org/head --answers answers.jsonl \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --output runs/weights

Tokens per round are those of greedy decoding, replayed over the target's own answers to the prompts. Measured rows are
skipped, so a killed run continues with the training that it was in.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from replayed import greedy_texts
from rich.console import Console
from transformers import PreTrainedModel

from hf_jetflow import JetFlowHead
from hf_jetflow.files import write_json
from hf_jetflow.prompts import read_prompts
from hf_jetflow.target.loading import fast_dtype, load_target
from hf_jetflow.target.target import Target
from hf_jetflow.training.answers import with_token_ids
from hf_jetflow.training.blocks import DraftedRows
from hf_jetflow.training.data import read_answers
from hf_jetflow.training.losses import KLResult, depth_weights
from hf_jetflow.training.replay import replay
from hf_jetflow.training.starting import start_from_head
from hf_jetflow.training.trainer import JetFlowTrainer, JetFlowTrainingConfig


NODE_BUDGETS = (16, 32, 64)
GAMMA = 4.0  # of the weights that decay with the depth

# Both arguments are (blocks, depths): the head's probability of the target's first choice, and how many of the head's
# tokens rank above it. So is the result.
Weighting = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def even(probs: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(probs)


def decaying(probs: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """exp(-(depth - 1) / gamma), as DFlash weighs depths."""
    return depth_weights(probs.shape[1], GAMMA).to(probs).expand_as(probs)


def first_twice(probs: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    weights = torch.ones_like(probs)
    weights[:, 0] = 2
    return weights


def d_pace(probs: torch.Tensor, ranks: torch.Tensor, smoothing: float = 0.5) -> torch.Tensor:
    """
    D-PACE (arXiv 2605.18810): a depth weighs as much as the accepted tokens that it can unlock, the sum over itself
    and all later depths of the product of smoothed probabilities up to there. With smoothing 0 these are the slopes of
    the expected accepted length, the chain reward of arXiv 2606.11552.
    """
    reach = (smoothing + (1 - smoothing) * probs).cumprod(1)
    return reach.flip(1).cumsum(1).flip(1)


def from_first_miss(probs: torch.Tensor, ranks: torch.Tensor, top: int = 1) -> torch.Tensor:
    """
    VAT (arXiv 2608.30135): weight 1 before the first depth where the target's choice is not among the head's first
    `top`; from there on the weights decay anew. The paper has `top` = 1; a tree holds more candidates.
    """
    missed = (ranks >= top).cumsum(1) > 0
    return torch.exp(-((missed.cumsum(1) - 1).clamp_min(0)) / GAMMA).to(probs)


WEIGHTINGS: dict[str, Weighting] = {
    "even": even,
    "decaying, gamma 4": decaying,
    "depth 1 twice": first_twice,
    "D-PACE": d_pace,
    "chain reward": partial(d_pace, smoothing=0.0),
    "VAT, first choice": from_first_miss,
    "VAT, first 4": partial(from_first_miss, top=4),
}


class WeightedTrainer(JetFlowTrainer):
    """A trainer that weighs the rows of each block by what the head drafted there."""

    weighting: Weighting = staticmethod(even)

    def loss_weights(self, drafted: DraftedRows, kl: KLResult) -> torch.Tensor:
        is_choice = kl.candidates == kl.teacher_tokens[:, None]
        probs = (kl.logprobs.exp() * is_choice).sum(1)  # 0 for a token that is no candidate
        ranks = torch.where(is_choice.any(1), is_choice.int().argmax(1), kl.candidates.shape[1])
        by_block = (-1, self.block_size - 1)
        weights = self.weighting(probs.detach().view(by_block), ranks.view(by_block)).reshape(-1)
        return weights * drafted.has_target


def train_row(name: str, seed: int, target: PreTrainedModel, args: argparse.Namespace) -> JetFlowHead:
    """The head of a row, continued from `args.head`."""
    folder = args.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    head = start_from_head(args.head, target, args.branch_correction, seed)
    training = JetFlowTrainingConfig(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        anchors_per_sequence=args.anchors,
        learning_rate=args.learning_rate,
        max_length=args.max_length,
        features_dir=str(args.output / "features"),
        warmup_steps=args.steps // 8,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": args.steps // 2, "min_lr_ratio": 0.02},
        save_steps=max(args.steps // 4, 1),
        save_total_limit=1,
        logging_steps=20,
        seed=seed,
        bf16=fast_dtype() == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = WeightedTrainer(head, target, training, read_answers(args.answers))
    trainer.weighting = WEIGHTINGS[name]
    trainer.train(resume_from_checkpoint=True)
    head.save_pretrained(folder / "head")
    return JetFlowHead.from_pretrained(folder / "head", dtype=target.dtype)


def write_table(results: list[dict[str, Any]], path: Path) -> None:
    """Mean and range over the seeds by prompt set and node budget."""
    names = list(dict.fromkeys(result["name"] for result in results))
    columns = [(prompts, budget) for prompts in results[0]["tokens_per_round"] for budget in NODE_BUDGETS]
    updates = max(result["updates"] for result in results)
    lines = [
        f"Tokens per round by loss weights, greedy, {updates} updates each: the mean over the seeds, the lowest and "
        "the highest.",
        "",
        "| weights | " + " | ".join(f"{prompts}, {budget} nodes" for prompts, budget in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in names:
        rows = [result["tokens_per_round"] for result in results if result["name"] == name]
        cells = []
        for prompts, budget in columns:
            values = [row[prompts][str(budget)] for row in rows]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--head", required=True, help="head that every row continues")
    parser.add_argument("--branch-correction", default="path", choices=["path", "parent"])
    parser.add_argument("--answers", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="development prompts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("examples/results/loss_weights.json"))
    parser.add_argument("--rows", nargs="*", choices=list(WEIGHTINGS), metavar="NAME", help=", ".join(WEIGHTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--anchors", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=384)
    args = parser.parse_args()

    console = Console(stderr=True)
    target, tokenizer = load_target(args.target, "auto")
    args.answers = [with_token_ids(path, target, tokenizer, args.output / "tokenized") for path in args.answers]
    texts = {
        path.stem: greedy_texts(
            target,
            tokenizer,
            read_prompts([path])[: args.num_prompts],
            args.output / "texts" / path.name,
            args.max_new_tokens,
        )
        for path in args.prompts
    }
    results = json.loads(args.results.read_text(encoding="utf-8"))["rows"] if args.results.exists() else []
    if others := [result for result in results if result["updates"] not in (0, args.steps)]:
        sys.exit(f"error: {args.results} was measured after {others[0]['updates']} updates, not {args.steps}")
    rows = [("none, the head as given", 0), *((name, seed) for seed in args.seeds for name in args.rows or WEIGHTINGS)]
    for name, seed in rows:
        if any((result["name"], result["seed"]) == (name, seed) for result in results):
            continue
        console.print(f"{name}, seed {seed} ...")
        if name in WEIGHTINGS:
            head = train_row(name, seed, target, args)
        else:
            head = JetFlowHead.from_pretrained(args.head, dtype=target.dtype)
        head = head.to(target.device).eval()
        figures = {
            prompts: {
                str(budget): round(stats.tokens_per_round, 3)
                for budget, stats in replay(Target(target, head.config), head, group, NODE_BUDGETS).items()
            }
            for prompts, group in texts.items()
        }
        updates = args.steps if name in WEIGHTINGS else 0
        results.append({"name": name, "seed": seed, "updates": updates, "tokens_per_round": figures})
        write_json({"rows": results}, args.results)
        write_table(results, args.results.with_suffix(".md"))
    console.print(args.results.with_suffix(".md").read_text(encoding="utf-8"), markup=False)


if __name__ == "__main__":
    main()
