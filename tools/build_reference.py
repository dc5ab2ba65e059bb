"""Write docs/reference/: the public Python API from its docstrings, the command line from its help.

    make docs

The Python pages are read off the source, so they do not depend on the releases of other packages that are installed.
"""

import ast
import inspect
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args

from typer.models import ArgumentInfo


ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
COMMANDS = "command-line.md"
WIDTH = 100
VALUES = {str: "TEXT", int: "INTEGER", float: "FLOAT", Path: "PATH", bool: ""}  # what an option takes

# Page: title, introduction, and its entries as module:name, with the name that users know it by where it is another.
PYTHON_PAGES = {
    "api.md": (
        "Generating",
        "What `hf_jetflow` exports. See [usage](../usage.md) for how it is used.",
        [
            "head/modeling_jetflow:JetFlowHead",
            "head/modeling_jetflow:JetFlowHead.from_pretrained",
            "head/modeling_jetflow:JetFlowHead.save_pretrained",
            "head/modeling_jetflow:JetFlowHead.forward",
            "integration:_custom_generate JetFlowHead.custom_generate",
            "stats:GenerationStats",
            "stats:GenerationStats.tokens_per_round",
            "stats:GenerationStats.acceptance_by_depth",
            "head/configuration_jetflow:JetFlowConfig",
            "head/configuration_jetflow:JetFlowConfig.for_target",
            "decoding/drafter:JetFlowCandidateGenerator",
            "integration:enable",
            "integration:disable",
        ],
    ),
    "training.md": (
        "Training",
        "What `hf-jetflow train` is made of. See [training](../training.md) for how it is used, and the "
        "[command line](command-line.md#hf-jetflow-train) for the options of a recipe.",
        [
            "training/settings:TrainRecipe",
            "training/recipe:train_head",
            "training/trainer:JetFlowTrainer",
            "training/trainer:JetFlowTrainer.train",
            "training/trainer:JetFlowTrainer.evaluate",
            "training/trainer:JetFlowTrainer.whole_head",
            "training/trainer:JetFlowTrainingConfig",
            "training/cost:training_memory",
            "training/cost:training_flops",
        ],
    ),
    "tools.md": (
        "Measuring, examining and converting",
        "What the other commands are made of.",
        [
            "bench/bench:run_bench",
            "bench/bench:BenchSettings",
            "doctor/doctor:examine",
            "simulate/simulate:run_simulation",
            "simulate/simulate:simulate",
            "simulate/hardware:Hardware",
            "training/replay:replay",
            "training/evaluation:tokens_per_round",
            "convert/convert:convert_head",
            "head/card:card_text",
            "target/loading:load_target",
        ],
    ),
}


# --- the source ------------------------------------------------------------------------------------------------------


@dataclass
class Field:
    """One field of a class: its annotation, its default, and what a comment or its metadata says of it."""

    kind: str
    default: str | None
    words: str


@dataclass
class Entry:
    """A documented class, function, method or property."""

    name: str
    path: Path
    node: ast.ClassDef | ast.FunctionDef
    fields: dict[str, Field] = field(default_factory=dict)


@cache
def parse(path: Path) -> tuple[ast.Module, dict[int, str], dict[int, str]]:
    """A file's tree, and its comments by line: those behind code, and those on lines of their own."""
    behind, alone = {}, {}
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                comments = alone if token.line.strip().startswith("#") else behind
                comments[token.start[0]] = token.string.lstrip("# ")
    return ast.parse(path.read_text(encoding="utf-8")), behind, alone


def find(spec: str) -> Entry:
    """The entry of `module:name` or `module:name shown name`."""
    place, _, shown = spec.partition(" ")
    module, _, name = place.partition(":")
    path = ROOT / "hf_jetflow" / f"{module}.py"
    tree, behind, alone = parse(path)
    node: Any = tree
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    fields = {}
    for child in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(child, ast.AnnAssign) and not child.target.id.startswith("_"):
            fields[child.target.id] = read_field(child, behind, alone)
    return Entry(shown or name, path, node, fields)


def read_field(node: ast.AnnAssign, behind: dict[int, str], alone: dict[int, str]) -> Field:
    """A class's field; what is said of it is its metadata's `help`, or the comment behind it or above it."""
    default, words = node.value, [behind.get(node.end_lineno, "")]
    line = node.lineno - 1
    while not words[0] and line in alone:
        words.insert(1, alone[line])
        line -= 1
    if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "field":
        given = {keyword.arg: keyword.value for keyword in node.value.keywords}
        default = given.get("default", given.get("default_factory"))
        if "metadata" in given:
            words = [ast.literal_eval(given["metadata"])["help"]]
    text = None if default is None else ast.unparse(default)
    return Field(ast.unparse(node.annotation), {"list": "[]", "dict": "{}"}.get(text, text), " ".join(words).strip())


# --- Markdown --------------------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def python_page(title: str, introduction: str, entries: list[Entry], links: dict[str, str]) -> str:
    parts = [f"# {title}", "Written by `make docs` from the docstrings: edit those.", introduction]
    for entry in entries:
        parts += [f"## {entry.name}", signature(entry), *docstring(entry, links)]
        parts.append(f"Source: [`{entry.path.name}`](../../{entry.path.relative_to(ROOT)})")
    return "\n\n".join(part for part in parts if part) + "\n"


def signature(entry: Entry) -> str:
    """The entry's call as a block of code; properties and plain dataclasses have none."""
    node = entry.node
    decorators = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
    if isinstance(node, ast.ClassDef):
        init = next((child for child in node.body if getattr(child, "name", None) == "__init__"), None)
        if init is None:
            bases = ", ".join(map(ast.unparse, node.bases))
            return f"```python\nclass {entry.name}{f'({bases})' if bases else ''}\n```"
        arguments, returns = init.args, ""
    elif "property" in decorators or entry.name.endswith("custom_generate"):
        return f"Property of type `{ast.unparse(node.returns)}`." if node.returns else "Property."
    else:
        arguments, returns = node.args, f" -> {ast.unparse(node.returns)}".replace("'", "") if node.returns else ""
    first = [argument.arg for argument in arguments.args[:1]]
    if first and first[0] in ("self", "cls"):
        arguments = ast.parse(f"def f({ast.unparse(arguments)}): ...").body[0].args
        del arguments.args[0]
    parts = [part for part in split_outside_brackets(ast.unparse(arguments)) if part]
    parts = [re.sub(r"^(\w+: [^=]+)=", r"\1 = ", part) for part in parts]
    line = f"{entry.name}({', '.join(parts)}){returns}"
    if len(line) > WIDTH:
        line = f"{entry.name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"
    return f"```python\n{line}\n```"


def split_outside_brackets(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket or string."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if character in "'\"" and quote in ("", character):
            quote = "" if quote else character
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def docstring(entry: Entry, links: dict[str, str]) -> Iterator[str]:
    """Paragraphs and lists of an entry's docstring, and its fields where the docstring lists none."""
    text = ast.get_docstring(entry.node) or ""
    text = re.sub(r"\[`(~?)([\w.]+)`\](?!\()", lambda match: reference(*match.groups(), links), text)
    sections = re.split(r"^(Args|Returns|Raises):\n", text, flags=re.MULTILINE)
    yield sections[0].strip()
    named = dict(zip(sections[1::2], sections[2::2], strict=True))
    if not named.get("Args") and any(each.words for each in entry.fields.values()):
        yield "\n".join(["**Fields**", "", *(field_line(*item) for item in entry.fields.items())])
    for name, body in named.items():
        inner = re.match(r"(?:(?: .*)?\n)*(?: .*)?", body).group()
        rest = body[len(inner) :].strip()
        if name == "Args":
            lines = [argument_line(item, entry.fields) for item in items(inner)]
            yield "\n".join(["**Arguments**", "", *lines])
        elif name == "Raises":
            lines = ["- `{}`: {}".format(*item.split(": ", 1)) for item in items(inner)]
            yield "\n".join(["**Raises**", "", *lines])
        else:
            yield f"**Returns** {' '.join(inner.split())}"
        if rest:
            yield rest


def reference(short: str, name: str, links: dict[str, str]) -> str:
    """A docstring's [`name`] as a link, where there is an entry for it."""
    last = name.rpartition(".")[2]
    shown = last if short else name
    is_ours = last in links and not name.startswith("transformers.")
    return f"[`{shown}`]({links[last]})" if is_ours else f"`{shown}`"


def items(text: str) -> list[str]:
    """Items of a section, one line each: an item's further lines are indented more."""
    found: list[str] = []
    for line in textwrap.dedent(text).splitlines():
        if line and not line.startswith(" "):
            found.append(line)
        elif line:
            found[-1] += " " + line.strip()
    return found


def argument_line(item: str, fields: dict[str, Field]) -> str:
    left, _, words = item.partition(": ")
    shown = []
    for part in split_outside_brackets(left):
        name, _, kind = part.partition(" ")
        default = fields[name].default if name in fields else None
        facts = [kind.removeprefix("(").removesuffix(")")] * bool(kind)
        facts += [] if default is None else [f"default `{default}`"]
        shown.append(f"**{name}**" + (f" ({', '.join(facts)})" if facts else ""))
    return f"- {', '.join(shown)}: {words}"


def field_line(name: str, item: Field) -> str:
    default = "" if item.default is None else f", default `{item.default}`"
    return f"- **{name}** (`{item.kind}`{default})" + (f": {item.words}" if item.words else "")


# --- the command line ------------------------------------------------------------------------------------------------


def command_page() -> str:
    from hf_jetflow.cli.main import app

    parts = [
        "# Command line",
        "Written by `make docs` from the help of the commands: edit that.",
        "`hf-jetflow COMMAND --help` prints the same on the terminal; `python -m hf_jetflow` is the same command.",
    ]
    for function in (command.callback for command in app.registered_commands):
        parts.append(f"## hf-jetflow {function.__name__}")
        for paragraph in inspect.cleandoc(function.__doc__).split("\n\n"):
            is_code = paragraph.startswith("hf-jetflow ")
            parts.append(f"```bash\n{paragraph}\n```" if is_code else " ".join(paragraph.split()))
        rows = [option_row(parameter) for parameter in inspect.signature(function).parameters.values()]
        parts.append("\n".join(["| Option | Default | Meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def option_row(parameter: inspect.Parameter) -> str:
    """One option of a command, from its annotation: releases of typer differ in what they make of it."""
    kind, info = get_args(parameter.annotation)
    kinds = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and each in VALUES]
    value = info.metavar or VALUES[kinds[0]]
    name = info.param_decls[0] if info.param_decls else f"--{parameter.name.replace('_', '-')}"
    shown = parameter.name.upper() if isinstance(info, ArgumentInfo) else f"{name} {value}".strip()
    if parameter.default is inspect.Parameter.empty:
        default = "required"
    else:
        is_off = parameter.default is None or parameter.default is False or parameter.default in ("", [])
        default = "" if is_off else f"`{parameter.default}`"
    return f"| `{shown}` | {default} | {info.help} |"


def pages() -> dict[Path, str]:
    """All files of the reference."""
    entries = {page: [find(spec) for spec in specs] for page, (_, _, specs) in PYTHON_PAGES.items()}
    links = {
        entry.name.rpartition(".")[2]: f"{page}#{anchor(entry.name)}"
        for page, found in entries.items()
        for entry in found
    }
    written = {
        REFERENCE / page: python_page(title, introduction, entries[page], links)
        for page, (title, introduction, _) in PYTHON_PAGES.items()
    }
    written[REFERENCE / COMMANDS] = command_page()
    lines = ["# Reference", "", "Written by `make docs`.", "", f"- [Command line]({COMMANDS})"]
    for page, (title, _, _) in PYTHON_PAGES.items():
        names = ", ".join(f"[`{entry.name}`]({page}#{anchor(entry.name)})" for entry in entries[page])
        lines.append(f"- [{title}]({page}): {names}")
    written[REFERENCE / "README.md"] = "\n".join(lines) + "\n"
    return written


def main() -> None:
    REFERENCE.mkdir(parents=True, exist_ok=True)
    written = pages()
    for path in sorted(set(REFERENCE.glob("*.md")) - written.keys()):
        path.unlink()
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    print(f"written: {len(written)} pages in {REFERENCE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
