"""Ablation of a head and its training: every row gets the same data and updates, then is measured.

    hf-jetflow train ... (or any run) gives answers.jsonl
    python examples/ablation.py --target model.gguf --answers answers.jsonl \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --output runs/ablation

Rows that are in the results file are skipped, so a killed run continues; `--rows NAME ...` measures the named rows
again. Tokens per round are those of greedy decoding, replayed over the target's own answers to the prompts;
the speedup is tokens per round times the ratio of a plain step's time to a round's, both medians of interleaved runs.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from replayed import greedy_texts
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.files import atomic_write
from hf_jetflow.head.configuration_jetflow import NGRAM_WEIGHTS, spaced_layer_ids
from hf_jetflow.prompts import read_prompts
from hf_jetflow.target.loading import fast_dtype, load_target
from hf_jetflow.target.target import Target
from hf_jetflow.training.answers import regenerate_answers
from hf_jetflow.training.data import frequent_tokens, read_answers
from hf_jetflow.training.replay import replay
from hf_jetflow.training.starting import initialize_from_target
from hf_jetflow.training.trainer import JetFlowTrainer, JetFlowTrainingConfig
from hf_jetflow.trees.tree import Candidates, DraftTree


NODE_BUDGETS = (16, 32, 64, 128)
NUM_TAPS = 5


@dataclass
class Training:
    """How a head differs from the default recipe: 3 causal layers, block 8, path correction."""

    config: dict[str, Any] = field(default_factory=dict)
    draft_vocab: int | None = 12288
    batch_size: int = 8
    anchors: int = 16
    gamma: float | None = None
    is_random_start: bool = False
    temperature: float | None = None  # of answers generated for this row; None trains on the given ones


NO_CORRECTION = {"branch_correction": None}
TRAININGS = {
    "bidirectional": Training({"is_causal": False, **NO_CORRECTION}, gamma=7.0),
    "causal": Training(NO_CORRECTION),
    "parent": Training({"branch_correction": "parent"}),
    "path": Training(),
    "1 layer": Training({"num_hidden_layers": 1}),
    "5 layers": Training({"num_hidden_layers": 5}),
    "vocabulary 4096": Training(draft_vocab=4096),
    "whole vocabulary": Training(draft_vocab=None),
    "block 4": Training({"block_size": 4}),
    "block 16": Training({"block_size": 16}),
    "random start": Training(is_random_start=True),
    "32 sequences x 4 anchors": Training(batch_size=32, anchors=4),
    "2 sequences x 64 anchors": Training(batch_size=2, anchors=64),
    "greedy answers": Training(temperature=0.0),
    "sampled answers": Training(temperature=1.0),
}

# Name of a row: the training of its head, and how it drafts.
ROWS = {
    "bidirectional, gamma 7, chain (DFlash)": ("bidirectional", "chain"),
    "bidirectional, gamma 7, exact tree (DDTree)": ("bidirectional", "exact"),
    "causal, Algorithm 1 tree (JetSpec as released)": ("causal", "algorithm 1"),
    "causal, exact tree": ("causal", "exact"),
    "causal, parent correction": ("parent", "exact"),
    "causal, path correction": ("path", "exact"),
    "causal, path correction, chain": ("path", "chain"),
    "causal, context n-grams": ("causal", "n-grams"),
    "causal, path correction, context n-grams": ("path", "n-grams"),
    **{f"path correction, {name}": (name, "exact") for name in list(TRAININGS)[4:]},
}
MAIN_ROWS = list(ROWS)[:9]


def algorithm_1_tree(
    anchor_id: torch.Tensor, candidates: Candidates, node_budget: int, scorer: Any = None, width: int | None = None
) -> DraftTree:
    """Algorithm 1 of arXiv 2606.18394: expand the likeliest leaf with all its children, until the budget is spent."""
    assert scorer is None
    tokens, parents, depths, scores = [int(anchor_id)], [-1], [0], [0.0]
    max_depth, children = len(candidates.tokens), min(8, candidates.tokens.shape[1])  # W = 8
    open_nodes = [0] if max_depth else []
    all_tokens, all_scores = candidates.tokens.tolist(), candidates.logprobs.tolist()
    while open_nodes and len(tokens) < node_budget:
        node = max(open_nodes, key=scores.__getitem__)
        open_nodes.remove(node)
        for rank in range(min(children, node_budget - len(tokens))):
            parents.append(node)
            depths.append(depths[node] + 1)
            tokens.append(all_tokens[depths[node]][rank])
            scores.append(scores[node] + all_scores[depths[node]][rank])
            if depths[-1] < max_depth:
                open_nodes.append(len(tokens) - 1)
    return DraftTree(
        torch.tensor(tokens),
        torch.tensor(parents),
        torch.tensor(depths),
        torch.tensor(scores),
        max_depth,
    )


def train_row(
    name: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> JetFlowHead:
    """The head of a training; loaded from its folder if it is there."""
    folder = args.output / "heads" / name.replace(" ", "-")
    if (folder / "model.safetensors").exists():
        return JetFlowHead.from_pretrained(folder)
    how = TRAININGS[name]
    paths = args.answers
    if how.temperature is not None:
        paths = [args.output / f"answers_T{how.temperature:g}.jsonl"]
        prompts = read_prompts(args.train_prompts)
        regenerate_answers(target, tokenizer, prompts, paths[0], batch_size=64, temperature=how.temperature)
    answers = read_answers(paths)
    num_target_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    settings = dict(num_hidden_layers=3, block_size=8, branch_correction="path", target_name=args.target_name)
    settings["ngram_weights"] = []
    config = JetFlowConfig.for_target(
        target.config,
        **{**settings, **how.config},
        hidden_state_indices=[layer + 1 for layer in spaced_layer_ids(num_target_layers, NUM_TAPS)],
        draft_vocab_size=how.draft_vocab,
    )
    torch.manual_seed(args.seed)
    head = JetFlowHead(config)
    if not how.is_random_start:
        initialize_from_target(head, target)
    if how.draft_vocab:
        head.d2t.copy_(frequent_tokens(read_answers(args.answers), how.draft_vocab))  # the same in every row
    training = JetFlowTrainingConfig(
        output_dir=str(args.output / "runs" / name.replace(" ", "-")),
        max_steps=args.steps,
        per_device_train_batch_size=how.batch_size,
        anchors_per_sequence=how.anchors,
        depth_gamma=how.gamma,
        max_length=args.max_length,
        features_dir=str(args.features or args.output / "features"),
        warmup_steps=20,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(0.4 * args.steps), "min_lr_ratio": 0.02},
        save_strategy="no",
        logging_steps=50,
        seed=args.seed,
        bf16=fast_dtype() == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    JetFlowTrainer(head, target, training, answers).train()
    head.save_pretrained(folder)
    return JetFlowHead.from_pretrained(folder)  # without the trainer's wrappers


def time_ratios(
    target: PreTrainedModel, head: JetFlowHead, texts: list[tuple[list[int], int]], budgets: list[int], is_chain: bool
) -> dict[int, float]:
    """Seconds of a plain step over seconds of a round, by node budget: medians over prompts, interleaved."""
    ratios: dict[int, list[float]] = {budget: [] for budget in budgets}
    head.generation_config.width = 1 if is_chain else None
    for number, (ids, num_prompt) in enumerate([texts[0], *texts]):  # the first one twice: warm-up
        prompt = torch.tensor([ids[:num_prompt]], device=target.device)
        for budget in budgets:
            seconds = []
            for node_budget in (1, budget):  # one node is plain decoding, in the same loop
                head.generation_config.node_budget = node_budget
                target.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=25,
                    do_sample=False,
                    assistant_model=head,
                )
                stats = head.last_stats
                in_rounds = sum(spent for step, spent in stats.seconds_by_step.items() if step != "prefill")
                seconds.append(in_rounds / max(stats.num_rounds, 1))
            if number:
                ratios[budget].append(seconds[0] / seconds[1])
    return {budget: statistics.median(values) for budget, values in ratios.items()}


def measure_row(
    name: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> list[dict[str, Any]]:
    training, drafts = ROWS[name]
    head = train_row(training, target, tokenizer, args).to(target.dtype).eval()
    head.config.ngram_weights = list(NGRAM_WEIGHTS) if drafts == "n-grams" else []
    is_chain = drafts == "chain"
    budgets = [head.config.block_size] if is_chain else list(NODE_BUDGETS)
    texts = {}
    for path in args.prompts:
        prompts = read_prompts([path])[: args.num_prompts]
        stored = args.output / "texts" / path.name
        texts[path.stem] = greedy_texts(target, tokenizer, prompts, stored, args.max_new_tokens)
    ratios = time_ratios(target, head, [group[0] for group in texts.values()], budgets, is_chain)
    results = []
    for set_name, group in texts.items():
        stats = replay(
            Target(target, head.config),
            head,
            group,
            budgets,
            width=1 if is_chain else None,
            tree_builder=algorithm_1_tree if drafts == "algorithm 1" else None,
        )
        for budget in budgets:
            figure = stats[budget].tokens_per_round
            results.append(
                {
                    "name": name,
                    "prompts": set_name,
                    "node_budget": budget,
                    "tokens_per_round": round(figure, 3),
                    "speedup": round(figure * ratios[budget], 3),
                    "plain_step_over_round": round(ratios[budget], 3),
                    "acceptance_by_depth": [round(value, 3) for value in stats[budget].acceptance_by_depth],
                    "num_prompts": len(group),
                    "updates": args.steps,
                }
            )
    return results


def write_table(results: list[dict[str, Any]], path: Path) -> None:
    """Tokens per round / speedup by row and node budget, means over the prompt sets."""
    sets = list(dict.fromkeys(result["prompts"] for result in results))
    lines = [
        f"Tokens per round / speedup, mean over {', '.join(sets)}, greedy, {results[0]['updates']} updates each.",
        "",
        "| row | " + " | ".join(f"{budget} nodes" for budget in (8, *NODE_BUDGETS)) + " |",
        "|---|" + "---|" * (1 + len(NODE_BUDGETS)),
    ]
    for name in [name for name in ROWS if any(result["name"] == name for result in results)]:
        cells = []
        for budget in (8, *NODE_BUDGETS):
            found = [result for result in results if (result["name"], result["node_budget"]) == (name, budget)]
            means = [
                statistics.mean(result[key] for result in found) for key in ("tokens_per_round", "speedup") if found
            ]
            cells.append(" / ".join(f"{mean:.2f}" for mean in means) or "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Left: the main rows by node budget. Right: the variations at 32 nodes."""
    mean: dict[tuple[str, int], float] = {}
    for name in ROWS:
        for budget in (8, *NODE_BUDGETS):
            found = [result for result in results if (result["name"], result["node_budget"]) == (name, budget)]
            if found:
                mean[name, budget] = statistics.mean(result["tokens_per_round"] for result in found)
    default = "causal, path correction"
    names = [name for name in ROWS if name not in MAIN_ROWS and (name, 32) in mean]
    figure, axes = plt.subplots(
        1, 1 + bool(names), figsize=(13 if names else 7.5, 6.5), layout="constrained", squeeze=False
    )
    left, right = axes[0, 0], axes[0, -1]
    for name in MAIN_ROWS:
        points = [(budget, mean[name, budget]) for budget in (8, *NODE_BUDGETS) if (name, budget) in mean]
        if points:
            left.plot(*zip(*points, strict=True), marker="o", label=name)
    left.set(xscale="log", xlabel="node budget", ylabel="tokens per round, mean over prompt sets")
    left.set_xticks([8, *NODE_BUDGETS], [str(budget) for budget in (8, *NODE_BUDGETS)])
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2)
    left.grid(alpha=0.3)
    if names:
        names = ([default] if (default, 32) in mean else []) + names
        right.barh([name.removeprefix("path correction, ") for name in names], [mean[name, 32] for name in names])
        right.invert_yaxis()
        right.set(xlabel="tokens per round at 32 nodes, mean over prompt sets", xlim=(1, None))
        right.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--target-name")
    parser.add_argument("--answers", type=Path, nargs="+", required=True)
    parser.add_argument("--train-prompts", type=Path, nargs="*", default=[], help="for rows with answers of their own")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="development prompts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("examples/results/ablation.json"))
    parser.add_argument("--features", type=Path, help="folder of stored target features; OUTPUT/features by default")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), metavar="NAME", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--num-prompts", type=int, default=30)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    console = Console(stderr=True)
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else []
    known = {result["name"] for result in results} - set(args.rows or ())
    results = [result for result in results if result["name"] in known]
    target, tokenizer = load_target(args.target, "auto")
    args.target_name = args.target_name or args.target
    for name in args.rows or ROWS:
        if name in known or (TRAININGS[ROWS[name][0]].temperature is not None and not args.train_prompts):
            continue
        console.print(f"{name} ...")
        results += measure_row(name, target, tokenizer, args)
        with atomic_write(args.results) as partial:
            partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_table(results, args.results.with_suffix(".md"))
        plot(results, args.results.with_suffix(".png"))
    console.print(args.results.with_suffix(".md").read_text(encoding="utf-8"), markup=False)


if __name__ == "__main__":
    main()
