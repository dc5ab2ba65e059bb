"""Cards: valid metadata, the promised first line, the measured tables; the committed ones are those of the code."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_jetflow import JetFlowConfig
from hf_jetflow.bench.log import read_result
from hf_jetflow.head.card import card_text, depth_table, measured_table, template_text


ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "examples" / "heads" / "smollm2-135m-instruct"
ROW = {
    "prompts": "dev_math",
    "method": "jetflow",
    "node_budget": 32,
    "dtype": "bfloat16",
    "temperature": 0.0,
    "num_prompts": 20,
    "tokens_per_round": 3.214,
    "tokens_per_second": 65.61,
    "speedup": 1.876,
    "speedup_spread": [1.5, 2.25],
    "identical_to_plain": 0.95,
    "acceptance_by_depth": [0.91, 0.5],
}
PLAIN = {**ROW, "method": "plain", "node_budget": None, "acceptance_by_depth": []}


def card(license="apache-2.0", **overrides):
    config = JetFlowConfig(target_name="org/target", mask_token_id=3, **overrides)
    facts = dict(name="org/head", num_parameters=12_300_000, training="Some answers.", rows=[PLAIN, ROW])
    return card_text(config, **facts, license=license, datasets=["org/data"], language=["en"])


def test_the_metadata_is_valid_for_the_hub():
    data = ModelCard(card()).data
    assert data.base_model == "org/target"
    assert data.library_name == "transformers"
    assert data.license == "apache-2.0"
    assert data.datasets == ["org/data"]
    assert "draft-head" in data.tags


CARDS = {
    "template": template_text,
    "trained": card,
    "no license": lambda: card(license=None),
    "shipped": lambda: (SHIPPED / "README.md").read_text(encoding="utf-8"),
}


@pytest.mark.parametrize("text", CARDS.values(), ids=CARDS)
def test_the_hub_s_own_classes_read_the_metadata_and_write_it_unchanged(text):
    """What `ModelCard.validate` sends to the Hub, and what its classes refuse before it is sent."""
    block = re.match(r"---\n(.*?)\n---\n", text(), re.DOTALL).group(1)
    fields = yaml.safe_load(block)
    read = ModelCard(text(), ignore_metadata_errors=False)
    assert read.data.to_dict() == fields
    assert ModelCardData(**fields).to_yaml() == block
    assert set(fields) <= {"base_model", "datasets", "language", "library_name", "license", "pipeline_tag", "tags"}
    assert str(read) == text()


@pytest.mark.parametrize("text", CARDS.values(), ids=CARDS)
def test_the_first_line_says_what_the_head_is_for(text):
    lines = [line for line in ModelCard(text()).text.splitlines() if line and not line.startswith("> ")]
    target = ModelCard(text()).data.base_model
    assert lines[0] == f"# Draft head for {target}"
    assert lines[1].startswith(f"This is a draft head for {target}, not a model on its own")


def test_the_template_says_that_it_is_one_and_for_whom_and_a_card_does_not():
    text = ModelCard(template_text()).text.strip()
    assert text.startswith("> This is a template, for those who publish a head")
    assert "a template" not in card()


def test_a_card_has_its_parts():
    headings = [line[3:] for line in card().splitlines() if line.startswith("## ")]
    assert headings == ["The head", "Measured", "Training", "License", "Limits"]
    assert "`apache-2.0` for this head." in card()
    assert "None was stated for this head." in card(license=None)


@pytest.mark.parametrize("name", ["/models/x.gguf", "runs/my head/x", "x.gguf"])
def test_a_target_that_is_no_hub_id_is_left_out_of_the_metadata(name):
    text = card_text(JetFlowConfig(target_name=name), name="head", num_parameters=1, training="")
    assert ModelCard(text).data.base_model is None


def test_the_table_quotes_the_measured_rows_and_their_setting():
    table = measured_table([ROW], {"dev_math": 0.5, "dev_chat": None}, "2 cores")
    assert "| dev_math | 0 | jetflow | 32 | 3.21 | 65.6 | 1.88 (1.50 - 2.25) | 95 % |" in table
    assert table.count("batch of 4") == 1
    assert "| dev_math | 0 | plain, batch of 4 | - | 1.00 | - | - | 50 % |" in table
    assert table.endswith("bfloat16, 20 prompts each, batch 1, medians of interleaved runs, 2 cores.")


def test_what_rounding_changes_stands_behind_the_measured_tables():
    facts = dict(name="org/head", num_parameters=1, training="Some answers.", rows=[ROW], rounding="3 of 8 texts.")
    text = card_text(JetFlowConfig(), **facts)
    assert depth_table([ROW], 7) + "\n\n3 of 8 texts.\n\n## Training" in text


def test_plain_rows_are_left_out_of_the_tables():
    assert "| plain |" not in measured_table([PLAIN]) + depth_table([PLAIN, ROW], 7)


def test_the_table_by_depth_has_a_column_for_every_depth_in_reach():
    table = depth_table([ROW, {**ROW, "node_budget": 64, "acceptance_by_depth": [0.95, 0.6, 0.25]}], 7)
    assert "| node budget | 1 | 2 | 3 |\n|---|---|---|---|---|---|---|" in table
    assert "| dev_math | 0 | jetflow | 32 | 0.91 | 0.50 | - |" in table
    assert table.endswith("| dev_math | 0 | jetflow | 64 | 0.95 | 0.60 | 0.25 |")
    assert depth_table([ROW], 7) in card()


def test_the_table_by_depth_ends_with_the_depths_of_the_head():
    """N-grams may go on below, on few branches."""
    table = depth_table([{**ROW, "acceptance_by_depth": [0.9, 0.5, 0.2, 0.1]}], 3)
    assert "| node budget | 1 | 2 | 3 |\n" in table
    assert table.endswith("| dev_math | 0 | jetflow | 32 | 0.90 | 0.50 | 0.20 |")


def test_the_committed_cards_are_those_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.delitem(sys.modules, "write_card", raising=False)
    import write_card

    stale = "run `make docs`"
    assert (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8") == template_text(), stale
    shipped = write_card.card_of(SHIPPED, **write_card.SHIPPED)
    assert (SHIPPED / "README.md").read_text(encoding="utf-8") == shipped, stale


def test_a_card_is_written_for_a_head_of_one_s_own(tmp_path, monkeypatch, tiny_target, random_head):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import write_card

    random_head(tiny_target("llama"), target_name="org/target").save_pretrained(tmp_path / "head")
    (tmp_path / "training.md").write_text("Three answers.\n")
    options = ["--head", tmp_path / "head", "--training", tmp_path / "training.md", "--license", "mit"]
    monkeypatch.setattr(sys, "argv", ["write_card.py", *map(str, options)])
    with pytest.raises(SystemExit):
        write_card.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--results", str(write_card.SHIPPED["results"]), "--name", "me/head"])
    write_card.main()
    written = ModelCard.load(tmp_path / "head" / "README.md")
    assert (written.data.license, written.data.base_model, written.data.datasets) == ("mit", "org/target", None)
    assert "Three answers." in written.text
    assert '    "me/head",\n' in written.text
    facts = read_result(write_card.SHIPPED["results"])["environment"]
    assert f"AMD EPYC with 2 threads, torch 2.13.0+cpu, transformers {facts['transformers']}." in written.text
