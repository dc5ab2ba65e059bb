"""Targets that verify chains only: biases and masks by index in the cache, and recurrent layers of unknown classes."""

import pytest
import torch
from conftest import build_noisy, build_random
from reference import assert_same_text
from support_matrix import build
from transformers import AutoModelForCausalLM

from hf_jetflow.target import layer_kinds, mixer_plans
from hf_jetflow.target.caches import commit_path, record_rows
from hf_jetflow.target.recurrent import RecurrentStates, has_states


BY_INDEX = ["bloom", "falcon-alibi", "gpt_neo", "mpt"]
REPLAYED = ["bamba", "falcon_h1", "kimi_linear", "lfm2", "qwen3_5_text", "qwen3_next"]
CHAINED = [*BY_INDEX, *REPLAYED]
NUM_TOKENS = 18


@pytest.fixture(autouse=True)
def unknown_layers(monkeypatch):
    """No recurrent layer is of a known class."""
    monkeypatch.setattr(mixer_plans, "planned_functions", lambda _: None)


def prompt(length: int = 9) -> torch.Tensor:
    return torch.randint(3, 67, (1, length), generator=torch.Generator().manual_seed(4))


def generate(target, input_ids, head=None, **kwargs):
    settings = dict(max_new_tokens=NUM_TOKENS, do_sample=False, return_dict_in_generate=True)
    return target.generate(input_ids, assistant_model=head, **{**settings, **kwargs})


@pytest.mark.parametrize("name", CHAINED)
def test_a_prompt_behind_padding_gives_the_plain_text(name):
    target = build(name)
    input_ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt()], dim=1)
    attention_mask = (input_ids != 0).long()
    plain = generate(target, input_ids, attention_mask=attention_mask).sequences
    # The padding has no position where a target takes positions.
    head = build_noisy(target, plain if name in ("bloom", "mpt") else plain[:, 4:])
    assert_same_text(plain, generate(target, input_ids, head, attention_mask=attention_mask).sequences)
    assert head.last_stats.num_accepted


@pytest.mark.parametrize(
    ("turns", "name"),
    [("head then head", name) for name in CHAINED]
    + [(turns, name) for turns in ("head then plain", "plain then head") for name in ("bloom", "qwen3_next")],
)
def test_turns_on_one_cache_give_the_plain_text(turns, name):
    target = build(name)
    texts = []
    for kinds in ("plain then plain", turns):
        ids, cache = prompt(), None
        for kind in kinds.split(" then "):
            head = build_noisy(target, texts[0]) if kind == "head" else None
            output = generate(target, ids, head, past_key_values=cache)
            ids, cache = torch.cat([output.sequences, prompt(5)], dim=1), output.past_key_values
        texts.append(output.sequences)
    assert_same_text(*texts)


@pytest.mark.parametrize("settings", [dict(node_budget="auto"), dict(node_budget=3), dict(width=2), dict(max_depth=1)])
@pytest.mark.parametrize("name", ["bloom", "qwen3_next", "lfm2"])
def test_whatever_is_asked_for_a_chain_is_verified(settings, name):
    target = build(name)
    plain = generate(target, prompt()).sequences
    head = build_noisy(target, plain)
    for setting, value in settings.items():
        setattr(head.generation_config, setting, value)
    assert_same_text(plain, generate(target, prompt(), head).sequences)
    stats = head.last_stats
    assert 0 < stats.num_drafted <= stats.num_rounds * head.generation_config.max_depth


@pytest.mark.parametrize("name", ["bloom", "bamba"])
def test_a_branch_correction_ranks_chains(name, corrected_head):
    target = build(name)
    plain = generate(target, prompt()).sequences
    head = corrected_head("path", target, plain)
    assert_same_text(plain, generate(target, prompt(), head).sequences)
    assert head.last_stats.num_accepted


@pytest.mark.parametrize("name", REPLAYED)
def test_the_returned_states_are_those_of_plain_decoding(name):
    target = build(name)
    plain = generate(target, prompt())
    drafted = generate(target, prompt(), build_noisy(target, plain.sequences))
    for expected, got in zip(plain.past_key_values.layers, drafted.past_key_values.layers, strict=True):
        for states in ("conv_states", "recurrent_states"):
            for index, state in getattr(expected, states, {}).items():
                if state is not None:
                    torch.testing.assert_close(getattr(got, states)[index], state, atol=1e-3, rtol=1e-3)
        assert not getattr(got, "record_past", False)


@torch.no_grad()
def test_states_are_restored_into_their_own_tensors():
    target = build("bamba")
    cache = target(prompt(), use_cache=True).past_key_values
    assert has_states(cache)
    before, layer = RecurrentStates.copy(cache), cache.layers[0]
    tensor, values = layer.recurrent_states[0], layer.recurrent_states[0].clone()
    record_rows(cache)
    target(prompt(3), past_key_values=cache, use_cache=True)
    assert not torch.equal(tensor, values), "the state did not change, so this test shows nothing"
    commit_path(cache, [], 3)
    before.restore(cache)
    assert layer.recurrent_states[0] is tensor
    assert torch.equal(tensor, values)
    assert cache.get_seq_length() == 9


def test_plain_rounds_of_recurrent_targets_read_nothing_twice():
    target = build("qwen3_next")
    head = build_random(target)
    head.generation_config.node_budget = 1
    calls = []
    handle = target.register_forward_hook(lambda *_: calls.append(1))
    plain = generate(target, prompt()).sequences
    assert_same_text(plain, generate(target, prompt(), head).sequences)
    handle.remove()
    assert len(calls) == 2 * NUM_TOKENS


@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "qwen3_next"])
def test_static_caches_are_refused(name):
    target = build(name)
    with pytest.raises(ValueError, match=r"chains only.*leave `cache_implementation` unset"):
        generate(target, prompt(), build_random(target), cache_implementation="static")


def test_other_assistants_of_recurrent_targets_are_refused_as_before():
    target = build("qwen3_next")
    assistant = AutoModelForCausalLM.from_config(target.config)
    with pytest.raises(ValueError, match="stateful"):
        generate(target, prompt(), assistant)


def test_a_target_that_verifies_chains_says_why_once(monkeypatch):
    warnings = []
    monkeypatch.setattr(layer_kinds.logger, "warning_once", warnings.append)
    assert not layer_kinds.takes_trees(build("qwen3_next"))
    assert len(warnings) == 1
    assert "`Qwen3NextGatedDeltaNet` does not read its states as" in warnings[0]
