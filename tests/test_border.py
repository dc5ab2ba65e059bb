"""The border with `generate`: what is wrapped, refused by name, pickled and counted."""

import copy
import inspect
import io
import pickle
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from conftest import make_prompt
from torch import nn
from transformers import GenerationMixin

import hf_jetflow
from hf_jetflow._compat import check_transformers
from hf_jetflow.errors import JetFlowError
from hf_jetflow.stats import GenerationStats


def generate(target, head=None, ids=None, **settings):
    ids = make_prompt(12) if ids is None else ids
    return target.generate(ids, assistant_model=head, **{"max_new_tokens": 12, "do_sample": False, **settings})


# --- other ways of decoding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["assistant_model", "custom_generate"])
@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (dict(dola_layers="high"), "leave `dola_layers` unset"),
        (dict(penalty_alpha=0.6, top_k=4, trust_remote_code=True), "leave `penalty_alpha` unset"),
        (dict(prompt_lookup_num_tokens=3), "leave `prompt_lookup_num_tokens` unset"),
        (dict(assistant_early_exit=2), "leave `assistant_early_exit` unset"),
        (dict(assistant_ensemble_weight=0.5), "leave `assistant_ensemble_weight` unset"),
        (dict(use_mtp=True), "leave `use_mtp` unset"),
        (
            dict(force_words_ids=[[5]], num_beams=2, trust_remote_code=True),
            "set `num_beams=1`, leave `force_words_ids` unset",
        ),
    ],
)
def test_settings_of_other_decoding_modes_are_refused_by_name(settings, advice, door, target, head):
    way = dict(assistant_model=head) if door == "assistant_model" else dict(custom_generate=head.custom_generate)
    with pytest.raises(ValueError, match=rf"greedy search and sampling only; {advice}, or generate without"):
        target.generate(make_prompt(12), max_new_tokens=4, **way, **settings)


@pytest.mark.parametrize("name", ["quantized", "offloaded", "offloaded_static"])
def test_a_cache_that_cannot_be_rolled_back_is_refused_before_it_is_made(name, target, head):
    """Making it may need a package that is not installed, whose absence says nothing about draft heads."""
    with pytest.raises(ValueError, match=rf"not supported with `cache_implementation` '{name}' yet; leave .* unset"):
        generate(target, head, cache_implementation=name)


def test_a_penalty_that_plain_decoding_ignores_is_ignored_with_a_head(target, head):
    settings = dict(do_sample=True, penalty_alpha=0.6, top_k=4)
    torch.manual_seed(3)
    plain = generate(target, **settings)
    torch.manual_seed(3)
    assert generate(target, head, **settings).tolist() == plain.tolist()


# --- wrapped heads and resized targets -------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Stands for peft's model, `DistributedDataParallel` and the like."""

    def __init__(self, module):
        super().__init__()
        self.module, self.config, self.generation_config = module, module.config, module.generation_config


def test_a_wrapped_head_is_refused_with_the_way_to_the_head(target, head):
    with pytest.raises(ValueError, match=r"`Wrapper` around a draft head.*`wrapper.merge_and_unload\(\)` for peft"):
        generate(target, Wrapper(head))


def test_a_target_with_resized_embeddings_is_told_how_to_go_on(target, random_head):
    target, head = copy.deepcopy(target), random_head(target)
    target.resize_token_embeddings(300)
    with pytest.raises(ValueError, match=r"has 300.*resized, set `head.config.vocab_size = 300`"):
        generate(target, head)
    head.config.vocab_size = 300
    assert generate(target, head).tolist() == generate(target).tolist()
    own = random_head(target, own_lm_head=True, own_embedding=True)
    target.resize_token_embeddings(310)
    with pytest.raises(ValueError, match=r"call `target.resize_token_embeddings\(300\)`"):
        generate(target, own)
    target.resize_token_embeddings(300)
    generate(target, own)


# --- pickling --------------------------------------------------------------------------------------------------------


def test_target_and_head_can_be_pickled_saved_and_copied_after_a_generation(target, head):
    target = copy.deepcopy(target)
    text = generate(target, head)
    file = io.BytesIO()
    torch.save(target, file)
    file.seek(0)
    copies = [
        (pickle.loads(pickle.dumps(target)), pickle.loads(pickle.dumps(head))),
        (torch.load(file, weights_only=False), head),
        (copy.deepcopy(target), copy.deepcopy(head)),
    ]
    for other_target, other_head in copies:
        assert generate(other_target, other_head).tolist() == text.tolist()
        assert other_head.last_stats.num_rounds > 0
        states = other_target(make_prompt(5), output_hidden_states=True).hidden_states
        assert len(states) == target.config.num_hidden_layers + 1, "hidden states are captured again"
    assert len(target(make_prompt(5), output_hidden_states=True).hidden_states) == len(states)


def test_no_hook_of_ours_is_left_on_a_target(target, head):
    target = copy.deepcopy(target)
    generate(target, head)
    kinds = [hook.__module__ for module in target.modules() for hook in module._forward_hooks.values()]
    assert not [kind for kind in kinds if not kind.startswith("transformers.")]


def test_a_hook_of_the_callers_stays_in_copies(target, head):
    target = copy.deepcopy(target)
    target.model.layers[0].register_forward_hook(nothing)
    generate(target, head)
    other = pickle.loads(pickle.dumps(target))
    assert list(other.model.layers[0]._forward_hooks.values()) == [nothing]


def nothing(module, args, output):
    return None


# --- statistics ------------------------------------------------------------------------------------------------------


def test_counts_by_depth_hold_what_ngrams_continued(target, echo_head):
    ids = make_prompt(6).repeat(1, 4)
    text = generate(target, None, ids, max_new_tokens=8)
    repeated = torch.cat([text, text, text[:, :24]], dim=1)  # the text so far predicts what follows the block
    plain = generate(target, None, repeated, max_new_tokens=40)
    head = echo_head(target, plain, block_size=4)
    head.generation_config.node_budget = 32
    generate(target, head, repeated, max_new_tokens=40)
    stats = head.last_stats
    assert sum(stats.accepted_by_depth) == stats.num_accepted
    assert len(stats.offered_by_depth) > 3, "no n-gram went on where the block ends: choose another prompt"
    assert all(0 <= share <= 1 for share in stats.acceptance_by_depth)
    assert stats.offered_by_depth == sorted(stats.offered_by_depth, reverse=True)


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_statistics_and_trees_are_those_of_the_thread(target, head):
    head.record_trees = True
    generate(target, head, max_new_tokens=5)
    mine = head.last_stats, head.last_trees
    theirs = in_thread(lambda: (generate(target, head, max_new_tokens=9), head.last_stats, head.last_trees)[1:])
    assert (head.last_stats, head.last_trees) == mine
    assert mine[0].num_new_tokens == 5
    assert theirs[0].num_new_tokens == 9
    assert theirs[1] is not mine[1]
    # A thread that has generated nothing gets those of the latest call.
    assert in_thread(lambda: (head.last_stats, head.last_trees)) == theirs


def test_statistics_of_threads_that_are_gone_are_freed(head):
    before = sum(len(vars(head)[name]) for name in vars(head) if isinstance(vars(head)[name], dict))
    for _ in range(20):
        in_thread(lambda: setattr(head, "last_stats", GenerationStats()))
    assert sum(len(vars(head)[name]) for name in vars(head) if isinstance(vars(head)[name], dict)) == before


# --- the patch -------------------------------------------------------------------------------------------------------


def test_disable_leaves_a_later_patch_of_others_in_place(target, head, monkeypatch):
    ours, calls = GenerationMixin._assisted_decoding, []

    def later(self, *args, **kwargs):
        calls.append(1)
        return ours(self, *args, **kwargs)

    later.__signature__ = inspect.signature(ours)  # `generate` reads it
    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", later)
    hf_jetflow.disable()
    try:
        assert GenerationMixin._assisted_decoding is later
        with pytest.raises((AttributeError, TypeError, ValueError)):
            generate(target, head)  # reaches transformers' own, which knows no heads
    finally:
        hf_jetflow.enable()
    assert GenerationMixin._assisted_decoding is later, "the wrap beneath the later patch is used again"
    calls.clear()
    generate(target, head)
    assert calls == [1]
    assert head.last_stats.num_rounds > 0


# --- other releases of transformers ----------------------------------------------------------------------------------


def test_a_release_beyond_the_tested_range_gets_a_warning(caplog, monkeypatch):
    warnings = []
    monkeypatch.setattr(hf_jetflow._compat.logger, "warning", warnings.append)
    check_transformers("5.24.9")
    assert not warnings
    check_transformers("5.25.0")
    assert "tested with transformers 5.17 to 5.24, but found 5.25.0" in warnings[0]


def test_import_survives_a_release_in_which_a_wrapped_or_listed_name_is_gone():
    """All in one process: the package is imported again for each name that is taken away."""
    code = """
    import importlib, sys, torch, transformers
    from transformers import LlamaConfig, LlamaForCausalLM, cache_utils
    from transformers.generation import logits_process, stopping_criteria
    from transformers.pipelines import base
    from transformers.utils import logging

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    target = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).eval()
    ids = torch.randint(3, 64, (2, 6))
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids))
    plain = target.generate(ids, **settings)
    wrapped = [(transformers.GenerationMixin, name) for name in ("_assisted_decoding", "_validate_generation_mode")]
    wrapped += [(base, "load_assistant_model")]
    gone = [[pair] for pair in wrapped]
    gone += [[(cache_utils, name)] for name in (
        "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "DummyLayer", "DynamicSlidingWindowLayer",
        "StaticLayer")]
    import hf_jetflow
    from hf_jetflow.decoding.batching import PER_SEQUENCE
    # What is listed by name is looked up in one way, so all of it goes at once.
    gone += [[(sys.modules[kind.__module__], kind.__name__) for kind in PER_SEQUENCE]]
    num_gone = 0
    for group in gone:
        pairs = [pair for pair in group if hasattr(*pair)]  # early releases lack some of them
        num_gone += len(pairs)
        hf_jetflow.disable()
        for known in [known for known in sys.modules if known.partition(".")[0] == "hf_jetflow"]:
            del sys.modules[known]
        originals = [getattr(*pair) for pair in pairs]
        for pair in pairs:
            delattr(*pair)
        warned = []
        logging.get_logger("transformers").warning = lambda text: warned.append(text)
        transformers.utils.logging.get_logger = lambda _=None: type("Log", (), {
            "warning": staticmethod(warned.append), "warning_once": staticmethod(warned.append),
            "info": staticmethod(print)})
        transformers.AutoConfig.register = transformers.AutoModel.register = lambda *a, **k: None
        import hf_jetflow
        for (module, name), original in zip(pairs, originals):
            if name.startswith("_validate") or module in (logits_process, stopping_criteria, cache_utils):
                setattr(module, name, original)  # transformers itself reads it
        head = hf_jetflow.JetFlowHead(
            hf_jetflow.JetFlowConfig.for_target(target.config, num_hidden_layers=1, block_size=4, mask_token_id=0))
        text = target.generate(ids, custom_generate=head.eval().custom_generate, **settings)
        assert torch.equal(text, plain), pairs
        assert head.last_stats.num_drafted > 0, (pairs, head.last_stats)
        for pair, original in zip(pairs, originals):
            assert any(f"no `{pair[1]}`" in text for text in warned) == (pair in wrapped), (pair, warned)
            setattr(*pair, original)
    print("survived", num_gone)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split("survived")[1]) > 25


def test_a_head_for_another_target_is_an_error_that_the_command_line_prints_in_one_line(tiny_target, random_head):
    head = random_head(tiny_target("llama"))
    head.config.num_target_layers += 1
    with pytest.raises(JetFlowError, match="number of layers"):
        tiny_target("llama").generate(torch.tensor([[5, 6, 7]]), assistant_model=head, max_new_tokens=2)
