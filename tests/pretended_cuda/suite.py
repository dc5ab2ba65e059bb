"""For pytest: every `generate` on the CPU runs on the pretended device, and its results come back."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from hf_jetflow import JetFlowHead
from hf_jetflow.decoding import reuse

from .device import install


class Moved:
    """Modules that lie on a device for the time of a block."""

    def __init__(self, device: str, *modules: torch.nn.Module | None):
        self._device, self._modules = device, [module for module in modules if module is not None]

    def __enter__(self) -> None:
        for module in self._modules:
            _move(module, self._device)

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            _move(module, "cpu")


def _move(module: torch.nn.Module, device: str) -> None:
    """With the tensors that are plain attributes."""
    module.to(device)
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.to(device))


def _on(value: Any, device: str) -> Any:
    """Tensors of plain containers and outputs on another device; caches stay where they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(_on(each, device) for each in value)
    if type(value) is dict:
        return {name: _on(each, device) for name, each in value.items()}
    if isinstance(value, ModelOutput):
        for name in list(value):
            value[name] = _on(value[name], device)
    return value


def _head_of(kwargs: dict[str, Any]) -> JetFlowHead | None:
    assistant, custom = kwargs.get("assistant_model"), kwargs.get("custom_generate")
    cells = [cell.cell_contents for cell in getattr(custom, "__closure__", None) or ()]
    return next((each for each in (assistant, *cells) if isinstance(each, JetFlowHead)), None)


def run_on_device() -> Counter[str]:
    """Wrap `generate`; returns the number of its calls, and of those with a head, which grows with each."""
    install()
    num_calls: Counter[str] = Counter()
    original, is_inside = GenerationMixin.generate, False

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        is_elsewhere = any(each.device.type != "cpu" for each in self.parameters()) or hasattr(self, "hf_device_map")
        if is_inside or is_elsewhere:
            return original(self, *args, **kwargs)
        head = _head_of(kwargs)
        num_calls["all"] += 1
        num_calls["with a head"] += head is not None
        is_inside = True
        try:
            with Moved("cuda", self, head):
                return _on(original(self, *_on(args, "cuda"), **_on(kwargs, "cuda")), "cpu")
        finally:
            is_inside = False

    GenerationMixin.generate = generate
    reuse.stored_context = _beside_the_cache(reuse.stored_context)
    GenerationMixin._valid_auto_compile_criteria = _only_on_request(GenerationMixin._valid_auto_compile_criteria)
    return num_calls


def _beside_the_cache(stored_context: Callable) -> Callable:
    """A test that asks what is stored with a cache sees the head on the host, where the cache is not."""

    def recall_on_device(cache: Any, head: JetFlowHead) -> Any:
        memory = getattr(cache, reuse.ATTRIBUTE, None)
        if memory is None or memory.device == head.device:
            return stored_context(cache, head)
        with Moved("cuda", head):
            return stored_context(cache, head)

    return recall_on_device


def _only_on_request(criteria: Callable) -> Callable:
    """transformers compiles on CUDA by default, which a device without Triton cannot do."""

    def valid(self: Any, model_kwargs: Any, generation_config: Any) -> bool:
        return generation_config.compile_config is not None and criteria(self, model_kwargs, generation_config)

    return valid
