"""Published heads by their headers, without any weights: config keys, tensor names and shapes.

Keys, names, block sizes, taps, ranks and vocabularies are those of the published files as their engines' sources tell
them; a layer size that no source gives is a guess.
"""

from typing import Any

import pytest
import torch

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.head.formats import read_checkpoint, recognize


Shapes = dict[str, tuple[int, ...]]


def body_config(hidden: int, inner: int, layers: int, heads: tuple[int, int], vocab: int, **keys: Any) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    return {
        **sizes,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 128,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "max_position_embeddings": 40960,
        **keys,
    }


def body_shapes(config: dict, num_taps: int) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (128 * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    layer |= {"self_attn.q_proj": (queries, hidden), "self_attn.o_proj": (hidden, queries)}
    layer |= {f"self_attn.{name}_proj": (keys, hidden) for name in "kv"}
    layer |= {f"self_attn.{name}_norm": (128,) for name in "qk"}
    layer |= {f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")} | {"mlp.down_proj": (hidden, inner)}
    shapes = {"fc.weight": (hidden, num_taps * hidden), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def dflash2_qwen38_27b() -> tuple[dict, Shapes]:
    """z-lab/Qwen3.8-27B-DFlash2."""
    config = body_config(5120, 17408, 5, (32, 8), 248320, architectures=["DFlash2DraftModel"], is_causal=False)
    config |= {"layer_types": ["sliding_attention"] * 5, "sliding_window": 2048, "use_sliding_window": True}
    section = {"block_size": 8, "conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256}
    section |= {"selector_top_k": 16, "mask_token_id": 248070, "target_layer_ids": [5, 19, 33, 47, 61]}
    shapes = body_shapes(config, 5)
    for index in range(5):
        for name in ("attention_conv", "mlp_conv"):
            shapes[f"layers.{index}.{name}.base_kernel"] = (2, 2, 5120)
            shapes[f"layers.{index}.{name}.kernel_projection.weight"] = (1280, 5120)
    shapes |= {f"candidate_selector.{name}_codebook": (248320, 256) for name in ("predecessor", "successor")}
    shapes["candidate_selector.hidden_projection.weight"] = (256, 5120)
    return config | {"num_target_layers": 64, "dflash_config": section}, shapes


def dspark_qwen3_4b() -> tuple[dict, Shapes]:
    """deepseek-ai/dspark_qwen3_4b_block7."""
    config = body_config(2560, 9728, 5, (32, 8), 151936, architectures=["Qwen3DSparkModel"], num_anchors=512)
    config |= {"num_target_layers": 36, "block_size": 7, "mask_token_id": 151669, "markov_rank": 256}
    config |= {"target_layer_ids": [1, 9, 17, 25, 33], "enable_confidence_head": True, "markov_head_type": "vanilla"}
    shapes = body_shapes(config, 5) | {f"{name}.weight": (151936, 2560) for name in ("embed_tokens", "lm_head")}
    shapes |= {f"markov_head.markov_{name}.weight": (151936, 256) for name in ("w1", "w2")}
    shapes |= {"confidence_head.proj.weight": (1, 2816), "confidence_head.proj.bias": (1,)}
    return config | {"confidence_head_with_markov": True}, shapes


def dspark_gemma4_31b() -> tuple[dict, Shapes]:
    """RedHatAI/gemma-4-31B-it-speculator.dspark: anchor row without prediction, own embedding, reduced vocabulary."""
    layers = body_config(5376, 21504, 5, (32, 16), 262144, sliding_window=2048, use_sliding_window=True)
    layers["layer_types"] = ["sliding_attention"] * 5
    config = {"architectures": ["DSparkDraftModel"], "speculators_model_type": "dspark", "draft_vocab_size": 32000}
    config |= {"transformer_layer_config": layers, "block_size": 8, "mask_token_id": 4, "sample_from_anchor": False}
    config |= {"aux_hidden_state_layer_ids": [1, 17, 29, 47, 58], "sliding_window_non_causal": False}
    config |= {"markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": False}
    shapes = body_shapes(layers, 5) | {"embed_tokens.weight": (262144, 5376), "lm_head.weight": (32000, 5376)}
    shapes |= {"markov_head.markov_w1.weight": (262144, 256), "markov_head.markov_w2.weight": (32000, 256)}
    return config, shapes


PUBLISHED = {
    "DFlash 2": (dflash2_qwen38_27b, 81, dict(causal_layers=[False] * 5, num_rows=8, block_size=8)),
    "DeepSpec DSpark": (dspark_qwen3_4b, 64, dict(causal_layers=[False] * 5, num_rows=7, block_size=8)),
    "speculators dspark": (dspark_gemma4_31b, 62, dict(causal_layers=[True] * 5, num_rows=8, block_size=8)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_header_fits_the_head_that_is_built_for_it(name):
    make, num_tensors, facts = PUBLISHED[name]
    config, shapes = make()
    assert len(shapes) == num_tensors
    layout = recognize(config)
    assert layout.name == name
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        reading = read_checkpoint(layout, config, tensors, {})
        head = JetFlowHead(JetFlowConfig.from_dict(reading.fields))
    built = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items() if name != "d2t"}
    assert built == {name: tuple(tensor.shape) for name, tensor in reading.tensors.items()}
    assert {fact: getattr(head.config, fact) for fact in facts} == facts
    if name == "DeepSpec DSpark":  # in bfloat16, as big as the published file
        assert round(2 * sum(tensor.numel() for tensor in head.state_dict().values()) / 1e9, 2) == 2.79
