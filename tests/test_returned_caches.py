"""What a generation leaves in the cache that it returns is what plain decoding leaves."""

from contextlib import contextmanager

import pytest
import torch
from reference import assert_same_text


FAMILIES = ["llama", "qwen3", "gemma3_text"]


def prompts(batch=3, length=9):
    ids = torch.randint(3, 200, (batch, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :4] = 0
    return ids, mask


def generate(target, head, **kwargs):
    torch.manual_seed(5)
    settings = dict(
        max_new_tokens=12, do_sample=False, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0
    )
    return target.generate(**settings | kwargs, assistant_model=head)


def both(target, head, **kwargs):
    return generate(target, None, **kwargs), generate(target, head, **kwargs)


@pytest.mark.parametrize(("batch", "do_sample"), [(1, False), (3, True)], ids=["one, greedy", "three, sampled"])
def test_prompts_given_as_embeddings_are_cached_whole(batch, do_sample, family, tiny_target, random_head):
    target = tiny_target(family)
    head = random_head(target)
    ids, mask = prompts(batch)
    embed = target.get_input_embeddings()
    call = dict(inputs_embeds=embed(ids), attention_mask=mask, do_sample=do_sample)
    plain, drafted = both(target, head, **call)
    assert_same_text(plain.sequences, drafted.sequences)
    assert head.last_stats.num_rounds > 0
    lengths = [result.past_key_values.get_seq_length() for result in (plain, drafted)]
    assert lengths[0] == lengths[1] == ids.shape[1] + 11
    for layer, other in zip(plain.past_key_values.layers, drafted.past_key_values.layers, strict=True):
        torch.testing.assert_close(other.keys, layer.keys, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(other.values, layer.values, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_second_turn_from_such_a_cache_is_the_plain_one(batch, family, tiny_target, random_head):
    target = tiny_target(family)
    head, (ids, mask) = random_head(target), prompts(batch)
    embed = target.get_input_embeddings()
    texts = []
    for assistant in (None, head):
        first = generate(target, assistant, inputs_embeds=embed(ids), attention_mask=mask)
        more = torch.cat([ids, first.sequences, prompts(batch, 5)[0]], dim=1)
        longer = torch.cat([mask, mask.new_ones(batch, more.shape[1] - mask.shape[1])], dim=1)
        call = dict(inputs_embeds=embed(more), attention_mask=longer, past_key_values=first.past_key_values)
        texts.append(generate(target, assistant, **call).sequences)
    assert_same_text(*texts)


def test_a_compressed_cache_of_a_padded_prompt_is_refused(tiny_target, random_head):
    target = tiny_target("llama")
    head, (ids, mask) = random_head(target), prompts()

    with (
        compressed(target, lambda index: 2),
        pytest.raises(ValueError, match=r"holds 5 of the prompt's 9 tokens.*give one prompt without padding"),
    ):
        generate(target, head, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("batch", [1, 3])
def test_layers_that_were_compressed_alike_are_drafted_for(batch, tiny_target, random_head):
    target = tiny_target("llama")
    with compressed(target, lambda index: 2):
        plain, drafted = both(target, random_head(target), input_ids=prompts(batch)[0])
    assert_same_text(plain.sequences, drafted.sequences)
    assert plain.past_key_values.get_seq_length() == drafted.past_key_values.get_seq_length()
    for layer, other in zip(plain.past_key_values.layers, drafted.past_key_values.layers, strict=True):
        torch.testing.assert_close(other.keys, layer.keys, atol=2e-4, rtol=2e-4)


def test_layers_that_were_compressed_differently_are_refused(tiny_target, random_head):
    target = tiny_target("llama")
    with (
        compressed(target, lambda index: 1 + index % 2),
        pytest.raises(ValueError, match=r"hold 5 to 9 tokens.*compress every layer to the same length"),
    ):
        generate(target, random_head(target), input_ids=prompts(1)[0])


@contextmanager
def compressed(target, step_of):
    """Layer `i` of the cache then holds every `step_of(i)`-th token of the prompt."""

    def compress(_module, _args, kwargs, _outputs):
        for index, layer in enumerate(kwargs.get("cache", kwargs.get("past_key_values")).layers):
            if layer.get_seq_length() == kwargs["input_ids"].shape[1]:
                layer.keys, layer.values = (rows[:, :, :: step_of(index)] for rows in (layer.keys, layer.values))

    handle = target.base_model.register_forward_hook(compress, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)
