"""Seconds of a forward and of a round by a roofline model: bytes read and operations done by target and head.

`docs/cost-model.md` has the equations and their limits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..errors import JetFlowError
from ..head.configuration_jetflow import JetFlowConfig
from ..head.modeling_jetflow import JetFlowHead
from .hardware import Hardware


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that determine what its forward reads and computes."""

    num_layers: int
    dense: int  # parameters that every row uses, without embeddings
    output: int  # parameters of the output embedding
    experts: int = 0  # parameters of all routed experts
    num_experts: int = 0  # routed experts per layer
    experts_per_token: int = 0
    query_width: int = 0  # all query heads of a layer
    cache_width: int = 0  # cached values per layer and position: keys and values
    windows: tuple[int | None, ...] = ()  # sliding window of each attention layer; `None` for full attention

    def parts(self, rows: int, batch_size: int, context: int, output_rows: int) -> dict[str, tuple[float, float]]:
        """
        Values read and operations done, by part.

        Args:
            rows (`int`): Rows per sequence.
            batch_size (`int`): Sequences.
            context (`int`): Cached positions per sequence.
            output_rows (`int`): Rows per sequence that reach the output embedding.
        """
        tokens = batch_size * rows
        seen = sum(min(context, window or context) + rows for window in self.windows)
        parts: dict[str, tuple[float, float]] = {
            "dense": (self.dense, 2.0 * self.dense * tokens),
            "attention": (batch_size * seen * self.cache_width, 4.0 * tokens * seen * self.query_width),
            "output": (self.output, 2.0 * self.output * batch_size * output_rows),
        }
        if self.experts:
            share = self.experts_per_token / self.num_experts
            touched = expected_experts(self.num_experts, self.experts_per_token, tokens) / self.num_experts
            parts["experts"] = (self.experts * touched, 2.0 * self.experts * share * tokens)
        return parts


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head."""

    backbone: ModelShape
    correction: ModelShape | None  # runs once per depth, from the second depth on
    block_size: int


def expected_experts(num_experts: int, experts_per_token: int, tokens: int) -> float:
    """Expected number of distinct experts per layer for `tokens` rows with independent, uniform routing."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** tokens)


def target_shape(config: PreTrainedConfig) -> ModelShape:
    """
    Shape of a target. Parameters are counted on a model built without storage.

    Raises:
        JetFlowError: If the target has no attention, or its config lacks the number of experts per token.
    """
    text = config.get_text_config(decoder=True)
    if not getattr(text, "num_attention_heads", None):
        raise JetFlowError(f"`{config.model_type}` has no attention heads; use a target with attention")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    output = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight.numel()
    is_tied = bool(text.tie_word_embeddings)
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    routed = sum(parameter.numel() for parameter in experts)
    per_token = getattr(text, "num_experts_per_tok", None) or 0
    if experts and not per_token:
        raise JetFlowError(
            f"`{text.model_type}` has experts, but its config has no `num_experts_per_tok`; add the field"
        )
    return ModelShape(
        num_layers=text.num_hidden_layers,
        dense=_num_parameters(model) - routed - embedding - (0 if is_tied else output),
        output=output,
        experts=routed,
        num_experts=len(experts[0]) if experts else 0,
        experts_per_token=per_token if experts else 0,
        **_attention(text),
    )


def head_shape(config: JetFlowConfig) -> HeadShape:
    """Shape of a head; its output embedding is the target's, cut to the draft vocabulary."""
    with torch.device("meta"):
        head = JetFlowHead(config)
    correction = None
    if head.branch_correction is not None:
        correction = ModelShape(num_layers=1, dense=_num_parameters(head.branch_correction), output=0)
    backbone = ModelShape(
        num_layers=config.num_hidden_layers,
        dense=_num_parameters(head) - (0 if correction is None else correction.dense),
        output=(config.draft_vocab_size or config.vocab_size) * config.hidden_size,
        **_attention(config),
    )
    return HeadShape(backbone, correction, config.block_size)


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _attention(config: Any) -> dict[str, Any]:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return {
        "query_width": heads * width,
        "cache_width": 2 * (getattr(config, "num_key_value_heads", None) or heads) * width,
        "windows": tuple(config.sliding_window if kind == "sliding_attention" else None for kind in layer_types),
    }


def forward_seconds(
    shape: ModelShape,
    hardware: Hardware,
    rows: int,
    *,
    batch_size: int = 1,
    context: int = 0,
    output_rows: int | None = None,
) -> float:
    """
    Seconds of one forward: each part takes the longer of its reads and its operations.

    Args:
        shape ([`ModelShape`]): The model.
        hardware ([`Hardware`]): The machine.
        rows (`int`): Rows per sequence, at least 1.
        batch_size (`int`): Sequences.
        context (`int`): Cached positions per sequence.
        output_rows (`int`, *optional*): Rows per sequence that reach the output embedding; all by default.
    """
    parts = shape.parts(rows, batch_size, context, rows if output_rows is None else output_rows)
    bandwidth, flops = hardware.bandwidth * hardware.memory_efficiency, hardware.flops * hardware.matrix_efficiency
    device = sum(max(read * hardware.bytes_per_value / bandwidth, done / flops) for read, done in parts.values())
    launch = shape.num_layers * hardware.launch_seconds
    return max(device, launch) if hardware.runs_ahead else device + launch


@dataclass(frozen=True)
class RoundSeconds:
    """Seconds of a plain step, and of the steps of a round, for a whole batch."""

    plain: float
    draft: float
    correct: float
    verify: float
    host: float

    @property
    def round(self) -> float:
        return self.draft + self.correct + self.verify + self.host


def round_seconds(
    target: ModelShape, head: HeadShape, hardware: Hardware, node_budget: int, *, batch_size: int = 1, context: int = 0
) -> RoundSeconds:
    """
    Seconds of a plain step and of a round that verifies `node_budget` rows per sequence, root included.

    Raises:
        JetFlowError: If `node_budget` is below 2, `batch_size` below 1 or `context` below 0.
    """
    minimums = (("node_budget", node_budget, 2), ("batch_size", batch_size, 1), ("context", context, 0))
    for name, value, minimum in minimums:
        if value < minimum:
            raise JetFlowError(f"`{name}` must be at least {minimum}, got {value}")
    sizes = {"batch_size": batch_size, "context": context}
    block, correct = head.block_size, 0.0
    depths = min(block, node_budget) - 2  # corrected depths: all but the first
    if head.correction is not None and depths > 0:
        rows = -(-(node_budget - 1) // depths)
        correct = depths * forward_seconds(head.correction, hardware, rows, batch_size=batch_size)
    return RoundSeconds(
        plain=forward_seconds(target, hardware, 1, **sizes),
        draft=forward_seconds(head.backbone, hardware, block, output_rows=block - 1, **sizes),
        correct=correct,
        verify=forward_seconds(target, hardware, node_budget, **sizes),
        host=hardware.host_seconds + hardware.host_seconds_per_node * node_budget * batch_size,
    )
