"""`MuonAdamW`: the optimizer of a head."""

from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon for the matrices and AdamW for everything else, as one optimizer with one state dict.

    Args:
        head (`nn.Module`): Its trainable parameters: Muon updates the 2-D ones, AdamW the others.
        muon_lr (`float`), adamw_lr (`float`): Their learning rates.
    """

    def __init__(self, head: nn.Module, muon_lr: float, adamw_lr: float):
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        self._parts = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give the parts this optimizer's groups and state, which schedulers and checkpoints use."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
