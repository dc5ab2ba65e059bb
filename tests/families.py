"""The families of the support matrix: of each the smallest configuration with its special features."""

from dataclasses import dataclass, field
from typing import Any


WINDOW = 9

COMMON: dict[str, Any] = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LOCAL_EXPERTS: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=2)
LATENT: dict[str, Any] = dict(  # multi-head latent attention
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
INDEXED: dict[str, Any] = dict(LATENT, index_topk=4, index_head_dim=8, index_n_heads=2)
GROUPED: dict[str, Any] = dict(LATENT, num_key_value_heads=2, head_dim=8)  # experts without latent attention
DELTA: dict[str, Any] = dict(
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4
)
MAMBA: dict[str, Any] = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8)
IMAGE_ID = 60
# Images of 4 x 4 patches, four of which become one token where the family merges them.
PATCHES: dict[str, Any] = dict(depth=2, num_heads=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2)
PIXELS: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
)
MULTIMODAL_ROPE: dict[str, Any] = dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2])
HYBRID = ["linear_attention", "full_attention"] * 2
MIXED = ["sliding_attention", "full_attention"] * 2


@dataclass(frozen=True)
class Family:
    """One row of the support matrix."""

    attention: str  # what is special about the attention, in words
    settings: dict[str, Any] = field(default_factory=dict)
    model_type: str | None = None  # where a family has several rows
    window: int | None = None  # positions that a sliding or chunked layer sees
    seed: int = 1  # of weights whose greedy texts do not repeat themselves
    image: str | None = None  # how the family is given an image: its prompts then have one


def _sliding(attention: str = "sliding window", seed: int = 1, **settings: Any) -> Family:
    return Family(attention, {"sliding_window": WINDOW, **settings}, window=WINDOW, seed=seed)


def _mixed(attention: str = "sliding and full", seed: int = 1, **settings: Any) -> Family:
    return _sliding(attention, seed, layer_types=MIXED, **settings)


def _seeing(attention: str, vision: dict[str, Any], seed: int = 1, **text: Any) -> Family:
    """A family that takes images, whose positions in time, height and width are rotated beside each other."""
    settings = dict(
        text_config={**COMMON, "rope_parameters": MULTIMODAL_ROPE, **text},
        vision_config=dict(PATCHES, hidden_size=32, intermediate_size=32, out_hidden_size=32, in_channels=3) | vision,
        image_token_id=IMAGE_ID,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return Family(attention, settings, seed=seed, image="patches")


FAMILIES: dict[str, Family] = {
    "afmoe": _mixed("sliding and full, experts", head_dim=8, **EXPERTS),
    "apertus": Family("full", seed=11),
    "apertus1p5_text": Family("full", seed=2),
    "arcee": Family("full", seed=4),
    "aria_text": Family("full, experts", dict(head_dim=8, moe_num_experts=4)),
    "axk1": Family("latent, experts", LATENT),
    "bailing_hybrid": Family(
        "recurrent and latent, experts",
        dict(
            {name: size for name, size in LATENT.items() if name != "n_routed_experts"},
            head_dim=8,
            layer_types=HYBRID,
            num_local_experts=4,
        ),
    ),
    "bamba": Family("recurrent and full", dict(attn_layer_indices=[1, 3], **MAMBA)),
    "biogpt": Family("full, learned positions", seed=11),
    "bitnet": Family("full"),
    "bloom": Family("alibi", seed=12),
    "codegen": Family("full", dict(rotary_dim=4, n_ctx=128), seed=13),
    "cohere": Family("full, logit scale", dict(logit_scale=0.5), seed=2),
    "cohere2": _mixed("sliding and full, logit scale", logit_scale=0.5),
    "cohere2_moe": _mixed("sliding and full, logit scale, experts", logit_scale=0.5, head_dim=8, **EXPERTS),
    "cwm": _mixed(seed=5),
    "deepseek_v2": Family("latent, experts", LATENT),
    "deepseek_v3": Family("latent, experts", LATENT, seed=2),
    "deepseek_v32": Family("latent, sparse by index", INDEXED),
    "deepseek_v4": Family("compressed, experts", dict(INDEXED, head_dim=16, o_groups=2, o_lora_rank=16)),
    "diffllama": Family("full, differential"),
    "doge": Family("sparse by score", dict(keep_window_size=WINDOW)),
    "dory": Family(
        "looped, sliding and full",
        dict(sliding_window=WINDOW, head_dim=8, layer_types=MIXED, n_input_layers=1, n_output_layers=1),
        window=WINDOW,
    ),
    "dots1": _mixed("sliding and full, experts", n_shared_experts=1, **GROUPED),
    "ernie4_5": Family("full", seed=5),
    "ernie4_5_moe": Family("full, experts", dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=16)),
    "exaone": Family("full"),
    "exaone4": _mixed(seed=3),
    "exaone_moe": _mixed("sliding and full, experts", head_dim=8, **EXPERTS),
    "falcon": Family("multi-query", dict(multi_query=True), seed=4),
    "falcon-alibi": Family("multi-query, alibi", dict(multi_query=True, alibi=True), model_type="falcon", seed=14),
    "falcon_h1": Family("recurrent and full in each layer", dict(MAMBA, mamba_d_ssm=32, mamba_d_head=8), seed=4),
    "falcon_mamba": Family("recurrent", dict(state_size=8, time_step_rank=4)),
    "flex_olmo": Family("full, experts", EXPERTS),
    "flint": _mixed("sliding and full, experts", head_dim=8, shared_expert_intermediate_size=16, **EXPERTS),
    "gemma": Family("full, embedding scale", dict(head_dim=8)),
    "gemma2": _sliding("sliding and full, soft caps, eager", head_dim=8, attn_logit_softcapping=2.0, seed=7),
    "gemma3": Family(
        "image, sliding and full",
        dict(
            text_config=dict(COMMON, head_dim=8, sliding_window=WINDOW, layer_types=MIXED),
            vision_config=PIXELS,
            mm_tokens_per_image=4,
            image_token_index=IMAGE_ID,
            boi_token_index=62,
            eoi_token_index=63,
        ),
        window=WINDOW,
        seed=23,
        image="pixels of 4 tokens",
    ),
    "gemma3_text": _mixed("sliding and full, embedding scale", head_dim=8, seed=6),
    "gemma3n_text": _mixed(
        "sliding and full, keys and values shared by layers",
        head_dim=8,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=67,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4_text": _mixed(
        "sliding and full, keys and values shared by layers",
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=67,
        hidden_size_per_layer_input=8,
    ),
    "gemma4_unified_text": _mixed(
        "sliding and full, heads of two widths", head_dim=8, per_layer_config={i: {"head_dim": 16} for i in "13"}
    ),
    "glm": Family("full, partial rotary", dict(head_dim=8)),
    "glm4": Family("full, partial rotary", dict(head_dim=8), seed=4),
    "glm4_moe": Family("full, experts", GROUPED, seed=3),
    "glm4_moe_lite": Family("latent, experts", LATENT, seed=2),
    "glm4v": _seeing("image, multimodal rope", dict(image_size=16), seed=21),
    "glm_moe_dsa": Family("latent, sparse by index, experts", INDEXED),
    "gpt2": Family("full, learned positions", seed=2),
    "gpt_bigcode": Family("multi-query, learned positions", dict(multi_query=True), seed=2),
    "gpt_neo": Family(
        "local and full, learned positions",
        dict(attention_types=[[["global", "local"], 2]], window_size=WINDOW),
        seed=2,
    ),
    "gpt_neox": Family("full, partial rotary", seed=5),
    "gpt_oss": _mixed("sliding and full, sinks, experts, eager", head_dim=8, **LOCAL_EXPERTS),
    "gptj": Family("full, partial rotary", dict(rotary_dim=4), seed=8),
    "granite": Family(
        "full, multipliers", dict(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5)
    ),
    "granite_swa": _mixed("sliding and full, multipliers", embedding_multiplier=3.0, logits_scaling=2.0),
    "granitemoe": Family("full, experts", dict(embedding_multiplier=3.0, logits_scaling=2.0, **LOCAL_EXPERTS)),
    "granitemoe_swa": _mixed("sliding and full, experts", embedding_multiplier=3.0, **LOCAL_EXPERTS),
    "granitemoehybrid": Family(
        "recurrent and full, experts", dict(layer_types=HYBRID, shared_intermediate_size=16, **LOCAL_EXPERTS, **MAMBA)
    ),
    "granitemoeshared": Family("full, experts", dict(shared_intermediate_size=16, **LOCAL_EXPERTS)),
    "helium": Family("full", dict(head_dim=8), seed=3),
    "hrm_text": Family("looped, full", dict(num_hidden_layers=8, num_layers_per_stack=1, head_dim=8), seed=3),
    "hunyuan_v1_dense": Family("full", dict(head_dim=8), seed=5),
    "hunyuan_v1_moe": Family("full, experts", dict(head_dim=8, num_experts=4, moe_topk=2), seed=2),
    "hy_v3": Family("full, experts", dict(head_dim=8, **EXPERTS)),
    "hy_v4": Family("latent, sparse by index, experts", INDEXED),
    "hyperclovax": Family("full, multipliers", dict(head_dim=8, embedding_multiplier=3.0, logits_scaling=2.0)),
    "inkling_text": Family("convolutions, sliding and full, experts", dict(GROUPED, swa_head_dim=8, rel_extent=16)),
    "internlm3": Family("full", dict(head_dim=8)),
    "iquestcoder": Family("full", dict(head_dim=8)),
    "jais2": Family("full", dict(head_dim=8)),
    "jamba": Family(
        "recurrent and full, experts",
        dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, num_experts=2),
    ),
    "jetmoe": Family(
        "full, experts of attention heads", dict(kv_channels=8, num_key_value_heads=4, **LOCAL_EXPERTS), seed=7
    ),
    "kimi_linear": Family(
        "recurrent and latent, experts",
        dict(LATENT, layer_types=HYBRID, linear_head_dim=8, linear_num_heads=4, num_local_experts=4),
    ),
    "kolibri1": _mixed("sliding and full, experts", head_dim=8, moe_intermediate_size=16, **LOCAL_EXPERTS),
    "laguna": _mixed("sliding and full, experts", head_dim=8, num_attention_heads_per_layer=[4, 2] * 2, **EXPERTS),
    "lara_mini": _sliding(
        "recurrent and sliding, experts", head_dim=8, layer_types=[HYBRID[0], MIXED[0]] * 2, **DELTA, **EXPERTS
    ),
    "lfm2": Family("convolutions and full", dict(layer_types=["conv", "full_attention"] * 2)),
    "lfm2_moe": Family(
        "convolutions and full, experts",
        dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1, **EXPERTS),
        seed=2,
    ),
    "lfm3": _sliding(
        "convolutions, sliding and full",
        head_dim=8,
        layer_types=["conv", "sliding_attention", "conv", "full_attention"],
    ),
    "llama": Family("full", seed=2),
    "llama4_text": Family(
        "chunked and full, queries scaled by index, experts",
        dict(
            head_dim=8,
            intermediate_size_mlp=48,
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention"] * 2,
            num_local_experts=2,
            floor_scale=16,
            attn_scale=2.0,
        ),
        window=WINDOW,
        seed=2,
    ),
    "llava": Family(
        "image, full",
        dict(
            text_config=dict(COMMON, model_type="llama"),
            vision_config=dict(PIXELS, model_type="clip_vision_model", projection_dim=32),
            image_token_index=IMAGE_ID,
            vision_feature_layer=-1,
        ),
        image="pixels of 16 tokens",
    ),
    "longcat_flash": Family(
        "latent, experts",
        dict(
            LATENT,
            head_dim=8,
            ffn_hidden_size=48,
            expert_ffn_hidden_size=16,
            num_layers=2,
            moe_topk=2,
            zero_expert_num=1,
        ),
    ),
    "mamba2": Family("recurrent", dict(num_heads=4, head_dim=16, state_size=8, chunk_size=8, n_groups=1)),
    "mellum": _mixed("sliding and full, experts", head_dim=8, **EXPERTS),
    "mimo_v2_flash": _mixed("sliding and full, sinks, experts", **GROUPED),
    "minicpm3": Family("latent", dict(LATENT, head_dim=8)),
    "minimax": Family(
        "recurrent and full, experts", dict(head_dim=8, layer_types=HYBRID, block_size=8, **LOCAL_EXPERTS)
    ),
    "minimax_m2": Family("full, experts", dict(head_dim=8, **LOCAL_EXPERTS), seed=8),
    "minimax_m3_vl_text": Family("full, experts", dict(head_dim=8, rotary_dim=4, **LOCAL_EXPERTS)),
    "minimax_m3_vl_text-sparse": Family(
        "full and sparse by index, experts",
        dict(head_dim=8, layer_types=["full_attention", "minimax_m3_sparse"] * 2, **LOCAL_EXPERTS),
        "minimax_m3_vl_text",
    ),
    "ministral": _mixed(head_dim=8),
    "ministral3": _sliding(head_dim=8),
    "mistral": _sliding(),
    "mixtral": _sliding("sliding window, experts", **LOCAL_EXPERTS),
    "mllama": Family(
        "image, cross-attention",
        dict(
            text_config=dict(COMMON, cross_attention_layers=[1]),
            vision_config=dict(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_global_layers=1,
                attention_heads=2,
                image_size=16,
                patch_size=4,
                vision_output_dim=64,
                intermediate_layers_indices=[0],
                max_num_tiles=1,
                supported_aspect_ratios=[[1, 1]],
            ),
        ),
        seed=3,
    ),
    "modernbert-decoder": _mixed(local_attention=2 * WINDOW),
    "mpt": Family("alibi", dict(max_seq_len=128, use_cache=True), seed=3),
    "nanochat": Family("full, logit soft cap", seed=2),
    "nemotron": Family("full, partial rotary", seed=2),
    "nemotron_h": Family(
        "recurrent and full, layers without either, experts",
        dict(
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=8,
            head_dim=8,
            n_routed_experts=4,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
        ),
    ),
    "olmo": Family("full", seed=4),
    "olmo2": Family("full", seed=3),
    "olmo3": _mixed(seed=3),
    "olmo_hybrid": Family("recurrent and full", dict(layer_types=HYBRID, **DELTA)),
    "olmoe": Family("full, experts", EXPERTS, seed=8),
    "opt": Family("full, learned positions", dict(ffn_dim=48, word_embed_proj_dim=32), seed=7),
    "opt-projected": Family(
        "full, embeddings of another width", dict(ffn_dim=48, word_embed_proj_dim=16), model_type="opt"
    ),
    "persimmon": Family("full, partial rotary"),
    "phi": Family("full, partial rotary", seed=2),
    "phi3": _sliding(),
    "phimoe": _sliding("sliding window, experts", **LOCAL_EXPERTS),
    "qwen2": _mixed(use_sliding_window=True),
    "qwen2_5_vl": _seeing("image, multimodal rope", dict(window_size=16, fullatt_block_indexes=[1]), seed=4),
    "qwen2_moe": Family("full, experts", dict(EXPERTS, shared_expert_intermediate_size=16), seed=3),
    "qwen2_vl": _seeing("image, multimodal rope", dict(embed_dim=32, mlp_ratio=1), seed=4),
    "qwen3": Family("full", dict(head_dim=8), seed=5),
    "qwen3_5": _seeing(
        "image, multimodal rope, recurrent and full",
        dict(num_position_embeddings=16),
        head_dim=8,
        layer_types=HYBRID,
        **DELTA,
    ),
    "qwen3_5_moe_text": Family(
        "recurrent and full, experts",
        dict(head_dim=8, layer_types=HYBRID, shared_expert_intermediate_size=16, **DELTA, **EXPERTS),
    ),
    "qwen3_5_text": Family("recurrent and full", dict(head_dim=8, layer_types=HYBRID, **DELTA)),
    "qwen3_moe": Family("full, experts", dict(head_dim=8, **EXPERTS), seed=13),
    "qwen3_next": Family(
        "recurrent and full, experts",
        dict(head_dim=8, layer_types=HYBRID, shared_expert_intermediate_size=16, **DELTA, **EXPERTS),
    ),
    "qwen3_vl": _seeing(
        "image, multimodal rope", dict(num_position_embeddings=16, deepstack_visual_indexes=[0, 1]), seed=2, head_dim=8
    ),
    "recurrent_gemma": Family(
        "recurrent and sliding",
        dict(block_types=["recurrent", "attention"], lru_width=32, attention_window_size=WINDOW),
        window=WINDOW,
    ),
    "sarvam_mla": Family("latent, experts", LATENT, seed=10),
    "sarvam_moe": Family("full, experts", LATENT, seed=4),
    "seed_oss": Family("full", dict(head_dim=8)),
    "smollm3": Family("full, layers without positions"),
    "solar_open": Family("full, experts", GROUPED),
    "stablelm": Family("full, partial rotary", seed=3),
    "starcoder2": _sliding(seed=7),
    "vaultgemma": _mixed("sliding and full, soft caps, eager", head_dim=8),
    "xglm": Family(
        "full, sinusoidal positions", dict(d_model=32, ffn_dim=48, attention_heads=4, num_layers=4), seed=13
    ),
    "youtu": Family("latent", LATENT),
    "zamba2": Family(
        "recurrent and full",
        dict(
            layers_block_type=["linear_attention", "hybrid"] * 2,
            n_mamba_heads=4,
            mamba_d_state=8,
            chunk_size=8,
            num_mem_blocks=1,
            adapter_rank=4,
        ),
    ),
    "zaya": Family("convolutions and full, experts", dict(EXPERTS, head_dim=8, num_experts_per_tok=1), seed=9),
}
