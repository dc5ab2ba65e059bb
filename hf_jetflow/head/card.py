"""The model card of a head, made from its configuration, the training facts and the measured figures."""

import re
from typing import Any

from huggingface_hub import ModelCardData

from .configuration_jetflow import JetFlowConfig


HUB_ID = r"[\w.-]+/[\w.-]+"
CARD = """---
{metadata}
---

# Draft head for {target}

This is a draft head for {target}, not a model on its own: it makes the target's `generate` faster and leaves its
output as it is. It needs the package [`hf_jetflow`](https://github.com/hf-jetflow/hf_jetflow).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_jetflow import JetFlowHead

target = AutoModelForCausalLM.from_pretrained("{target_id}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{target_id}")
head = JetFlowHead.from_pretrained(
    "{name}",
    dtype=target.dtype,
    device_map=target.device,
)

messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
inputs = inputs.to(target.device)
output = target.generate(**inputs, assistant_model=head, do_sample=False, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(head.last_stats.tokens_per_round)
```

## The head

{layers} layers of width {hidden}, {parameters} M parameters, block of {block} rows ({depth} drafted depths).
It reads `hidden_states` {indices} of the target, is {causality}, and {vocabulary}. {correction}

## Measured

{measured}

## Training

{training}

## License

{license} The head learned from answers of the target, and its layers started from the target's own, so the
target's license may apply too.

## Limits

In float32 the output equals plain `generate` token for token. In bfloat16 a forward over many rows can rank two nearly
equal tokens differently than a forward over one row. Texts may then differ after a near-tie; both are the target's own
choices. On text unlike the training prompts, acceptance drops and the output stays the same. Speeds depend on the
hardware; measure your own with `hf-jetflow bench`. The head is for the target named above only.
"""

TEMPLATE_NOTE = """\
> This is a template, for those who publish a head that `hf-jetflow train` did not make. Copy it to the README.md of
> the head's repository, replace what stands in brackets and `org/...`, and delete this note. `hf-jetflow train` writes
> the card of its head, `examples/write_card.py` one with the figures of a bench."""

# Placeholders in MODEL_CARD.md for the facts of a head.
PLACES = {
    "target": "org/target",
    "target_id": "org/target",
    "name": "org/head",
    "layers": "[number of]",
    "hidden": "[width]",
    "parameters": "[number of]",
    "block": "[block_size]",
    "depth": "[block_size - 1]",
    "indices": "[tapped entries]",
    "causality": "[causal inside the block or not]",
    "vocabulary": "[which tokens it scores]",
    "correction": "[Its branch correction.]",
    "measured": "[Tokens per round, speeds with the hardware, and acceptance by depth: from the JSON of\n"
    "`hf-jetflow bench`; after training alone, tokens per round of the held-out prompts.]",
    "training": "[Target, data, length and settings of the training.]",
    "license": "[The license of the head.]",
}


def card_text(
    config: JetFlowConfig,
    *,
    name: str,
    num_parameters: int,
    training: str,
    rows: list[dict[str, Any]] | None = None,
    control: dict[str, float | None] | None = None,
    hardware: str | None = None,
    tokens_per_round: dict[str, dict[int, float]] | None = None,
    rounding: str | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    language: list[str] | None = None,
) -> str:
    """
    Write the Markdown card of a head.

    Args:
        config ([`JetFlowConfig`]): The head's configuration.
        name (`str`): What `from_pretrained` takes.
        num_parameters (`int`): Number of parameters of the head.
        training (`str`): Data and length of the training, in Markdown.
        rows (`list[dict]`, *optional*): Rows of a bench result.
        control (`dict[str, float | None]`, *optional*): Its `control`: by prompt set, the share of plain texts that
            stay the same in a batch of four.
        hardware (`str`, *optional*): Hardware they were measured on.
        tokens_per_round (`dict[str, dict[int, float]]`, *optional*): Figures of greedy decoding by prompt set and node
            budget, if there is no bench result.
        rounding (`str`, *optional*): How many texts rounding alone changes, in Markdown, where it was measured apart
            from the rows.
        license (`str`, *optional*): License of the head, as the Hub spells it (`"apache-2.0"`).
        datasets (`list[str]`, *optional*): Hub ids of the training data.
        language (`list[str]`, *optional*): Codes of its languages.
    """
    target = config.target_name or "an unnamed target"
    is_hub_id = config.target_name is not None and re.fullmatch(HUB_ID, config.target_name) is not None
    measured = _measured(rows, control or {}, hardware, tokens_per_round, deepest=config.block_size - 1)
    return CARD.format(
        metadata=metadata(target if is_hub_id else None, license, datasets, language),
        target=target,
        target_id=config.target_name or PLACES["target_id"],
        name=name,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        parameters=f"{num_parameters / 1e6:.1f}",
        block=config.block_size,
        depth=config.block_size - 1,
        indices=config.hidden_state_indices,
        causality="causal inside the block"
        if all(config.causal_layers)
        else "not causal inside the block in every layer",
        vocabulary=(
            f"scores the {config.draft_vocab_size} most frequent target tokens of its training answers"
            if config.draft_vocab_size
            else "scores the whole vocabulary"
        ),
        correction={
            None: "It has no branch correction: all branches of a depth share one distribution.",
            "parent": "A branch correction re-scores candidates given their parent's token.",
            "path": "A branch correction re-scores candidates given all tokens of their branch.",
        }[config.branch_correction]
        + _ngrams(config),
        measured="\n\n".join(filter(None, [measured, rounding])),
        training=training,
        license=f"`{license}` for this head." if license else "None was stated for this head.",
    )


def template_text() -> str:
    """The card with placeholders, and a note for whom it is: MODEL_CARD.md."""
    card = CARD.format(metadata=metadata(PLACES["target"], None, None, None), **PLACES)
    return card.replace("\n# Draft head", f"\n{TEMPLATE_NOTE}\n\n# Draft head", 1)


def metadata(
    base_model: str | None, license: str | None, datasets: list[str] | None, language: list[str] | None
) -> str:
    """The Hub's metadata of a head, as YAML."""
    return ModelCardData(
        library_name="transformers",
        base_model=base_model,
        license=license,
        datasets=datasets,
        language=language,
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "draft-head", "jetflow"],
    ).to_yaml()


def _ngrams(config: JetFlowConfig) -> str:
    if not config.ngram_weights:
        return ""
    weights = ", ".join(f"{weight:g}" for weight in config.ngram_weights)
    outside = ""
    if config.draft_vocab_size is not None and not config.own_lm_head:
        outside = " Tokens of the text outside its draft vocabulary are drafted, too."
    return (
        f"{outside} Context n-grams raise tokens that followed the same tokens earlier "
        f"(weights {weights} by the number of tokens that match)."
    )


def _measured(
    rows: list[dict[str, Any]] | None,
    control: dict[str, float | None],
    hardware: str | None,
    tokens_per_round: dict[str, dict[int, float]] | None,
    deepest: int,
) -> str:
    if rows:
        return f"{measured_table(rows, control, hardware)}\n\n{depth_table(rows, deepest)}"
    if tokens_per_round:
        return rounds_table(tokens_per_round)
    return "Nothing was measured yet; run `hf-jetflow bench`."


def measured_table(
    rows: list[dict[str, Any]], control: dict[str, float | None] | None = None, hardware: str | None = None
) -> str:
    """Bench rows as a Markdown table, and plain decoding in a batch: how many texts rounding alone changes."""
    lines = [
        "| prompts | temperature | method | node budget | tokens per round | tokens/s | speedup (quartiles) "
        "| same as plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["method"] == "plain":
            continue
        low, high = row["speedup_spread"]
        speedup = f"{row['speedup']:.2f} ({low:.2f} - {high:.2f})"
        lines.append(
            f"| {row['prompts']} | {row['temperature']:g} | {row['method']} | {row['node_budget'] or '-'} "
            f"| {row['tokens_per_round']:.2f} | {row['tokens_per_second']:.1f} | {speedup} "
            f"| {100 * row['identical_to_plain']:.0f} % |"
        )
    for prompts, share in (control or {}).items():
        if share is not None:
            lines.append(f"| {prompts} | 0 | plain, batch of 4 | - | 1.00 | - | - | {100 * share:.0f} % |")
    first = rows[0]
    setting = f"{first['dtype']}, {first['num_prompts']} prompts each, batch 1, medians of interleaved runs"
    return "\n".join(lines) + f"\n\n{setting}{', ' + hardware if hardware else ''}."


def depth_table(rows: list[dict[str, Any]], deepest: int) -> str:
    """Acceptance by depth of the rows that count it, as a Markdown table; `deepest` is the head's last depth."""
    counted = [row for row in rows if row["acceptance_by_depth"]]
    depths = min(max((len(row["acceptance_by_depth"]) for row in counted), default=0), deepest)
    lines = [
        "Share of the rounds that accepted a token at a depth, of those whose trees could reach it:",
        "",
        f"| prompts | temperature | method | node budget | {' | '.join(map(str, range(1, depths + 1)))} |",
        "|---" * (4 + depths) + "|",
    ]
    for row in counted:
        cells = [f"{share:.2f}" for share in row["acceptance_by_depth"][:depths]]
        cells += ["-"] * (depths - len(cells))
        lines.append(
            f"| {row['prompts']} | {row['temperature']:g} | {row['method']} | {row['node_budget'] or '-'} "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(lines) if counted else ""


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
