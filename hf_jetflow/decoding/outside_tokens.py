"""Tokens of the text outside a head's draft vocabulary, which it drafts all the same.

A draft vocabulary leaves out rare tokens. One that stands in the text, such as a name, often comes again, and its row
of the target's output embedding scores it as the head's other tokens are scored.
"""

import torch
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence

from ..transfer import must_not_wait


NO_TOKEN = -1  # fills up what a text has fewer of


def distinct_outside(ids: torch.Tensor, draft_indices: torch.Tensor) -> torch.Tensor:
    """
    The distinct tokens of each text outside the draft vocabulary, (..., tokens).

    Args:
        ids (`torch.Tensor`, (..., seq)): Tokens of each text; ids that are no tokens are left out.
        draft_indices (`torch.Tensor`, (vocab + 1,)): Of each token its index in the draft vocabulary; the size of that
            for all others.
    """
    vocab_size, draft_vocab_size = len(draft_indices) - 1, draft_indices[-1]
    is_token = (ids >= 0) & (ids < vocab_size)
    ids = ids.where(is_token, vocab_size)
    is_outside = is_token & (draft_indices[ids] == draft_vocab_size)
    if must_not_wait(ids.device):  # all places, but a token counts only at its last one
        places = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
        last = ids.new_zeros(*ids.shape[:-1], vocab_size + 1).scatter_reduce(-1, ids, places, "amax")
        return ids.where(is_outside & (last.gather(-1, ids) == places), NO_TOKEN)
    texts = zip(ids.view(-1, ids.shape[-1]), is_outside.view(-1, ids.shape[-1]), strict=True)
    distinct = [text[mask].unique() for text, mask in texts]
    return pad_sequence(distinct, batch_first=True, padding_value=NO_TOKEN).view(*ids.shape[:-1], -1)


def outside_logits(rows: torch.Tensor, tokens: torch.Tensor, output_embedding: torch.Tensor) -> torch.Tensor:
    """
    Logits (..., depth, tokens) of tokens (..., tokens) by the rows of an output embedding (vocab, hidden).

    Args:
        rows (`torch.Tensor`, (..., depth, hidden)): The head's.
    """
    weight = output_embedding[tokens.clamp_min(0).to(output_embedding.device)]
    rows = rows.to(weight.device, weight.dtype)
    return linear(rows, weight.squeeze(0)) if weight.dim() == 3 and len(weight) == 1 else rows @ weight.mT
