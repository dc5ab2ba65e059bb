"""`install`: builds the device and makes `torch.cuda` answer as if it were there."""

import fcntl
import functools
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


@functools.cache
def install() -> ModuleType:
    """The extension module, built on first use; from then on torch sees CUDA devices."""
    from torch.utils import cpp_extension

    source = Path(__file__).with_name("device.cpp")
    folder = Path(tempfile.gettempdir()) / f"pretended_cuda-{os.getuid()}-{torch.__version__}"
    folder.mkdir(exist_ok=True)
    with open(folder / "building", "w") as building:
        fcntl.flock(building, fcntl.LOCK_EX)  # ends with the process; on torch's own lock others wait forever
        (folder / "lock").unlink(missing_ok=True)
        device = cpp_extension.load(
            "pretended_cuda_device", [str(source)], build_directory=str(folder), extra_cflags=["-O1", "-w"]
        )
    _answer_for(device)
    return device


def _answer_for(device: ModuleType) -> None:
    """Random numbers are the CPU's, so that a seed gives one text on both devices."""
    cuda: Any = torch.cuda
    cuda._lazy_init = cuda.synchronize = cuda.empty_cache = cuda.manual_seed = cuda.manual_seed_all = _nothing
    cuda.is_available = cuda.is_initialized = cuda.is_bf16_supported = lambda *_, **__: True
    cuda._is_in_bad_fork = lambda: False
    cuda.device_count = lambda: device.NUM_DEVICES
    cuda.current_device = device.current_device
    cuda.set_device = lambda index: device.set_device(torch.device("cuda", index).index)
    cuda.get_device_name = lambda *_: "pretended"
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    generator = torch.Generator
    torch.Generator = type("Generator", (), {"__new__": lambda _cls, device="cpu": generator("cpu")})  # type: ignore[misc]
    torch.histc = _histc(torch.histc)
    torch.Tensor.__deepcopy__ = _deepcopy(torch.Tensor.__deepcopy__)  # type: ignore[method-assign]


def _nothing(*_: Any, **__: Any) -> None: ...


def _histc(original: Any) -> Any:
    """CUDA's kernel takes integers, the CPU's does not."""

    def histc(numbers: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not numbers.is_cuda or numbers.is_floating_point():
            return original(numbers, *args, **kwargs)
        return original(numbers.float(), *args, **kwargs).to(numbers.dtype)

    return histc


def _deepcopy(original: Any) -> Any:
    """torch copies storages, which it cannot make on a device it was not built for."""

    def deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if not tensor.is_cuda:
            return original(tensor, memo)
        if id(tensor) not in memo:
            copied = tensor.detach().clone()
            if isinstance(tensor, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = copied
        return memo[id(tensor)]

    return deepcopy
