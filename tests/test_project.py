"""What others meet first: workflows, templates and files about the project agree with pyproject.toml."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_the_commands_of_the_makefile_with_no_rights_to_write(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps(workflow) if "uses" in step)
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    targets = [command.split()[1] for command in commands if command.startswith("make ")]
    assert [target for target in targets if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)] == []
    assert len(targets) >= len(workflow["jobs"]), "every job runs a target"


def test_the_tests_run_on_every_python_that_is_promised_and_at_both_ends_of_transformers():
    matrix = read(".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    lowest = re.search(r'"transformers>=([\d.]+),', PYPROJECT)[1]
    assert matrix["python"] == classifiers
    assert f'requires-python = ">={classifiers[0]}"' in PYPROJECT
    assert {row["transformers"] for row in matrix["include"]} == {f"transformers=={lowest}"}
    assert {row["python"] for row in matrix["include"]} == {classifiers[0], classifiers[-1]}


def test_the_torch_of_the_workflows_is_that_of_the_makefile():
    pinned = re.search(r",torch,(torch==[\d.]+)\)", MAKEFILE)[1]
    assert {read(path)["env"]["TORCH"].split()[0] for path in WORKFLOWS} == {pinned}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["venv", "vllm-check", "serve-load", "parity", "targets-test"])
def test_another_torch_reaches_pip_as_several_words(target):
    torch = "torch==2.13.0 --index-url https://example.org/cpu"
    fresh = [f"{name}=.none-{name}" for name in ("VENV", "VLLM_VENV", "PARITY_VENV", "TARGETS_VENV")]
    command = ["make", "--dry-run", target, f"TORCH={torch}", *fresh]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installs = [line for line in printed.splitlines() if re.search(r"pip install .*torch==", line)]
    assert [line.endswith(f" {torch}") for line in installs] == [True]


def test_pre_commit_has_the_ruff_of_the_tests():
    (ruff,) = [repo for repo in read(".pre-commit-config.yaml")["repos"] if repo["repo"].endswith("ruff-pre-commit")]
    assert f'"ruff=={ruff["rev"].removeprefix("v")}"' in PYPROJECT


@pytest.mark.parametrize("name", ["ISSUE_TEMPLATE/bug.yml", "ISSUE_TEMPLATE/feature.yml", "PULL_REQUEST_TEMPLATE.md"])
def test_templates_ask_for_what_the_doctor_says(name):
    text = (ROOT / ".github" / name).read_text(encoding="utf-8")
    (command,) = re.findall(r"`(hf-jetflow [^`]*)`", text)
    assert command == "hf-jetflow doctor --target TARGET --head HEAD --json doctor.json"
    if name.endswith(".yml"):
        assert {"name", "description", "body"} <= yaml.safe_load(text).keys()


def test_the_readme_and_the_citation_file_name_the_same_paper():
    paper = read("CITATION.cff")["preferred-citation"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    authors = " ".join(re.search(r"author +=(.*?)},", readme, re.DOTALL)[1].strip().strip("{").split())
    assert authors.split(" and ") == [f"{each['family-names']}, {each['given-names']}" for each in paper["authors"]]
    assert paper["title"] in readme
    assert f'Repository = "{read("CITATION.cff")["repository-code"]}"' in PYPROJECT
