"""Run the notebooks of examples/notebooks, each in a kernel of its own, and write them back with their outputs.

make notebooks
python examples/run_notebooks.py 01 02 --set MAX_NEW_TOKENS=32
"""

import argparse
import ast
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


NOTEBOOKS = Path(__file__).parent / "notebooks"


def run_notebook(path: Path, parameters: dict[str, Any], folder: Path) -> nbformat.NotebookNode:
    """
    The notebook with the outputs of a run in `folder`; an error in a cell is raised.

    `parameters` replace the values of the cell tagged so; the cell itself does not change.
    """
    notebook = nbformat.read(path, as_version=4)
    index = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    known = {name.id for name in ast.walk(ast.parse(notebook.cells[index].source)) if isinstance(name, ast.Name)}
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise ValueError(f"{path.name} has no parameters {unknown}, but {sorted(known)}")
    given = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
    notebook.cells.insert(index + 1, given)
    settings = dict(timeout=3600, startup_timeout=600, record_timing=False, coalesce_streams=True)
    client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **settings)
    client.execute(env=environment())
    del notebook.cells[index + 1]
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    notebook.metadata.pop("widgets", None)
    return notebook


def environment() -> dict[str, str]:
    """That of the kernels: the commands of this environment are found, and outputs are free of progress bars."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of their names; all if none is given")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter, in Python")
    parser.add_argument(
        "--no-times", action="store_true", help="leave empty what cells tagged `timing` print: the machine is busy"
    )
    args = parser.parse_args()

    parameters = {name: ast.literal_eval(value) for name, _, value in (text.partition("=") for text in args.set)}
    chosen = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.name.startswith(tuple(args.names or [""]))]
    if not chosen:
        raise SystemExit(f"error: no notebook in {NOTEBOOKS} begins with {' or '.join(args.names)}")
    for path in chosen:
        print(f"{path.name} ...", end=" ", flush=True)
        start = time.perf_counter()
        notebook = run_notebook(path, parameters, NOTEBOOKS)
        if args.no_times:
            for cell in notebook.cells:
                if "timing" in cell.metadata.get("tags", []):
                    cell.outputs, cell.execution_count = [], None
        partial = path.with_name(f"{path.name}.tmp")
        nbformat.write(notebook, partial)
        os.replace(partial, path)
        print(f"{time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
