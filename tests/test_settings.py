"""Settings of a head for the time of a run; node budgets read from text."""

import contextlib

import pytest
from conftest import make_prompt

from hf_jetflow.decoding.settings import read_node_budget
from hf_jetflow.errors import JetFlowError
from hf_jetflow.head.settings import head_settings


def test_a_head_gets_its_settings_back_after_an_error(tiny_target, random_head):
    head = random_head(tiny_target("llama")).train()
    head.record_trees, head.last_stats, before = True, "earlier", head.generation_config
    with contextlib.suppress(ZeroDivisionError), head_settings(head, node_budget=5, width=1):
        inside = head.generation_config
        assert (inside.node_budget, inside.width, head.training, head.record_trees) == (5, 1, False, False)
        head.last_stats = "later"
        raise ZeroDivisionError
    assert head.generation_config is before
    assert (head.training, head.record_trees, head.last_stats) == (True, True, "earlier")
    assert getattr(before, "width", None) is None


@pytest.mark.parametrize(
    ("wrong", "right"), [("nodebudget", "node_budget"), ("max_dept", "max_depth"), ("widht", "width")]
)
def test_a_misspelled_setting_is_refused_with_the_right_name(wrong, right, tiny_target, random_head):
    target = tiny_target("llama")
    head = random_head(target)
    setattr(head.generation_config, wrong, 3)
    with pytest.raises(JetFlowError, match=f"`{wrong}` is no setting of a head, did you mean `{right}`"):
        target.generate(make_prompt(12), assistant_model=head, max_new_tokens=4)


def test_node_budgets_are_read_from_text():
    assert [read_node_budget(text) for text in ("auto", "1", "64")] == ["auto", 1, 64]
    for text in ("0", "-3", "1.5", "many", ""):
        with pytest.raises(
            JetFlowError, match=f"`--node-budget` is '{text}', expected 'auto' or a number of at least 1"
        ):
            read_node_budget(text)
