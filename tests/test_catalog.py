"""The list of published heads: what the command and the page say about each, and that it matches the reader."""

import json
import re

import pytest
from helpers import run_command
from test_docs import ROOT, load

from hf_jetflow import JetFlowHead
from hf_jetflow.head import catalog
from hf_jetflow.head.catalog import PublishedHead, published_heads
from hf_jetflow.head.formats import LAYOUTS, REFUSED


def head_of(layout, **fields):
    return PublishedHead("target", "org/head", layout, **fields)


def test_every_line_has_an_id_of_the_hub_or_a_folder_here_and_a_layout_by_its_name_here():
    heads = published_heads()
    assert len({head.target for head in heads}) > 40
    assert len({head.head for head in heads}) == len(heads)
    known = {each.name for each in (*LAYOUTS, *REFUSED)}
    for head in heads:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", head.head) or (ROOT / head.head / "config.json").exists(), head
        assert head.layout in known, head


def test_whether_a_head_loads_follows_from_the_layouts_that_are_read():
    for layout in LAYOUTS:
        assert head_of(layout.name).refusal is None
    for refused in REFUSED:
        assert head_of(refused.name).refusal == refused.reason
    assert head_of("DFlash", obstacle="its weights are a .bin file").refusal == "its weights are a .bin file"


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen/Qwen3-8B", "someone/qwen3-8b"])
def test_a_target_is_found_by_name_or_hub_id_and_heads_that_load_come_first(name):
    heads = published_heads(name)
    assert {head.target for head in heads} == {"Qwen3-8B"}
    loads = [head.refusal is None for head in heads]
    assert loads == sorted(loads, reverse=True)
    assert heads[0].head == "JetSpec/jetspec-qwen3-8b"


def test_the_command_prints_one_target_or_all_of_them():
    of_one, of_all = run_command("heads", "Qwen/Qwen3-8B"), run_command("heads")
    assert (of_one.exit_code, of_all.exit_code) == (0, 0)
    assert of_one.output.startswith(
        "Qwen3-8B\n  JetSpec/jetspec-qwen3-8b\n    loads\n    layout JetSpec; license not stated"
    )
    assert "\nGLM-5.3-Flash\n" in of_all.output
    assert "license CC BY-NC-ND 4.0" in of_all.output
    assert re.search(r"Ids and layouts were read in 20\d\d-\d\d, not on the Hub: READMEs", of_one.output)
    assert "does not load: its weights are a .bin file" in of_all.output


def test_the_shipped_head_is_listed_first_and_loads_from_where_the_list_says():
    head, *others = published_heads("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert not others
    assert published_heads()[0] == head
    assert head.refusal is None
    assert JetFlowHead.from_pretrained(ROOT / head.head).config.target_name.endswith(head.target)
    project = (ROOT / "examples" / "heads" / "pyproject.toml").read_text(encoding="utf-8")
    assert "`hf_jetflow_smollm2`" in head.note
    assert 'packages = ["hf_jetflow_smollm2"]' in project


def test_an_unlisted_target_is_an_error_that_names_close_ones():
    finished = run_command("heads", "Qwen/Qwen3-8")
    assert finished.exit_code == 1
    assert "error: no head is listed for 'Qwen/Qwen3-8'; did you mean Qwen3-8B" in finished.output
    assert "train a head" in run_command("heads", "zzz").output


def test_the_page_is_the_one_that_make_docs_writes():
    tool = load("tools/heads_page.py")
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run `make docs`"
    assert tool.PAGE.parent == ROOT / "docs"


def test_the_file_has_one_line_per_head():
    lines = [line for line in catalog.FILE.read_text(encoding="utf-8").splitlines() if line.startswith("  {")]
    assert len(lines) == len(json.loads(catalog.FILE.read_text(encoding="utf-8"))["heads"])
