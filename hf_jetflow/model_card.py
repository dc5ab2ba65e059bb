"""The card of a head: text from its configuration, the training facts and the measured figures."""

from typing import Any

from .configuration_jetflow import JetFlowConfig


CARD = """---
library_name: transformers
{base_model}license: {license}
pipeline_tag: text-generation
tags:
- speculative-decoding
- draft-head
- jetflow
---

# Draft head for {target}

This is a draft head for {target}, not a model by itself: it makes the target's `generate` faster and leaves its output
as it is. It needs the package `hf_jetflow`.

```python
from hf_jetflow import JetFlowHead

head = JetFlowHead.from_pretrained("{name}")
target.generate(**inputs, assistant_model=head)
```

## The head

{layers} layers of width {hidden}, {parameters:.1f} M parameters, block of {block} rows ({depth} drafted depths); it
listens to `hidden_states` {indices} of the target, {causality}, {vocabulary}. {correction}

## Measured

{measured}

## Training

{training}

## Limits

In float32 the output equals plain `generate` token for token. In bfloat16 a forward over many rows can rank two nearly
equal tokens otherwise than a forward over one row, so texts may part at a near-tie; both are the target's own choices.
Text unlike the training prompts is drafted less well, never decoded less well. Not tested with other targets than the
one named above.
"""


def card_text(
    config: JetFlowConfig,
    *,
    name: str,
    num_parameters: int,
    training: str,
    rows: list[dict[str, Any]] | None = None,
    hardware: str | None = None,
    tokens_per_round: dict[str, dict[int, float]] | None = None,
    license: str = "apache-2.0",
) -> str:
    """
    Markdown card of a head.

    Args:
        config ([`JetFlowConfig`]): The head's configuration.
        name (`str`): What `from_pretrained` takes.
        num_parameters (`int`): Parameters of the head.
        training (`str`): Data and length of the training, in Markdown.
        rows (`list[dict]`, *optional*): Rows of a bench result.
        hardware (`str`, *optional*): Where they were measured.
        tokens_per_round (`dict[str, dict[int, float]]`, *optional*): Figures of greedy decoding by prompt set and node
            budget, where there is no bench result.
    """
    target = config.target_name or "an unnamed target"
    is_hub_id = config.target_name is not None and config.target_name.count("/") == 1
    return CARD.format(
        base_model=f"base_model: {target}\n" if is_hub_id else "",
        license=license,
        target=target,
        name=name,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        parameters=num_parameters / 1e6,
        block=config.block_size,
        depth=config.block_size - 1,
        indices=config.hidden_state_indices,
        causality="causal inside the block"
        if all(config.causal_layers)
        else "not causal inside the block in every layer",
        vocabulary=(
            f"scores the {config.draft_vocab_size} target tokens commonest in its training answers"
            if config.draft_vocab_size
            else "scores the whole vocabulary"
        ),
        correction={
            None: "It has no branch correction: all branches of a depth share one distribution.",
            "parent": "A branch correction re-scores candidates given their parent's token.",
            "path": "A branch correction re-scores candidates given all tokens of their branch.",
        }[config.branch_correction],
        measured=(
            measured_table(rows, hardware)
            if rows
            else rounds_table(tokens_per_round)
            if tokens_per_round
            else "Nothing was measured yet; run `hf-jetflow bench`."
        ),
        training=training,
    )


def measured_table(rows: list[dict[str, Any]], hardware: str | None = None) -> str:
    """Bench rows as a Markdown table; plain decoding is the speedup's unit and left out."""
    lines = [
        "| prompts | temperature | method | node budget | tokens per round | speedup (quartiles) | same as plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["method"] == "plain":
            continue
        low, high = row["speedup_spread"]
        lines.append(
            f"| {row['prompts']} | {row['temperature']:g} | {row['method']} | {row['node_budget'] or '-'} "
            f"| {row['tokens_per_round']:.2f} | {row['speedup']:.2f} ({low:.2f} - {high:.2f}) "
            f"| {100 * row['identical_to_plain']:.0f} % |"
        )
    first = rows[0]
    setting = f"{first['dtype']}, {first['num_prompts']} prompts each, batch 1, medians of interleaved runs"
    return "\n".join(lines) + f"\n\n{setting}{', ' + hardware if hardware else ''}."


def rounds_table(tokens_per_round: dict[str, dict[int, float]]) -> str:
    """Tokens per round by prompt set and node budget as a Markdown table."""
    budgets = sorted({budget for figures in tokens_per_round.values() for budget in figures})
    lines = [
        f"| tokens per round | {' | '.join(f'{budget} nodes' for budget in budgets)} |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for name, figures in tokens_per_round.items():
        cells = [f"{figures[budget]:.2f}" if budget in figures else "-" for budget in budgets]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nGreedy decoding of held-out prompts, batch 1; plain decoding is 1.00."
