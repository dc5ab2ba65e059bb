"""Where a head's training starts: at late layers of its target, or at another head; and what of it is trained."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..head.configuration_jetflow import JetFlowConfig
from ..head.modeling_jetflow import JetFlowHead
from ..integration import check_pairing


# Start of the query and key norms where the target has none to copy: the root mean square of the queries and keys in
# SmolLM2's late layers. With 1.0 the attention starts too flat over the context to learn from: top-1 at depth 1 was
# 0.09 after 100 updates of 16 sequences, with this scale 0.15 after 100 updates of 8.
QUERY_KEY_SCALE = 2.2


def initialize_from_target(head: JetFlowHead, target: PreTrainedModel) -> int:
    """
    Start the head from the target: its layers from late target layers, its norms from the target's, the fusion from
    the mean of the tapped states.

    Tensors whose names or shapes the target does not share keep their random start.

    Returns:
        `int`: Number of tensors copied.
    """
    for name, parameter in head.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data.fill_(QUERY_KEY_SCALE)
    base = target.base_model
    num_layers, num_target = head.config.num_hidden_layers, head.config.num_target_layers
    assert num_target is not None
    sources = [f"layers.{max(num_target - 1 - 4 * (num_layers - 1 - i), 0)}" for i in range(num_layers)]
    pairs = [
        (parameter, _tensor(base, f"{source}.{_name_in_target(base, source, name)}"))
        for layer, source in zip(head.layers, sources, strict=True)
        for name, parameter in layer.named_parameters()
    ]
    pairs.append((head.norm.weight, _tensor(base, "norm.weight")))
    # The context takes the place of the normed input of the copied key and value projections.
    pairs.append((head.hidden_norm.weight, _tensor(base, f"{sources[0]}.input_layernorm.weight")))
    copied = 0
    with torch.no_grad():
        for parameter, tensor in pairs:
            if tensor is not None and tensor.shape == parameter.shape:
                parameter.copy_(tensor)
                copied += 1
        if head.config.target_hidden_size == head.config.hidden_size:
            num_taps = head.fc.in_features // head.config.hidden_size
            head.fc.weight.copy_(torch.eye(head.config.hidden_size).repeat(1, num_taps) / num_taps)
            copied += 1
    return copied


def _name_in_target(base: nn.Module, source: str, name: str) -> str:
    """The norm before the MLP is called otherwise where `post_attention_layernorm` norms the attention's output."""
    if name == "post_attention_layernorm.weight" and _module(base, f"{source}.post_feedforward_layernorm") is not None:
        return "pre_feedforward_layernorm.weight"
    return name


def _module(base: nn.Module, path: str) -> nn.Module | None:
    try:
        return base.get_submodule(path)
    except AttributeError:
        return None


@torch.no_grad()
def _tensor(base: nn.Module, name: str) -> torch.Tensor | None:
    """A tensor of the target; a norm's weights as plain factors, which Gemma-like ones keep as offsets from one."""
    path, _, leaf = name.rpartition(".")
    module = _module(base, path)
    tensor = getattr(module, leaf, None)
    if module is None or not isinstance(tensor, torch.Tensor) or tensor.ndim != 1 or leaf != "weight":
        return tensor
    factors = module(torch.ones_like(tensor)).float()  # what the norm makes of ones, whose norm is one
    offset = tensor.float() + 1
    return offset if torch.allclose(factors, offset, rtol=5e-3, atol=5e-3) else tensor


def start_from_head(source: str, target: PreTrainedModel, branch_correction: str | None, seed: int) -> JetFlowHead:
    """
    A float32 head to continue from. One without a branch correction is given a fresh one where it is asked for.

    Args:
        source (`str`): Hub id or folder of the head.
        branch_correction (`str`, *optional*): Kind of correction that the trained head is to have.

    Raises:
        ValueError: If the head does not fit the target, is of a kind that cannot be trained, or has another correction
            than the one asked for.
        OSError: If a file is missing or damaged.
    """
    head = JetFlowHead.from_pretrained(source, dtype=torch.float32)
    check_pairing(target, head)
    if not head.config.is_plain:
        raise ValueError(
            f"the head {source} has an embedding or an LM head of its own, scaled logits, or an anchor's row that "
            "predicts; heads like it draft in `generate`, but cannot be trained further yet: train a new one, without "
            "`--head`"
        )
    own = head.config.branch_correction
    if own is not None and own != branch_correction:
        raise ValueError(
            f"the head {source} has a branch correction of kind {own!r}, but {branch_correction!r} is asked for; a "
            f"correction can be added, not exchanged or removed: give `--branch-correction {own}`"
        )
    if own != branch_correction:
        torch.manual_seed(seed)
        whole = JetFlowHead(JetFlowConfig.from_dict({**head.config.to_dict(), "branch_correction": branch_correction}))
        missing, unexpected = whole.load_state_dict(head.state_dict(), strict=False)
        assert not unexpected
        assert all(name.startswith("branch_correction.") for name in missing)
        whole.generation_config = head.generation_config
        head = whole
    return head.to(target.device)


def train_correction_only(head: JetFlowHead) -> None:
    """
    Freeze all of the head but its branch correction.

    Raises:
        ValueError: If it has none.
    """
    if head.branch_correction is None:
        raise ValueError(
            "only the branch correction is to be trained, but the head has none; give `--branch-correction path` or "
            "`parent`, or leave out `--train-only`"
        )
    head.requires_grad_(False)
    head.branch_correction.requires_grad_(True)
