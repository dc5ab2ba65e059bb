"""The settings of each command: transformers' `HfArgumentParser` makes a command line from them."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from hf_jetflow.bench.settings import BenchSettings
from hf_jetflow.doctor.settings import DoctorSettings
from hf_jetflow.errors import JetFlowError
from hf_jetflow.head.settings import head_settings
from hf_jetflow.show.settings import ShowSettings
from hf_jetflow.simulate.settings import SimulateSettings
from hf_jetflow.target.settings import PairSettings, read_node_budget


COMMANDS = {
    BenchSettings: ["--prompts", "a.jsonl"],
    DoctorSettings: [],
    ShowSettings: ["--output", "x.html", "--prompt", "Why?"],
    SimulateSettings: ["--target", "t", "--head", "h", "--acceptance", "x.json"],
    PairSettings: ["--target", "t", "--head", "h"],
}


@pytest.mark.parametrize("settings", COMMANDS, ids=lambda kind: kind.__name__)
def test_defaults_and_help_of_the_command_line_are_those_of_the_settings(settings):
    parser = HfArgumentParser(settings)
    (parsed,) = parser.parse_args_into_dataclasses(COMMANDS[settings], look_for_args_file=False)
    for each in fields(settings):
        assert each.metadata["help"] in " ".join(parser.format_help().split()).replace("- ", "-")
        if each.default is not MISSING and f"--{each.name}" not in COMMANDS[settings]:
            assert getattr(parsed, each.name) == each.default


def test_lists_are_parsed_with_their_types():
    arguments = "--prompts a.jsonl --prompts b.jsonl --node-budgets 8 auto --temperature 0 0.7 --batch-sizes 1 4"
    (settings,) = HfArgumentParser(BenchSettings).parse_args_into_dataclasses(
        arguments.split(), look_for_args_file=False
    )
    assert settings.prompts == [Path("a.jsonl"), Path("b.jsonl")]
    assert (settings.temperatures, settings.batch_sizes) == ([0.0, 0.7], [1, 4])
    assert [variant.node_budget for variant in make_variants(settings)] == [None, None, 8, "auto"]


def test_a_head_gets_its_settings_back_after_an_error(tiny_target, random_head):
    head = random_head(tiny_target("llama")).train()
    head.record_trees, head.last_stats, before = True, "earlier", head.generation_config
    with pytest.raises(ZeroDivisionError), head_settings(head, node_budget=5, width=1):
        assert (head.generation_config.node_budget, head.generation_config.width) == (5, 1)
        assert not head.training
        assert not head.record_trees
        head.last_stats = 1 / 0
    assert head.generation_config is before
    assert (head.training, head.record_trees, head.last_stats) == (True, True, "earlier")
    assert getattr(before, "width", None) is None


def test_node_budgets_are_read_from_text():
    assert [read_node_budget(text) for text in ("auto", "1", "64")] == ["auto", 1, 64]
    for text in ("0", "-3", "1.5", "many", ""):
        with pytest.raises(JetFlowError, match=f"at least 1, or 'auto', got '{text}'"):
            read_node_budget(text)
