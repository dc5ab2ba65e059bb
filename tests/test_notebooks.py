"""The notebooks, run from end to end with few tokens and steps, and what is committed of them."""

import importlib.util
import re

import nbformat
import pytest
from conftest import EXAMPLES
from helpers import save_pair
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook


NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", EXAMPLES / "run_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair(target, random_head, tmp_path_factory):
    """Parameters that name a tiny target and a head for it, saved in folders."""
    _, target_folder, _, head_folder = save_pair(tmp_path_factory.mktemp("pair"), target, random_head(target))
    return dict(TARGET=str(target_folder), HEAD=str(head_folder))


def text_of(notebook):
    """All that was printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def num_pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_quick_start(runner, pair, tmp_path):
    parameters = dict(**pair, MAX_NEW_TOKENS=10)
    notebook = runner.run_notebook(NOTEBOOKS[0], parameters, tmp_path)
    assert text_of(notebook).count("same text: True") == 2
    assert "tokens per round" in text_of(notebook)
    assert num_pictures(notebook) == 2


def test_look_inside(runner, pair, tmp_path):
    parameters = dict(**pair, MAX_NEW_TOKENS=12, ROUNDS=[1, 2], BUDGETS=[2, 8])
    notebook = runner.run_notebook(NOTEBOOKS[1], parameters, tmp_path)
    rates = re.findall(r"nodes  ([\d.]+) tokens per round", text_of(notebook))
    assert len(rates) == 2
    assert min(map(float, rates)) >= 1
    assert num_pictures(notebook) == 4
    assert (tmp_path / "trees.html").exists()


@pytest.mark.slow
def test_train_your_own_head(runner, pair, tmp_path):
    options = "--anchors 2 --eval-num-prompts 1 --max-length 96"
    parameters = dict(TARGET=pair["TARGET"], NUM_PROMPTS=6, MAX_NEW_TOKENS=16, STEPS=2, OPTIONS=options, RUN="run")
    parameters |= dict(DRAFT_VOCAB=12)
    notebook = runner.run_notebook(NOTEBOOKS[2], parameters, tmp_path)
    assert "same text: True" in text_of(notebook)
    assert "drafts 5 tokens deep" in text_of(notebook)
    assert (tmp_path / "run-published" / "model.safetensors").exists()


@pytest.mark.slow
def test_bring_a_public_head(runner, pair, tmp_path):
    parameters = dict(TARGET=pair["TARGET"], SHIPPED_HEAD=pair["HEAD"], NUM_PROMPTS=3, MAX_NEW_TOKENS=10)
    notebook = runner.run_notebook(NOTEBOOKS[3], parameters, tmp_path)
    text = text_of(notebook)
    assert "same text: True" in text
    assert len(re.findall(r"No fault found|FAULT", text)) == 2, (
        "few tokens tell little from chance; the doctor ran twice"
    )
    assert "prompts, greedy: " in text, "the sentence that closes a bench"
    assert num_pictures(notebook) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_small_and_name_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    badge = f"colab.research.google.com/github/hf-jetflow/hf_jetflow/blob/main/examples/notebooks/{path.name})"
    assert badge in notebook.cells[0].source
    parameters, install = [cell.source for cell in notebook.cells if cell.cell_type == "code"][:2]
    assert "%pip install" in install
    assert ".." not in parameters, "a notebook runs without the folders around it"
    tables = [line for line in text_of(notebook).splitlines() if "│" in line]
    assert [line for line in tables if len(line) > 80 or "…" in line] == [], "tables are read at 80 columns"
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) == 1
    assert not re.search(r"/(root|home|Users|tmp|work)/", text_of(notebook))
    assert any(cell.get("outputs") for cell in notebook.cells), "run `make notebooks`"


def write_notebook(path, *sources):
    cells = [new_code_cell(sources[0], metadata={"tags": ["parameters"]}), *map(new_code_cell, sources[1:])]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_a_parameter_replaces_the_notebook_s_own_value_only_in_the_run(runner, tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "SIZE = 3", "print(SIZE + 1)")
    notebook = runner.run_notebook(path, {"SIZE": 9}, tmp_path)
    assert [cell.source for cell in notebook.cells] == ["SIZE = 3", "print(SIZE + 1)"]
    assert text_of(notebook) == "10\n"
    assert [cell.execution_count for cell in notebook.cells] == [1, 2]
    with pytest.raises(ValueError, match=r"no parameters \['SIZ'\], but \['SIZE'\]"):
        runner.run_notebook(path, {"SIZ": 9}, tmp_path)


def test_an_error_in_a_cell_ends_the_run(runner, tmp_path):
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        runner.run_notebook(write_notebook(tmp_path / "a.ipynb", "SIZE = 0", "1 / SIZE"), {}, tmp_path)
