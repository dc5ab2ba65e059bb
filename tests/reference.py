"""The slow reference: greedy decoding without cache, heads or `generate`; and the comparison of exactness tests."""

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def decode_slowly(target: PreTrainedModel, input_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`input_ids` (1, seq) and the `num_tokens` most likely tokens after it, one whole forward per token."""
    for _ in range(num_tokens):
        logits = target(input_ids=input_ids, use_cache=False).logits
        input_ids = torch.cat([input_ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return input_ids


def assert_same_text(plain: torch.Tensor, drafted: torch.Tensor) -> None:
    """Fails with the index of the first difference between two outputs (1, seq)."""
    expected, got = plain[0].tolist(), drafted[0].tolist()
    index = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    assert index is None, (
        f"the head changed the text: at index {index} plain decoding wrote {expected[index]}, with the head it is "
        f"{got[index]} (lengths {len(expected)} and {len(got)})"
    )
    assert len(expected) == len(got), (
        f"the text ended at the wrong token: plain decoding returns {len(expected)} ids, with the head {len(got)}"
    )
