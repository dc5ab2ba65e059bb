"""Targets in training mode, whose forwards draw random numbers: no tree can be verified as plain decoding reads it."""

from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel


NOISE = ("drop", "jitter")  # parts of the names of what training adds at random, in configurations
NOT_DECODING = ("classifier", "summary")  # beginnings of the names of what generation does without


def dropout_reason(model: PreTrainedModel) -> str | None:
    """Reason to decode a call plainly because the target's forwards are random; `None` if they are not."""
    in_training = [module for module in model.modules() if module.training]
    if not in_training:
        return None
    text = vars(model.config.get_text_config(decoder=True))
    rates = [
        value
        for name, value in text.items()
        if any(part in name for part in NOISE) and not name.startswith(NOT_DECODING)
    ]
    rates += [module.p for module in in_training if isinstance(module, _DropoutNd)]
    if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
        return f"`{model.config.model_type}` is in training mode, where dropout is random; call `eval()` on it first"
    return None
