"""What changes a head's training: each row continues the same head with the same data and updates, and one difference.

    python examples/compare_training.py --target model.gguf --head org/head --answers answers.jsonl \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --output runs/rows

Tokens per round are those of greedy decoding, replayed over the target's own answers to the prompts. Measured rows are
skipped, so a killed run continues with the training that it was in; several runs may share an output folder, each with
`--rows` of its own and `--results`.
"""

import argparse
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from head_parts import PARTS, with_part
from loss_weights import WEIGHTINGS, Weighting, even
from replayed import greedy_texts
from rich.console import Console
from transformers import PreTrainedModel

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.files import atomic_write, write_json
from hf_jetflow.jsonl import check_same_settings
from hf_jetflow.prompts import read_prompts
from hf_jetflow.target.loading import fast_dtype, load_target
from hf_jetflow.target.target import Target
from hf_jetflow.training.answers import with_token_ids
from hf_jetflow.training.blocks import DraftedRows
from hf_jetflow.training.data import read_answers
from hf_jetflow.training.losses import KLResult, correction_kl
from hf_jetflow.training.replay import replay
from hf_jetflow.training.starting import start_from_head
from hf_jetflow.training.trainer import JetFlowTrainer, JetFlowTrainingConfig
from hf_jetflow.trees.ngrams import ContextNgrams, TextNgrams
from hf_jetflow.trees.tree import Candidates, corrected_logprobs, with_rest


NODE_BUDGETS = (16, 32, 64)
PLOTTED = 6.0  # largest gain or loss that is drawn to scale, in %
BEFORE = "none, the head as given"
BASE = "as the head was trained"
SETTINGS = (
    *("branch_correction", "steps", "batch_size", "anchors", "learning_rate", "num_prompts", "max_new_tokens"),
    "max_length",
)


@dataclass(frozen=True)
class Row:
    """How a row differs from `BASE`."""

    weighting: Weighting = even
    uncorrected: float = 1.0  # `--uncorrected-loss` of `hf-jetflow train`
    has_ngrams: bool = False  # in the scores that are trained
    part: str | None = None  # of `head_parts.PARTS`


ROWS = {
    BASE: Row(),
    **{name: Row(weighting) for name, weighting in WEIGHTINGS.items()},
    "uncorrected loss 0.3": Row(uncorrected=0.3),
    "uncorrected loss 0.3, n-grams in the scores": Row(uncorrected=0.3, has_ngrams=True),
    **{name: Row(part=name) for name in PARTS},
}


def ngram_changes(
    ids: torch.Tensor, anchors: torch.Tensor, tokens: torch.Tensor, weights: list[float | int]
) -> torch.Tensor:
    """
    Logit changes of candidates by context n-grams, along the true path of each block.

    Args:
        ids (`torch.Tensor`, (batch, seq)): Token ids of the texts.
        anchors (`torch.Tensor`, (batch, anchors)): Positions of the anchors; a missing one is -1, and nothing changes.
        tokens (`torch.Tensor`, (batch, anchors, depths, width)): Candidates of each depth.
        weights (`list[float]`): As in `config.ngram_weights`.
    """
    changes = torch.zeros(tokens.shape)
    for row, (text, starts) in enumerate(zip(ids.tolist(), anchors.tolist(), strict=True)):
        known = TextNgrams(len(weights))
        for index in sorted(range(len(starts)), key=starts.__getitem__):
            if starts[index] < 0:
                continue
            known.follow(text[: starts[index] + 1])
            block = tokens[row, index]
            ngrams = ContextNgrams([[known]], Candidates(block, torch.zeros(block.shape)), [weights])
            for depth in range(min(len(block), len(text) - starts[index])):
                last = torch.tensor([text[starts[index] + depth]])
                changes[row, index, depth] = ngrams(depth, torch.zeros_like(last), last)[0]
    return changes


class RowTrainer(JetFlowTrainer):
    """The trainer of a row."""

    row: Row = ROWS[BASE]

    def score_rows(
        self, inputs: dict[str, Any], drafted: DraftedRows, num_candidates: int
    ) -> tuple[KLResult, torch.Tensor | None, torch.Tensor | None]:
        if not self.row.has_ngrams:
            return super().score_rows(inputs, drafted, num_candidates)
        kl, _, _ = super().score_rows(inputs, replace(drafted, shifts=None), num_candidates)
        head = self.accelerator.unwrap_model(self.model)
        assert drafted.shifts is not None
        tokens = kl.candidates if head.draft_token_ids is None else head.draft_token_ids[kl.candidates]
        blocks = tokens.view(*inputs["anchors"].shape, self.block_size - 1, -1).cpu()
        weights = head.config.ngram_weights
        changes = ngram_changes(inputs["input_ids"], inputs["anchors"], blocks, weights).view_as(kl.logprobs)
        logprobs = corrected_logprobs(with_rest(kl.logprobs), changes.to(kl.logprobs.device))[:, :-1]
        shifts = drafted.shifts + drafted.rows - drafted.rows.detach()
        corrected, is_top1 = correction_kl(replace(kl, logprobs=logprobs), shifts, self.projection)
        # The trainer counts corrected scores from depth 2 only, as no correction precedes; n-grams do.
        return replace(kl, divergence=torch.where(drafted.depths == 1, corrected, kl.divergence)), corrected, is_top1

    def loss_weights(self, drafted: DraftedRows, kl: KLResult) -> torch.Tensor:
        is_choice = kl.candidates == kl.teacher_tokens[:, None]
        probs = (kl.logprobs.exp() * is_choice).sum(1)  # 0 for a token that is no candidate
        ranks = torch.where(is_choice.any(1), is_choice.int().argmax(1), kl.candidates.shape[1])
        by_block = (-1, self.block_size - 1)
        weights = self.row.weighting(probs.detach().view(by_block), ranks.view(by_block)).reshape(-1)
        return weights * drafted.has_target


def train_row(name: str, seed: int, target: PreTrainedModel, args: argparse.Namespace) -> JetFlowHead:
    """The head of a row, continued from `args.head`."""
    row = ROWS[name]
    head = start_from_head(args.head, target, args.branch_correction, seed)
    if row.part is not None:
        head = with_part(head, row.part)
    training = JetFlowTrainingConfig(
        output_dir=str(args.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        anchors_per_sequence=args.anchors,
        learning_rate=args.learning_rate,
        uncorrected_loss_weight=row.uncorrected,
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
    trainer = RowTrainer(head, target, training, read_answers(args.answers))
    trainer.row = row
    trainer.train(resume_from_checkpoint=True)
    return head


def over_base(results: list[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """
    Tokens per round over those of `BASE` with the same seed, minus 1, by row and node budget: in the mean of the
    prompt sets, one figure a seed. Those of `BASE` are over its own mean: what the seed alone changes.
    """
    base = {row["seed"]: row["tokens_per_round"] for row in results if row["name"] == BASE}
    gains: dict[str, dict[int, list[float]]] = {}
    for row in results:
        if row["name"] == BEFORE or row["seed"] not in base:
            continue
        others = list(base.values()) if row["name"] == BASE else [base[row["seed"]]]
        for budget in map(str, NODE_BUDGETS):
            gain = statistics.mean(
                figures[budget] / statistics.mean(other[prompts][budget] for other in others) - 1
                for prompts, figures in row["tokens_per_round"].items()
            )
            gains.setdefault(row["name"], {}).setdefault(int(budget), []).append(gain)
    return gains


def write_table(results: list[dict[str, Any]], updates: int, path: Path) -> None:
    """Tokens per round by row: the mean over the seeds, and the gain over `BASE` with its range over the seeds."""
    names = list(dict.fromkeys(result["name"] for result in results))
    sets, gains = list(results[0]["tokens_per_round"]), over_base(results)
    lines = [
        f"Tokens per round, greedy, at {', '.join(map(str, NODE_BUDGETS))} nodes after {updates} further updates: the "
        f'mean over the seeds. The gain is over "{BASE}" with the same seed, in the mean of the prompt sets: its mean '
        "over the seeds (lowest to highest). In that row it is over the mean of its own seeds: what a seed changes.",
        "",
        f"| row | seeds | {' | '.join(sets)} | {' | '.join(f'gain, {budget} nodes' for budget in NODE_BUDGETS)} |",
        "|---|---|" + "---|" * (len(sets) + len(NODE_BUDGETS)),
    ]
    for name in names:
        rows = [result["tokens_per_round"] for result in results if result["name"] == name]
        cells = [name, str(len(rows)) if name != BEFORE else "-"]
        for prompts in sets:
            means = (statistics.mean(row[prompts][str(budget)] for row in rows) for budget in NODE_BUDGETS)
            cells.append(" / ".join(f"{mean:.2f}" for mean in means))
        for budget in NODE_BUDGETS:
            values = [100 * gain for gain in gains.get(name, {}).get(budget, [])]
            cells.append(
                f"{statistics.mean(values):+.1f} % ({min(values):+.1f} to {max(values):+.1f})" if values else "-"
            )
        lines.append(f"| {' | '.join(cells)} |")
    with atomic_write(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot_gains(results: list[dict[str, Any]], path: Path) -> None:
    """Each row's gain over `BASE`, a dot a seed and a line at their mean; grey is what the seed alone changes."""
    gains = over_base(results)
    base = gains.pop(BASE, None)
    if not base or not gains:
        return
    shape, size = (1, len(NODE_BUDGETS)), (11, 0.9 + 0.32 * len(gains))
    figure, (panels,) = plt.subplots(*shape, figsize=size, sharex=True, sharey=True, squeeze=False)
    for budget, panel in zip(NODE_BUDGETS, panels, strict=True):
        panel.axvspan(100 * min(base[budget]), 100 * max(base[budget]), color="0.9", zorder=0)
        panel.axvline(0, color="0.6", linewidth=0.8, zorder=1)
        for index, by_budget in enumerate(gains.values()):
            values = [100 * gain for gain in by_budget[budget]]
            mean = statistics.mean(values)
            if abs(mean) > PLOTTED:  # would leave no room for the others
                panel.text(math.copysign(PLOTTED, mean), index, f"{mean:+.0f}", va="center", ha="center", fontsize=9)
                continue
            panel.scatter(values, [index] * len(values), s=18, color="tab:blue", alpha=0.6, linewidth=0)
            panel.plot([mean] * 2, [index - 0.3, index + 0.3], color="tab:blue")
        panel.set_title(f"{budget} nodes", fontsize=10)
        panel.set_xlabel("gain in tokens per round, %")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlim(-1.15 * PLOTTED, 1.15 * PLOTTED)
    panels[0].set_yticks(range(len(gains)), list(gains))
    panels[0].invert_yaxis()
    figure.tight_layout()
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--head", required=True, help="head that every row continues")
    parser.add_argument("--branch-correction", default="path", choices=["path", "parent"])
    parser.add_argument("--answers", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="development prompts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("examples/results/compare_training.json"))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--anchors", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
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
    start = JetFlowHead.from_pretrained(args.head, dtype=torch.float32).to(target.device)
    measured_with = environment(start)
    settings = {"head": measured_with["head_hash"], **{name: getattr(args, name) for name in SETTINGS}}
    results = []
    if args.results.exists():
        stored = json.loads(args.results.read_text(encoding="utf-8"))
        check_same_settings(args.results, stored["settings"], settings, "give another file with --results")
        results = stored["rows"]
    rows = [(BEFORE, 0), *((name, seed) for seed in args.seeds for name in args.rows or ROWS)]
    for name, seed in rows:
        if any((result["name"], result["seed"]) == (name, seed) for result in results):
            continue
        console.print(f"{name}, seed {seed} ...")
        is_before = name == BEFORE
        head = start if is_before else train_row(name, seed, target, args).eval()
        figures = {
            prompts: {
                str(budget): round(stats.tokens_per_round, 3)
                for budget, stats in replay(Target(target, head.config), head, group, NODE_BUDGETS).items()
            }
            for prompts, group in texts.items()
        }
        results.append({"name": name, "seed": seed, "tokens_per_round": figures})
        write_json({"environment": measured_with, "settings": settings, "rows": results}, args.results)
        write_table(results, args.steps, args.results.with_suffix(".md"))
        plot_gains(results, args.results.with_suffix(".png"))
    console.print(args.results.with_suffix(".md").read_text(encoding="utf-8"), markup=False)


if __name__ == "__main__":
    main()
