"""Text after image prompts: with a head, the text of plain decoding."""

import pytest
import torch
from conftest import build_noisy
from families import FAMILIES
from reference import assert_same_text
from support_matrix import build, prompt


SEEING = [name for name, family in FAMILIES.items() if family.image]
NUM_TOKENS = 14


def generate(target, inputs, head=None, **kwargs):
    settings = dict(max_new_tokens=NUM_TOKENS, do_sample=False, return_dict_in_generate=True)
    return target.generate(**inputs, assistant_model=head, **settings, **kwargs)


@pytest.mark.parametrize("turns", ["head then head", "plain then head", "head then plain"])
@pytest.mark.parametrize("name", SEEING)
def test_a_turn_after_the_image_on_its_cache_gives_the_plain_text(turns, name):
    texts = []
    for kinds in ("plain then plain", turns):
        target, inputs, cache = build(name), prompt(name, 7), None  # the targets remember the image's positions
        for kind in kinds.split(" then "):
            head = build_noisy(target, texts[0]) if kind == "head" else None
            output = generate(target, inputs, head, past_key_values=cache)
            input_ids = torch.cat([output.sequences, torch.tensor([[5, 6, 7, 8]])], dim=1)
            inputs, cache = (
                dict(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)),
                output.past_key_values,
            )
        texts.append(output.sequences)
    assert_same_text(*texts)


@pytest.mark.parametrize("name", SEEING)
def test_an_image_prompt_behind_padding_gives_the_plain_text(name):
    target, inputs = build(name), prompt(name, 7)
    zeros = torch.zeros(1, 3, dtype=torch.long)
    for key in {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"} & inputs.keys():
        inputs[key] = torch.cat([zeros, inputs[key]], dim=1)
    plain = generate(target, inputs).sequences
    head = build_noisy(target, plain[:, 3:])
    assert_same_text(plain, generate(target, inputs, head).sequences)
    assert head.last_stats.num_accepted


def test_positions_behind_an_image_run_apart_from_places_in_the_text(random_head):
    target = build("qwen2_5_vl")
    states = []
    handle = target.register_forward_hook(lambda *call: states.append(call[2]["position_ids"]), with_kwargs=True)
    head = random_head(target)
    generate(target, prompt("qwen2_5_vl", 7), head)
    handle.remove()
    for position_ids in states[1:]:
        assert len(position_ids) == 4
        # Four tokens of a 2 x 2 image take two positions.
        assert torch.equal(position_ids[1:], (position_ids[:1] - 2).expand(3, -1, -1))
