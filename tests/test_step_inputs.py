"""Whatever plain decoding passes to every forward, verifies pass on as well, or the call is refused by name."""

import copy
from types import SimpleNamespace

import pytest
import support_matrix
import torch
from conftest import build_noisy
from torch import nn
from transformers import (
    AutoConfig,
    CpmAntConfig,
    CpmAntForCausalLM,
    GitConfig,
    GitForCausalLM,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)
from transformers.modeling_utils import PreTrainedModel

from hf_jetflow import JetFlowConfig, JetFlowHead


BUDGETS = [1, 16]


def ids_of(batch: int, length: int = 9, highest: int = 64) -> torch.Tensor:
    return torch.randint(3, highest, (batch, length), generator=torch.Generator().manual_seed(batch))


def assert_same(target: PreTrainedModel, head: JetFlowHead, **settings) -> None:
    settings = {"max_new_tokens": 14, "do_sample": False, **settings}
    texts = []
    for assistant in ({}, {"assistant_model": head}):
        torch.manual_seed(7)
        texts.append(target.generate(**settings, **assistant))
    assert torch.equal(*texts)


def head_for(target: PreTrainedModel, text: torch.Tensor, budget: int) -> JetFlowHead:
    """A head that is often right about `text`."""
    head = build_noisy(target, text)
    head.generation_config.node_budget = budget
    return head


def refused(target: PreTrainedModel, match: str, **settings) -> None:
    """The call is refused, and the target has not run at all."""
    config = JetFlowConfig.for_target(target.config, num_hidden_layers=1, block_size=4, mask_token_id=0)
    calls = []
    hook = target.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=f"(?s){match}.*without `assistant_model`"):
        target.generate(**settings, max_new_tokens=4, assistant_model=JetFlowHead(config).eval())
    hook.remove()
    assert not calls


@pytest.mark.parametrize("name", ["gpt2", "gptj", "codegen", "gpt_bigcode", "gpt_neo"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_token_types_reach_every_forward(name, budget):
    target, ids = support_matrix.build(name), ids_of(1)
    settings = dict(input_ids=ids, token_type_ids=torch.full_like(ids, 7))
    text = target.generate(**settings, max_new_tokens=14, do_sample=False)
    untyped = target.generate(ids, max_new_tokens=14, do_sample=False)
    assert not torch.equal(text, untyped)
    head = head_for(target, text, budget)
    for do_sample in (False, True):
        assert_same(target, head, **settings, do_sample=do_sample)


@pytest.mark.parametrize("do_sample", [False, True])
def test_token_types_of_padded_sequences_that_end_at_different_steps(do_sample):
    target, ids = support_matrix.build("gpt2"), ids_of(3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    types = torch.tensor([[7], [11], [13]]).expand_as(ids)
    settings = dict(input_ids=ids, attention_mask=mask, token_type_ids=types, do_sample=do_sample, pad_token_id=0)
    torch.manual_seed(7)
    text = target.generate(**settings, max_new_tokens=14)
    assert_same(target, head_for(target, text[:1], 16), **settings, eos_token_id=text[0, 12].item())


class Steered(LlamaForCausalLM):
    """A model of the user's own, whose forward takes a vector for every row, a weight per row, and a number."""

    def forward(self, input_ids=None, steering=None, row_weights=None, strength=0.0, inputs_embeds=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if steering is not None:
            embeds = embeds + strength * steering[:, None]
        if row_weights is not None:
            assert row_weights.shape == embeds.shape[:2]
            embeds = embeds * row_weights[..., None]
        return super().forward(inputs_embeds=embeds, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, row_weights=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if row_weights is not None:
            missing = input_ids.shape[1] - row_weights.shape[1]
            weights = torch.cat([row_weights, row_weights[:, -1:].expand(-1, missing)], dim=1)
            inputs["row_weights"] = weights[:, -inputs["input_ids"].shape[1] :]
        return inputs


class Shifted(LlamaForCausalLM):
    """A model of the user's own, whose forward shifts the embeddings."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, shift=None, **kwargs):
        own = dict(attention_mask=attention_mask, position_ids=position_ids)
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) + shift, **own, **kwargs)


class Other(Steered):
    """A subclass that hands each step something that verifies cannot repeat; `kind` says what."""

    kind = ""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        length = input_ids.shape[1]
        if self.kind == "number of the step":
            inputs["extra"] = length
        elif self.kind == "whole text":
            inputs["extra"] = torch.ones_like(input_ids)
        elif self.kind == "made from the token":
            inputs["extra"] = inputs["input_ids"] % 2
        elif self.kind == "object":
            inputs["extra"] = SimpleNamespace(calls=0)
        elif self.kind == "positions":
            inputs["position_ids"] = 2 * inputs["position_ids"]
        elif self.kind == "mask":
            inputs["attention_mask"] = None
        return inputs

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, extra=None, **kwargs):
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


def subclassed(kind: type[Steered], **overrides) -> Steered:
    target = copy.deepcopy(support_matrix.build("arcee"))
    config = AutoConfig.for_model("llama", **{**support_matrix.COMMON, **overrides})
    torch.manual_seed(1)
    made = kind(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3 if "embed" in name else 10)
    made.generation_config = target.generation_config
    return made


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("batch", [1, 3])
def test_keywords_of_the_models_own_forward(batch, budget):
    target, ids = subclassed(Steered), ids_of(batch)
    generator = torch.Generator().manual_seed(3)
    own = dict(
        steering=torch.randn(batch, 32, generator=generator),
        row_weights=0.5 + torch.rand(batch, ids.shape[1], generator=generator),
        strength=0.7,
    )
    text = target.generate(ids, **own, max_new_tokens=14, do_sample=False)
    head = head_for(target, text[:1], budget)
    for do_sample in (False, True):
        assert_same(target, head, input_ids=ids, **own, do_sample=do_sample, pad_token_id=0)


@pytest.mark.parametrize("shape", [(), (32,), (1, 1, 32)])
def test_a_keyword_that_all_tokens_share(shape):
    target = subclassed(Shifted)
    shift = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    text = target.generate(ids_of(1), shift=shift, max_new_tokens=14, do_sample=False)
    assert_same(target, head_for(target, text, 16), input_ids=ids_of(1), shift=shift, do_sample=False)


REFUSED = {
    "number of the step": "`extra` differs from step to step",
    "whole text": "`extra` differs from step to step",
    "made from the token": "`extra` differs from step to step",
    "object": "`extra` is a `SimpleNamespace`",
    "positions": "`position_ids` of steps do not grow by one",
    "mask": "`attention_mask` of a step is not the prompt's",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_verify_cannot_repeat_is_refused_before_the_prompt_is_read(kind):
    target, ids = subclassed(Other), ids_of(1).repeat(2, 1)
    target.kind = kind
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    kept = slice(0, 2) if kind == "mask" else slice(1, 2)
    refused(target, REFUSED[kind], input_ids=ids[kept], attention_mask=mask[kept], pad_token_id=0)


def test_a_value_without_an_entry_for_each_sequence_is_refused_in_a_batch():
    shift = torch.randn(2, 1, 32)
    refused(subclassed(Shifted), "`shift` has no entry per sequence", input_ids=ids_of(3), shift=shift)


def test_an_iterator_is_refused_unread():
    chunks = iter([torch.ones(1, 32)])
    refused(
        subclassed(Steered), "`steering` is an iterator that every step advances", input_ids=ids_of(1), steering=chunks
    )
    assert len(list(chunks)) == 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_target_that_makes_up_positions_verifies_chains_without_any(budget):
    class Unplaced(Steered):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return super().prepare_inputs_for_generation(input_ids, **kwargs) | {"position_ids": None}

        def forward(self, input_ids=None, position_ids=None, **kwargs):
            assert position_ids is None
            cache = next(kwargs[name] for name in ("cache", "past_key_values") if name in kwargs)
            start = 5 + 2 * cache.get_seq_length()  # not what anyone would guess
            positions = start + 2 * torch.arange(input_ids.shape[1])[None]
            return super().forward(input_ids, position_ids=positions, **kwargs)

    target, ids = subclassed(Unplaced), ids_of(1)
    text = target.generate(ids, max_new_tokens=14, do_sample=False)
    head = head_for(target, text, budget)
    assert_same(target, head, input_ids=ids)
    if budget > 1:
        assert head.last_stats.num_accepted > 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_target_that_looks_at_its_image_in_every_forward(batch, budget):
    sizes = dict(embed_dim=32, image_size=28, patch_size=14, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(1)
    config = IdeficsConfig(
        **dict(vocab_size=257, additional_vocab_size=2, hidden_size=64, intermediate_size=96, num_hidden_layers=4),
        **dict(num_attention_heads=4, cross_layer_interval=2, use_resampler=False, tie_word_embeddings=False),
        vision_config=dict(sizes, intermediate_size=32),
        alpha_initializer="ones",
    )
    target, ids = IdeficsForVisionText2Text(config).eval(), ids_of(batch)
    image = dict(
        pixel_values=torch.randn(batch, 1, 3, 28, 28),
        image_attention_mask=torch.ones(batch, ids.shape[1], 1, dtype=torch.long),
    )
    head = JetFlowHead(JetFlowConfig.for_target(config, num_hidden_layers=1, block_size=4, mask_token_id=0)).eval()
    head.generation_config.node_budget = budget
    assert_same(target, head, input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **image)


def test_paligemma_with_several_kinds_of_masks_is_refused_and_with_one_decodes():
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    for kind in ("gemma", "gemma2"):
        text = dict(sizes, model_type=kind, num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=None)
        vision = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        vision |= dict(num_attention_heads=2, image_size=8, patch_size=4)
        config = PaliGemmaConfig(
            text_config=text, vision_config=vision, image_token_index=98, projection_dim=32, hidden_size=32
        )
        target = PaliGemmaForConditionalGeneration(config).eval()
        ids = torch.tensor([[98] * 4 + [5, 6, 7]])
        settings = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.rand(1, 3, 8, 8))
        settings |= dict(token_type_ids=torch.zeros_like(ids))
        if kind == "gemma2":
            refused(target, "takes no tree masks by kind of layer", **settings)
        else:
            head = JetFlowConfig.for_target(config, num_hidden_layers=1, block_size=4, mask_token_id=0)
            assert_same(target, JetFlowHead(head).eval(), **settings)


def test_activated_lora_is_refused_and_a_disabled_one_decodes():
    target, ids = subclassed(Steered), ids_of(1)
    target.peft_config = {"judge": SimpleNamespace(alora_invocation_tokens=[5, 6])}
    layer = target.model.layers[0].mlp
    layer.lora_variant, layer.disable_adapters = {}, False
    refused(target, "the adapter 'judge' .activated LoRA. adapts only the last rows", input_ids=ids)
    layer.disable_adapters = True
    text = target.generate(ids, max_new_tokens=14, do_sample=False)
    assert_same(target, head_for(target, text, 16), input_ids=ids)


def test_targets_whose_forwards_depend_on_their_number_of_rows_are_refused():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None)
    target = CpmAntForCausalLM(CpmAntConfig(vocab_size=257, dim_ff=64, dim_head=8, **sizes)).eval()
    refused(target, "trained rows in front of the tokens", input_ids=ids_of(1))
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    target = GitForCausalLM(GitConfig(intermediate_size=64, vision_config=vision, **sizes)).eval()
    refused(target, "masks and positions in forwards of one token", input_ids=ids_of(1))


def test_a_target_with_a_depth_decoder_is_refused():
    target = subclassed(Steered)
    target.depth_decoder = nn.Linear(2, 2)
    refused(target, "another model decodes between its steps", input_ids=ids_of(1))


def test_hidden_states_of_several_streams_are_those_of_plain_decoding():
    target, ids = support_matrix.build("gemma3n_text"), ids_of(1)
    settings = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_hidden_states=True)
    plain = target.generate(ids, **settings)
    drafted = target.generate(ids, **settings, assistant_model=head_for(target, plain.sequences, 16))
    assert torch.equal(plain.sequences, drafted.sequences)
    for theirs, ours in zip(plain.hidden_states, drafted.hidden_states, strict=True):
        for one, other in zip(theirs, ours, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
