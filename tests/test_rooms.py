"""The order of the rooms, the size limits and the habits of CONTRIBUTING.md, read off the source of the package.

Nothing here imports `hf_jetflow` into the test process: the files are parsed, and one check starts an interpreter.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_jetflow"

# The table of CONTRIBUTING.md. A file imports from its own room or from one further up.
ROOMS = {
    "words": ("versions", "configuration_jetflow", "stats"),
    "pure": (
        "tree",
        "ngrams",
        "walk",
        "losses",
        "fetching",
        "layouts",
        "formats",
        "exports",
        "model_card",
        "hardware",
        "linear",
    ),
    "models": (
        "modeling_jetflow",
        "attention",
        "layer_kinds",
        "recurrent",
        "target",
        "growing_cache",
        "caches",
        "batch_caches",
        "reuse",
        "draft_weights",
        "branch_scores",
        "drafting",
    ),
    "loop": ("emit", "batch", "policy", "trace", "decoding"),
    "door": ("integration",),
    "workshop": (
        "data",
        "answers",
        "loading",
        "blocks",
        "teacher",
        "cost",
        "replay",
        "roofline",
        "simulate",
        "simulation_report",
        "starting",
        "checkpoints",
        "evaluation",
        "training",
        "recipe",
        "convert",
        "bench_prompts",
        "bench_runs",
        "rivals",
        "forward_times",
        "bench_rows",
        "bench_log",
        "bench",
        "bench_report",
        "plots",
        "token_text",
        "tree_layout",
        "tree_plot",
        "tree_page",
        "show",
        "doctor_mistakes",
        "doctor_verdict",
        "doctor",
        "doctor_report",
        "cli",
    ),
}
ROOM_OF = {module: room for room, modules in ROOMS.items() for module in modules}
ORDER = list(ROOMS)
EXEMPT = ("__init__", "__main__")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_LOOP_LINES = 60
HEAVY = ("accelerate", "datasets", "matplotlib", "rich", "typer")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_files() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / PACKAGE).glob("*.py"))}


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each sibling imported anywhere in a file; a public name taken from the package counts as its
    `__init__`, apart from `__version__`, which is there before any import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for parts in (alias.name.split(".") for alias in node.names):
                if parts[0] == PACKAGE:
                    yield node.lineno, parts[1] if len(parts) > 1 else "__init__"
        elif isinstance(node, ast.ImportFrom):
            parts = ([PACKAGE] if node.level else []) + (node.module.split(".") if node.module else [])
            if parts[0] != PACKAGE:
                continue
            if len(parts) > 1:
                yield node.lineno, parts[1]
                continue
            for alias in node.names:
                if alias.name != "__version__":
                    yield node.lineno, alias.name if alias.name in ROOM_OF else "__init__"


def room_violations(module: str, source: str) -> list[str]:
    if module in EXEMPT:
        return []
    if module not in ROOM_OF:
        return [f"{module}.py has no room: add it to ROOMS in tests/test_rooms.py and to the table of CONTRIBUTING.md"]
    violations = []
    for line, imported in imported_modules(ast.parse(source)):
        room = "door" if imported in EXEMPT else ROOM_OF.get(imported)
        if room is None:
            violations.append(f"{module}.py:{line} imports {imported}, which has no room")
        elif ORDER.index(room) > ORDER.index(ROOM_OF[module]):
            violations.append(f"{module}.py:{line} ({ROOM_OF[module]}) imports {imported} from a later room ({room})")
    return violations


def functions(tree: ast.AST) -> Iterator[tuple[Function, int]]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node, node.end_lineno - node.lineno + 1


def heavy_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Imports of `HEAVY` that run when the file is imported: not those inside functions or for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [] if node.level else [node.module]
        elif isinstance(node, Function) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            names = []
        else:
            yield from heavy_imports(node)
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in HEAVY)


def habit_violations(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = [ast.unparse(each) if each else "everything" for each in caught]
            for name in names:
                if name.split(".")[-1] in ("everything", "Exception", "BaseException"):
                    yield node.lineno, f"catches {name}: name the exceptions that can be raised here"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.environb", "os.getenv"):
            yield node.lineno, "reads an environment variable: make it a config field"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = [alias.name for alias in node.names if alias.name in ("environ", "environb", "getenv")]
            yield from ((node.lineno, f"imports os.{name}: make it a config field") for name in names)


def report(violations: list[str]) -> str:
    return "\n".join(["", *violations])


def test_a_file_imports_only_its_own_room_or_an_earlier_one():
    violations = [text for module, source in source_files().items() for text in room_violations(module, source)]
    assert not violations, report(violations)


def test_no_file_is_longer_than_500_lines():
    lengths = {module: len(source.splitlines()) for module, source in source_files().items()}
    violations = [f"{module}.py has {length} lines" for module, length in lengths.items() if length > MAX_FILE_LINES]
    assert not violations, report(violations)


def test_no_function_is_longer_than_80_lines():
    violations = [
        f"{module}.py:{function.lineno} {function.name} has {length} lines"
        for module, source in source_files().items()
        for function, length in functions(ast.parse(source))
        if length > MAX_FUNCTION_LINES
    ]
    assert not violations, report(violations)


def test_the_decoding_loop_is_no_longer_than_60_lines():
    tree = ast.parse(source_files().get("decoding", ""))
    violations = [
        f"decoding.py:{function.lineno} {function.name} has {length} lines"
        for function, length in functions(tree)
        if function in tree.body and not function.name.startswith("_") and length > MAX_LOOP_LINES
    ]
    assert not violations, report(violations)


def test_only_workshop_files_import_heavy_packages_when_they_are_imported():
    violations = [
        f"{module}.py:{line} imports {name} at the top level"
        for module, source in source_files().items()
        if ROOM_OF.get(module) != "workshop"
        for line, name in heavy_imports(ast.parse(source))
    ]
    assert not violations, report(violations)


def test_importing_the_package_loads_no_package_of_the_workshop():
    # What transformers loads by itself is not ours to answer for: accelerate, and in some releases rich.
    code = (
        "import sys; from transformers import PreTrainedModel; before = set(sys.modules); "
        f"import {PACKAGE}; print(*((set(sys.modules) - before) & set({HEAVY})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"`import {PACKAGE}` loads {done.stdout.strip()}"


def test_no_file_reads_the_environment_or_catches_everything():
    violations = [
        f"{module}.py:{line} {text}"
        for module, source in source_files().items()
        for line, text in habit_violations(ast.parse(source))
    ]
    assert not violations, report(violations)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("tree", "from .decoding import decode", "later room (loop)"),
        ("tree", "def f():\n    from hf_jetflow.cli import main", "later room (workshop)"),
        ("stats", "from . import tree", "later room (pure)"),
        ("target", "from hf_jetflow import JetFlowHead", "later room (door)"),
        ("tree", "import hf_jetflow.target as target", "later room (models)"),
        ("tree", "from .helpers import f", "helpers, which has no room"),
        ("helpers", "", "has no room: add it to ROOMS"),
    ],
)
def test_the_room_check_sees_every_form_of_a_wrong_import(module, source, message):
    (violation,) = room_violations(module, source)
    assert message in violation


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from .tree import DraftTree",
        "from .configuration_jetflow import X",
        "from . import __version__",
    ],
)
def test_the_room_check_accepts_other_packages_and_earlier_rooms(source):
    assert room_violations("walk", source) == []


@pytest.mark.parametrize(
    "source",
    [
        "try: f()\nexcept: pass",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept (ValueError, BaseException): pass",
        "import os\nx = os.environ['X']",
        "import os\nx = os.getenv('X')",
        "from os import environ",
    ],
)
def test_the_habit_check_sees_every_form_of_a_bad_habit(source):
    assert len(list(habit_violations(ast.parse(source)))) == 1


def test_the_heavy_import_check_looks_only_at_what_runs_on_import():
    lazy = "def f():\n    import rich\nif TYPE_CHECKING:\n    import typer\nfrom .rich import x"
    eager = "try:\n    import rich.table\nexcept ImportError:\n    pass\nclass A:\n    from typer import Typer"
    assert list(heavy_imports(ast.parse(lazy))) == []
    assert [name for _, name in heavy_imports(ast.parse(eager))] == ["rich.table", "typer"]
