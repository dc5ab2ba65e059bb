"""Common mistakes in reading or using a draft head, each with the change that reverts it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..head.configuration_jetflow import READ_CORRECTIONS, TRAINED_CORRECTIONS, JetFlowConfig
from ..head.modeling_jetflow import JetFlowHead
from ..prompts import encode_chat


@dataclass(frozen=True)
class Edit:
    """A change of a head that no field of its configuration makes."""

    apply: Callable[[JetFlowHead], None]  # changes modules of the head; shared tensors stay as they are
    lines: tuple[str, ...]  # the same in Python


def _swap_codebooks(head: JetFlowHead) -> None:
    scorer = head.branch_correction
    scorer.predecessor_codebook, scorer.successor_codebook = scorer.successor_codebook, scorer.predecessor_codebook


def _skip_context_norm(head: JetFlowHead) -> None:
    head.hidden_norm = nn.Identity()


EDITS = {
    "swap codebooks": Edit(
        _swap_codebooks,
        (
            "scorer = head.branch_correction",
            "old, new = scorer.predecessor_codebook, scorer.successor_codebook",
            "scorer.predecessor_codebook, scorer.successor_codebook = new, old",
        ),
    ),
    "skip the context's norm": Edit(
        _skip_context_norm,
        ("import torch", "head.hidden_norm = torch.nn.Identity()  # no layout stores this: train the head again"),
    ),
}


@dataclass(frozen=True)
class Mistake:
    """A possible mistake, and the fields of `JetFlowConfig` or the edit (a key of `EDITS`) that revert it."""

    name: str
    cause: str  # the explanation if the change helps
    change: str
    fields: dict[str, Any]
    edit: str | None = None

    def reverted(self, head: JetFlowHead) -> JetFlowHead:
        """The head without the mistake; tensors are shared, not copied."""
        other = with_fields(head, self.fields)
        if self.edit is not None:
            EDITS[self.edit].apply(other)
        return other

    def fix(self, source: str) -> list[str]:
        """Lines of Python that load the head without the mistake and save it."""
        # A checkpoint loads with all of its tensors, so its own embeddings are removed after loading.
        own = {"own_embedding": "embed_tokens", "own_lm_head": "lm_head"}
        given = "".join(f", {name}={value!r}" for name, value in self.fields.items() if name not in own)
        return [
            "from hf_jetflow import JetFlowHead",
            f"head = JetFlowHead.from_pretrained({source!r}{given})",
            *(f"head.{own[name]}, head.config.{name} = None, False" for name in self.fields if name in own),
            *(EDITS[self.edit].lines if self.edit is not None else ()),
            'head.save_pretrained("fixed-head")',
        ]


def with_fields(head: JetFlowHead, fields: dict[str, Any]) -> JetFlowHead:
    """The head with other fields in its configuration; tensors are shared, not copied."""
    config = JetFlowConfig.from_dict({**head.config.to_dict(), **fields})
    config._attn_implementation = head.config._attn_implementation
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*head.parameters(), *head.buffers())}
    other = copy.deepcopy(head, {**shared, id(head.config): config})
    other.rotary_emb = type(head.rotary_emb)(config).to(head.device)
    if not config.own_embedding:
        other.embed_tokens = None
    if not config.own_lm_head:
        other.lm_head = None
    return other


def common_mistakes(
    head: JetFlowHead, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Mistake]:
    """Possible mistakes of a head whose sizes fit the target."""
    config = head.config
    for flag in (True, False):
        if config.causal_layers != [flag] * config.num_hidden_layers:
            change = f"{'causal' if flag else 'bidirectional'} blocks"
            cause = "the causality of the head's blocks was misread"
            yield Mistake("causality", cause, change, {"is_causal": flag})
    yield from _shifted_taps(config, target)
    yield from _shifted_rows(config)
    yield from _scorers(config)
    cause = "the head was trained without a norm of the fused taps"
    yield Mistake("context norm", cause, "no norm of the fused taps", {}, "skip the context's norm")
    yield from _windows(config, target)
    yield from _rotations(config, target)
    yield from _mask_tokens(config, target, tokenizer)
    for name, module in (("own_lm_head", "LM head"), ("own_embedding", "embedding")):
        if getattr(config, name):
            cause = f"the {module} in the checkpoint is not the one the head was trained with"
            yield Mistake(module, cause, f"the target's {module}", {name: False})


def _shifted_taps(config: JetFlowConfig, target: PreTrainedModel) -> Iterator[Mistake]:
    assert config.hidden_state_indices is not None
    last = target.config.get_text_config(decoder=True).num_hidden_layers
    for shift in (1, -1):
        indices = [index + shift for index in config.hidden_state_indices]
        if min(indices) >= 0 and max(indices) <= last:
            cause = "the tapped layers are off by one"
            yield Mistake("taps", cause, f"taps {shift:+d}: {indices}", {"hidden_state_indices": indices})


def _shifted_rows(config: JetFlowConfig) -> Iterator[Mistake]:
    predicts = not config.anchor_predicts
    if config.branch_correction in TRAINED_CORRECTIONS or config.num_rows + predicts < 2:
        return
    change = f"{'every' if predicts else 'no anchor'} row predicts"
    fields = {"anchor_predicts": predicts, "block_size": config.num_rows + predicts}
    yield Mistake("layout", "the rows of a block were read one depth off", change, fields)


def _scorers(config: JetFlowConfig) -> Iterator[Mistake]:
    if config.branch_correction not in READ_CORRECTIONS:
        return
    first = 1 if config.first_corrected_depth == 0 else 0
    cause = "the first depth to correct was misread"
    yield Mistake("first depth", cause, f"scores corrected from depth {first}", {"first_corrected_depth": first})
    if config.branch_correction == "selector":
        cause = "the selector's codebooks of predecessors and successors were exchanged"
        yield Mistake("selector", cause, "codebooks exchanged", {}, "swap codebooks")


def window_to_try(config: JetFlowConfig, target: PreTrainedModel) -> int | None:
    """The sliding window of the head, or else of the target, in positions."""
    text = target.config.get_text_config(decoder=True)
    return config.sliding_window or getattr(text, "sliding_window", None)


def _windows(config: JetFlowConfig, target: PreTrainedModel) -> Iterator[Mistake]:
    cause = "the sliding window of the head's layers was misread"
    num_layers, window = config.num_hidden_layers, window_to_try(config, target)
    if any(config.layer_windows):
        yield Mistake("window", cause, "no sliding window", {"layer_types": ["full_attention"] * num_layers})
    elif window:
        for num_full, where in ((0, "all layers"), (1, "all layers except the last")):
            kinds = ["sliding_attention"] * (num_layers - num_full) + ["full_attention"] * num_full
            if "sliding_attention" in kinds:
                fields = {"layer_types": kinds, "sliding_window": window}
                yield Mistake("window", cause, f"a window of {window} in {where}", fields)


def _rotations(config: JetFlowConfig, target: PreTrainedModel) -> Iterator[Mistake]:
    cause = "the rotary parameters are not those the head was trained with"
    assert config.rope_parameters is not None
    plain = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    tried = [config.rope_parameters]
    theirs = JetFlowConfig.for_target(target.config).rope_parameters
    assert theirs is not None
    for change, rope in (("the target's rope", theirs), ("rope without scaling", plain)):
        if rope not in tried:
            tried.append(rope)
            yield Mistake("rope", cause, change, {"rope_parameters": rope})


def _mask_tokens(
    config: JetFlowConfig, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Mistake]:
    if config.mask_token_id is None:
        return
    text = target.config.get_text_config(decoder=True)
    named = [token for token in tokenizer.get_added_vocab() if "mask" in token.lower()]
    found = [getattr(text, "mask_token_id", None), *tokenizer.convert_tokens_to_ids(named)]
    found += [tokenizer.pad_token_id, text.pad_token_id]
    for token_id in dict.fromkeys(found):
        if token_id is not None and token_id != config.mask_token_id and 0 <= token_id < config.vocab_size:
            cause = "the MASK token is not the one the head was trained with"
            change = f"MASK {token_id} ({tokenizer.convert_ids_to_tokens(token_id)})"
            yield Mistake("mask token", cause, change, {"mask_token_id": token_id})


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt under the chat template, or as plain text if the tokenizer has none."""
    return encode_chat(tokenizer, messages) if tokenizer.chat_template else _encode_text(tokenizer, messages)


def other_encodings(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict[str, str]]]
) -> dict[str, list[list[int]]]:
    """The prompts in other forms, by name: thinking on or off, no chat template; only forms that differ."""
    if not tokenizer.chat_template:
        return {}
    forms = {
        "enable_thinking=True": [encode_chat(tokenizer, each, enable_thinking=True) for each in conversations],
        "enable_thinking=False": [encode_chat(tokenizer, each, enable_thinking=False) for each in conversations],
        "no chat template": [_encode_text(tokenizer, each) for each in conversations],
    }
    usual = [encode_chat(tokenizer, each) for each in conversations]
    return {name: prompts for name, prompts in forms.items() if prompts != usual}


def _encode_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
