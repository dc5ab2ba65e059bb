"""How the classes of recurrent layers read their states: which functions of their forward have a version for trees.

All recurrent layers of transformers follow one plan: project, convolve, run a rule, norm, project. The convolution and
the rule are functions of their module, and the states come from a cache. A class is known by these functions, whatever
its family; the rest of its forward is run as it is.
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn


STATE_UPDATES = {"update_conv_state", "update_recurrent_state"}  # the cache's methods that write states
DELTA_RULE = {"query", "key", "value", "g", "beta", "use_qk_l2norm_in_kernel"}
STATE_SPACE = {"hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus"}
# Functions of transformers' modules that have a version for trees, and the parameters that it relies on.
CONVOLUTIONS = {"causal_conv1d_fn": {"hidden_states", "weight", "bias", "activation"}}
RULES = {
    "torch_chunk_gated_delta_rule": DELTA_RULE,
    "chunk_kimi_delta_attention": DELTA_RULE,
    "mamba2_chunk_scan": STATE_SPACE,
}


def recurrent_modules(model: nn.Module) -> list[nn.Module]:
    """Layers of the target that write states to the cache."""
    return [module for module in model.modules() if _state_writers(_class(module))]


def unknown_reason(model: nn.Module, layers: list[int]) -> str | None:
    """
    Why the recurrent layers of a target cannot read trees; `None` if they can.

    Args:
        layers (`list[int]`): The layers that are recurrent, according to the target's configuration.
    """
    modules = recurrent_modules(model)
    for module in modules:
        if planned_functions(_class(module)) is None:
            return f"`{type(module).__name__}` does not read its states as transformers' recurrent layers do"
    if sorted(getattr(module, "layer_idx", -1) for module in modules) != layers:
        return "there is not one recurrent module in each recurrent layer"
    return None


@functools.cache
def planned_functions(cls: Any) -> set[str] | None:
    """Functions of a recurrent layer's forward that have a version for trees; `None` if its class does not follow the
    plan."""
    if _state_writers(cls) != {"forward"}:
        return None
    forward = inspect.unwrap(cls.forward)
    names = _names_in(forward)
    for update, functions in (("update_conv_state", CONVOLUTIONS), ("update_recurrent_state", RULES)):
        if (update in names) != (len(names & functions.keys()) == 1):
            return None
    found = names & (CONVOLUTIONS | RULES).keys()
    if not all(_takes(forward.__globals__.get(name), (CONVOLUTIONS | RULES)[name]) for name in found):
        return None
    return found


def with_functions(cls: Any, functions: dict[str, Callable]) -> Callable:
    """The class's own forward, undecorated, in which these functions replace those of the same name."""
    forward = inspect.unwrap(cls.forward)
    names = {**forward.__globals__, **functions}
    return FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


def _class(module: nn.Module) -> Any:
    return type(module)


@functools.cache
def _state_writers(cls: Any) -> set[str]:
    """Methods of a class that write states to the cache."""
    members = [item for base in cls.__mro__ for item in vars(base).items()]
    return {name for name, member in members if callable(member) and _names_in(member) & STATE_UPDATES}


def _names_in(function: Any) -> set[str]:
    """Names that a function looks up."""
    return set(getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ()))


def _takes(function: Any, names: set[str]) -> bool:
    """Whether a function has these parameters; one that takes whatever comes is a wrapper and is trusted."""
    if not callable(function):
        return False
    parameters = inspect.signature(function).parameters
    return names <= parameters.keys() or any(known.kind is known.VAR_POSITIONAL for known in parameters.values())
