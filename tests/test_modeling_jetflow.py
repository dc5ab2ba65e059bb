"""The draft head: shapes, what each row sees, the cache, names and files of its tensors, targets it is made for."""

import json

import pytest
import torch
from helpers import HIDDEN, NUM_TAPS, block_inputs, tiny_config, tiny_head
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.head.cache import GrowingHeadCache
from hf_jetflow.head.masks import visibility


BODY = ("fc.weight", "hidden_norm.weight", "norm.weight")
LAYER = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
)
CLOSE = dict(atol=1e-5, rtol=1e-4)


@torch.no_grad()
def run(head: JetFlowHead, inputs: dict[str, torch.Tensor], **changes: torch.Tensor) -> torch.Tensor:
    return head(**{**inputs, **changes})


def changed_rows(head: JetFlowHead, inputs: dict[str, torch.Tensor], **changes: torch.Tensor) -> list[bool]:
    """Which output rows a change of the inputs reaches."""
    difference = (run(head, inputs) - run(head, inputs, **changes)).abs().amax(dim=(0, 2))
    return (difference > 1e-6).tolist()


def with_noise(values: torch.Tensor, row: int) -> torch.Tensor:
    values = values.clone()
    values[:, row] += 1
    return values


def assert_same_tensors(first: JetFlowHead, second: JetFlowHead) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def test_the_head_returns_one_row_per_block_row():
    assert run(tiny_head(), block_inputs(5)).shape == (1, 4, HIDDEN)


def test_the_head_takes_a_part_of_a_block():
    inputs = block_inputs(5)
    part = {key: inputs[key][:, :2] for key in ("inputs_embeds", "position_ids")}
    head = tiny_head()
    torch.testing.assert_close(run(head, inputs, **part), run(head, inputs)[:, :2], **CLOSE)


def test_target_and_head_may_differ_in_width():
    head = tiny_head(target_hidden_size=20)
    inputs = block_inputs(5)
    assert run(head, inputs, features=inputs["features"][..., : NUM_TAPS * 20]).shape == (1, 4, HIDDEN)


@pytest.mark.parametrize("row", range(4))
def test_a_causal_block_row_reaches_only_itself_and_later_rows(row):
    head, inputs = tiny_head(), block_inputs(5)
    changed = changed_rows(head, inputs, inputs_embeds=with_noise(inputs["inputs_embeds"], row))
    assert changed == [place >= row for place in range(4)]


@pytest.mark.parametrize("row", range(4))
def test_a_bidirectional_block_row_reaches_every_row(row):
    head, inputs = tiny_head(is_causal=False), block_inputs(5)
    assert all(changed_rows(head, inputs, inputs_embeds=with_noise(inputs["inputs_embeds"], row)))


@pytest.mark.parametrize("flags", [[True, False], [False, True]])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_layer_follows_its_own_causality_flag(flags, layer):
    head, inputs = tiny_head(is_causal=flags), block_inputs(5)
    with torch.no_grad():
        head.layers[1 - layer].self_attn.o_proj.weight.zero_()  # only `layer` mixes rows
    changed = changed_rows(head, inputs, inputs_embeds=with_noise(inputs["inputs_embeds"], 3))
    assert changed == [not flags[layer]] * 3 + [True]


@pytest.mark.parametrize("place", range(5))
def test_every_row_sees_the_whole_context(place):
    head, inputs = tiny_head(), block_inputs(5)
    assert all(changed_rows(head, inputs, features=with_noise(inputs["features"], place)))


def test_a_loaded_head_knows_where_it_is_from(tmp_path):
    tiny_head().save_pretrained(tmp_path / "mine")
    head = JetFlowHead.from_pretrained(tmp_path / "mine")
    assert head.name_or_path == head.config.name_or_path == str(tmp_path / "mine")


def test_context_at_or_after_the_anchor_is_invisible():
    head, inputs = tiny_head(), block_inputs(5)
    late = inputs["context_position_ids"] + 1  # the last context row now stands at the anchor's position
    changed = changed_rows(head, {**inputs, "context_position_ids": late}, features=with_noise(inputs["features"], 4))
    assert not any(changed)


@pytest.mark.parametrize("place", range(5))
def test_a_sliding_layer_counts_its_window_in_positions(place):
    # Context positions have gaps, as behind padding: slots and positions tell different stories.
    settings = dict(num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=4)
    head, inputs = tiny_head(**settings), block_inputs(5)
    inputs["context_position_ids"] = torch.tensor([[0, 5, 6, 8, 9]])
    inputs["position_ids"] = torch.arange(10, 14)[None]
    changed = changed_rows(head, inputs, features=with_noise(inputs["features"], place))
    position = int(inputs["context_position_ids"][0, place])
    assert changed == [row - position < 4 for row in range(10, 14)]


def test_layers_of_both_kinds_work_side_by_side():
    settings = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=2)
    head, inputs = tiny_head(**settings), block_inputs(5)
    assert all(changed_rows(head, inputs, features=with_noise(inputs["features"], 0)))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_visibility_equals_its_definition(is_causal, window):
    position_ids = torch.tensor([[4, 5, 6, 9, 10, 11]])
    anchors = torch.tensor([[4, 4, 4, 9, 9, 9]])
    context = torch.tensor([[0, 1, 3, 4, 8]])
    mask = visibility(position_ids, context, anchors, is_causal, window)
    assert mask.shape == (1, 1, 6, 11)
    for row in range(6):
        position, anchor = int(position_ids[0, row]), int(anchors[0, row])
        for column, key in enumerate([*context[0].tolist(), *position_ids[0].tolist()]):
            if column < 5:
                sees = key < anchor
            else:
                sees = int(anchors[0, column - 5]) == anchor and (key <= position or not is_causal)
            sees = sees and (window is None or position - key < window)
            assert bool(mask[0, 0, row, column]) == sees, (row, column)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_causal": False},
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
        {"attn_implementation": "eager"},
    ],
    ids=["causal", "bidirectional", "sliding", "eager"],
)
def test_cached_rounds_equal_uncached_ones(settings):
    head, cache = tiny_head(**settings), GrowingHeadCache(2)
    whole = block_inputs(300)["features"]
    length = 0
    for num_new in (5, 3, 1, 4, 260, 1):  # outgrows the cache's first buffer
        block = {**block_inputs(length + num_new, seed=num_new), "features": whole[:, : length + num_new]}
        new = {key: block[key][:, length:] for key in ("features", "context_position_ids")}
        with torch.no_grad():
            cached = head(**{**block, **new}, past_key_values=cache)
        torch.testing.assert_close(cached, run(head, block), **CLOSE)
        length += num_new


def test_a_context_that_starts_late_is_read_at_its_own_positions():
    head, inputs = tiny_head(), block_inputs(5)
    shifted = {key: inputs[key] + 7 for key in ("position_ids", "context_position_ids")}
    torch.testing.assert_close(run(head, inputs, **shifted), run(head, inputs), **CLOSE)  # RoPE is relative
    moved = inputs["context_position_ids"] - torch.tensor([[3, 2, 1, 0, 0]])
    assert all(changed_rows(head, inputs, context_position_ids=moved))


@pytest.mark.parametrize(
    "settings",
    [{}, {"is_causal": False}, {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5}],
    ids=["causal", "bidirectional", "sliding"],
)
def test_many_blocks_at_once_equal_one_block_at_a_time(settings):
    head = tiny_head(**settings)
    context = block_inputs(12)
    anchors = [2, 5, 6, 11]  # blocks overlap
    blocks = [block_inputs(anchor, seed=anchor) for anchor in anchors]
    many = run(
        head,
        context,
        inputs_embeds=torch.cat([block["inputs_embeds"] for block in blocks], dim=1),
        position_ids=torch.cat([block["position_ids"] for block in blocks], dim=1),
        anchor_position_ids=torch.tensor(anchors).repeat_interleave(4)[None],
    )
    for number, (anchor, block) in enumerate(zip(anchors, blocks, strict=True)):
        alone = run(head, block, features=context["features"][:, :anchor])
        torch.testing.assert_close(many[:, 4 * number : 4 * number + 4], alone, **CLOSE)


@pytest.mark.parametrize("is_causal", [True, False])
def test_sdpa_equals_eager_attention(is_causal):
    inputs = block_inputs(6)
    sdpa, eager = (run(tiny_head(kind, is_causal=is_causal), inputs) for kind in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, **CLOSE)


def test_gradient_checkpointing_leaves_the_gradients_alone():
    gradients = []
    for is_checkpointed in (False, True):
        head = tiny_head().train()
        if is_checkpointed:
            head.gradient_checkpointing_enable()
        head(**block_inputs(5)).square().sum().backward()
        gradients.append(head.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({}, set()),
        ({"num_hidden_layers": 5}, set()),
        ({"mask_token_id": None}, {"mask_embedding"}),
        ({"draft_vocab_size": 10}, {"d2t"}),
        (
            {"attention_bias": True, "num_hidden_layers": 1},
            {f"layers.0.self_attn.{name}_proj.bias" for name in "qkvo"},
        ),
    ],
    ids=["plain", "five layers", "mask embedding", "draft vocabulary", "biases"],
)
def test_the_saved_tensors_have_the_public_names(settings, extra, tmp_path):
    head = tiny_head(**settings)
    head.save_pretrained(tmp_path)
    layers = {f"layers.{layer}.{name}" for layer in range(head.config.num_hidden_layers) for name in LAYER}
    assert load_file(tmp_path / "model.safetensors").keys() == {*BODY, *layers, *extra}


def test_the_fusion_reads_all_tapped_states():
    assert tiny_head().fc.weight.shape == (HIDDEN, NUM_TAPS * HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"mask_token_id": None, "draft_vocab_size": 10, "attention_bias": True}], ids=["plain", "extras"]
)
def test_a_saved_head_is_loaded_bit_by_bit(settings, dtype, tmp_path):
    head = tiny_head(**settings).to(dtype)
    head.save_pretrained(tmp_path)
    loaded = JetFlowHead.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype
    assert_same_tensors(head, loaded)


def test_a_loaded_head_computes_what_the_saved_one_did(tmp_path):
    head = tiny_head()
    head.save_pretrained(tmp_path)
    assert torch.equal(run(head, block_inputs(5)), run(JetFlowHead.from_pretrained(tmp_path), block_inputs(5)))


def test_a_loaded_head_can_be_cast_while_loading(tmp_path):
    head = tiny_head(draft_vocab_size=10)
    head.save_pretrained(tmp_path)
    loaded = JetFlowHead.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.fc.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.d2t, head.d2t)


def test_device_map_auto_loads_the_same_tensors(tmp_path):
    head = tiny_head(draft_vocab_size=10, mask_token_id=None)
    head.save_pretrained(tmp_path)
    assert_same_tensors(head, JetFlowHead.from_pretrained(tmp_path, device_map="auto").cpu())


def test_a_head_saved_in_shards_is_loaded_again(tmp_path):
    head = tiny_head()
    head.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_tensors(head, JetFlowHead.from_pretrained(tmp_path))


def test_the_configuration_survives_saving(tmp_path):
    config = tiny_config(
        is_causal=[True, False],
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=7,
        target_name="a/b",
    )
    JetFlowHead(config).save_pretrained(tmp_path)
    loaded = JetFlowHead.from_pretrained(tmp_path).config
    names = [name for name in JetFlowConfig.__dataclass_fields__ if name not in ("architectures", "dtype")]
    kept = {name: getattr(loaded, name) for name in names}
    assert kept == {
        **{name: getattr(config, name) for name in names},
        "transformers_version": kept["transformers_version"],
    }


def test_node_budget_and_depth_survive_saving(tmp_path):
    head = tiny_head()
    for name, value in (("node_budget", 17), ("max_depth", 2), ("width", 3)):
        setattr(head.generation_config, name, value)
    head.save_pretrained(tmp_path)
    loaded = JetFlowHead.from_pretrained(tmp_path).generation_config
    assert (loaded.node_budget, loaded.max_depth, loaded.width) == (17, 2, 3)


def test_node_budget_and_depth_are_found_in_a_subfolder(tmp_path):
    head = tiny_head()
    head.generation_config.node_budget = 17
    head.save_pretrained(tmp_path / "heads" / "one")
    loaded = JetFlowHead.from_pretrained(tmp_path, subfolder="heads/one")
    assert loaded.generation_config.node_budget == 17
    assert_same_tensors(head, loaded)


def test_node_budget_and_depth_are_found_in_the_hub_s_cache(tmp_path):
    head = tiny_head()
    head.generation_config.node_budget = 17
    repo = tmp_path / "models--org--head"
    head.save_pretrained(repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    loaded = JetFlowHead.from_pretrained("org/head", cache_dir=tmp_path, local_files_only=True)
    assert loaded.generation_config.node_budget == 17
    assert_same_tensors(head, loaded)


def test_a_head_without_generation_config_gets_the_defaults(tmp_path):
    tiny_head().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = JetFlowHead.from_pretrained(tmp_path).generation_config
    assert (loaded.node_budget, loaded.max_depth, loaded.width) == (64, 3, None)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("brach_correction", "branch_correction"),
        ("ngrams_weights", "ngram_weights"),
        ("is_casual", "is_causal"),
        ("hidden_states_indices", "hidden_state_indices"),
    ],
)
def test_a_misspelled_field_is_refused_with_the_right_name(wrong, right, tmp_path):
    message = f"`{wrong}` is no field of a head's configuration, did you mean `{right}`"
    with pytest.raises(ValueError, match=message):
        JetFlowConfig(**{wrong: None})
    tiny_head().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[wrong] = config.pop(right)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        JetFlowHead.from_pretrained(tmp_path)


def test_a_misspelled_field_given_to_loading_is_refused_with_the_right_name(tmp_path):
    tiny_head().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`is_casual` is no field .* did you mean `is_causal`"):
        JetFlowHead.from_pretrained(tmp_path, is_casual=True)


def test_facts_that_other_tools_store_in_a_configuration_stay(tmp_path):
    head = tiny_head()
    head.config.unsloth_version, head.config.trained_by = "2026.1", "somebody"
    head.save_pretrained(tmp_path)
    assert JetFlowHead.from_pretrained(tmp_path).config.trained_by == "somebody"


def test_saving_writes_safetensors_and_json_only(tmp_path):
    tiny_head(mask_token_id=None, draft_vocab_size=10).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_the_auto_classes_load_a_head(tmp_path):
    head = tiny_head()
    head.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is JetFlowConfig
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is JetFlowHead
    assert_same_tensors(head, loaded)


def test_loading_info_is_returned_where_asked_for(tmp_path):
    tiny_head().save_pretrained(tmp_path)
    loaded, info = JetFlowHead.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is JetFlowHead
    assert not info["missing_keys"]


@pytest.fixture
def uploads(monkeypatch) -> dict[str, list[str]]:
    """Files of every commit to the Hub, by repository; nothing leaves the machine."""
    commits: dict[str, list[str]] = {}

    class Repository:
        repo_id = "org/head"

    def create_commit(self, repo_id, operations, **_):
        commits.setdefault(repo_id, []).extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", lambda *_, **__: ModelCard("---\nlibrary_name: hf_jetflow\n---\n# A head"))
    return commits


UPLOADED = {"README.md", "config.json", "generation_config.json", "model.safetensors"}


def test_push_to_hub_uploads_the_card_the_configs_and_the_tensors_only(uploads):
    tiny_head().push_to_hub("org/head")
    assert sorted(uploads["org/head"]) == sorted(UPLOADED)


def test_saving_with_push_to_hub_uploads_the_generation_config_too(uploads, tmp_path):
    tiny_head().save_pretrained(tmp_path / "head", push_to_hub=True, repo_id="org/head", commit_message="A head")
    assert sorted(uploads["org/head"]) == sorted(UPLOADED)
    assert (tmp_path / "head" / "model.safetensors").exists()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "qwen3_moe", "mistral-sliding", "phi3"])
def test_a_head_for_a_target_fits_it(tiny_target, family):
    target = tiny_target(family).config
    config = JetFlowConfig.for_target(target, num_hidden_layers=2, block_size=6, mask_token_id=0)
    assert (config.vocab_size, config.hidden_size) == (target.vocab_size, target.hidden_size)
    assert (config.num_target_layers, config.target_model_type) == (target.num_hidden_layers, target.model_type)
    assert config.head_dim == getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads
    assert all(1 <= index <= target.num_hidden_layers for index in config.hidden_state_indices)
    rows = run(
        JetFlowHead(config),
        block_inputs(5, num_rows=6),
        inputs_embeds=torch.randn(1, 6, target.hidden_size),
        features=torch.randn(1, 5, 2 * target.hidden_size),
    )
    assert rows.shape == (1, 6, target.hidden_size)
    assert bool(rows.isfinite().all())


def test_a_head_for_a_target_with_two_kinds_of_rope_takes_that_of_full_attention(tiny_target):
    target = tiny_target("gemma3_text", rope_parameters=None).config
    rope = JetFlowConfig.for_target(target, mask_token_id=0).rope_parameters
    assert rope == target.rope_parameters["full_attention"]
    assert rope["rope_theta"] != target.rope_parameters["sliding_attention"]["rope_theta"]


def test_a_head_for_a_target_with_partial_rotation_rotates_all_of_it(tiny_target):
    target = tiny_target("gpt_neox").config
    assert target.rope_parameters["partial_rotary_factor"] < 1
    config = JetFlowConfig.for_target(target, mask_token_id=0)
    assert "partial_rotary_factor" not in config.rope_parameters
    assert len(JetFlowHead(config).rotary_emb.inv_freq) == config.head_dim // 2


def test_a_head_for_a_target_takes_other_settings_as_told(tiny_target):
    config = JetFlowConfig.for_target(tiny_target("llama").config, num_hidden_layers=3, head_dim=8, mask_token_id=7)
    assert (config.num_hidden_layers, config.head_dim, config.mask_token_id) == (3, 8, 7)
    assert config.hidden_state_indices == [2, 3, 3]


def test_a_setting_that_does_not_exist_is_refused_by_name(tiny_target):
    with pytest.raises(ValueError, match=r"'num_layers'.*not fields of `JetFlowConfig`"):
        JetFlowConfig.for_target(tiny_target("llama").config, num_layers=3)


def test_an_encoder_decoder_target_is_refused():
    with pytest.raises(ValueError, match="`t5` is an encoder-decoder model"):
        JetFlowConfig.for_target(AutoConfig.for_model("t5"))


@pytest.mark.parametrize(
    ("model_type", "eps"),
    [
        ("llama", 1e-6),
        ("cohere2_moe", 1e-5),  # `layer_norm_eps`; its `rms_norm_eps` is None
        ("gpt2", 1e-5),  # `layer_norm_epsilon`
        ("lfm2", 1e-5),  # `norm_eps`
        ("recurrent_gemma", 1e-6),
    ],
)
def test_a_head_takes_the_epsilon_of_its_target_by_any_name(model_type, eps):
    config = JetFlowConfig.for_target(AutoConfig.for_model(model_type), mask_token_id=0)
    assert config.rms_norm_eps == pytest.approx(eps)


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [("blt", "num_hidden_layers"), ("pi0", "num_hidden_layers"), ("clip_vision_model", "vocab_size")],
)
def test_a_target_that_is_no_stack_of_decoder_layers_is_refused_by_name(model_type, missing):
    with pytest.raises(ValueError, match=f"`{model_type}` has no .*`{missing}`"):
        JetFlowConfig.for_target(AutoConfig.for_model(model_type), mask_token_id=0)


def test_attention_heads_of_odd_width_are_one_narrower_in_the_head():
    target = AutoConfig.for_model("gpt_bigcode", n_embd=63, n_head=3)
    config = JetFlowConfig.for_target(target, mask_token_id=0, num_hidden_layers=1)
    assert config.head_dim == 20
    JetFlowHead(config)


def test_a_target_without_a_longest_position_gets_the_default():
    assert JetFlowConfig.for_target(AutoConfig.for_model("xlnet"), mask_token_id=0).max_position_embeddings == 32768


LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[2.0, 2.5, 3.0, 4.0],
    factor=4.0,
    original_max_position_embeddings=16,
)
ROPES = [
    dict(rope_type="default"),
    dict(rope_type="linear", factor=4.0),
    dict(rope_type="dynamic", factor=4.0),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    dict(
        rope_type="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    LONGROPE,
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("start", [0, 100], ids=["within the trained length", "beyond it"])
def test_every_kind_of_rope_scaling_runs(rope, start, tmp_path):
    head = tiny_head(rope_parameters={"rope_theta": 10000.0, **rope}, max_position_embeddings=64)
    rows = run(head, block_inputs(5, start=start))
    assert bool(rows.isfinite().all())
    head.save_pretrained(tmp_path)
    torch.testing.assert_close(run(JetFlowHead.from_pretrained(tmp_path), block_inputs(5, start=start)), rows, **CLOSE)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_the_rope_scaling_of_the_target_is_taken_over(rope):
    rope = {"rope_theta": 5000.0, **rope}
    target = AutoConfig.for_model(
        "llama", rope_parameters=rope, hidden_size=32, num_attention_heads=4, max_position_embeddings=64
    )
    taken = JetFlowConfig.for_target(target, mask_token_id=0).rope_parameters
    assert {key: taken[key] for key in rope} == rope


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, "`block_size` is 1, but a block needs the anchor"),
        ({"num_attention_heads": 3}, "must be a multiple of `num_key_value_heads`"),
        ({"is_causal": [True]}, "`is_causal` lists 1 layers, but `num_hidden_layers` is 2"),
        ({"layer_types": ["sliding_attention"] * 2}, "`sliding_window` is not set"),
        ({"layer_types": ["chunked_attention"] * 2}, "may hold 'full_attention' and 'sliding_attention' only"),
        ({"hidden_state_indices": [2, 7]}, "an offset of one is the usual cause"),
        ({"hidden_state_indices": []}, "must be non-empty"),
        ({"mask_token_id": 64}, "`mask_token_id` 64 is outside the vocabulary of 64"),
        ({"draft_vocab_size": 65}, "`draft_vocab_size` 65 must lie in 1 .. `vocab_size`"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0, but at least 1 is needed"),
        ({"head_dim": -8, "hidden_size": 0}, "`hidden_size` is 0, `head_dim` is -8, but at least 1 is needed"),
        ({"hidden_act": "sillu"}, "'sillu' is not an activation"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "weird"}, {"rope_type": "linear"}, {"full_attention": {"rope_theta": 1.0}}]
)
def test_rope_parameters_that_cannot_be_used_are_refused(rope):
    with pytest.raises(Exception, match="rope_parameters"):
        tiny_config(rope_parameters=rope)


def test_default_taps_are_spread_over_the_target():
    taps = [tiny_config(num_target_layers=36, num_hidden_layers=n, hidden_state_indices=None) for n in (1, 5)]
    assert [config.hidden_state_indices for config in taps] == [[19], [2, 10, 18, 26, 34]]
