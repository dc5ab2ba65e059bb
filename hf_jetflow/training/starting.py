"""The head that training starts with: copied from late layers of its target, or a given head."""

from dataclasses import fields

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import JetFlowError, flag
from ..head.configuration_jetflow import JetFlowConfig, spaced_layer_ids
from ..head.modeling_jetflow import JetFlowHead
from ..integration import check_pairing
from ..target.loading import load_head
from .data import Answers, frequent_tokens
from .settings import LAYOUT_OPTIONS, TrainRecipe


# Initial weight of the query and key norms, where the target has none to copy: the root mean square of the queries and
# keys in SmolLM2's late layers. With 1.0 the attention over the context starts too flat to learn from: top-1 at depth
# 1 was 0.09 after 100 updates of 16 sequences, against 0.15 after 100 updates of 8 with this scale.
QUERY_KEY_SCALE = 2.2
BLOCK_SIZE = 8  # of a new head


def check_start(recipe: TrainRecipe, target: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuse what `starting_head` would, as far as it shows without the target's weights.

    Raises:
        JetFlowError: If a setting does not fit the target or the given head, or that head cannot be loaded.
    """
    if recipe.head is None:
        head_config(recipe, target, tokenizer)
        return
    config = load_head(recipe.head, torch.float32).config
    assert config.hidden_state_indices is not None
    defaults = {field.name: field.default for field in fields(TrainRecipe)}
    own = {"num_layers": config.num_hidden_layers, "num_taps": len(config.hidden_state_indices)}
    for name in LAYOUT_OPTIONS:
        given = getattr(recipe, name)
        if given not in (defaults[name], own[name]):
            raise JetFlowError(
                f"`{flag(name)}` is {given}, but the head {recipe.head} has {own[name]}; remove the option to "
                "continue from the head, or remove `--head` to train a new one"
            )
    if recipe.mask_token is not None and _mask_token_id(tokenizer, recipe.mask_token) != config.mask_token_id:
        raise JetFlowError(
            f"`--mask-token` is {recipe.mask_token!r}, but the head {recipe.head} was trained with another one (its "
            f"`mask_token_id` is {config.mask_token_id}); remove the option"
        )


def starting_head(recipe: TrainRecipe, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> JetFlowHead:
    """
    The head that training starts with: a new one, or a given one, frozen where it is not trained. With
    `recipe.draft_vocab`, its draft vocabulary is still to be chosen.

    Raises:
        JetFlowError: If the given head does not fit the target.
    """
    if recipe.head is None:
        config = head_config(recipe, target.config, tokenizer)
        torch.manual_seed(recipe.seed)
        head = JetFlowHead(config).to(target.device)
        initialize_from_target(head, target)
        return head
    kind = None if recipe.branch_correction == "none" else recipe.branch_correction
    head = start_from_head(recipe.head, target, kind, recipe.seed, recipe.draft_vocab, recipe.block_size)
    if recipe.target_name is not None:
        head.config.target_name = recipe.target_name
    if recipe.train_only:
        train_correction_only(head)
    return head


def head_config(recipe: TrainRecipe, target: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> JetFlowConfig:
    """The configuration of a new head for the target; a [`JetFlowError`] if a setting does not fit it."""
    num_target_layers = target.get_text_config(decoder=True).num_hidden_layers
    if recipe.num_taps > num_target_layers:
        raise JetFlowError(
            f"`--num-taps` is {recipe.num_taps}, but the target has {num_target_layers} layers; give at most as many"
        )
    return JetFlowConfig.for_target(
        target,
        num_hidden_layers=recipe.num_layers,
        block_size=recipe.block_size or BLOCK_SIZE,
        hidden_state_indices=[layer + 1 for layer in spaced_layer_ids(num_target_layers, recipe.num_taps)],
        mask_token_id=None if recipe.mask_token is None else _mask_token_id(tokenizer, recipe.mask_token),
        draft_vocab_size=recipe.draft_vocab or None,
        branch_correction=None if recipe.branch_correction == "none" else recipe.branch_correction,
        target_name=recipe.target_name or recipe.target,
    )


def choose_draft_vocab(head: JetFlowHead, target: PreTrainedModel, answers: Answers) -> None:
    """Let the head score the most frequent tokens of these answers, and those that end a text."""
    eos = target.generation_config.eos_token_id
    always = eos if isinstance(eos, list) else [] if eos is None else [eos]
    assert head.config.draft_vocab_size is not None
    head.d2t.copy_(frequent_tokens(answers, head.config.draft_vocab_size, always))


def _mask_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids = tokenizer.get_vocab()
    if token not in ids:
        raise JetFlowError(
            f"`--mask-token`: the token {token!r} is not in the tokenizer's vocabulary; name an unused special token"
        )
    return ids[token]


def initialize_from_target(head: JetFlowHead, target: PreTrainedModel) -> None:
    """
    Initialize a head from its target: layers from late target layers, norms from the target's norms, and the fusion as
    the mean of the tapped states.

    Tensors whose name or shape the target does not have stay random.
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
    # The copied key and value projections read the context instead of the layer's normed input.
    pairs.append((head.hidden_norm.weight, _tensor(base, f"{sources[0]}.input_layernorm.weight")))
    with torch.no_grad():
        for parameter, tensor in pairs:
            if tensor is not None and tensor.shape == parameter.shape:
                parameter.copy_(tensor)
        if head.config.target_hidden_size == head.config.hidden_size:
            assert head.fc is not None  # a new head has one
            num_taps = head.fc.in_features // head.config.hidden_size
            head.fc.weight.copy_(torch.eye(head.config.hidden_size).repeat(1, num_taps) / num_taps)


def _name_in_target(base: nn.Module, source: str, name: str) -> str:
    """
    The target's name of a head's tensor. Some targets use `post_attention_layernorm` for the attention's output and
    have another norm before the MLP.
    """
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
    """A tensor of the target. Norm weights are plain factors; Gemma-like targets store them as offsets from one."""
    path, _, leaf = name.rpartition(".")
    module = _module(base, path)
    tensor = getattr(module, leaf, None)
    if module is None or not isinstance(tensor, torch.Tensor) or tensor.ndim != 1 or leaf != "weight":
        return tensor
    factors = module(torch.ones_like(tensor)).float()  # of a row of ones, whose RMS is one: the weights it applies
    offset = tensor.float() + 1
    return offset if torch.allclose(factors, offset, rtol=5e-3, atol=5e-3) else tensor


def start_from_head(
    source: str,
    target: PreTrainedModel,
    branch_correction: str | None,
    seed: int,
    draft_vocab: int = 0,
    block_size: int | None = None,
) -> JetFlowHead:
    """
    A float32 head to continue from. A missing branch correction is added, zero-initialized.

    No tensor depends on the block size: a longer block has more MASK rows, which training then teaches to draft.

    Args:
        source (`str`): Hub id or folder of the head.
        branch_correction (`str`, *optional*): Kind of correction of the trained head.
        draft_vocab (`int`): Size of its draft vocabulary, whose tokens the caller then chooses; 0 for the head's own.
        block_size (`int`, *optional*): Rows of its blocks, by default as many as the head has.

    Raises:
        JetFlowError: If the head cannot be loaded or trained, does not fit the target, or has another correction.
    """
    head = load_head(source, torch.float32)
    check_pairing(target, head)
    if not head.config.is_plain:
        raise JetFlowError(
            f"the head {source} has parts of another layout (its own embedding or LM head, scaled logits, an anchor "
            "row that predicts, or another layout's scorer or layers); such heads draft in `generate`, but cannot be "
            "trained; remove `--head` to train a new one"
        )
    own = head.config.branch_correction
    if own is not None and own != branch_correction:
        raise JetFlowError(
            f"the head {source} has a branch correction of kind {own!r}, which cannot become {branch_correction!r}; "
            f"give `--branch-correction {own}`"
        )
    if block_size is not None:
        head.config.block_size, head.generation_config.max_depth = block_size, block_size - 1
    size = draft_vocab or head.config.draft_vocab_size
    if (own, head.config.draft_vocab_size) != (branch_correction, size):
        torch.manual_seed(seed)
        changes = {"branch_correction": branch_correction, "draft_vocab_size": size}
        whole = JetFlowHead(JetFlowConfig.from_dict({**head.config.to_dict(), **changes}))
        state = {name: tensor for name, tensor in head.state_dict().items() if name != "d2t" or not draft_vocab}
        missing, unexpected = whole.load_state_dict(state, strict=False)
        assert not unexpected
        assert all(name == "d2t" or name.startswith("branch_correction.") for name in missing)
        whole.generation_config = head.generation_config
        head = whole
    return head.to(target.device)


def train_correction_only(head: JetFlowHead) -> None:
    """
    Freeze the head except its branch correction.

    Raises:
        JetFlowError: If it has none.
    """
    if head.branch_correction is None:
        raise JetFlowError(
            "`--train-only correction`, but the head has no branch correction; give `--branch-correction path` or "
            "`parent`, or remove `--train-only`"
        )
    head.requires_grad_(False)
    head.branch_correction.requires_grad_(True)
