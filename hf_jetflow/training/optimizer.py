"""`MuonAdamW`: the optimizer of a head."""

from typing import Any

import torch
from torch import nn


class Muon(torch.optim.Muon):
    """
    torch's Muon, with a choice of the dtype of Newton-Schulz. torch takes bfloat16, which a processor without bfloat16
    instructions emulates: an update of the shipped head took 110 s there, and takes 2 s in float32 (AMD EPYC, AVX2).
    """

    def __init__(self, parameters: Any, lr: float, dtype: torch.dtype):
        super().__init__(parameters, lr=lr, weight_decay=0.0)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            momentum, to_unit = group["momentum"], (group["ns_coefficients"], group["ns_steps"], group["eps"])
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                direction = _orthogonalized(gradient.lerp(mean, momentum).to(self._dtype), *to_unit)
                rows, columns = parameter.shape
                parameter.add_(direction, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def _orthogonalized(matrix: torch.Tensor, coefficients: tuple[float, ...], steps: int, eps: float) -> torch.Tensor:
    """Newton-Schulz (kellerjordan.github.io/posts/muon): all singular values near one; the matrix is overwritten."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x.div_(x.norm().clamp_min(eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon for the matrices and AdamW for everything else, as one optimizer with one state dict.

    Args:
        head (`nn.Module`): Its trainable parameters: Muon updates the 2-D ones, AdamW the others.
        muon_lr (`float`), adamw_lr (`float`): Their learning rates.
        dtype (`torch.dtype`): Dtype of Muon's Newton-Schulz steps, one that the device computes in.
    """

    def __init__(self, head: nn.Module, muon_lr: float, adamw_lr: float, dtype: torch.dtype = torch.bfloat16):
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        self._parts = [
            Muon(matrices, muon_lr, dtype),
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
