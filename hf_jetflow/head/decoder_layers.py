"""The layers of the head's body: attention over context and block, SwiGLU, and the convolutions of some layouts."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, eager_attention_forward, rotate_half

from .cache import HeadCache
from .configuration_jetflow import JetFlowConfig


class JetFlowAttention(nn.Module):
    """Cross- and self-attention in one: queries of the block, keys and values of the context and the block."""

    def __init__(self, config: JetFlowConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # causality is in the mask: the context is always fully visible
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)
        # The context's own projections (DFlare); without them, it shares those of the block.
        widths = (config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.k_proj_target = nn.Linear(*widths, bias=bias) if config.own_context_kv else None
        self.v_proj_target = nn.Linear(*widths, bias=bias) if config.own_context_kv else None
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        block: torch.Tensor,
        context: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
        past_key_values: HeadCache | None,
    ) -> torch.Tensor:
        batch, rows, _ = block.shape
        cos, sin = (table.unsqueeze(1) for table in cos_sin)
        query = self.q_norm(self.q_proj(block).view(batch, rows, -1, self.head_dim)).transpose(1, 2)
        keys, values = self._keys_and_values(block, context)
        key = self.k_norm(keys.view(batch, keys.shape[1], -1, self.head_dim)).transpose(1, 2)
        value = values.view(batch, values.shape[1], -1, self.head_dim).transpose(1, 2)
        query = query * cos[:, :, -rows:] + rotate_half(query) * sin[:, :, -rows:]
        key = key * cos + rotate_half(key) * sin
        if past_key_values is not None:
            key, value = past_key_values.extend(self.layer_idx, key, value, context.shape[1])
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # Drafts, which are made without gradients, must not draw random numbers.
        dropout = self.config.attention_dropout if self.training and torch.is_grad_enabled() else 0.0
        output, _ = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(output.reshape(batch, rows, -1))

    def _keys_and_values(self, block: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, seq + rows, key heads x head_dim), the context's first."""
        if self.k_proj_target is None or self.v_proj_target is None:
            source = torch.cat([context, block], dim=1)
            return self.k_proj(source), self.v_proj(source)
        keys = torch.cat([self.k_proj_target(context), self.k_proj(block)], dim=1)
        return keys, torch.cat([self.v_proj_target(context), self.v_proj(block)], dim=1)


class JetFlowMLP(nn.Module):
    def __init__(self, config: JetFlowConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, block: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(block)) * self.up_proj(block))


class DynamicConvolution(nn.Module):
    """
    DFlash 2's convolution along the rows of a block, before and after a sublayer.

    The kernels are a base and a part that the sublayer's input yields row by row, both for before and after. Rows
    before the anchor count as zero.
    """

    def __init__(self, config: JetFlowConfig):
        super().__init__()
        assert config.conv_kernel_size is not None
        assert config.conv_group_size is not None
        self.group_size = config.conv_group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, config.conv_kernel_size, config.hidden_size))
        num_groups = config.hidden_size // self.group_size
        self.kernel_projection = nn.Linear(config.hidden_size, 2 * config.conv_kernel_size * num_groups, bias=False)

    def kernels(self, block: torch.Tensor) -> torch.Tensor:
        """Kernels (2, batch, rows, taps, hidden) of a sublayer's normed input (batch, rows, hidden)."""
        dynamic = self.kernel_projection(block).unflatten(-1, (*self.base_kernel.shape[:2], -1))
        return (self.base_kernel + dynamic.repeat_interleave(self.group_size, dim=-1)).movedim(2, 0)

    def forward(self, kernels: torch.Tensor, block: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Apply kernels (batch, rows, taps, hidden) to rows whose `offsets` (batch, rows) count from their anchor."""
        output = kernels[..., 0, :] * block
        for tap in range(1, kernels.shape[-2]):
            earlier = nn.functional.pad(block, (0, 0, tap, 0))[:, : block.shape[1]]
            output = output + kernels[..., tap, :] * earlier.masked_fill((offsets < tap)[..., None], 0.0)
        return output


class JetFlowDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: JetFlowConfig, layer_idx: int):
        super().__init__()
        self.self_attn = JetFlowAttention(config, layer_idx)
        self.mlp = JetFlowMLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        has_convs = config.conv_kernel_size is not None
        self.attention_conv = DynamicConvolution(config) if has_convs else None
        self.mlp_conv = DynamicConvolution(config) if has_convs else None

    def forward(
        self,
        block: torch.Tensor,
        context: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
        past_key_values: HeadCache | None,
        offsets: torch.Tensor,
    ) -> torch.Tensor:
        def attend(rows: torch.Tensor) -> torch.Tensor:
            return self.self_attn(rows, context, cos_sin, attention_mask, past_key_values)

        block = block + _convolved(self.attention_conv, attend, self.input_layernorm(block), offsets)
        return block + _convolved(self.mlp_conv, self.mlp, self.post_attention_layernorm(block), offsets)


def _convolved(
    conv: DynamicConvolution | None,
    sublayer: Callable[[torch.Tensor], torch.Tensor],
    block: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """A sublayer's output, with convolutions before and after it if the layer has them."""
    if conv is None:
        return sublayer(block)
    before, after = conv.kernels(block)
    return conv(after, sublayer(conv(before, block, offsets)), offsets)
