"""Recurrent layers of the target while they verify a draft tree.

A [`TreeMixer`] runs a layer's own forward with the tree versions of its functions (see `mixer_plans.py`), and stands
for the cache in it. So the states stay as they were before the round; at commit they follow from its products. It is
installed for the verifying forward only, and other threads never meet it.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, softplus
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.integrations.accelerate import force_accelerate_hooks

from ..trees.tree import DraftTree
from .mixer_plans import planned_functions, recurrent_modules, with_functions
from .recurrent import LinearAttentionLayer, has_states
from .tree_mixers import (
    Recurrence,
    gated_delta_rule,
    newest_window,
    path_windows,
    state_space_rule,
    tree_convolution,
    windows_of,
)


CACHE_NAMES = ("cache", "cache_params", "past_key_values")  # of the cache in forwards, by release
METHODS = {  # of `TreeMixer`, by the function that they replace
    "causal_conv1d_fn": "convolve",
    "torch_chunk_gated_delta_rule": "delta_rule",
    "chunk_kimi_delta_attention": "delta_rule",
    "mamba2_chunk_scan": "state_space",
}
_running = threading.local()  # `mixer`: whose forward this thread is in


class TreeNodes:
    """
    What the recurrent layers need to know of a round's trees, made once a round for each device.

    Args:
        tree ([`DraftTree`]): Of all active sequences.
        num_rows (`int`): Rows of the forward; those beyond the nodes are padding.
    """

    def __init__(self, tree: DraftTree, num_rows: int):
        self._tree, self._num_pad = tree, num_rows - tree.num_nodes
        self.num_sequences = len(tree.tokens)
        self._known: dict[Any, torch.Tensor] = {}

    def ancestors(self, device: torch.device) -> torch.Tensor:
        """(batch, rows, rows) bool; padding sees nothing."""
        return self._once((device,), lambda: pad(self._tree.ancestor_mask, (0, self._num_pad, 0, self._num_pad)))

    def windows(self, width: int, device: torch.device) -> torch.Tensor:
        """See `path_windows`."""
        parents = pad(self._tree.parents, (0, self._num_pad), value=-1)
        return self._once((device, width), lambda: path_windows(parents, width))

    def ends(self, paths: list[list[int]], device: torch.device) -> torch.Tensor:
        """The last node of each sequence's path, (batch,); -1 for an empty path."""
        return self._once((device, "ends"), lambda: torch.tensor([[-1, *path][-1] for path in paths], device="cpu"))

    def _once(self, key: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor on the device that the key begins with."""
        if key not in self._known:
            self._known[key] = make().to(key[0])
        return self._known[key]


class TreeMixer:
    """
    One recurrent layer of the target over draft trees.

    Args:
        module (`nn.Module`): The layer.
        states (`LinearAttentionLayer`): Its states in the target's cache, written by `advance` only.
    """

    def __init__(self, module: nn.Module, states: LinearAttentionLayer):
        self.module, self.states = module, states
        cls: Any = type(module)
        # The convolution's weights are read without a call of it, which would bring them in where they are offloaded.
        convolutions = [name for name, child in module.named_children() if isinstance(child, nn.Conv1d)]
        self._forward = force_accelerate_hooks(convolutions)(_tree_forward(cls))
        # State space layers hold (value_dim, key_dim).
        self._is_transposed = "mamba2_chunk_scan" in (planned_functions(cls) or ())
        self._nodes: TreeNodes | None = None
        self._inputs: torch.Tensor | None = None  # of the convolution: those before the tree, then the nodes'
        self._recurrence: Recurrence | None = None

    def forward(self, nodes: TreeNodes, *args: Any, **kwargs: Any) -> Any:
        """The module's forward over all nodes."""
        self._nodes = nodes
        name = next(name for name in CACHE_NAMES if name in kwargs)
        outer, _running.mixer = getattr(_running, "mixer", None), self
        try:
            return self._forward(self.module, *args, **{**kwargs, name: self})
        finally:
            _running.mixer = outer

    def advance(self, paths: list[list[int]]) -> None:
        """Replace the states by those after each sequence's path, in place: compiled graphs hold on to them."""
        assert self._nodes is not None
        batch = self._nodes.num_sequences
        if self._inputs is not None:
            ends, state = self._nodes.ends(paths, self._inputs.device), self.states.conv_states[0][:batch]
            newest = newest_window(self._nodes.windows(state.shape[-1], ends.device), ends)
            state.copy_(windows_of(self._inputs, newest).transpose(1, 2))
        if self._recurrence is not None:
            keys = self._recurrence.keys
            self._recurrence.advance(self._state(keys.shape[1]), self._nodes.ends(paths, keys.device))
        self.forget()

    def reorder(self, slots: list[int], sources: list[int]) -> None:
        """Move the states of sequences to other slots of the batch, in place."""
        for states in (*self.states.conv_states.values(), *self.states.recurrent_states.values()):
            if states is not None and slots != sources:
                states[slots] = states[sources]

    def forget(self) -> None:
        """Drop what the newest round computed."""
        self._nodes = self._inputs = self._recurrence = None

    # In the module's forward it stands for the cache, one without states, so that all rows are read at once.

    def get_conv_state(self, *args: Any, **kwargs: Any) -> None: ...

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> None: ...

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def update_conv_state(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return inputs

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> None: ...

    # Its versions of the module's functions.

    def convolve(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(batch, channels, nodes)."""
        assert self._nodes is not None
        state = self.states.conv_states[0][: len(hidden_states)]
        self._inputs = torch.cat([state, hidden_states], dim=-1).transpose(1, 2)
        windows = self._nodes.windows(state.shape[-1], hidden_states.device)
        outputs = tree_convolution(self._inputs.to(weight.dtype), windows, weight, bias)
        if activation is not None:
            outputs = ACT2FN[activation](outputs)
        return outputs.to(hidden_states.dtype).transpose(1, 2)

    def delta_rule(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (batch, nodes, heads, dim), and a state that nobody uses."""
        assert self._nodes is not None
        groups, dtype = key.shape[2], torch.promote_types(query.dtype, torch.float32)
        query, key = (_grouped(rows.to(dtype), groups) for rows in (query, key))
        if use_qk_l2norm_in_kernel:
            query, key = _normalized(query), _normalized(key)
        outputs, self._recurrence = gated_delta_rule(
            query * query.shape[-1] ** -0.5,
            key,
            _grouped(value.to(dtype), groups),
            _grouped(g.to(dtype) if g.ndim == 4 else g[..., None].to(dtype), groups),
            _grouped(beta.to(dtype)[..., None], groups)[..., 0],
            self._state(groups).to(dtype),
            self._nodes.ancestors(query.device),
        )
        return outputs.flatten(1, 2).transpose(1, 2).to(value.dtype), outputs

    def state_space(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `delta_rule`. Steps are not clamped to `dt_limit`, as they are not in plain decoding."""
        assert self._nodes is not None
        groups, dtype = B.shape[2], torch.promote_types(hidden_states.dtype, torch.float32)
        if dt_bias is not None:
            dt = dt + dt_bias.to(dt.dtype)
        if dt_softplus:
            dt = softplus(dt)
        inputs, dt = hidden_states.to(dtype), dt.to(dtype)[..., None]
        outputs, self._recurrence = state_space_rule(
            _grouped(C.to(dtype), groups),
            _grouped(B.to(dtype), groups),
            _grouped(inputs * dt, groups),
            _grouped(dt * A.to(dtype)[:, None], groups),
            self._state(groups).to(dtype),
            self._nodes.ancestors(inputs.device),
        )
        rows = outputs.flatten(1, 2).transpose(1, 2)
        if D is not None:
            rows = rows + inputs * D[:, None]
        return rows.to(hidden_states.dtype).contiguous(), outputs

    def _state(self, groups: int) -> torch.Tensor:
        """The recurrent state of the active sequences, a view (batch, groups, heads, key_dim, value_dim)."""
        assert self._nodes is not None
        state = self.states.recurrent_states[0][: self._nodes.num_sequences]
        if self._is_transposed:
            state = state.transpose(-1, -2)
        return state.unflatten(1, (groups, -1))


def _grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(batch, nodes, heads, dim) as (batch, groups, heads of a group, nodes, dim)."""
    return rows.transpose(1, 2).unflatten(1, (groups, -1))


def _normalized(rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + 1e-6)


@functools.cache
def _tree_forward(cls: Any) -> Callable:
    """The class's own forward, in which the running [`TreeMixer`]'s methods replace functions."""

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(_running.mixer, method)(*args, **kwargs)

    names = planned_functions(cls) or ()
    return with_functions(cls, {name: functools.partial(run, METHODS[name]) for name in names})


def tree_mixers(model: nn.Module, cache: Cache) -> list[TreeMixer]:
    """One for each recurrent layer of a target whose cache holds the prompt."""
    if not has_states(cache):
        return []
    return [TreeMixer(module, cache.layers[module.layer_idx]) for module in recurrent_modules(model)]


_lock = threading.Lock()


class _Dispatch:
    """
    Takes the place of a module's forward while some thread verifies a tree; other threads get the forward as it was.

    Args:
        module (`nn.Module`): The layer.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        # accelerate's hooks call the forward that they found.
        self._name = "_old_forward" if "_old_forward" in vars(module) else "forward"
        self._found = vars(module).get(self._name)
        self._forward = getattr(module, self._name)
        self.forwards: dict[int, Callable] = {}  # by thread

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forwards.get(threading.get_ident(), self._forward)(*args, **kwargs)

    @staticmethod
    def of(module: nn.Module) -> "_Dispatch":
        """The one that is installed, or a new one, installed."""
        for name in ("_old_forward", "forward"):
            if isinstance(installed := vars(module).get(name), _Dispatch):
                return installed
        dispatch = _Dispatch(module)
        vars(module)[dispatch._name] = dispatch
        return dispatch

    def remove(self) -> None:
        """Bring back the forward as it was."""
        if self._found is None:
            del vars(self._module)[self._name]
        else:
            vars(self._module)[self._name] = self._found


@contextmanager
def reading_trees(mixers: list[TreeMixer], nodes: TreeNodes) -> Iterator[None]:
    """Lets the target's recurrent layers read trees inside, in this thread."""
    thread_id = threading.get_ident()
    with _lock:
        for mixer in mixers:
            _Dispatch.of(mixer.module).forwards[thread_id] = functools.partial(mixer.forward, nodes)
    try:
        yield
    finally:
        with _lock:
            for mixer in mixers:
                dispatch = _Dispatch.of(mixer.module)
                del dispatch.forwards[thread_id]
                if not dispatch.forwards:
                    dispatch.remove()
