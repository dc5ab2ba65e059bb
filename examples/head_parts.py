"""Parts that published heads have and the shipped one lacks. Each starts as what changes nothing.

`compare_training.py` trains a head with each. `JetFlowHead` has convolutions and mixtures for checkpoints of the
layouts that have them; slot embeddings exist here alone.
"""

from typing import Any

import torch
from torch import nn

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.head.decoder_layers import DynamicConvolution


GROUP_SIZE = 64  # channels that share the part of a kernel that the rows yield


class SlotHead(JetFlowHead):
    """A learned vector for each row of a block, added to its embedding (arXiv 2608.27339)."""

    def __init__(self, config: JetFlowConfig):
        if config.mask_token_id is None:
            raise ValueError("slot embeddings need a head with a MASK token; train one with `--mask-token`")
        super().__init__(config)
        # Of three dimensions, as these here and below are: Muon is for matrices that multiply rows.
        self.slot_embeddings = nn.Parameter(torch.zeros(config.num_rows, 1, config.hidden_size))

    def forward(self, inputs_embeds: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        anchors, positions = kwargs.get("anchor_position_ids"), kwargs["position_ids"]
        slots = positions - (positions[:, :1] if anchors is None else anchors)
        return super().forward(inputs_embeds + self.slot_embeddings[slots, 0].to(inputs_embeds.dtype), *args, **kwargs)


class ConvolvedHead(JetFlowHead):
    """Convolutions over two rows before and after each sublayer, as in DFlash 2."""

    def __init__(self, config: JetFlowConfig):
        super().__init__(config)
        sizes = {"conv_kernel_size": 2, "conv_group_size": GROUP_SIZE}
        parts = JetFlowConfig.from_dict({**config.to_dict(), **sizes})
        for layer in self.layers:
            layer.attention_conv, layer.mlp_conv = DynamicConvolution(parts), DynamicConvolution(parts)
            for conv in (layer.attention_conv, layer.mlp_conv):
                conv.base_kernel.data[:, 0] = 1.0
                nn.init.zeros_(conv.kernel_projection.weight)


class MixtureHead(JetFlowHead):
    """Besides the fusion that all layers share, each layer adds a mixture of the taps of its own (DFlare, DFly)."""

    def __init__(self, config: JetFlowConfig):
        super().__init__(config)
        assert config.hidden_state_indices is not None
        self.mixtures = nn.Parameter(torch.zeros(config.num_hidden_layers, len(config.hidden_state_indices), 1))

    def _contexts(self, features: torch.Tensor) -> list[torch.Tensor]:
        assert self.fc is not None
        taps = features.unflatten(-1, (self.mixtures.shape[1], -1))
        fused = self.fc(features)
        return [self.hidden_norm(fused + (weights * taps).sum(-2)).to(features.dtype) for weights in self.mixtures]


PARTS = {"slot embeddings": SlotHead, "2-tap convolutions": ConvolvedHead, "a mixture of taps per layer": MixtureHead}


def with_part(head: JetFlowHead, name: str) -> JetFlowHead:
    """The head with this part of `PARTS`, untrained: it drafts what it drafted."""
    whole = PARTS[name](head.config)
    _, unexpected = whole.load_state_dict(head.state_dict(), strict=False)
    assert not unexpected
    whole.generation_config = head.generation_config
    return whole.to(head.device, head.dtype)
