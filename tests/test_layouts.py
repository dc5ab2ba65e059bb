"""Public layouts: each is read from a miniature with the real keys and names, and what is not known is refused."""

import json
import logging
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import make_layouts as make
import pytest
import torch
from make_scored_layouts import CHECKPOINTS
from reference import assert_same_text
from safetensors.torch import load_file, save_file

from hf_jetflow import JetFlowCandidateGenerator, JetFlowHead
from hf_jetflow.head import checkpoint_files as fetching
from hf_jetflow.head.formats import LAYOUTS, REFUSED, layout_table, recognize
from hf_jetflow.target.prefilled import TargetStates
from hf_jetflow.target.target import Target


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is logged while loading."""
    lines: list[str] = []
    logger = logging.getLogger("hf_jetflow.head.formats")
    monkeypatch.setattr(logger, "warning_once", lines.append, raising=False)
    return lines


@torch.no_grad()
def chains(head: JetFlowHead, target, num_prompts: int = 3) -> list[list[int]]:
    """Chains drafted behind random prompts; a head that is read wrongly drafts others."""
    generator = torch.Generator().manual_seed(7)
    drafted = []
    for length in range(5, 5 + num_prompts):
        ids = torch.randint(4, make.VOCAB, (1, length), generator=generator)
        view = Target(target, head.config)
        drafter = JetFlowCandidateGenerator(head, view)
        features, _ = view.states(ids[:, :-1])
        drafter.observe(TargetStates(torch.empty(1, 0, make.VOCAB), (features,), torch.arange(length - 1)[None]))
        chain, _ = drafter.get_candidates(ids)
        drafted.append(chain[0, length:].tolist())
    return drafted


def refusal(tmp_path: Path, config: make.Config, tensors: make.Tensors | None = None, **kwargs: Any) -> str:
    folder = make.write(tmp_path / "head", config, make.body_tensors() if tensors is None else tensors)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        JetFlowHead.from_pretrained(folder, **kwargs)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


# --- the layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make.CONFIGS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_config_is_recognized_by_its_layout(name, is_causal):
    assert recognize(make.CONFIGS[name](is_causal)).name == name.partition(",")[0]


def test_every_layout_has_a_miniature():
    made = {name.partition(",")[0] for name in (*make.CONFIGS, *CHECKPOINTS)} | {recognize(make.deepspec()).name}
    assert made == {layout.name for layout in LAYOUTS}


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_same_weights_draft_the_same_tokens_in_every_layout(target, tmp_path, is_causal):
    heads = {
        name: make.load(tmp_path / name, config(is_causal), make.body_tensors())
        for name, config in make.CONFIGS.items()
    }
    drafted = {name: chains(head, target) for name, head in heads.items()}
    assert all(drafts == drafted["JetFlow"] for drafts in drafted.values()), drafted
    assert all(len(chain) == make.BLOCK - 1 for chain in drafted["JetFlow"])
    assert len({tuple(chain) for chain in drafted["JetFlow"]}) == 3, "the miniature drafts the same whatever it reads"


def test_causal_and_bidirectional_heads_draft_differently(target, tmp_path):
    first, second = (
        make.load(tmp_path / str(flag), make.jetspec(flag), make.body_tensors()) for flag in (True, False)
    )
    assert chains(first, target) != chains(second, target)


@pytest.mark.parametrize("shift", [-1, 1])
def test_an_offset_in_the_tapped_layers_would_show(target, tmp_path, shift):
    config = make.jetspec(True)
    right = make.load(tmp_path / "right", config, make.body_tensors())
    config["dflash_config"]["target_layer_ids"] = [index + shift for index in make.LAYER_IDS]
    assert chains(make.load(tmp_path / "wrong", config, make.body_tensors()), target) != chains(right, target)


def test_a_foreign_head_leaves_the_text_as_it_is(target, tmp_path, prompt):
    head = make.load(tmp_path, make.speculators(True), make.body_tensors())
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    assert_same_text(plain, target.generate(prompt, assistant_model=head, max_new_tokens=12, do_sample=False))


def test_missing_layer_ids_are_spread_from_the_second_layer_to_the_third_last(tmp_path):
    config = make.dflash_old(False) | {"num_target_layers": 36}
    del config["dflash_config"]["target_layer_ids"]
    assert make.load(tmp_path, config, make.body_tensors()).config.hidden_state_indices == [2, 34]


def test_deepspec_heads_predict_from_the_anchor_with_their_own_embedding_and_lm_head(target, tmp_path):
    tensors = {**make.body_tensors(), **make.own_tensors()}
    head = make.load(tmp_path, make.deepspec(), tensors)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, make.VOCAB, (1, 9), generator=generator)
    view = Target(target, head.config)
    features, _ = view.states(ids[:, :-1])
    block = torch.tensor([[ids[0, -1]] + [make.MASK] * 6])
    with torch.no_grad():
        rows = head(
            inputs_embeds=tensors["embed_tokens.weight"][block],
            features=features,
            position_ids=torch.arange(8, 15)[None],
            context_position_ids=torch.arange(8)[None],
        )
    expected = (rows[0] @ tensors["lm_head.weight"].T).argmax(dim=-1).tolist()
    drafter = JetFlowCandidateGenerator(head, view)
    drafter.observe(TargetStates(torch.empty(1, 0, make.VOCAB), (features,), torch.arange(8)[None]))
    assert drafter.get_candidates(ids)[0][0, 9:].tolist() == expected
    assert len(expected) == 7
    assert head.config.causal_layers == [False, False]


def test_a_deepspec_head_leaves_the_text_as_it_is(target, tmp_path, prompt):
    head = make.load(tmp_path, make.deepspec(), {**make.body_tensors(), **make.own_tensors()})
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    assert_same_text(plain, target.generate(prompt, assistant_model=head, max_new_tokens=12, do_sample=False))
    assert head.generation_config.max_depth == 7


def test_speculators_heads_that_sample_from_the_anchor_draft_what_deepspec_s_do(target, tmp_path):
    tensors = {**make.body_tensors(), **make.own_tensors()}
    config = make.speculators(False) | {"sample_from_anchor": True, "block_size": make.BLOCK - 1}
    heads = [make.load(tmp_path / "s", config, tensors), make.load(tmp_path / "d", make.deepspec(), tensors)]
    assert chains(heads[0], target) == chains(heads[1], target)


def test_minus_one_taps_the_embeddings_in_deepspec_s_count(tmp_path):
    config = make.deepspec() | {"target_layer_ids": [-1, 4]}
    head = make.load(tmp_path, config, {**make.body_tensors(), **make.own_tensors()})
    assert head.config.hidden_state_indices == [0, 5]


# --- speculators' vocabulary -----------------------------------------------------------------------------------------


def reduced(num_drafted: int = 40) -> tuple[make.Config, make.Tensors, torch.Tensor]:
    """A speculators checkpoint with a reduced vocabulary, and the token ids of it."""
    token_ids = torch.randperm(make.VOCAB, generator=torch.Generator().manual_seed(1))[:num_drafted].sort().values
    in_draft = torch.zeros(make.VOCAB, dtype=torch.bool)
    in_draft[token_ids] = True
    tensors = {**make.body_tensors(), "d2t": token_ids - torch.arange(num_drafted), "t2d": in_draft}
    return make.speculators(False) | {"draft_vocab_size": num_drafted}, tensors, token_ids


def test_the_offsets_of_a_reduced_vocabulary_become_token_ids(target, tmp_path):
    config, tensors, token_ids = reduced()
    head = make.load(tmp_path, config, tensors, ngram_weights=[])  # with n-grams, tokens of the text are drafted, too
    assert torch.equal(head.d2t, token_ids)
    assert {token for chain in chains(head, target) for token in chain} <= set(token_ids.tolist())


def test_an_lm_head_in_the_file_is_used(target, tmp_path):
    config, tensors, token_ids = reduced()
    alone = dict(ngram_weights=[])  # a head that borrows the target's LM head drafts tokens of the text, too
    borrowed = make.load(tmp_path / "borrowed", config, tensors, **alone)
    rows = target.get_output_embeddings().weight.detach()[token_ids].clone()
    same = make.load(tmp_path / "same", config, {**tensors, "lm_head.weight": rows}, **alone)
    assert same.config.own_lm_head
    assert chains(same, target) == chains(borrowed, target)
    other = make.load(tmp_path / "other", config, {**tensors, "lm_head.weight": rows.flip(0).contiguous()}, **alone)
    assert chains(other, target) != chains(borrowed, target)


def test_an_embedding_in_the_file_is_used(target, tmp_path):
    config = make.speculators(False)
    weight = target.get_input_embeddings().weight.detach().clone()
    heads = [
        make.load(tmp_path / str(number), config, {**make.body_tensors(), **more})
        for number, more in enumerate(
            [{}, {"embed_tokens.weight": weight}, {"embed_tokens.weight": weight.flip(0).contiguous()}]
        )
    ]
    borrowed, same, other = (chains(head, target) for head in heads)
    assert same == borrowed != other


def test_tables_of_the_vocabulary_that_contradict_each_other_are_refused(tmp_path):
    config, tensors, _ = reduced()
    message = refusal(tmp_path, config, {**tensors, "t2d": ~tensors["t2d"]})
    assert "`d2t` and `t2d` name different draft vocabularies" in message


def test_a_reduced_vocabulary_without_its_table_is_refused(tmp_path):
    config, tensors, _ = reduced()
    assert "missing (d2t)" in refusal(tmp_path, config, {k: v for k, v in tensors.items() if k not in ("d2t", "t2d")})


def test_the_name_of_the_target_is_taken_over(tmp_path):
    assert make.load(tmp_path, make.speculators(True), make.body_tensors()).config.target_name == "org/target"


def test_a_head_that_taps_more_layers_than_the_target_has_is_refused(target, tmp_path, prompt):
    config = make.speculators(False) | {"aux_hidden_state_layer_ids": [2, 6]}
    head = make.load(tmp_path, config, make.body_tensors())
    with pytest.raises(ValueError, match="this target ends at 5"):
        target.generate(prompt, assistant_model=head, max_new_tokens=2)


# --- causality -------------------------------------------------------------------------------------------------------

WINDOWED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=64, use_sliding_window=True)
# Flags of a file with one sliding and one full layer, from the strongest to the weakest.
CAUSALITY = {
    "nested causal_head": (dict(dflash=dict(causal_head=True, causal=False), is_causal=False), [True, True]),
    "nested causal": (dict(dflash=dict(causal=False), is_causal=True), [False, False]),
    "is_causal": (dict(is_causal=False), [False, False]),
    "no flag": (dict(), [True, False]),
}


@pytest.mark.parametrize("case", CAUSALITY)
def test_flags_of_causality_have_an_order(tmp_path, said, case):
    settings, expected = CAUSALITY[case]
    config = {**make.dflash_old(False), **WINDOWED}
    config["dflash_config"] |= settings.get("dflash", {})
    config |= {key: value for key, value in settings.items() if key != "dflash"}
    assert make.load(tmp_path, config, make.body_tensors()).config.causal_layers == expected
    assert "inside the block" in said[0]


@pytest.mark.parametrize(("flag", "expected"), [(True, [False, False]), (False, [True, False]), (None, [True, False])])
def test_speculators_sliding_layers_follow_their_flag(tmp_path, flag, expected):
    config = make.speculators(False) | {"sliding_window_non_causal": flag}
    if flag is None:
        del config["sliding_window_non_causal"]
    config["transformer_layer_config"] |= WINDOWED
    head = make.load(tmp_path, config, make.body_tensors())
    assert head.config.causal_layers == expected
    assert head.config.layer_windows == [64, None]


def test_flags_that_contradict_each_other_are_named_with_the_one_that_won(tmp_path, said):
    make.load(tmp_path, make.automodel(True), make.body_tensors())
    (line,) = said
    assert "a NeMo Automodel head, causal inside the block (`dflash_config.causal: true`)" in line
    assert "`is_causal: false` says otherwise and was overruled" in line
    assert "Give `is_causal=` to `from_pretrained`" in line


@pytest.mark.parametrize("flag", [True, [False, True]])
def test_the_caller_overrides_the_causality_of_a_file(tmp_path, said, flag):
    head = make.load(tmp_path, make.automodel(False), make.body_tensors(), is_causal=flag)
    assert head.config.causal_layers == ([flag] * 2 if isinstance(flag, bool) else flag)
    assert "(given by the caller)" in said[0]


def test_a_flag_that_is_no_flag_is_refused(tmp_path):
    config = make.dflash_old(False) | {"is_causal": "auto"}
    assert "`is_causal: auto`: a causality flag must be true or false" in refusal(tmp_path, config)


def test_nothing_is_said_of_our_own_layout(tmp_path, said):
    make.load(tmp_path, make.jetflow(True), make.body_tensors())
    assert said == []


# --- what configs say ------------------------------------------------------------------------------------------------


def test_scales_and_the_soft_cap_of_a_file_are_read(tmp_path):
    config = make.dflash_old(False)
    config["dflash_config"] |= dict(input_embedding_scale=2.5, output_multiplier=0.5, final_logit_softcapping=30.0)
    read = make.load(tmp_path, config, make.body_tensors()).config
    assert (read.embedding_scale, read.logit_scale, read.logit_softcap) == (2.5, 0.5, 30.0)


def test_scale_and_soft_cap_shape_the_draft_probabilities(target, tmp_path):
    config = make.dflash_old(False)
    plain = make.load(tmp_path / "plain", config, make.body_tensors())
    config["dflash_config"] |= dict(output_multiplier=0.5, final_logit_softcapping=3.0)
    shaped = make.load(tmp_path / "shaped", config, make.body_tensors())
    rows = torch.randn(3, make.HIDDEN, generator=torch.Generator().manual_seed(2))
    logits = rows @ target.get_output_embeddings().weight.detach().T
    for head, expected in ((plain, logits), (shaped, 3 * torch.tanh(logits / 2 / 3))):
        head.config.ngram_weights = []
        drafter = JetFlowCandidateGenerator(head, Target(target, head.config))
        candidates = drafter.ranker.rank(rows, torch.tensor([5]), 5).candidates
        expected = torch.log_softmax(expected, dim=-1).topk(5)
        torch.testing.assert_close(candidates.logprobs, expected.values)


def test_the_embedding_scale_replaces_what_the_target_s_module_does(tiny_target, tmp_path):
    gemma = tiny_target("gemma2")
    config = make.dflash_old(False)
    head = make.load(tmp_path / "raw", config, make.body_tensors())
    ids = torch.tensor([[5, 6]])
    weight = gemma.get_input_embeddings().weight
    torch.testing.assert_close(Target(gemma, head.config).embeddings.embed(ids), weight[ids])
    config["dflash_config"]["input_embedding_scale"] = 2.0
    scaled = make.load(tmp_path / "scaled", config, make.body_tensors())
    torch.testing.assert_close(Target(gemma, scaled.config).embeddings.embed(ids), 2 * weight[ids])
    jetspec = make.load(tmp_path / "jetspec", make.jetspec(False), make.body_tensors())
    torch.testing.assert_close(Target(gemma, jetspec.config).embeddings.embed(ids), 8 * weight[ids])


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)


@pytest.mark.parametrize(
    "spelling",
    [
        dict(rope_theta=700, rope_scaling=YARN),
        dict(rope_theta=700, rope_scaling={"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}}),
        dict(rope_parameters={"rope_theta": 700, **YARN}),
    ],
    ids=["theta and scaling", "the older type", "parameters"],
)
def test_every_spelling_of_rope_is_read(tmp_path, spelling):
    config = {k: v for k, v in make.jetspec(True).items() if not k.startswith("rope_")} | spelling
    rope = make.load(tmp_path, config, make.body_tensors()).config.rope_parameters
    assert {**YARN, "rope_theta": 700}.items() <= rope.items()


@pytest.mark.parametrize(("model_type", "longest"), [("llama", 2048), ("qwen3", 32768)])
def test_what_speculators_leaves_out_has_the_default_of_the_body_it_names(tmp_path, model_type, longest):
    config = make.speculators(False)
    config["transformer_layer_config"]["model_type"] = model_type
    del config["transformer_layer_config"]["max_position_embeddings"]
    assert make.load(tmp_path, config, make.body_tensors()).config.max_position_embeddings == longest


@pytest.mark.parametrize(
    ("make_config", "change", "cause"),
    [
        (make.jetspec, dict(new_trick=1), "`new_trick: 1`"),
        (make.jetspec, dict(use_swa=True), "`use_swa: True`"),
        (make.jetspec, dict(dflash_config=dict(draft_shift=1)), "`dflash_config.draft_shift: 1`"),
        (make.jetspec, dict(dflash_config=dict(target_hidden_size=32)), "a head with a `hidden_dim_adapter`"),
        (
            make.jetspec,
            dict(dflash_config=dict(block_size=4)),
            "`dflash_config.block_size` is 4, but `block_size` is 8",
        ),
        (make.jetspec, dict(use_swa=False, swa_window_size=64), "`swa_window_size: 64`"),
        (make.jetspec, dict(dflash_config=dict(projector_type="other")), "`dflash_config.projector_type: other`"),
        (make.jetspec, dict(partial_rotary_factor=0.5), "`partial_rotary_factor: 0.5`"),
        (make.speculators, dict(sliding_window=64), "`sliding_window: 64`"),
        (
            make.speculators,
            dict(block_size="8", sample_from_anchor=True),
            "`block_size` is '8', but must be an integer",
        ),
        (
            make.speculators,
            dict(transformer_layer_config=3),
            "`transformer_layer_config` is 3, but must be a JSON object",
        ),
        (make.jetspec, dict(dflash_config=dict(target_layer_ids="1,3")), "'1,3', but a list of integers is needed"),
        (make.jetspec, dict(dflash_config=dict(target_layer_ids=[1, 5])), "lie in 0 .. 5"),
        (make.jetspec, dict(model_type="gemma4_text"), "'gemma4_text', but one of ('qwen3', 'llama') is needed"),
        (make.jetspec, dict(rope_parameters=dict(full_attention=dict(rope_theta=1.0))), "differ by kind of layer"),
        (
            make.jetspec,
            dict(rope_parameters=dict(rope_type="default", rope_theta=1.0, partial_rotary_factor=0.25)),
            "`partial_rotary_factor` is not 1",
        ),
        (make.jetspec, {**WINDOWED, "use_sliding_window": False}, "`use_sliding_window` is false"),
        (make.dflash_old, {**WINDOWED, "sliding_window": 4, "is_causal": False}, "shorter than a block of 8"),
        (
            make.speculators,
            dict(transformer_layer_config=dict(mlp_bias=True)),
            "`transformer_layer_config.mlp_bias: True`",
        ),
        (make.speculators, dict(norm_before_fc=True), "`norm_before_fc: True`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_known_is_refused_and_never_skipped(tmp_path, make_config, change, cause):
    config = make_config(False)
    for key, value in change.items():
        is_section = isinstance(config.get(key), dict) and isinstance(value, dict)
        config[key] = {**config[key], **value} if is_section else value
    assert cause in refusal(tmp_path, config)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_key_that_says_nothing_is_let_through(tmp_path, value):
    make.load(tmp_path, make.jetspec(True) | {"new_trick": value}, make.body_tensors())


def test_what_the_training_left_in_a_file_is_let_through(tmp_path):
    config = make.jetspec(True) | {"is_neox_style": True, "partial_rotary_factor": 1.0}
    config["dflash_config"] |= {"num_anchors": 4096, "loss_decay_gamma": 7.0, "projector_type": "dflash"}
    make.load(tmp_path, config, make.body_tensors())
    speculators = make.speculators(False)
    make.load(tmp_path, speculators | {"hidden_size": make.HIDDEN}, make.body_tensors())


def test_a_flag_of_the_rotation_that_is_off_is_refused(tmp_path):
    assert "`is_neox_style: False`" in refusal(tmp_path, make.jetspec(True) | {"is_neox_style": False})


@pytest.mark.parametrize("key", ["mask_token_id", "aux_hidden_state_layer_ids"])
def test_what_an_early_file_does_not_say_can_be_given(tmp_path, key):
    config, field = (
        make.speculators(False) | {key: None},
        key.replace("aux_hidden_state_layer_ids", "hidden_state_indices"),
    )
    assert f"give `{field}=` to `from_pretrained`" in refusal(tmp_path, config)
    value = {"mask_token_id": 9, "hidden_state_indices": [1, 5]}[field]
    head = JetFlowHead.from_pretrained(tmp_path / "head", **{field: value})
    assert getattr(head.config, field) == value


# --- refused by name -------------------------------------------------------------------------------------------------

REFUSED_CONFIGS = {
    "LiLiCorr": dict(
        architectures=["LiLiCorrDraftModel"],
        dflash_config=dict(
            lilicorr_candidate_topk=8, lilicorr_hidden_size=512, conv_kernel_size=2, conv_group_size=16
        ),
    ),
    "DeepSpec for Gemma 4": dict(architectures=["Gemma4DSparkModel"], markov_rank=256),
    "DeepSeek V4 DSpark": dict(
        architectures=["DeepseekV4ForCausalLM"], dspark_block_size=7, dspark_noise_token_id=3, dspark_markov_rank=256
    ),
    "MLA or MoE draft": dict(architectures=["K3DSparkModel"], model_type="k3_dspark", markov_rank=256),
    "Laguna DFlash": dict(architectures=["DFlashLagunaForCausalLM"]),
    "MiMo DFlash": dict(architectures=["DFlashDraftModel"], dflash_config={}, attention_sink_bias=True),
    "EAGLE": dict(architectures=["LlamaForCausalLMEagle3"]),
    "Medusa": dict(medusa_num_heads=4, medusa_num_layers=1),
    "quantized (compressed-tensors and others)": dict(
        speculators_model_type="dflash", quantization_config=dict(quant_method="compressed-tensors")
    ),
}


def test_every_refused_layout_is_tested():
    assert REFUSED_CONFIGS.keys() == {refusal.name for refusal in REFUSED}


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_a_layout_that_does_not_load_is_refused_by_name_with_what_to_do(tmp_path, name):
    message = refusal(tmp_path, {**make.qwen3_config(), **REFUSED_CONFIGS[name]})
    assert f"unsupported checkpoint layout {name}: " in message
    assert next(each.reason for each in REFUSED if each.name == name) in message


@pytest.mark.parametrize("kind", ["dsv4_dspark", "eagle3", "peagle"])
def test_other_speculators_are_refused_by_name(tmp_path, kind):
    assert "unsupported checkpoint layout" in refusal(
        tmp_path, make.speculators(False) | {"speculators_model_type": kind}
    )


@pytest.mark.parametrize("refused", [each for each in REFUSED if each.tensors], ids=lambda each: each.name)
def test_a_layout_that_does_not_load_is_known_by_its_tensors(tmp_path, refused):
    for part in refused.tensors:
        name = f"layers.0.{part}x"
        message = refusal(tmp_path, make.jetspec(True), {**make.body_tensors(), name: torch.zeros(2)})
        assert f"unsupported checkpoint layout {refused.name}: " in message
        assert f"`{name}`" in message


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_unknown_key_of_a_head_that_scores_branches_is_refused(tmp_path, name):
    config, tensors = CHECKPOINTS[name]()
    message = refusal(tmp_path, config | {"new_trick": 1}, tensors)
    assert "`new_trick: 1`" in message


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_unknown_tensor_of_a_head_that_scores_branches_is_refused(tmp_path, name):
    config, tensors = CHECKPOINTS[name]()
    message = refusal(tmp_path, config, {**tensors, "secret.weight": torch.zeros(2)})
    assert f"({name.partition(',')[0]}): the tensors do not match" in message
    assert "1 unexpected (secret.weight)" in message


SCORED_FAULTS = {
    "no rank": ("DFlash 2", lambda config: config["dflash_config"].pop("selector_rank"), "has no `selector_rank`"),
    "a reduced vocabulary": (
        "speculators dflash2",
        lambda config: config.update(draft_vocab_size=100),
        "`draft_vocab_size` is 100, but a dflash2 head scores the whole vocabulary",
    ),
    "another Markov head": (
        "DeepSpec DSpark",
        lambda config: config.update(markov_head_type="lstm"),
        "`markov_head_type` is 'lstm'",
    ),
    "neither flag nor count": (
        "speculators dspark",
        lambda config: [config.pop("sample_from_anchor"), config.pop("speculators_config")],
        "set `sample_from_anchor` in config.json",
    ),
    "another approximation": (
        "TreeFlash",
        lambda config: config["treeflash_config"].update(ar_approximation="rnn"),
        "only `ar_approximation` 'swiglu' or null is supported",
    ),
    "no shift": ("Domino", lambda config: config["dflash_config"].pop("shift_label"), "has no `shift_label`"),
    "a position factor": ("DFly", lambda config: config.update(markov_alpha_max=2.0), "`markov_alpha_max: 2.0`"),
}


@pytest.mark.parametrize("fault", SCORED_FAULTS)
def test_a_contradiction_in_a_head_that_scores_branches_is_named(tmp_path, fault):
    name, spoil, cause = SCORED_FAULTS[fault]
    config, tensors = CHECKPOINTS[name]()
    spoil(config)
    assert cause in refusal(tmp_path, config, tensors)


def test_an_early_dspark_file_says_by_its_number_of_drafts_whether_the_anchor_predicts(tmp_path):
    config, tensors = CHECKPOINTS["speculators dspark"]()
    del config["sample_from_anchor"]
    for count, predicts in ((make.BLOCK - 1, True), (make.BLOCK - 2, False)):
        config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = count
        head = make.load(tmp_path / str(count), config, tensors)
        assert head.config.anchor_predicts == predicts
        assert head.config.block_size - 1 == count


def test_an_unknown_tensor_is_refused_with_the_layout_s_name(tmp_path):
    message = refusal(tmp_path, make.jetspec(True), {**make.body_tensors(), "secret.weight": torch.zeros(2)})
    assert "(JetSpec): the tensors do not match" in message
    assert "1 unexpected (secret.weight)" in message


def test_a_missing_tensor_is_refused_with_the_layout_s_name(tmp_path):
    tensors = make.body_tensors()
    del tensors["hidden_norm.weight"]
    assert "(speculators dflash)" in (message := refusal(tmp_path, make.speculators(True), tensors))
    assert "1 missing (hidden_norm.weight)" in message


@pytest.mark.parametrize("config", [dict(architectures=["LlamaForCausalLM"], model_type="llama"), dict(hidden_size=8)])
def test_what_is_no_head_is_called_so(tmp_path, config):
    message = refusal(tmp_path, config)
    assert "no draft head of a known layout" in message
    assert "JetSpec" in message


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of local folders under `tmp_path / "hub"`; remembers which files were asked for."""
    asked: list[str] = []

    def snapshot(repo_id: str, *, allow_patterns: list[str], **kwargs: Any) -> str:
        repo, cache = tmp_path / "hub" / repo_id, tmp_path / "cache" / repo_id
        assert kwargs.keys() <= set(fetching.HUB_KEYWORDS)
        for path in (path for path in repo.rglob("*") if path.is_file()):
            name = path.relative_to(repo).as_posix()
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                asked.append(name)
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (cache / name).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr(fetching, "snapshot_download", snapshot)
    monkeypatch.setattr(
        fetching, "file_exists", lambda repo_id, path, **_: (tmp_path / "hub" / repo_id / path).exists()
    )
    return asked


def fill(folder: Path, config: make.Config | None = None) -> None:
    make.write(folder, config or make.jetspec(True), make.body_tensors())
    for name in (
        "training_state.pt",
        "pytorch_model.bin",
        "dflash.py",
        "optimizer/model.safetensors.pkl",
        "README.md",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never read")


def test_only_configs_and_safetensors_are_asked_of_the_hub(hub, tmp_path):
    fill(tmp_path / "hub" / "org" / "head")
    JetFlowHead.from_pretrained("org/head", revision="main", token=False)
    assert sorted(set(hub)) == ["config.json", "model.safetensors"]


def test_the_weights_of_a_refused_layout_are_not_asked_for(hub, tmp_path):
    fill(tmp_path / "hub" / "org" / "model", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    with pytest.raises(ValueError, match="no draft head of a known layout"):
        JetFlowHead.from_pretrained("org/model")
    assert hub == ["config.json"]


@pytest.mark.parametrize("spelling", ["org/heads::one/two", "org/heads"])
def test_a_head_in_a_subfolder_of_a_repository_is_found(hub, tmp_path, spelling):
    fill(tmp_path / "hub" / "org" / "heads" / "one" / "two")
    JetFlowHead.from_pretrained(spelling, **({} if "::" in spelling else {"subfolder": "one/two"}))
    assert set(hub) == {"one/two/config.json", "one/two/model.safetensors"}


def test_a_subfolder_of_a_local_folder_is_spelled_alike(tmp_path):
    fill(tmp_path / "heads" / "one")
    JetFlowHead.from_pretrained(f"{tmp_path / 'heads'}::one")


def test_two_subfolders_are_refused(tmp_path):
    fill(tmp_path / "heads" / "one")
    with pytest.raises(ValueError, match="two subfolders are given"):
        JetFlowHead.from_pretrained(f"{tmp_path / 'heads'}::one", subfolder="two")


def test_a_foreign_head_in_shards_is_read(tmp_path):
    fill(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in files.items() for name in held}}))
    head = JetFlowHead.from_pretrained(tmp_path)
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in tensors.items())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match=r"lists model-00002-of-00002\.safetensors, but there are no such"):
        JetFlowHead.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": {"a": "../../secret.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_cannot_be_used_is_named(tmp_path, content):
    fill(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(OSError, match=r"model\.safetensors\.index\.json"):
        JetFlowHead.from_pretrained(tmp_path)


def test_pickled_weights_alone_are_not_read(tmp_path):
    fill(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="never from pickled weights"):
        JetFlowHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("from_hub", [True, False])
def test_the_root_of_a_jetspec_plus_plus_repository_loads_as_a_plain_head_and_says_so(hub, said, tmp_path, from_hub):
    root = tmp_path / "hub" / "org" / "plus"
    fill(root)
    (root / "adapter").mkdir()
    for name in ("head.safetensors", "converter.safetensors"):
        (root / "adapter" / name).write_bytes(b"")
    source = "org/plus" if from_hub else str(root)
    JetFlowHead.from_pretrained(source)
    assert "is a JetSpec++ head. Its adapter is not supported and was left out" in said[1]
    assert not any("adapter" in name for name in hub)
    with pytest.raises(OSError, match=r"holds the adapter of a JetSpec\+\+ head"):
        JetFlowHead.from_pretrained(f"{source}::adapter")


def test_a_generation_config_of_another_project_leaves_the_head_its_own_settings(tmp_path):
    fill(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "temperature": 0.6, "do_sample": True})
    )
    settings = JetFlowHead.from_pretrained(tmp_path).generation_config
    assert (settings.node_budget, settings.max_depth) == (64, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_foreign_head_is_loaded_in_the_dtype_asked_for(tmp_path, dtype):
    tensors = {name: tensor.bfloat16() for name, tensor in make.body_tensors().items()}
    assert make.load(tmp_path, make.jetspec(True), tensors).dtype == torch.bfloat16
    assert make.load(tmp_path, make.jetspec(True), tensors, dtype=dtype).dtype == dtype


def test_a_foreign_head_saved_by_us_is_one_of_ours(tmp_path, target):
    head = make.load(tmp_path / "theirs", make.deepspec(), {**make.body_tensors(), **make.own_tensors()})
    head.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "jetflow"
    assert chains(JetFlowHead.from_pretrained(tmp_path / "ours"), target) == chains(head, target)


def test_a_head_with_modules_of_its_own_is_not_trained_further(tmp_path, target):
    from hf_jetflow.training.starting import start_from_head

    make.write(tmp_path, make.deepspec(), {**make.body_tensors(), **make.own_tensors()})
    with pytest.raises(ValueError, match="cannot be trained; remove `--head`"):
        start_from_head(str(tmp_path), target, None, seed=0)


def test_the_documents_table_of_layouts_is_the_code_s():
    assert layout_table() in (ROOT / "docs" / "heads.md").read_text(encoding="utf-8")
