"""peft's per-sequence `adapter_names`, reordered with the batch."""

from functools import cached_property, partial
from typing import Any

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
        self._model = model

    @cached_property
    def _hooks(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Keywords of peft's hooks, and the names of all sequences; looked up only if a sequence finishes."""
        hooks = [hook for module in self._model.modules() for hook in module._forward_pre_hooks.values()]
        keywords = [h.keywords for h in hooks if isinstance(h, partial) and h.keywords.get("adapter_names")]
        return [(each, list(each["adapter_names"])) for each in keywords]

    def select(self, sequences: list[int]) -> None:
        """Let the layers know the names of these sequences of the batch, in this order."""
        for keywords, names in self._hooks:
            keywords["adapter_names"] = [names[sequence] for sequence in sequences]
