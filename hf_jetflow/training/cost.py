"""Memory and floating-point operations of one update of `JetFlowTrainer`, by part, from the configurations.

Counted for bf16 autocast: fp32 weights of the head, a dense SwiGLU target in bf16, SDPA attention, one micro-batch per
update. The bytes are those of the tensors that autograd stores in `modeling_jetflow` and of the temporaries that
`losses` holds at a time; overhead of the allocator is not counted.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..head.configuration_jetflow import JetFlowConfig


KL_CHUNK = 1024  # the default of `chunked_forward_kl`
NEWTON_SCHULZ_STEPS = 5  # the default of `torch.optim.Muon`


def head_matrices(config: JetFlowConfig) -> list[tuple[int, int]]:
    """Shapes (out, in) of the head's matrices, which Muon trains."""
    assert config.hidden_state_indices is not None
    assert config.target_hidden_size is not None
    assert config.branch_intermediate_size is not None
    hidden, width = config.hidden_size, config.branch_intermediate_size
    shapes = [(hidden, len(config.hidden_state_indices) * config.target_hidden_size)]
    shapes += config.num_hidden_layers * _layer_matrices(config)
    if config.branch_correction is not None:
        shapes += [(2 * width, hidden), (2 * width, hidden), (hidden, width)]
    if config.branch_correction == "path":
        shapes += [(2 * width, hidden), (hidden, width)]
    return shapes


def head_parameters(config: JetFlowConfig) -> int:
    """Parameters of a head."""
    return _elements(head_matrices(config)) + _num_vector_elements(config)


def _layer_matrices(config: Any) -> list[tuple[int, int]]:
    """Attention and MLP matrices of one layer of a head or of a dense target."""
    hidden, inner, (queries, keys) = config.hidden_size, config.intermediate_size, _attention_widths(config)
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]


def _attention_widths(config: Any) -> tuple[int, int]:
    """Widths of the queries and of the keys, all attention heads together."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, (config.num_key_value_heads or config.num_attention_heads) * head_dim


def _num_vector_elements(config: JetFlowConfig) -> int:
    """Norms, biases and the mask embedding, which AdamW trains."""
    hidden, (queries, keys) = config.hidden_size, _attention_widths(config)
    assert config.head_dim is not None
    biases = queries + 2 * keys if config.attention_bias else 0
    per_layer = 2 * hidden + 2 * config.head_dim + biases + (hidden if config.attention_bias else 0)
    correction = {None: 0, "parent": 2, "path": 3}[config.branch_correction]
    return config.num_hidden_layers * per_layer + (2 + correction + (config.mask_token_id is None)) * hidden


def _elements(shapes: list[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)


@dataclass(frozen=True)
class _Rows:
    """Numbers of rows in one micro-batch."""

    context: int  # positions of the sequences
    block: int  # block rows, anchors included
    source: int  # both: the inputs of keys and values
    drafted: int  # block rows without the anchors, which the loss scores
    corrected: int  # drafted rows from depth 2 on
    pairs: int  # entries of the attention mask

    @classmethod
    def of(cls, config: JetFlowConfig, batch_size: int, seq: int, anchors: int) -> "_Rows":
        blocks = batch_size * anchors
        block = blocks * config.block_size
        context = batch_size * seq
        return cls(
            context=context,
            block=block,
            source=context + block,
            drafted=block - blocks,
            corrected=block - 2 * blocks,
            pairs=block * (seq + anchors * config.block_size),
        )


def training_memory(
    target_config: PreTrainedConfig,
    head_config: JetFlowConfig,
    *,
    batch_size: int,
    seq: int,
    anchors: int,
    chunk_size: int = KL_CHUNK,
    target_bytes: int | None = None,
) -> dict[str, int]:
    """
    Bytes of one update by part, the total during each stage of it, and the largest of those.

    Args:
        target_config (`PreTrainedConfig`): The target's.
        head_config ([`JetFlowConfig`]): The head's.
        batch_size (`int`): Sequences of a micro-batch on one device.
        seq (`int`): Their length in tokens.
        anchors (`int`): Anchors per sequence.
        chunk_size (`int`): Rows whose logits are in memory at a time in the KL.
        target_bytes (`int`, *optional*): Bytes of the target's weights, if it is not a dense model in bf16.

    Returns:
        `dict`: Parts, which do not all exist at once; totals under `"during ..."`; the largest under `"peak"`.
    """
    text = target_config.get_text_config(decoder=True)
    rows = _Rows.of(head_config, batch_size, seq, anchors)
    hidden, matrices = head_config.hidden_size, head_matrices(head_config)
    assert head_config.hidden_state_indices is not None
    taps = head_config.hidden_state_indices
    embeddings = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    weights = 2 * (text.num_hidden_layers * _elements(_layer_matrices(text)) + embeddings)
    draft_rows = 0 if head_config.draft_vocab_size is None else 2 * head_config.draft_vocab_size * hidden
    layer, mlp, correction = _stored_by_layer(head_config, rows), _stored_by_mlp(head_config, rows), 0
    if head_config.branch_correction is not None:
        correction = _stored_by_correction(head_config, rows)
    # The fc layer stores its input, which is the target's states; its norm stores fp32 input and bf16 output.
    activations = 6 * hidden * rows.context + head_config.num_hidden_layers * layer + 6 * hidden * rows.block
    parts = {
        "target weights": (weights if target_bytes is None else target_bytes) + draft_rows,
        "head weights": 4 * head_parameters(head_config),
        "optimizer state": 4 * _elements(matrices) + 8 * _num_vector_elements(head_config),
        "gradients": 4 * head_parameters(head_config),
        "bf16 copies of the head": 2 * _elements(matrices),
        "target states": 2 * text.hidden_size * rows.context * (len(taps) + 1),
        "target's working memory": _target_transient(text, rows.context, taps),
        "head activations": activations + correction,
        "rows of the loss": _loss_rows(head_config, rows),
        "KL chunk": _kl_chunk(head_config, rows.drafted, chunk_size),
        "Muon's working memory": max(8 * a * b + 4 * min(a, b) ** 2 for a, b in matrices),
    }
    resident = parts["target weights"] + parts["head weights"] + parts["optimizer state"]
    stored = parts["bf16 copies of the head"] + parts["target states"] + parts["head activations"]
    attention = _attention_transient(head_config, rows)
    # Backward at the attention of the last layer: its MLP is done. At the first layer: the other layers are freed, and
    # all gradients exist except those of fc and of the projections to queries, keys and values.
    at_last = stored - mlp - 6 * hidden * rows.block - correction + attention
    first = parts["target states"] + 6 * hidden * rows.context + layer - mlp
    pending = 2 * _elements(matrices[1:4]) - 4 * _elements(matrices[:4])
    at_first = first + parts["gradients"] + pending + attention
    totals = {
        "during target forward": resident + parts["target's working memory"],
        "during head forward": resident + at_last,
        "during loss": resident + stored + parts["rows of the loss"] + parts["KL chunk"],
        "during backward": resident + max(stored + 8 * hidden * rows.drafted, at_last, at_first),
        "during optimizer step": resident + parts["gradients"] + parts["Muon's working memory"],
    }
    return {**parts, **totals, "peak": max(totals.values())}


def _stored_by_layer(config: JetFlowConfig, rows: _Rows) -> int:
    """Bytes that autograd stores of one layer for its backward."""
    hidden, (queries, keys) = config.hidden_size, _attention_widths(config)
    attention = (
        (4 + 2 + 2) * hidden * rows.block  # norm: fp32 input, bf16 output before its weight; the cast for q_proj
        + (2 + 2) * hidden * rows.source  # k_proj and v_proj each cast the fp32 rows
        + (4 + 2) * (queries * rows.block + keys * rows.source)  # norms of queries and keys, as above
        + 2 * (3 * rows.block + 2 * rows.source) * queries  # SDPA: query, output, its copy; key, value of all heads
        + 4 * config.num_attention_heads * rows.block  # its log-sum-exp
        + 2 * rows.pairs  # its mask, as bf16 and by layer
    )
    return attention + _stored_by_mlp(config, rows)


def _stored_by_mlp(config: JetFlowConfig, rows: _Rows) -> int:
    """Norm as above with casts for gate and up; their outputs, the activation and the product."""
    return ((4 + 2 + 2 + 2) * config.hidden_size + 8 * config.intermediate_size) * rows.block


def _stored_by_correction(config: JetFlowConfig, rows: _Rows) -> int:
    assert config.branch_intermediate_size is not None
    hidden, width = config.hidden_size, config.branch_intermediate_size
    by_row = (4 + 4 + 2) * hidden + 2 * 2 * width  # slots: fp32 row, fp32 before the norm's weight, cast; projection
    by_row += 2 * hidden + 2 * hidden  # the parents' embeddings and the stacked shifts
    by_node = (2 + 2) * hidden + 2 * 4 * width  # token: before the norm's weight, cast; gate and up, silu, product
    if config.branch_correction == "path":
        by_node += (4 + 2 + 2) * hidden  # state: norm and cast
    return by_row * rows.block + by_node * rows.corrected


def _attention_transient(config: JetFlowConfig, rows: _Rows) -> int:
    """Around a layer's attention, forward or backward: fp32 context, rows of the layer, keys, keys of all heads."""
    queries, keys = _attention_widths(config)
    by_source = 4 * (config.hidden_size + keys + queries)
    return 4 * config.hidden_size * rows.context + by_source * rows.source + 2 * rows.pairs


def _target_transient(text: Any, context: int, taps: list[int]) -> int:
    """The stored states and one running layer: residual, its input, three rows of the MLP; or all states fused."""
    hidden, inner = text.hidden_size, text.intermediate_size
    stored = len({index + shift for index in taps for shift in (-1, 0)})  # as `Target` asks for them
    return 2 * context * max((stored + 2) * hidden + 3 * inner, (stored + len(taps) + 1) * hidden)


def _loss_rows(config: JetFlowConfig, rows: _Rows) -> int:
    """fp32 rows of the head, their KL gradient; the target's in bf16; shifts; facts of the candidates."""
    candidates = min(config.branch_candidates, config.draft_vocab_size or config.vocab_size)
    by_row = (4 + 4 + 2) * config.hidden_size + (8 + 4 + 4) * candidates
    if config.branch_correction is not None:
        by_row += 4 * config.hidden_size
    return by_row * rows.drafted


def _kl_chunk(config: JetFlowConfig, drafted: int, chunk_size: int) -> int:
    """
    fp32 logits that exist at a time.

    In the first chunk there are seven: both sides' logits and log-probabilities, the target's probabilities, and two
    terms of the divergence or the slope. In a later one there are up to eight: values of the chunk before stay until
    they are replaced.
    """
    first = min(drafted, chunk_size)
    second = min(drafted - first, chunk_size)
    return 4 * (config.draft_vocab_size or config.vocab_size) * max(7 * first, 4 * (first + second))


def training_flops(
    target_config: PreTrainedConfig, head_config: JetFlowConfig, *, batch_size: int, seq: int, anchors: int
) -> dict[str, float]:
    """
    Floating-point operations of the matrix products of one update by part, and their sum under `"total"`.

    A product of (a, b) and (b, c) counts 2abc; attention counts in full, masked pairs included.

    Args:
        target_config (`PreTrainedConfig`): The target's, as of a dense SwiGLU model.
        head_config ([`JetFlowConfig`]): The head's.
        batch_size (`int`), seq (`int`), anchors (`int`): As in `training_memory`.
    """
    text = target_config.get_text_config(decoder=True)
    rows = _Rows.of(head_config, batch_size, seq, anchors)
    hidden, (queries, keys) = head_config.hidden_size, _attention_widths(head_config)
    matrices = head_matrices(head_config)
    target_attention = 4 * rows.context * seq * _attention_widths(text)[0]
    fc = 2 * rows.context * _elements(matrices[:1])
    by_block = 2 * queries * hidden + 3 * hidden * head_config.intermediate_size
    layers = head_config.num_hidden_layers * 2 * (by_block * rows.block + 2 * keys * hidden * rows.source)
    attention = head_config.num_hidden_layers * 4 * rows.pairs * queries
    correction = tokens = 0
    if head_config.branch_correction is not None:
        slot, token, *others = (2 * a * b for a, b in matrices[1 + 7 * head_config.num_hidden_layers :])
        tokens = token * rows.corrected
        correction = slot * rows.block + tokens + sum(others) * rows.corrected
    scored = 2 * rows.drafted * hidden * (head_config.draft_vocab_size or head_config.vocab_size)
    small_large = [sorted(shape) for shape in matrices]
    flops: dict[str, float] = {
        "target forward": text.num_hidden_layers
        * (2 * rows.context * _elements(_layer_matrices(text)) + target_attention),
        "head forward": fc + layers + attention + correction,
        # Gradients of weights and inputs, but neither the states nor the embeddings need one; SDPA's backward
        # has five products to the forward's two.
        "head backward": fc + 2 * layers + 2.5 * attention + 2 * correction - tokens,
        "KL": scored * (3 if head_config.branch_correction is None else 5),  # head, target, gradient; shifts, theirs
        "Newton-Schulz": NEWTON_SCHULZ_STEPS * sum(4 * a * a * b + 2 * a**3 for a, b in small_large),
    }
    return {**flops, "total": sum(flops.values())}
