"""Loading targets: errors that name the source and the remedy."""

import sys

import pytest

from hf_jetflow.errors import JetFlowError
from hf_jetflow.target import loading
from hf_jetflow.target.loading import load_model, load_target, load_target_config
from hf_jetflow.target.settings import PairSettings


def test_a_head_that_is_refused_is_refused_before_the_target_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(loading, "load_target", lambda *_: 1 / 0)
    with pytest.raises(JetFlowError, match=r"config.json is not valid JSON .*; download or save the head again"):
        loading.load_pair(PairSettings("nowhere", str(tmp_path), "float32"))


def test_an_empty_gguf_file_is_called_so(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(JetFlowError, match=r"a.gguf` is empty or no GGUF file; download it again"):
        load_target_config(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("load", [load_target_config, lambda source: load_model(source, "auto")])
def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path, load):
    with pytest.raises(JetFlowError, match=r"cannot load `.*`: .*; give a Hub id, a folder or a \.gguf file") as error:
        load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_without_a_connection_the_page_for_it_is_named(monkeypatch):
    def refuse(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nMore lines.")

    monkeypatch.setattr("hf_jetflow.target.loading.AutoConfig.from_pretrained", refuse)
    with pytest.raises(JetFlowError, match=r"load the files; check the connection, or give .*Without the Hub\)$"):
        load_target_config("org/model")


@pytest.mark.parametrize("source", ["missing.gguf", "/no/such/folder"])
def test_a_path_that_does_not_exist_is_named(source):
    with pytest.raises(JetFlowError, match=f"`{source}` does not exist; give the path of a"):
        load_target_config(source)


def test_a_gguf_file_without_the_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(JetFlowError, match=r"GGUF files need gguf, .* `pip install 'hf-jetflow\[train\]'`"):
        load_target_config(str(tmp_path / "a.gguf"))


def test_an_unknown_dtype_is_refused_before_anything_is_loaded():
    with pytest.raises(JetFlowError, match="the dtype is 'int4', expected auto or one of"):
        load_target("nowhere", "int4")
