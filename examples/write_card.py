r"""Write a head's card from its config, a bench result and a description of its training.

    python examples/write_card.py --head examples/heads/smollm2-135m-instruct \
        --results examples/results/bench_smollm2.json \
        --training examples/results/training_smollm2.md --output MODEL_CARD.md
"""

import argparse
import json
from pathlib import Path

from hf_jetflow import JetFlowHead
from hf_jetflow.model_card import card_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="JSON of `hf-jetflow bench`")
    parser.add_argument("--training", type=Path, required=True, help="Markdown about data and length of the training")
    parser.add_argument("--output", type=Path, action="append", required=True, help="may be given several times")
    args = parser.parse_args()

    head = JetFlowHead.from_pretrained(args.head)
    result = json.loads(args.results.read_text(encoding="utf-8"))
    facts = result["environment"]
    hardware = f"{facts['processor']} with {facts['num_threads']} threads, torch {facts['torch']}"
    card = card_text(
        head.config,
        name=args.head.as_posix(),
        num_parameters=head.num_parameters(),
        training=args.training.read_text(encoding="utf-8").strip(),
        rows=result["rows"],
        hardware=hardware,
    )
    for path in args.output:
        path.write_text(card, encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
