"""Copies of a target's linear weights for the CPU's matrix kernels, stored as long as the target is in use."""

from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from ..laid_out import LaidOutWeights, can_be_laid_out


MAX_UNASKED_BYTES = 2**31  # of copies that nobody asked for

_STORED: WeakKeyDictionary[PreTrainedModel, tuple[int, LaidOutWeights]] = WeakKeyDictionary()


def laid_out_target(model: PreTrainedModel, is_wanted: bool | None, version: int = 0) -> LaidOutWeights:
    """
    Copies of the target's linear weights as they are now. Reads all of them, to see which have changed.

    Args:
        is_wanted (`bool`, *optional*): `False` drops the copies. `None` makes them unless they are large.
        version (`int`): Copies that were made under another one are made again.
    """
    layers = [module for module in model.modules() if can_be_laid_out(module)]
    is_large = sum(layer.weight.nbytes for layer in layers) > MAX_UNASKED_BYTES
    if is_wanted is False or (is_wanted is None and is_large):
        _STORED.pop(model, None)
        return LaidOutWeights()
    known, weights = _STORED.get(model, (version, LaidOutWeights()))
    if known != version:
        weights = LaidOutWeights()
    _STORED[model] = version, weights
    weights.refresh(layers)
    return weights
