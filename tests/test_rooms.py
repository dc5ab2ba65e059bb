"""The order of the folders, the size limits and the habits of CONTRIBUTING.md, read off the source of the package.

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

# A folder imports from itself, from those of an earlier line, and from the top-level modules named there.
ORDER = (
    {"_compat", "_version", "buffers", "errors", "laid_out", "stats", "transfer"},
    {"extras", "files", "jsonl", "prompts"},
    {"head"},
    {"trees"},
    {"target"},
    {"decoding"},
    {"integration"},
    {"training", "convert"},
    {"bench", "doctor", "simulate", "show"},
    {"cli"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
SHIMS = {"modeling_jetflow", "configuration_jetflow"}  # names that transformers users expect at the top
EXEMPT = {"__init__", "__main__"} | SHIMS

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_LOOP_LINES = 60
HEAVY = ("accelerate", "datasets", "matplotlib", "rich")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_files() -> dict[str, str]:
    """Sources by path below the package, such as `trees/walk.py`."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {path.relative_to(ROOT / PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def room_of(path: str) -> str:
    """The folder of a file, or its own name at the top."""
    return path.split("/")[0].removesuffix(".py")


def imported_rooms(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and room of every import from the package; a public name taken from the package counts as `__init__`."""
    folders = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for parts in (alias.name.split(".") for alias in node.names):
                if parts[0] == PACKAGE:
                    yield node.lineno, parts[1] if len(parts) > 1 else "__init__"
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level:
                parts = [PACKAGE, *folders[: len(folders) + 1 - node.level], *parts]
            if parts[:1] != [PACKAGE]:
                continue
            if len(parts) > 1:
                yield node.lineno, parts[1]
                continue
            for alias in node.names:
                if alias.name != "__version__":  # it is there before any import
                    yield node.lineno, alias.name if alias.name in LEVEL_OF else "__init__"


def room_violations(path: str, source: str) -> list[str]:
    room = room_of(path)
    if room in EXEMPT:
        return []
    if room not in LEVEL_OF:
        return [f"{path} has no room: add its folder to ORDER in tests/test_rooms.py"]
    violations = []
    for line, imported in imported_rooms(path, ast.parse(source)):
        level = LEVEL_OF["integration"] if imported in EXEMPT else LEVEL_OF.get(imported)
        if level is None:
            violations.append(f"{path}:{line} imports {imported}, which has no room")
        elif level > LEVEL_OF[room] or (level == LEVEL_OF[room] == 0 and imported != room):
            violations.append(f"{path}:{line} imports from a later room ({imported})")
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
    violations = [text for path, source in source_files().items() for text in room_violations(path, source)]
    assert not violations, report(violations)


def test_every_folder_says_what_lives_there():
    for path, source in source_files().items():
        if path.endswith("/__init__.py"):
            docstring = ast.get_docstring(ast.parse(source)) or ""
            assert "Start with" in docstring, f"{path} does not say where to start reading"


def test_no_file_is_longer_than_400_lines():
    lengths = {path: len(source.splitlines()) for path, source in source_files().items()}
    violations = [f"{path} has {length} lines" for path, length in lengths.items() if length > MAX_FILE_LINES]
    assert not violations, report(violations)


def test_no_function_is_longer_than_80_lines():
    violations = [
        f"{path}:{function.lineno} {function.name} has {length} lines"
        for path, source in source_files().items()
        for function, length in functions(ast.parse(source))
        if length > MAX_FUNCTION_LINES
    ]
    assert not violations, report(violations)


def test_the_decoding_loop_is_no_longer_than_60_lines():
    tree = ast.parse(source_files()["decoding/loop.py"])
    violations = [
        f"decoding/loop.py:{function.lineno} {function.name} has {length} lines"
        for function, length in functions(tree)
        if length > MAX_LOOP_LINES
    ]
    assert not violations, report(violations)


def test_only_the_upper_rooms_import_heavy_packages_when_they_are_imported():
    violations = [
        f"{path}:{line} imports {name} at the top level"
        for path, source in source_files().items()
        if LEVEL_OF.get(room_of(path), 0) <= LEVEL_OF["integration"]
        for line, name in heavy_imports(ast.parse(source))
    ]
    assert not violations, report(violations)


def test_importing_the_package_loads_no_package_of_the_upper_rooms():
    # What transformers loads on its own is not ours to answer for: accelerate, and in some releases rich.
    code = (
        "import sys; from transformers import PreTrainedModel; before = set(sys.modules); "
        f"import {PACKAGE}; print(*((set(sys.modules) - before) & set({HEAVY})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"`import {PACKAGE}` loads {done.stdout.strip()}"


def test_no_file_reads_the_environment_or_catches_everything():
    violations = [
        f"{path}:{line} {text}"
        for path, source in source_files().items()
        for line, text in habit_violations(ast.parse(source))
    ]
    assert not violations, report(violations)


def test_the_command_line_prints_what_a_target_refuses_in_one_line():
    sources = {path: source for path, source in source_files().items() if path.startswith("target/")}
    raising = [path for path, source in sources.items() if "raise ValueError" in source]
    assert not raising, "use `JetFlowError`: the command line prints others with their traceback"


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("trees/tree.py", "from ..decoding.loop import decode", "later room (decoding)"),
        ("trees/tree.py", "def f():\n    from hf_jetflow.cli.main import main", "later room (cli)"),
        ("stats.py", "from . import trees", "later room (trees)"),
        ("stats.py", "from . import errors", "later room (errors)"),
        ("target/target.py", "from hf_jetflow import JetFlowHead", "later room (__init__)"),
        ("trees/tree.py", "import hf_jetflow.target.target as target", "later room (target)"),
        ("trees/tree.py", "from ..helpers import f", "helpers, which has no room"),
        ("helpers/f.py", "", "has no room: add its folder to ORDER"),
    ],
)
def test_the_room_check_sees_every_form_of_a_wrong_import(path, source, message):
    (violation,) = room_violations(path, source)
    assert message in violation


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from .tree import DraftTree",
        "from ..head.configuration_jetflow import X",
        "from ..stats import GenerationStats",
        "from .. import __version__",
    ],
)
def test_the_room_check_accepts_other_packages_and_earlier_rooms(source):
    assert room_violations("trees/walk.py", source) == []


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
    lazy = "def f():\n    import rich\nif TYPE_CHECKING:\n    import matplotlib\nfrom .rich import x"
    eager = "try:\n    import rich.table\nexcept ImportError:\n    pass\nclass A:\n    from matplotlib import figure"
    assert list(heavy_imports(ast.parse(lazy))) == []
    assert [name for _, name in heavy_imports(ast.parse(eager))] == ["rich.table", "matplotlib"]
