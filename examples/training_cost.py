"""Estimate memory and time of a training run with the formulas of docs/training-cost.md.

    python examples/training_cost.py --target Qwen/Qwen3-8B --num-layers 5 --block-size 16 --draft-vocab 32768 \
        --batch-size 8 --max-length 2048 --anchors 32 --max-steps 20000

The options are those of `hf-jetflow train`. Only the target's configuration is read. The time is that of the updates
alone, without answers, evaluation and saving, and assumes the share of the GPU's peak that is reached.

Counted for bf16 autocast: fp32 weights of the head, a dense SwiGLU target in bf16, SDPA attention, one micro-batch per
update. The bytes are those of the tensors that autograd stores in `modeling_jetflow` and of the temporaries that
`losses` holds at a time; overhead of the allocator is not counted.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.head.configuration_jetflow import spaced_layer_ids
from hf_jetflow.target.loading import load_target_config


KL_CHUNK = 1024  # the default of `chunked_forward_kl`
NEWTON_SCHULZ_STEPS = 5  # the default of `torch.optim.Muon`


@dataclass(frozen=True)
class Rows:
    """Numbers of rows in one micro-batch."""

    context: int  # positions of the sequences
    block: int  # block rows, anchors included
    source: int  # both: the inputs of keys and values
    drafted: int  # block rows without the anchors, which the loss scores
    corrected: int  # drafted rows from depth 2 on
    pairs: int  # entries of the attention mask

    @classmethod
    def count(cls, block_size: int, batch_size: int, seq: int, anchors: int) -> "Rows":
        blocks, context = batch_size * anchors, batch_size * seq
        block = blocks * block_size
        pairs = block * (seq + anchors * block_size)
        return cls(context, block, context + block, block - blocks, block - 2 * blocks, pairs)


def elements(model: nn.Module, part: str = "", min_ndim: int = 1) -> int:
    """Number of elements of the parameters whose names start with `part`."""
    parameters = (each for name, each in model.named_parameters() if name.startswith(part))
    return sum(parameter.numel() for parameter in parameters if parameter.ndim >= min_ndim)


def attention_widths(config: Any) -> tuple[int, int]:
    """Widths of the queries and of the keys, all attention heads together."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, (config.num_key_value_heads or config.num_attention_heads) * head_dim


class TrainingCost:
    """
    Memory and floating-point operations of one update of `JetFlowTrainer`, by part, from the configurations.

    Args:
        target_config (`PreTrainedConfig`): The target's.
        head_config ([`JetFlowConfig`]): The head's.
        target_bytes (`int`, *optional*): Bytes of the target's weights, if it is not a dense model in bf16.

    `memory` and `flops` take the shape of a micro-batch on one device: `batch_size` sequences of `seq` tokens with
    `anchors` anchors each.
    """

    def __init__(self, target_config: PreTrainedConfig, head_config: JetFlowConfig, target_bytes: int | None = None):
        self.text, self.config = target_config.get_text_config(decoder=True), head_config
        with torch.device("meta"):
            self.target, self.head = AutoModelForCausalLM.from_config(self.text), JetFlowHead(head_config)
        self.matrices = [parameter.shape for parameter in self.head.parameters() if parameter.ndim == 2]
        self.target_bytes = 2 * elements(self.target) if target_bytes is None else target_bytes

    def memory(self, *, batch_size: int, seq: int, anchors: int, chunk_size: int = KL_CHUNK) -> dict[str, int]:
        """
        Bytes by part, the total during each stage of an update, and the largest of those.

        Args:
            chunk_size (`int`): Rows whose logits are in memory at a time in the KL.

        Returns:
            `dict`: Parts, which do not all exist at once; totals under `"during ..."`; the largest under `"peak"`.
        """
        config, hidden = self.config, self.config.hidden_size
        assert config.hidden_state_indices is not None
        taps = config.hidden_state_indices
        rows = Rows.count(config.block_size, batch_size, seq, anchors)
        all_elements, in_matrices = elements(self.head), elements(self.head, min_ndim=2)
        draft_rows = 0 if config.draft_vocab_size is None else 2 * config.draft_vocab_size * hidden
        layer, mlp, correction = (
            self._stored_by_layer(rows),
            self._stored_by_mlp(rows),
            self._stored_by_correction(rows),
        )
        # The fc layer stores its input, which is the target's states; its norm stores fp32 input and bf16 output.
        activations = 6 * hidden * rows.context + config.num_hidden_layers * layer + 6 * hidden * rows.block
        parts = {
            "target weights": self.target_bytes + draft_rows,
            "head weights": 4 * all_elements,
            "optimizer state": 4 * in_matrices + 8 * (all_elements - in_matrices),
            "gradients": 4 * all_elements,
            "bf16 copies of the head": 2 * in_matrices,
            "target states": 2 * self.text.hidden_size * rows.context * (len(taps) + 1),
            "target's working memory": self._target_transient(rows.context, taps),
            "head activations": activations + correction,
            "rows of the loss": self._loss_rows(rows),
            "KL chunk": kl_chunk(config, rows.drafted, chunk_size),
            "Muon's working memory": max(8 * a * b + 4 * min(a, b) ** 2 for a, b in self.matrices),
        }
        resident = parts["target weights"] + parts["head weights"] + parts["optimizer state"]
        stored = parts["bf16 copies of the head"] + parts["target states"] + parts["head activations"]
        attention = self._attention_transient(rows)
        # Backward at the attention of the last layer: its MLP is done. At the first layer: the other layers are freed,
        # and all gradients exist except those of fc and of the projections to queries, keys and values.
        at_last = stored - mlp - 6 * hidden * rows.block - correction + attention
        first = parts["target states"] + 6 * hidden * rows.context + layer - mlp
        names = [f"layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
        projections, fc = sum(elements(self.head, name) for name in names), elements(self.head, "fc.weight")
        at_first = first + parts["gradients"] + 2 * projections - 4 * (projections + fc) + attention
        totals = {
            "during target forward": resident + parts["target's working memory"],
            "during head forward": resident + at_last,
            "during loss": resident + stored + parts["rows of the loss"] + parts["KL chunk"],
            "during backward": resident + max(stored + 8 * hidden * rows.drafted, at_last, at_first),
            "during optimizer step": resident + parts["gradients"] + parts["Muon's working memory"],
        }
        return {**parts, **totals, "peak": max(totals.values())}

    def flops(self, *, batch_size: int, seq: int, anchors: int) -> dict[str, float]:
        """
        Floating-point operations of the matrix products of one update by part, and their sum under `"total"`.

        A product of (a, b) and (b, c) counts 2abc; attention counts in full, masked pairs included.
        """
        config, hidden, head = self.config, self.config.hidden_size, self.head
        rows = Rows.count(config.block_size, batch_size, seq, anchors)
        queries, keys = attention_widths(config)
        target_matrices = elements(self.target.base_model, "layers", min_ndim=2)
        target_attention = 4 * rows.context * seq * attention_widths(self.text)[0] * self.text.num_hidden_layers
        fc = 2 * rows.context * elements(head, "fc.weight")
        by_block = 2 * queries * hidden + 3 * hidden * config.intermediate_size
        layers = config.num_hidden_layers * 2 * (by_block * rows.block + 2 * keys * hidden * rows.source)
        attention = config.num_hidden_layers * 4 * rows.pairs * queries
        slots = 2 * rows.block * elements(head, "branch_correction.slot_proj")
        tokens = 2 * rows.corrected * elements(head, "branch_correction.token_proj")
        correction = 2 * rows.corrected * elements(head, "branch_correction", min_ndim=2)
        correction += slots - slots // rows.block * rows.corrected
        scored = 2 * rows.drafted * hidden * (config.draft_vocab_size or config.vocab_size)
        small_large = [sorted(shape) for shape in self.matrices]
        flops: dict[str, float] = {
            "target forward": 2 * rows.context * target_matrices + target_attention,
            "head forward": fc + layers + attention + correction,
            # Gradients of weights and inputs, but neither the states nor the embeddings need one; SDPA's backward
            # has five products to the forward's two.
            "head backward": fc + 2 * layers + 2.5 * attention + 2 * correction - tokens,
            "KL": scored * (3 if config.branch_correction is None else 5),  # head, target, gradient; shifts, theirs
            "Newton-Schulz": NEWTON_SCHULZ_STEPS * sum(4 * a * a * b + 2 * a**3 for a, b in small_large),
        }
        return {**flops, "total": sum(flops.values())}

    def _stored_by_layer(self, rows: Rows) -> int:
        """Bytes that autograd stores of one layer for its backward."""
        hidden, (queries, keys) = self.config.hidden_size, attention_widths(self.config)
        attention = (
            (4 + 2 + 2) * hidden * rows.block  # norm: fp32 input, bf16 output before its weight; the cast for q_proj
            + (2 + 2) * hidden * rows.source  # k_proj and v_proj each cast the fp32 rows
            + (4 + 2) * (queries * rows.block + keys * rows.source)  # norms of queries and keys, as above
            + 2
            * (3 * rows.block + 2 * rows.source)
            * queries  # SDPA: query, output, its copy; key, value of all heads
            + 4 * self.config.num_attention_heads * rows.block  # its log-sum-exp
            + 2 * rows.pairs  # its mask, as bf16 and by layer
        )
        return attention + self._stored_by_mlp(rows)

    def _stored_by_mlp(self, rows: Rows) -> int:
        """Norm as above with casts for gate and up; their outputs, the activation and the product."""
        return ((4 + 2 + 2 + 2) * self.config.hidden_size + 8 * self.config.intermediate_size) * rows.block

    def _stored_by_correction(self, rows: Rows) -> int:
        if self.config.branch_correction is None:
            return 0
        assert self.config.branch_intermediate_size is not None
        hidden, width = self.config.hidden_size, self.config.branch_intermediate_size
        by_row = (
            4 + 4 + 2
        ) * hidden + 2 * 2 * width  # slots: fp32 row, fp32 before the norm's weight, cast; projection
        by_row += 2 * hidden + 2 * hidden  # the parents' embeddings and the stacked shifts
        by_node = (2 + 2) * hidden + 2 * 4 * width  # token: before the norm's weight, cast; gate and up, silu, product
        if self.config.branch_correction == "path":
            by_node += (4 + 2 + 2) * hidden  # state: norm and cast
        return by_row * rows.block + by_node * rows.corrected

    def _attention_transient(self, rows: Rows) -> int:
        """Around a layer's attention, both ways: fp32 context, rows of the layer, keys, keys of all heads."""
        queries, keys = attention_widths(self.config)
        by_source = 4 * (self.config.hidden_size + keys + queries)
        return 4 * self.config.hidden_size * rows.context + by_source * rows.source + 2 * rows.pairs

    def _target_transient(self, context: int, taps: list[int]) -> int:
        """The stored states and one running layer: residual, its input, three rows of the MLP; or all states fused."""
        hidden, inner = self.text.hidden_size, self.text.intermediate_size
        stored = len({index + shift for index in taps for shift in (-1, 0)})  # as `Target` asks for them
        return 2 * context * max((stored + 2) * hidden + 3 * inner, (stored + len(taps) + 1) * hidden)

    def _loss_rows(self, rows: Rows) -> int:
        """fp32 rows of the head, their KL gradient; the target's in bf16; shifts; facts of the candidates."""
        config = self.config
        candidates = min(config.branch_candidates, config.draft_vocab_size or config.vocab_size)
        by_row = (4 + 4 + 2) * config.hidden_size + (8 + 4 + 4) * candidates
        if config.branch_correction is not None:
            by_row += 4 * config.hidden_size
        return by_row * rows.drafted


def kl_chunk(config: JetFlowConfig, drafted: int, chunk_size: int) -> int:
    """
    fp32 logits that exist at a time, in bytes.

    In the first chunk there are seven: both sides' logits and log-probabilities, the target's probabilities, and two
    terms of the divergence or the slope. In a later one there are up to eight: values of the chunk before stay until
    they are replaced.
    """
    first = min(drafted, chunk_size)
    second = min(drafted - first, chunk_size)
    return 4 * (config.draft_vocab_size or config.vocab_size) * max(7 * first, 4 * (first + second))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="Hub id, folder, config.json or .gguf file")
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--num-taps", type=int, default=5)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--draft-vocab", type=int, default=0)
    parser.add_argument("--branch-correction", choices=("path", "parent", "none"), default="path")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--anchors", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=4000)
    parser.add_argument(
        "--peak-tflops", type=float, default=990, help="of the GPU in bf16, dense; an H100's if not given"
    )
    parser.add_argument("--share-of-peak", type=float, default=0.4, help="of it that is reached; an assumption")
    args = parser.parse_args()

    target = load_target_config(args.target)
    num_layers = target.get_text_config(decoder=True).num_hidden_layers
    head = JetFlowConfig.for_target(
        target,
        num_hidden_layers=args.num_layers,
        block_size=args.block_size,
        hidden_state_indices=[layer + 1 for layer in spaced_layer_ids(num_layers, args.num_taps)],
        draft_vocab_size=args.draft_vocab or None,
        branch_correction=None if args.branch_correction == "none" else args.branch_correction,
    )
    shape = dict(batch_size=args.batch_size, seq=args.max_length, anchors=args.anchors)
    cost = TrainingCost(target, head)
    peak = cost.memory(**shape)["peak"]
    seconds = cost.flops(**shape)["total"] / (args.share_of_peak * args.peak_tflops * 1e12)
    print(
        f"head of {elements(cost.head) / 1e9:.2f} B parameters; on each GPU {peak / 1e9:.1f} GB at the peak and "
        f"{seconds:.2f} s per update, {args.max_steps * seconds / 3600:.1f} h for {args.max_steps} updates "
        f"({args.share_of_peak:.0%} of {args.peak_tflops:g} TFLOP/s); computed, not measured"
    )


if __name__ == "__main__":
    main()
