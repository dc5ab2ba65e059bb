"""Predict the speedup on other hardware: measured tokens per round over the seconds of a roofline model.

`docs/cost-model.md` compares predictions with measurements.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import JetFlowError
from ..files import write_json
from ..head.checkpoint_files import locate, read_config, readable_load_errors
from ..head.configuration_jetflow import JetFlowConfig
from ..head.formats import recognize
from ..target.loading import head_errors, load_target_config
from ..trees.tree import Candidates, build_tree
from .fitting import fit_hardware
from .hardware import PRESETS, Hardware
from .inputs import RANKS, fitting_rows, measured_tokens, read_acceptance, read_hardware
from .plots import plot_speedup
from .roofline import HeadShape, ModelShape, head_shape, round_seconds, target_shape
from .settings import SimulateSettings


DEFAULT_BUDGETS = (8, 16, 32, 64, 128, 256)  # for a table of ranks


def simulate(
    target: ModelShape,
    head: HeadShape,
    hardware: Hardware,
    tokens_per_round: Mapping[int, float],
    *,
    batch_sizes: Sequence[int] = (1,),
    context: int = 512,
) -> list[dict[str, Any]]:
    """
    Speedup over plain decoding of the same batch, by node budget and batch size.

    Args:
        tokens_per_round: Tokens per round by node budget, as measured or from `expected_tokens`.
        batch_sizes: Numbers of sequences decoded together; all are assumed to take the same rounds.
        context (`int`): Cached positions per sequence.

    Returns:
        Rows with node budget, batch size, tokens per round, speedup, tokens/s of the batch, and seconds by step.
    """
    rows = []
    for budget, tokens in tokens_per_round.items():
        for batch_size in batch_sizes:
            seconds = round_seconds(target, head, hardware, budget, batch_size=batch_size, context=context)
            rows.append(
                {
                    "node_budget": budget,
                    "batch_size": batch_size,
                    "tokens_per_round": tokens,
                    "speedup": tokens * seconds.plain / seconds.round,
                    "tokens_per_second": batch_size * tokens / seconds.round,
                    "seconds": dataclasses.asdict(seconds),
                }
            )
    return rows


def expected_tokens(acceptance: Sequence[Sequence[float]], node_budget: int) -> float:
    """
    Expected tokens per round, bonus included, of the best tree under fixed probabilities by depth and rank.

    Depths are independent: a node is accepted with the product of the probabilities on its path. The expectation is
    the sum over the nodes, and `build_tree` finds the tree that maximizes it (arXiv 2606.18394, section 3.4).

    Args:
        acceptance: For each depth, the probabilities that the target's token is the head's first, second, ... choice,
            given that the path to it was accepted.
        node_budget (`int`): Nodes of the tree, root included.

    Raises:
        JetFlowError: If a depth has no ranks, its probabilities are out of range, or the budget is below 1.
    """
    if node_budget < 1:
        raise JetFlowError(f"`node_budget` must be at least 1, got {node_budget}")
    for depth, ranks in enumerate(acceptance, 1):
        if not ranks or min(ranks) < 0 or sum(ranks) > 1 + 1e-3:  # files round the shares
            raise JetFlowError(
                f"acceptance at depth {depth}: expected probabilities by rank that sum to at most 1, got {list(ranks)}"
            )
    width = max(map(len, acceptance), default=0)
    if node_budget == 1 or not width:
        return 1.0
    padded = torch.tensor([[*ranks, *[0.0] * (width - len(ranks))] for ranks in acceptance])
    logprobs = padded.sort(dim=1, descending=True).values.log()
    tokens = torch.arange(width).expand(len(acceptance), width)
    tree = build_tree(torch.zeros(1, dtype=torch.long), Candidates(tokens, logprobs), node_budget)
    return float(tree.logprobs.exp().sum())


def read_tokens(figures: Mapping[str, Any], node_budgets: Sequence[int] | None) -> dict[str, dict[int, float]]:
    """
    Tokens per round by prompt set and node budget.

    Args:
        figures: JSON of `hf-jetflow bench` or a replay (`rows` with `prompts`, `node_budget`, `tokens_per_round`), or
            a table of ranks: `acceptance_by_rank` holds the argument of `expected_tokens` by prompt set.
        node_budgets: Node budgets to read; by default those measured, or 8 to 256 for a table of ranks.

    Raises:
        JetFlowError: If the file holds neither, or a node budget was not measured.
    """
    if RANKS in figures:
        budgets = node_budgets or DEFAULT_BUDGETS
        tables = figures[RANKS]
        return {name: {budget: expected_tokens(table, budget) for budget in budgets} for name, table in tables.items()}
    return measured_tokens(figures, node_budgets)


def run_simulation(settings: SimulateSettings) -> dict[str, Any]:
    """
    Run `simulate` on files, and write the files that the settings ask for.

    Returns:
        `dict`: `target`, `head`, `context`, `hardware`, `notes` (what was never confirmed, and why batch sizes may not
            differ) and `rows`, each row with its `prompts`.

    Raises:
        JetFlowError: If head and target do not fit together, or figures are missing or out of range.
        OSError: If the configuration of target or head does not exist.
    """
    head_config, config = _read_head_config(settings.head), load_target_config(settings.target)
    text = config.get_text_config(decoder=True)
    expected = (head_config.target_hidden_size, head_config.num_target_layers)
    if (text.hidden_size, text.num_hidden_layers) != expected:
        raise JetFlowError(
            f"the head `{settings.head}` is for a target of width {expected[0]} with {expected[1]} layers, but "
            f"`{settings.target}` has width {text.hidden_size} and {text.num_hidden_layers} layers; use the target "
            "that the head was trained for"
        )
    target, head = target_shape(config), head_shape(head_config)
    machine = _hardware(settings.hardware, target, head, settings.context)
    rows = [
        {"prompts": prompts, **row}
        for prompts, tokens in read_tokens(read_acceptance(settings), settings.node_budgets).items()
        for row in simulate(target, head, machine, tokens, batch_sizes=settings.batch_sizes, context=settings.context)
    ]
    result = {
        "target": settings.target,
        "head": settings.head,
        "context": settings.context,
        "hardware": dataclasses.asdict(machine),
        "notes": notes(machine, rows),
        "rows": rows,
    }
    if settings.json is not None:
        write_json(result, settings.json)
    if settings.plot is not None:
        plot_speedup(result, settings.plot)
    return result


def notes(hardware: Hardware, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What no measurement confirmed of these rows, and why batch sizes do not differ where they do not."""
    has_batches = any(row["batch_size"] > 1 for row in rows)
    unconfirmed = {
        "the speed of hf_jetflow on a GPU": hardware in PRESETS.values(),
        "any figure of an A100": "A100" in hardware.name,
        "graphed execution": hardware.launch_seconds == 0,
        "batches of several sequences": has_batches,
    }
    lines = []
    if any(unconfirmed.values()):
        lines.append(f"Never confirmed by a measurement: {', '.join(name for name, it in unconfirmed.items() if it)}.")
    speedups: dict[Any, set[float]] = {}
    for row in rows:
        speedups.setdefault((row["prompts"], row["node_budget"]), set()).add(round(row["speedup"], 2))
    if has_batches and all(len(values) == 1 for values in speedups.values()):
        lines.append(
            "The batch sizes do not differ: in eager mode launching the layers takes longer than all reads and "
            "operations, up to the largest batch. Larger batches, or a graphed preset, show where that ends."
        )
    return lines


def _hardware(source: str, target: ModelShape, head: HeadShape, context: int) -> Hardware:
    """A preset, hardware figures from JSON, or hardware fitted to the JSON of a bench."""
    given = read_hardware(source)
    if isinstance(given, Hardware):
        return given
    name = f"{given.get('environment', {}).get('processor', 'machine')}, fitted to {Path(source).name}"
    return fit_hardware(name, target, head, *fitting_rows(given["rows"]), context=context)


def _read_head_config(head: str) -> JetFlowConfig:
    with head_errors(), readable_load_errors(head):
        settings = read_config(locate(head, {}))
        layout = recognize(settings).name
        if layout != "JetFlow":
            raise JetFlowError(
                f"`{head}` is in the layout {layout}, but JetFlow is expected; convert it with `hf-jetflow convert "
                "--to jetflow`"
            )
        return JetFlowConfig.from_dict(settings)
