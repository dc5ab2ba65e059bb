"""The rivals of a bench: transformers' own ways to draft, and refusals."""

import pytest
import torch
from conftest import SIZES
from helpers import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.rivals import NativeDFlash, rival_kwargs
from hf_jetflow.bench.runs import Variant, timed_run
from hf_jetflow.bench.settings import is_rival


def run(target, head, prompt, method, max_new_tokens=40, **more):
    tokenizer = tiny_tokenizer(target.config.vocab_size)
    rival = rival_kwargs(method, target, tokenizer, head) if is_rival(method) else None
    return timed_run(target, head, Variant(method), prompt, rival=rival, max_new_tokens=max_new_tokens, **more)


@pytest.fixture
def save_model(tmp_path):
    """`save_model(model, **changes)`: a folder that the model and a tokenizer of its size can be loaded from."""

    def save(model, words=None):
        folder = tmp_path / "assistant"
        model.save_pretrained(folder)
        tiny_tokenizer(words or model.config.vocab_size).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("settings", [{}, {"mask_token_id": None}, {"branch_correction": "path"}])
def test_native_dflash_gives_the_plain_text(family, settings, tiny_target, random_head, prompt):
    target = tiny_target(family)
    head = random_head(target, **settings)
    plain, native = (run(target, head, prompt, method, 12) for method in ("plain", "native-dflash"))
    assert native.new_ids == plain.new_ids


@pytest.mark.parametrize(
    "settings",
    [{}, {"mask_token_id": None}, {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}],
)
def test_native_dflash_drafts_what_our_chain_drafts(settings, target, random_head, prompt):
    head = random_head(target, **settings)
    drafts = {"chain": [], "native-dflash": []}
    for method, rows in drafts.items():
        handle = head.register_forward_hook(lambda *call, rows=rows: rows.append(call[-1][:, 1:]))
        run(target, head, prompt, method, 20)
        handle.remove()
    # Towards the end our chain gets shorter; the first rounds are drafted at full depth.
    for ours, native in zip(drafts["chain"][:12], drafts["native-dflash"][:12], strict=True):
        torch.testing.assert_close(native, ours, atol=1e-4, rtol=1e-4)


def test_native_dflash_accepts_whole_chains_of_a_head_that_is_right(target, echo_head, prompt):
    plain = target.generate(prompt, do_sample=False, max_new_tokens=60)
    head = echo_head(target, plain)
    # The stub does not read its context, but transformers expects a cache that was written to.
    head.forward = lambda **inputs: (JetFlowHead.forward(head, **inputs), type(head).forward(head, **inputs))[1]
    native, chain = run(target, head, prompt, "native-dflash"), run(target, head, prompt, "chain")
    assert native.new_ids == chain.new_ids == plain[0, 12:52].tolist()
    assert (native.num_first, native.num_rounds) == (1, chain.num_rounds) == (1, 5)  # 39 tokens by chains of 8


def test_a_head_that_taps_the_embedding_output_is_refused(tiny_target, random_head):
    head = random_head(tiny_target("llama"), hidden_state_indices=[0, 2])
    with pytest.raises(ValueError, match=r"taps the target's embedding output.*leave `native-dflash` out"):
        NativeDFlash(head)


def test_prompt_lookup_gives_the_plain_text_in_fewer_target_forwards(random_head, prompt):
    config = AutoConfig.for_model("llama", **{**SIZES, "eos_token_id": None})
    target = AutoModelForCausalLM.from_config(config).eval()  # at this scale it repeats itself
    plain, lookup = (run(target, random_head(target), prompt, method) for method in ("plain", "prompt-lookup"))
    assert lookup.new_ids == plain.new_ids
    assert plain.num_rounds == plain.num_decoded == 39
    assert lookup.num_rounds < 30


def test_the_drafts_of_an_assistant_equal_to_the_target_are_accepted(target, random_head, prompt, save_model):
    folder = save_model(target)
    plain, assisted = (run(target, random_head(target), prompt, m, 20) for m in ("plain", f"assistant:{folder}"))
    assert assisted.new_ids == plain.new_ids
    assert assisted.num_rounds < plain.num_rounds / 2


def test_an_assistant_of_another_vocabulary_brings_its_tokenizer(tiny_target, random_head, prompt, save_model):
    target = tiny_target("llama")
    folder = save_model(tiny_target("llama", vocab_size=300))
    plain, assisted = (run(target, random_head(target), prompt, m, 8) for m in ("plain", f"assistant:{folder}"))
    assert assisted.new_ids == plain.new_ids


def test_an_assistant_with_another_vocabulary_of_the_same_size_is_refused(target, random_head, save_model):
    folder = save_model(target, words=200)
    with pytest.raises(ValueError, match=r"another vocabulary than the target.*of the same size.*use an assistant"):
        rival_kwargs(f"assistant:{folder}", target, tiny_tokenizer(target.config.vocab_size), random_head(target))


def test_a_missing_assistant_is_refused_by_name(target, random_head):
    with pytest.raises(ValueError, match=r"assistant:/nowhere/at/all.*cannot be loaded"):
        rival_kwargs("assistant:/nowhere/at/all", target, tiny_tokenizer(257), random_head(target))


def test_a_sampled_run_is_reproduced_by_its_seed(target, random_head, prompt):
    head = random_head(target)
    for method in ("native-dflash", "prompt-lookup"):
        first, second, other = (
            run(target, head, prompt, method, 12, temperature=1.0, seed=seed).new_ids for seed in (1, 1, 2)
        )
        assert first == second != other


@pytest.mark.parametrize("method", ["plain", "chain", "native-dflash", "prompt-lookup"])
def test_prefill_is_a_part_of_the_call(method, target, random_head, prompt):
    result = run(target, random_head(target), prompt, method, 4)
    assert 0 < result.prefill_seconds <= result.seconds
    assert result.decode_seconds == result.seconds - result.prefill_seconds
    assert result.num_first + result.num_decoded == len(result.new_ids) == 4
