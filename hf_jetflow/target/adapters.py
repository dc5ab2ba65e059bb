"""peft's per-sequence `adapter_names`, reordered with the batch."""

from functools import partial

from torch import nn


class AdapterNames:
    """
    The `adapter_names` of a call of peft's `generate`, or nothing.

    peft hands them to its layers by forward hooks that last as long as the call. When sequences
    finish, only the names of the active ones are passed on, in their order.

    Args:
        model (`nn.Module`): The target, inside that call.
    """

    def __init__(self, model: nn.Module):
        hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
        self._keywords = [h.keywords for h in hooks if isinstance(h, partial) and h.keywords.get("adapter_names")]
        self._names = [list(keywords["adapter_names"]) for keywords in self._keywords]

    def select(self, indices: list[int]) -> None:
        """Let the layers know the names of these sequences of the batch, in this order."""
        for keywords, names in zip(self._keywords, self._names, strict=True):
            keywords["adapter_names"] = [names[index] for index in indices]
