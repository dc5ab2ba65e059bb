r"""Write a head's card from its config, a bench result and a description of its training.

    python examples/write_card.py --head runs/my-head --results bench.json --training training.md --license apache-2.0

Without options it writes the card of the shipped head. `--template MODEL_CARD.md` writes a template for heads that
were trained elsewhere, with a note for each part to fill in.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rounding import share_table

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import weights_hash
from hf_jetflow.head.card import card_text, template_text


HERE = Path(__file__).resolve().parent
HEAD = HERE / "heads" / "smollm2-135m-instruct"
SHIPPED = {
    "name": "examples/heads/smollm2-135m-instruct",
    "results": HERE / "results" / "bench_smollm2_bf16.json",
    "training": HERE / "results" / "training_smollm2.md",
    "rounding": HERE / "results" / "rounding.json",
    "license": "apache-2.0",
    "datasets": ["openai/gsm8k"],
    "language": ["en"],
    "sets": {
        "dev_math": "math (GSM8K test)",
        "dev_code": "code (HumanEval)",
        "dev_chat": "chat (MT-Bench, first turns)",
    },
}


def card_of(
    folder: Path,
    *,
    name: str,
    results: Path,
    training: Path,
    license: str | None,
    datasets: list[str],
    language: list[str],
    sets: dict[str, str],
    rounding: Path | None = None,
) -> str:
    """The card of a head; `sets` maps prompt sets of the results to their descriptions."""
    head = JetFlowHead.from_pretrained(folder)
    result = json.loads(results.read_text(encoding="utf-8"))
    facts = result["environment"]
    return card_text(
        head.config,
        name=name,
        num_parameters=head.num_parameters(),
        training=training.read_text(encoding="utf-8").strip(),
        rows=[{**row, "prompts": sets.get(row["prompts"], row["prompts"])} for row in result["rows"]],
        control={sets.get(name, name): share for name, share in result.get("control", {}).items()},
        rounding=None if rounding is None else rounding_text(rounding, sets, weights_hash(head)),
        hardware=hardware(facts),
        license=license,
        datasets=datasets or None,
        language=language or None,
    )


def hardware(facts: dict[str, Any]) -> str:
    """Device and versions of an `environment`."""
    device = facts.get("cuda_device") or f"{facts['processor']} with {facts['num_threads']} threads"
    return f"{device}, torch {facts['torch']}, transformers {facts['transformers']}"


def rounding_text(path: Path, sets: dict[str, str], head_hash: str) -> str:
    """The table of examples/rounding.py and what it was measured on, another head than that of the hash too."""
    result = json.loads(path.read_text(encoding="utf-8"))
    facts = result["environment"]
    heading, *lines = share_table(result, sets)
    table = ["| " + " | ".join(cells) + " |" for cells in [heading, ["---"] * len(heading), *lines]]
    said = (
        f"Greedy texts of up to {result['max_new_tokens']} tokens, compared with those of plain decoding alone in the "
        "same dtype. The last column\nsays how far apart the target's two best tokens are where texts part."
    )
    other = "" if facts.get("head_hash", head_hash) == head_hash else ", and an earlier head"
    return "\n".join(
        [said, "", *table, "", f"Measured {facts['date']}, {facts['cpu_capability']}: {hardware(facts)}{other}."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, help="folder of the head; its README.md is written")
    parser.add_argument("--name", help="Hub id of the head, for `from_pretrained`; its folder if not given")
    parser.add_argument("--results", type=Path, help="JSON of `hf-jetflow bench`")
    parser.add_argument("--training", type=Path, help="Markdown file about the training")
    parser.add_argument("--license", help="license of the head, as spelled by the Hub")
    parser.add_argument("--dataset", action="append", default=[], help="Hub id of the training data; may be repeated")
    parser.add_argument("--language", action="append", default=[], help="language code; may be repeated")
    parser.add_argument("--template", type=Path, help="file for the template; a card is written only with --head")
    args = parser.parse_args()
    if args.head and not (args.results and args.training):
        parser.error("--head needs --results and --training")

    if args.template:
        args.template.write_text(template_text(), encoding="utf-8")
        print(f"written: {args.template}")
    if args.head or not args.template:
        facts = dict(name=args.name or (args.head or HEAD).as_posix(), results=args.results, training=args.training)
        facts |= dict(license=args.license, datasets=args.dataset, language=args.language, sets={})
        card = card_of(args.head or HEAD, **(facts if args.head else SHIPPED))
        path = (args.head or HEAD) / "README.md"
        path.write_text(card, encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
