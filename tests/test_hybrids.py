"""Draft trees on recurrent and hybrid targets: the text of plain decoding, and states that are read once."""

import copy
import functools
import threading

import pytest
import torch
from conftest import build_noisy, build_random
from reference import assert_same_text
from support_matrix import batch_of, build, is_known
from torch import nn
from transformers import DynamicCache, StoppingCriteria
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from hf_jetflow._compat import CACHE_NAME
from hf_jetflow.target import mixer_layers, mixer_plans
from hf_jetflow.target.layer_kinds import takes_trees
from hf_jetflow.target.recurrent import RecurrentStates


DELTA_RULE = ["olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"]
BY_CHANNEL = ["bailing_hybrid", "kimi_linear"]
STATE_SPACE = ["bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"]
CONVOLUTIONS = ["lfm2", "lfm2_moe", "lfm3"]
HYBRIDS = list(filter(is_known, [*DELTA_RULE, *BY_CHANNEL, *STATE_SPACE, *CONVOLUTIONS]))
ONE_OF_EACH = ["falcon_h1", "kimi_linear", "lfm2", "qwen3_next"]
LARGE_TREES = [(name, 64) for name in HYBRIDS]
SMALL_TREES = [(name, 4) for name in ONE_OF_EACH]  # the budget is no matter of the family, but of the kind of mixer
SETTINGS = [
    dict(do_sample=False),
    dict(do_sample=True, temperature=1.5, top_k=20, repetition_penalty=1.2),
]
NUM_TOKENS = 18

target_of = functools.cache(build)


def prompt(length: int = 9) -> torch.Tensor:
    return torch.randint(3, 67, (1, length), generator=torch.Generator().manual_seed(4))


def generate(target, input_ids, head=None, **kwargs):
    torch.manual_seed(5)
    settings = dict(max_new_tokens=NUM_TOKENS, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    settings["attention_mask"] = torch.ones_like(input_ids)  # a text may hold the padding's token
    return target.generate(input_ids, assistant_model=head, **{**settings, **kwargs})


def both(name, input_ids, **kwargs):
    """Outputs of plain decoding and with a head that is often right, and the head."""
    target = target_of(name)
    plain = generate(target, input_ids, **kwargs)
    head = build_noisy(target, plain.sequences) if len(input_ids) == 1 else build_random(target)
    head.generation_config.node_budget = 64
    return plain, generate(target, input_ids, head, **kwargs), head


def assert_same_states(plain, drafted):
    for expected, got in zip(plain.past_key_values.layers, drafted.past_key_values.layers, strict=True):
        assert type(got) is type(expected)
        for kind in ("conv_states", "recurrent_states"):
            for index, state in getattr(expected, kind, {}).items():
                if state is not None:
                    torch.testing.assert_close(getattr(got, kind)[index], state, atol=1e-3, rtol=1e-3)
        if getattr(expected, "keys", None) is not None:
            torch.testing.assert_close(got.keys, expected.keys, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "node_budget"), LARGE_TREES + SMALL_TREES)
def test_trees_give_the_plain_text(name, node_budget):
    target, accepted = target_of(name), 0
    for settings in SETTINGS:
        plain = generate(target, prompt(), **settings).sequences
        head = build_noisy(target, plain)
        head.generation_config.node_budget = node_budget
        assert_same_text(plain, generate(target, prompt(), head, **settings).sequences)
        accepted += head.last_stats.num_accepted
        assert head.last_stats.num_drafted > head.last_stats.num_rounds * 2, "the rounds verified nothing"
    assert accepted > NUM_TOKENS // 2


@pytest.mark.parametrize(("name", "node_budget"), LARGE_TREES + SMALL_TREES)
def test_padded_batches_give_the_plain_texts(name, node_budget):
    target, head = target_of(name), build_random(target_of(name))
    head.generation_config.node_budget = node_budget
    batch = batch_of(name)
    for settings in SETTINGS:
        settings = dict(settings, attention_mask=batch["attention_mask"], eos_token_id=[3, 4, 5, 6])
        plain = generate(target, batch["input_ids"], **settings).sequences
        assert plain.tolist() == generate(target, batch["input_ids"], head, **settings).sequences.tolist()
        assert "plain" not in head.last_stats.policy


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_prompt_behind_padding_gives_the_plain_text(name):
    target = target_of(name)
    input_ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt()], dim=1)
    attention_mask = (input_ids != 0).long()
    plain = generate(target, input_ids, attention_mask=attention_mask).sequences
    head = build_noisy(target, plain[:, 4:])  # the padding has no position
    assert_same_text(plain, generate(target, input_ids, head, attention_mask=attention_mask).sequences)
    assert head.last_stats.num_accepted


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_returned_states_are_those_of_plain_decoding(name):
    plain, drafted, _ = both(name, prompt())
    assert_same_states(plain, drafted)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_batch_returns_the_states_of_plain_decoding_though_sequences_end_early(name):
    batch = batch_of(name)
    settings = dict(attention_mask=batch["attention_mask"], max_new_tokens=40)
    texts = generate(target_of(name), batch["input_ids"], **settings).sequences
    eos_token_id = texts[1, batch["input_ids"].shape[1] + 5].item()  # the second sequence ends first
    plain, drafted, head = both(name, batch["input_ids"], **settings, eos_token_id=[eos_token_id])
    assert plain.sequences.tolist() == drafted.sequences.tolist()
    assert "plain" not in head.last_stats.policy
    assert_same_states(plain, drafted)


@pytest.mark.parametrize(
    ("turns", "num_prompts"),
    [("head then head", 1), ("head then head", 3), ("head then plain", 3), ("plain then head", 1)],
)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_turns_on_one_cache_give_the_plain_text(turns, num_prompts, name):
    target = target_of(name)
    first = prompt(9 * num_prompts).view(num_prompts, 9)
    texts = []
    for kinds in ("plain then plain", turns):
        ids, cache = first, None
        for kind in kinds.split(" then "):
            head = None
            if kind == "head":
                head = build_noisy(target, texts[0]) if num_prompts == 1 else build_random(target)
            output = generate(target, ids, head, **{CACHE_NAME: cache})
            cache = copy.deepcopy(output.past_key_values)
            ids = torch.cat([output.sequences, first[:, :5]], dim=1)
        texts.append(output.sequences)
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.any_release
@pytest.mark.parametrize("settings", [dict(node_budget="auto"), dict(node_budget=1), dict(width=1), dict(max_depth=1)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_settings_of_the_rounds_do_not_change_the_text(settings, name):
    target = target_of(name)
    plain = generate(target, prompt()).sequences
    head = build_noisy(target, plain)
    for setting, value in settings.items():
        setattr(head.generation_config, setting, value)
    assert_same_text(plain, generate(target, prompt(), head).sequences)


@pytest.mark.parametrize("kind", ["parent", "path"])
def test_a_branch_correction_ranks_trees(kind, corrected_head):
    target = target_of("bamba")
    plain = generate(target, prompt()).sequences
    head = corrected_head(kind, target, plain)
    head.record_trees = True
    assert_same_text(plain, generate(target, prompt(), head).sequences)
    assert any(len(set(entry.depths)) < len(entry.depths) for entry in head.last_trees), "no tree had branches"


class Leaves(Exception):
    pass


class LeavingReader:
    """A streamer that raises at its `limit`-th token."""

    def __init__(self, limit):
        self.limit, self.num_read = limit, 0

    def put(self, value):
        self.num_read += value.numel()
        if self.num_read >= self.limit:
            raise Leaves

    def end(self): ...


@pytest.mark.any_release
@pytest.mark.parametrize(("num_prompts", "node_budget", "num_tokens"), [(1, 1, 9), (1, 64, 2), (1, 64, 9), (3, 64, 9)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_generation_that_broke_off_can_be_gone_on_from(name, num_prompts, node_budget, num_tokens):
    target = target_of(name)
    ids = prompt(9 * num_prompts).view(num_prompts, 9)
    plain = generate(target, ids).sequences
    head = build_noisy(target, plain) if num_prompts == 1 else build_random(target)
    head.generation_config.node_budget = node_budget
    cache = DynamicCache(config=target.config)
    reader = LeavingReader(ids.numel() + num_tokens * num_prompts)
    with pytest.raises(Leaves):
        generate(target, ids, head, streamer=reader, **{CACHE_NAME: cache})
    text = plain[:, : ids.shape[1] + num_tokens]
    assert cache.get_seq_length() < text.shape[1]
    again = generate(target, text, head, max_new_tokens=NUM_TOKENS - num_tokens, **{CACHE_NAME: cache})
    assert again.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_nothing_is_read_twice(name):
    rows = []
    target = target_of(name)
    hook = target.register_forward_hook(lambda *call: rows.append(call[-1].logits.shape[1]))
    _, _, head = both(name, prompt(), max_new_tokens=30)
    hook.remove()
    plain = [9 if count > 1 else 1 for count in rows[:30]]
    stats = head.last_stats
    assert len(rows) - len(plain) == 1 + stats.num_rounds, "the prompt and one forward per round"
    assert sum(rows[31:]) == stats.num_drafted + stats.num_rounds, "of the drafted nodes and the anchors"


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_round_writes_states_once_and_in_place(name, monkeypatch):
    target, written = target_of(name), []
    plain = generate(target, prompt()).sequences

    def states_of(mixer):
        states = [*mixer.states.conv_states.values(), *mixer.states.recurrent_states.values()]
        return [(id(state), state._version) for state in states if state is not None]

    advance = mixer_layers.TreeMixer.advance

    def watched(self, paths):
        before = states_of(self)
        advance(self, paths)
        written.append((self, before, states_of(self)))

    monkeypatch.setattr(mixer_layers.TreeMixer, "advance", watched)
    monkeypatch.setattr(RecurrentStates, "copy", None)
    head = build_noisy(target, plain)
    head.record_trees = True
    generate(target, prompt(), head)
    newest = {}
    for mixer, before, after in written:
        assert before == newest.get(mixer, before), "something wrote to the states between two commits"
        assert [(address, version + 1) for address, version in before] == after
        newest[mixer] = after
    num_trees = sum(len(entry.tokens) > 1 for entry in head.last_trees)
    assert len(written) == num_trees * len(newest)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_lone_root_is_a_step_of_plain_decoding(name):
    """So half precision rounds alike."""
    target = copy.deepcopy(target_of(name)).half()
    plain = generate(target, prompt()).sequences
    head = build_random(target).half()
    head.generation_config.node_budget = 1
    assert_same_text(plain, generate(target, prompt(), head).sequences)


def test_the_layers_are_left_as_they_were():
    target = target_of("qwen3_next")
    mixer = next(module for module in target.modules() if isinstance(module, Qwen3NextGatedDeltaNet))
    both("qwen3_next", prompt())
    assert "forward" not in vars(mixer)
    theirs = mixer.forward
    mixer.forward = theirs  # as accelerate and others do
    try:
        plain, drafted, _ = both("qwen3_next", prompt())
        assert vars(mixer)["forward"] is theirs
    finally:
        del mixer.forward
    assert_same_text(plain.sequences, drafted.sequences)


@pytest.mark.any_release
@pytest.mark.parametrize("name", ["bamba", "qwen3_5_text"])
def test_threads_share_a_target(name):
    target = target_of(name)
    prompts = [prompt(length) for length in (5, 9, 12)]
    plains = [generate(target, ids).sequences for ids in prompts]
    heads = [build_noisy(target, plain) for plain in plains]
    results = {}

    def work(index, head):
        results[index, head is None] = [generate(target, prompts[index], head).sequences for _ in range(2)]

    threads = [threading.Thread(target=work, args=(i, head)) for i in range(3) for head in (heads[i], None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(threads), "a thread failed"
    for (index, _), texts in results.items():
        for text in texts:
            assert_same_text(plains[index], text)
    assert not any("forward" in vars(module) for module in target.modules())


class StopWithAnyone(StoppingCriteria):
    """Ends all sequences where one of them holds a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 14:] == self.token).any().expand(len(input_ids))


@pytest.mark.parametrize("is_returned", [True, False])
def test_a_criterion_over_a_batch_whose_cache_is_returned_asks_for_plain_decoding(is_returned):
    target, batch = target_of("qwen3_next"), batch_of("qwen3_next")
    settings = dict(attention_mask=batch["attention_mask"], return_dict_in_generate=is_returned)
    texts = generate(target, batch["input_ids"], attention_mask=batch["attention_mask"]).sequences
    settings["stopping_criteria"] = [StopWithAnyone(texts[0, -5])]
    head = build_random(target)
    plain, drafted = (generate(target, batch["input_ids"], assistant, **settings) for assistant in (None, head))
    if is_returned:
        assert "cannot be rolled back" in head.last_stats.policy["plain"]
        plain, drafted = plain.sequences, drafted.sequences
    else:
        assert "plain" not in head.last_stats.policy
    assert plain.tolist() == drafted.tolist()


class OtherMixer(nn.Module):
    """A recurrent layer that computes its rule itself."""

    def forward(self, hidden_states, cache):
        return cache.update_recurrent_state(hidden_states, 0)


class OtherwiseWritten(Qwen3NextGatedDeltaNet):
    """A recurrent layer that writes states in another method, too."""

    def rewind(self, cache, states):
        cache.update_conv_state(states, self.layer_idx)


@pytest.mark.parametrize("cls", [OtherMixer, OtherwiseWritten])
def test_classes_that_do_not_follow_the_plan_are_not_known(cls):
    assert mixer_plans.planned_functions(cls) is None
    assert mixer_plans.planned_functions(Qwen3NextGatedDeltaNet)


def test_a_recurrent_layer_without_a_module_of_its_own_is_not_known():
    target = target_of("qwen3_next")
    assert mixer_plans.unknown_reason(target, [0, 2]) is None
    assert "not one recurrent module" in mixer_plans.unknown_reason(target, [0, 1, 2])


@pytest.mark.parametrize("name", [*HYBRIDS, "llama", "gemma2", "llama4_text"])
def test_they_take_trees(name):
    assert takes_trees(target_of(name))


@pytest.mark.parametrize("name", [name for name in HYBRIDS if name != "lfm3"])
def test_static_caches(name):
    for settings in SETTINGS:
        plain, drafted, head = both(name, prompt(), cache_implementation="static", **settings)
        assert_same_text(plain.sequences, drafted.sequences)
        assert head.last_stats.num_accepted
    assert_same_states(plain, drafted)


def test_a_static_cache_of_a_sliding_window_target_is_refused():
    if is_known("lfm3"):
        with pytest.raises(ValueError, match="leave `cache_implementation` unset"):
            generate(target_of("lfm3"), prompt(), build_random(target_of("lfm3")), cache_implementation="static")
