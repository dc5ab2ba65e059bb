"""A CUDA device that the CPU pretends, to find device mixes and to count launches and host waits without a card.

`install()` gives torch the devices `cuda:0` and `cuda:1`. Tensors claim the device, operations that mix devices raise
as on CUDA, and every launch and host wait is reported. `pytest --pretend-cuda` runs each `generate` of a suite there
(`suite.py`); `python -m pretended_cuda` in this folder's parent prints counts of a round by step (`__main__.py`).
Needs a C++ compiler and ninja.
"""

from .counting import Counts, count
from .device import install


__all__ = ["Counts", "count", "install"]
