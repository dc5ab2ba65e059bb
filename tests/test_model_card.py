"""Cards: valid metadata, the promised first line, the measured table."""

from huggingface_hub import ModelCard

from hf_jetflow import JetFlowConfig
from hf_jetflow.model_card import card_text, measured_table


ROW = {
    "prompts": "dev_math",
    "method": "jetflow",
    "node_budget": 32,
    "dtype": "bfloat16",
    "temperature": 0.0,
    "num_prompts": 20,
    "tokens_per_round": 3.214,
    "speedup": 1.876,
    "speedup_spread": [1.5, 2.25],
    "identical_to_plain": 0.95,
}


def card(**overrides):
    config = JetFlowConfig(target_name="org/target", mask_token_id=3, **overrides)
    return card_text(config, name="org/head", num_parameters=12_300_000, training="Some answers.", rows=[ROW])


def test_the_metadata_is_valid_for_the_hub():
    data = ModelCard(card()).data
    assert data.base_model == "org/target"
    assert data.library_name == "transformers"
    assert data.license == "apache-2.0"
    assert "draft-head" in data.tags


def test_the_first_line_says_what_the_head_is_for():
    first = next(line for line in ModelCard(card()).text.splitlines() if line and not line.startswith("#"))
    assert first.startswith("This is a draft head for org/target, not a model by itself")


def test_a_target_that_is_no_hub_id_is_left_out_of_the_metadata():
    text = card_text(JetFlowConfig(target_name="/models/x.gguf"), name="head", num_parameters=1, training="")
    assert ModelCard(text).data.base_model is None


def test_the_table_quotes_the_measured_rows_and_their_setting():
    table = measured_table([ROW], "2 cores")
    assert "| dev_math | 0 | jetflow | 32 | 3.21 | 1.88 (1.50 - 2.25) | 95 % |" in table
    assert table.endswith("bfloat16, 20 prompts each, batch 1, medians of interleaved runs, 2 cores.")


def test_plain_rows_are_left_out_of_the_table():
    assert "plain |" not in measured_table([{**ROW, "method": "plain"}]).splitlines()[-3]
