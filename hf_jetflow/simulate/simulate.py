"""What drafting gains on hardware that is not at hand: tokens per round, by the seconds that `roofline` predicts.

How far the predictions are off is in `docs/cost-model.md`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..head.checkpoint_files import locate, read_config, readable_load_errors
from ..head.configuration_jetflow import JetFlowConfig
from ..head.formats import recognize
from ..target.loading import load_target_config
from ..trees.tree import Candidates, build_tree
from .hardware import PRESETS, Hardware
from .roofline import HeadShape, ModelShape, forward_seconds, head_shape, round_seconds, target_shape


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
        tokens_per_round: Tokens of a round by node budget, as measured or from `expected_tokens`.
        batch_sizes: Sequences decoded together; all take the same rounds.
        context (`int`): Positions in the cache of each sequence.

    Returns:
        Rows with the node budget, batch size, tokens per round, speedup, tokens/s of the batch and seconds by step.
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
    Tokens per round, bonus included, of the best tree under fixed probabilities by depth and rank.

    A node is accepted with the product of the probabilities on its path, independently by depth, so that the expected
    tokens are the sum over the nodes, and the best tree is that of `build_tree` (arXiv 2606.18394, section 3.4).

    Args:
        acceptance: For depth 1, 2, ... the probability that the target's token is the head's first, second, ... choice
            after a path that was accepted so far.
        node_budget (`int`): Nodes of the tree, root included.

    Raises:
        ValueError: If a depth has no ranks, a probability lies outside 0 .. 1, a depth's sum is above 1, or the budget
            is below 1.
    """
    if node_budget < 1:
        raise ValueError(f"`node_budget` is {node_budget}, but at least 1 is needed")
    for depth, ranks in enumerate(acceptance, 1):
        if not ranks or min(ranks) < 0 or sum(ranks) > 1 + 1e-3:  # files round the shares
            raise ValueError(
                f"acceptance at depth {depth} is {list(ranks)}, but probabilities by rank are needed, which sum to at "
                "most 1"
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
        figures: What `hf-jetflow bench` or a replay wrote (`rows` with `prompts`, `node_budget`, `tokens_per_round`),
            or a table of ranks: `acceptance_by_rank`, by prompt set what `expected_tokens` takes.
        node_budgets: Budgets wanted; by default those measured, or 8 to 256 for a table of ranks.

    Raises:
        ValueError: If there are neither, or a budget was not measured.
    """
    if "acceptance_by_rank" in figures:
        budgets = node_budgets or (8, 16, 32, 64, 128, 256)
        tables = figures["acceptance_by_rank"]
        return {name: {budget: expected_tokens(table, budget) for budget in budgets} for name, table in tables.items()}
    measured: dict[str, dict[int, float]] = {}
    for row in figures.get("rows", ()):
        if isinstance(row.get("node_budget"), int):
            if missing := {"prompts", "tokens_per_round"} - row.keys():
                raise ValueError(f"a row of the acceptance file has no {sorted(missing)}: {row}; measure it again")
            at = f", T = {row['temperature']:g}" if row.get("temperature") else ""
            measured.setdefault(row["prompts"] + at, {})[row["node_budget"]] = row["tokens_per_round"]
    if not measured:
        raise ValueError(
            "the acceptance file holds no `rows` with node budgets and no `acceptance_by_rank`; give the JSON of "
            "`hf-jetflow bench` with fixed budgets, or that of examples/measure_ranks.py"
        )
    for name, tokens in measured.items():
        if missing := sorted(set(node_budgets or ()) - tokens.keys()):
            raise ValueError(
                f"node budgets {missing} were not measured on {name}, only {sorted(tokens)}; measure them, or give a "
                "table of ranks (examples/measure_ranks.py)"
            )
    return {name: {budget: tokens[budget] for budget in node_budgets or tokens} for name, tokens in measured.items()}


def fit_hardware(
    name: str,
    target: ModelShape,
    head: HeadShape,
    plain: Mapping[str, Any],
    small: Mapping[str, Any],
    large: Mapping[str, Any],
    *,
    context: int,
    bytes_per_value: int = 2,
) -> Hardware:
    """
    What a machine achieves, from three rows of a bench on it: plain decoding and trees of two node budgets.

    The trees' verify times are taken as bound by operations and give `flops` and `launch_seconds`; the plain step, as
    bound by reads, gives `bandwidth`. What a tree round takes besides the forwards of the model gives the host's time.

    Raises:
        ValueError: If the rows do not have that form, as where rows are free because launching takes longer.
    """
    budgets = [row["node_budget"] for row in (small, large)]
    verify = [row["round_seconds"]["verify"] for row in (small, large)]
    seconds = [1 / plain["tokens_per_second"], *verify]
    fitted = _fit_forwards(name, target, [1, *budgets], seconds, context, bytes_per_value)
    rest = []
    for row, budget, verify_seconds in zip((small, large), budgets, verify, strict=True):
        model = round_seconds(target, head, fitted, budget, context=context)
        whole = row["tokens_per_round"] / row["tokens_per_second"]
        rest.append(whole - verify_seconds - model.draft - model.correct)
    per_node = max((rest[1] - rest[0]) / (budgets[1] - budgets[0]), 0.0)
    return dataclasses.replace(
        fitted,
        host_seconds=max(rest[0] - per_node * budgets[0], 0.0),
        host_seconds_per_node=per_node,
        source=f"fitted to plain decoding and {budgets[0]} and {budgets[1]} nodes on {plain['prompts']}",
    )


def _fit_forwards(
    name: str, target: ModelShape, rows: Sequence[int], seconds: Sequence[float], context: int, bytes_per_value: int
) -> Hardware:
    """Hardware whose forwards over three numbers of rows, the first of them one, take the seconds given."""
    parts = [list(target.parts(number, 1, context, number).values()) for number in rows]
    read = bytes_per_value * sum(values for values, _ in parts[0])
    done = [sum(operations for _, operations in part) for part in parts]
    if rows[1] < rows[2] and seconds[1] < seconds[2]:
        flops = (done[2] - done[1]) / (seconds[2] - seconds[1])
        launch = (seconds[1] - done[1] / flops) / target.num_layers
        reading = seconds[0] - target.num_layers * launch
        if launch >= 0 and reading > 0:
            fitted = Hardware(name, read / reading, flops, 1.0, 1.0, launch, False, bytes_per_value=bytes_per_value)
            found = [forward_seconds(target, fitted, number, context=context) for number in rows]
            if all(abs(a / b - 1) < 0.05 for a, b in zip(found, seconds, strict=True)):
                return fitted
    raise ValueError(
        "forwards over "
        + ", ".join(f"{number} rows in {1e3 * value:.2f} ms" for number, value in zip(rows, seconds, strict=True))
        + " are not bound by memory first and by operations then, so hardware figures cannot be read off them; give a "
        "JSON file of hardware figures (where launching takes longest, `launch_seconds` is the first / layers)"
    )


def run_simulation(
    target: str,
    head: str,
    acceptance: Path,
    hardware: str,
    *,
    node_budgets: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1,),
    context: int = 512,
) -> dict[str, Any]:
    """
    `simulate` from files.

    Args:
        target (`str`): Hub id, folder, config.json or `.gguf` file; only the configuration is read.
        head (`str`): Hub id or folder; only the configuration is read.
        acceptance (`Path`): JSON as `read_tokens` takes it.
        hardware (`str`): Name of a preset, or a JSON file: fields of `Hardware`, or a bench of this target and head.
        node_budgets, batch_sizes, context: As in `read_tokens` and `simulate`.

    Returns:
        `dict`: `target`, `head`, `context`, `hardware` and `rows`, with `prompts` in each.

    Raises:
        ValueError: If head and target do not fit together, or figures are missing or out of range.
        OSError: If a file is missing.
    """
    head_config = _read_head_config(head)
    config = load_target_config(target)
    found = config.get_text_config(decoder=True)
    wanted = (head_config.target_hidden_size, head_config.num_target_layers)
    if (found.hidden_size, found.num_hidden_layers) != wanted:
        raise ValueError(
            f"`{target}` is {found.hidden_size} wide with {found.num_hidden_layers} layers, but the head `{head}` is "
            f"for a target of width {wanted[0]} with {wanted[1]} layers; give the two that belong together"
        )
    shapes = target_shape(config), head_shape(head_config)
    machine = _read_hardware(hardware, *shapes, context)
    rows = []
    for prompts, tokens in read_tokens(_read_json(acceptance), node_budgets).items():
        lines = simulate(*shapes, machine, tokens, batch_sizes=batch_sizes, context=context)
        rows += [{"prompts": prompts, **line} for line in lines]
    return {
        "target": target,
        "head": head,
        "context": context,
        "hardware": dataclasses.asdict(machine),
        "rows": rows,
    }


def _read_hardware(source: str, target: ModelShape, head: HeadShape, context: int) -> Hardware:
    if source in PRESETS:
        return PRESETS[source]
    if not Path(source).is_file():
        raise ValueError(f"the hardware is {source!r}, but one of {', '.join(PRESETS)} or a JSON file is needed")
    figures = _read_json(Path(source))
    if "rows" not in figures:
        return Hardware.from_dict(figures)
    name = f"{figures.get('environment', {}).get('processor', 'machine')}, fitted to {Path(source).name}"
    return fit_hardware(name, target, head, *fitting_rows(figures["rows"]), context=context)


def fitting_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """
    Of the first prompt set of a bench: plain decoding, the smallest node budget and the largest.

    Raises:
        ValueError: If the bench has no plain decoding or fewer than two fixed node budgets.
    """
    first = [row for row in rows if row.get("prompts") == rows[0].get("prompts") and not row.get("temperature")]
    plain = [row for row in first if row.get("method") == "plain"]
    trees = [row for row in first if row.get("method") == "jetflow" and isinstance(row["node_budget"], int)]
    trees.sort(key=lambda row: row["node_budget"])
    if not plain or len(trees) < 2:
        raise ValueError(
            "hardware is fitted to plain decoding and two fixed node budgets at temperature 0, which this bench does "
            "not have; run it again with `--node-budgets 16,64`"
        )
    return plain[0], trees[0], trees[-1]


def _read_head_config(head: str) -> JetFlowConfig:
    with readable_load_errors(head):
        settings = read_config(locate(head, {}))
        layout = recognize(settings).name
        if layout != "JetFlow":
            raise ValueError(
                f"`{head}` is in the layout {layout}; write it anew with `hf-jetflow convert --to jetflow`"
            )
        return JetFlowConfig.from_dict(settings)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, but a JSON object is needed")
    return content
