"""The atomic write and the guard for optional packages."""

import sys
from pathlib import Path

import pytest

from hf_jetflow.errors import JetFlowError
from hf_jetflow.extras import EXTRAS, require_package
from hf_jetflow.files import atomic_write


class Killed(BaseException):
    pass


def write_half_a_file(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as partial:
        partial.write_text("tw")
        raise error


def write_folder_twice(path: Path) -> None:
    with atomic_write(path) as partial:
        partial.mkdir()
        partial.mkdir()


def test_a_write_replaces_the_file_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    with atomic_write(path) as partial:
        partial.write_text("one")
        assert not path.exists()
        assert partial.suffix == ".json"
    with atomic_write(path) as partial:
        partial.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert [each.name for each in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [OSError, Killed])
def test_a_write_that_fails_leaves_the_file_that_was_there_and_nothing_else(tmp_path, error):
    (tmp_path / "a.json").write_text("one")
    with pytest.raises(error):
        write_half_a_file(tmp_path / "a.json", error)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "one"}


def test_a_folder_is_written_as_a_whole(tmp_path):
    with atomic_write(tmp_path / "head") as partial:
        partial.mkdir()
        (partial / "config.json").write_text("{}")
    assert (tmp_path / "head" / "config.json").exists()
    with pytest.raises(FileExistsError):
        write_folder_twice(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch):
    require_package("torch", "heads")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(JetFlowError, match=r"GGUF files need gguf, .* `pip install 'hf-jetflow\[train\]'` or `pip"):
        require_package("gguf", "GGUF files")


def test_the_extras_are_those_of_the_package():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for package, extra in EXTRAS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{extra} = [")]
        assert f'"{package}' in line
