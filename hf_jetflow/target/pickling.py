"""Pickles and copies of a target that has captured hidden states: made without transformers' capturing hooks."""

import copyreg
from typing import Any
from weakref import WeakSet

from torch import nn


# transformers captures hidden states by hooks that it installs at the first request and never removes. They are local
# functions, which cannot be pickled.
_CAPTURING_MODULE, _CAPTURING_FLAG = "transformers.utils.output_capturing", "_output_capturing_hooks_installed"
_PICKLABLE: WeakSet[nn.Module] = WeakSet()


def allow_pickling(model: nn.Module) -> None:
    """Let pickled and copied models go without these hooks: transformers installs them again where they are needed."""
    if model in _PICKLABLE:
        return
    for module in model.modules():
        if _CAPTURING_FLAG in vars(module) or any(map(_captures, module._forward_hooks.values())):
            copyreg.pickle(type(module), _reduce_without_capture)
    _PICKLABLE.add(model)


def _captures(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == _CAPTURING_MODULE


def _reduce_without_capture(module: nn.Module) -> tuple[Any, ...]:
    reduced: Any = module.__reduce_ex__(2)
    rebuild, args, state, *rest = reduced
    hooks = state["_forward_hooks"]
    state = {name: value for name, value in state.items() if name != _CAPTURING_FLAG}
    state["_forward_hooks"] = type(hooks)((key, hook) for key, hook in hooks.items() if not _captures(hook))
    return rebuild, args, state, *rest
