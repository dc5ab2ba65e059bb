"""Rotary frequencies of the head's rows."""

import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding


class DraftRotaryEmbedding(Qwen3RotaryEmbedding):
    """
    Ignores padding among the context rows where frequencies depend on the longest position.

    Padding lies at a position beyond every text (see `cache.UNSEEN_POSITION`), so that no block row sees it.
    """

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rope_type in ("dynamic", "longrope"):
            position_ids = position_ids.where(position_ids < torch.iinfo(torch.int32).max, 0)
        return super().forward(x, position_ids)
