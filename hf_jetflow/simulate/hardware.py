"""`Hardware`: what a machine does per second, for the cost model in `roofline`; rated figures of some of them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """What a machine does per second, and what the software around it costs."""

    name: str
    bandwidth: float  # bytes/s of the memory that holds weights and cache, as rated
    flops: float  # floating-point operations/s of dense matrix products in the dtype used, as rated
    memory_efficiency: float  # share of `bandwidth` that is reached
    matrix_efficiency: float  # share of `flops` that is reached
    launch_seconds: float  # of one layer: what the host takes to issue it; 0 for a graphed forward
    runs_ahead: bool  # whether the host issues work while the device computes: the longer of the two counts, not both
    host_seconds: float = 0.0  # of one round: tree, walk, commit, and what else does not depend on nodes
    host_seconds_per_node: float = 0.0
    bytes_per_value: int = 2  # of weights and cache, in the dtype used
    source: str = ""  # where the figures are from

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops", "bytes_per_value"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        for name in ("memory_efficiency", "matrix_efficiency"):
            self._check(name, 0 < getattr(self, name) <= 1, "a share between 0 and 1")
        for name in ("launch_seconds", "host_seconds", "host_seconds_per_node"):
            self._check(name, getattr(self, name) >= 0, "0 or more seconds")

    def _check(self, name: str, is_good: bool, needed: str) -> None:
        if not is_good:
            raise ValueError(f"hardware {self.name!r}: `{name}` is {getattr(self, name)}, but {needed} is needed")

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "Hardware":
        """
        Hardware from the fields of this class.

        Raises:
            ValueError: If a field is missing, unknown, of another type or out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if unknown := sorted(figures.keys() - fields.keys()):
            raise ValueError(f"{unknown} are not hardware figures; known are {', '.join(fields)}")
        if missing := sorted(required - figures.keys()):
            raise ValueError(f"hardware figures {missing} are missing; `Hardware` in hardware.py describes each")
        for name, value in figures.items():
            wanted: Any = fields[name].type
            if isinstance(value, bool) != (wanted is bool) or not isinstance(
                value, (int, float) if wanted is float else wanted
            ):
                raise ValueError(f"hardware figure `{name}` is {value!r}, but a {wanted.__name__} is needed")
        return cls(**figures)


_DATASHEETS = "rated figures: NVIDIA's datasheets, dense bf16; "
_EFFICIENCIES = (
    "memory: 1397 of 2039 GB/s, Llama-2-7B with torch.compile on an A100 (gpt-fast's README); matrices: assumed, "
    "where the best shape reaches 780 of 989 TFLOP/s on an H100 (gist Chillee/2ec89696b8db7ed1c24461159e325405); "
)
_HOST = "host: tree of 256 nodes in 0.5 ms, measured on a CPU (examples/results/tree_building.json)"
_H100_LAUNCH = "launch: Qwen3-8B in transformers on an H20, 45.32 tokens/s, 36 layers (Qwen's speed benchmark); "
_A100_LAUNCH = "launch: Qwen2.5-7B in transformers on an A100, 40.38 tokens/s, 28 layers (Qwen's speed benchmark); "
_H100 = Hardware(
    name="H100 SXM, eager",
    bandwidth=3.35e12,
    flops=989e12,
    memory_efficiency=0.685,
    matrix_efficiency=0.5,
    launch_seconds=1 / 45.32 / 36,
    runs_ahead=True,
    host_seconds=0.5e-3,
    source=_DATASHEETS + _EFFICIENCIES + _H100_LAUNCH + _HOST,
)
_A100 = dataclasses.replace(
    _H100,
    name="A100 SXM 80 GB, eager",
    bandwidth=2.039e12,
    flops=312e12,
    launch_seconds=1 / 40.38 / 28,
    source=_DATASHEETS + _EFFICIENCIES + _A100_LAUNCH + _HOST,
)


def _graphed(eager: Hardware) -> Hardware:
    name, source = eager.name.replace("eager", "graphed"), _DATASHEETS + _EFFICIENCIES + _HOST
    return dataclasses.replace(eager, name=name, launch_seconds=0.0, source=source)


PRESETS = {"h100": _H100, "h100-graphed": _graphed(_H100), "a100": _A100, "a100-graphed": _graphed(_A100)}
