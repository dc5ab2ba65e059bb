"""`Hardware`: bandwidth, operations and overheads of a machine for the cost model; presets for some GPUs."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import JetFlowError


@dataclass(frozen=True)
class Hardware:
    """Rated and achieved speed of a machine, and the overhead of the software."""

    name: str
    bandwidth: float  # rated bytes/s of the memory that holds weights and cache
    flops: float  # rated operations/s of dense matrix products in the dtype used
    memory_efficiency: float  # achieved share of `bandwidth`
    matrix_efficiency: float  # achieved share of `flops`
    launch_seconds: float  # host time to launch one layer; 0 for a graphed forward
    runs_ahead: bool  # whether launches overlap with computation: then the longer counts, not the sum
    host_seconds: float = 0.0  # per round, whatever the number of nodes: tree, walk, commit
    host_seconds_per_node: float = 0.0
    bytes_per_value: int = 2  # of weights and cache
    source: str = ""  # origin of the figures

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops", "bytes_per_value"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        for name in ("memory_efficiency", "matrix_efficiency"):
            self._check(name, 0 < getattr(self, name) <= 1, "more than 0 and at most 1")
        for name in ("launch_seconds", "host_seconds", "host_seconds_per_node"):
            self._check(name, getattr(self, name) >= 0, "0 or more")

    def _check(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise JetFlowError(f"hardware {self.name!r}: `{name}` must be {expected}, got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "Hardware":
        """
        Hardware from the fields of this class.

        Raises:
            JetFlowError: If a field is missing, unknown, of another type or out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if unknown := sorted(figures.keys() - fields.keys()):
            raise JetFlowError(f"unknown hardware figures {unknown}; expected {', '.join(fields)}")
        if missing := sorted(required - figures.keys()):
            raise JetFlowError(f"hardware figures {missing} are missing; `Hardware` in hardware.py describes each")
        for name, value in figures.items():
            wanted: Any = fields[name].type
            if isinstance(value, bool) != (wanted is bool) or not isinstance(
                value, (int, float) if wanted is float else wanted
            ):
                raise JetFlowError(f"hardware figure `{name}`: expected a {wanted.__name__}, got {value!r}")
        return cls(**figures)


_DATASHEETS = "rated figures: NVIDIA's datasheets, dense bf16; "
_EFFICIENCIES = (
    "memory: 1397 of 2039 GB/s, Llama-2-7B with torch.compile on an A100 (gpt-fast's README); matrices: assumed, "
    "while the best shape reaches 780 of 989 TFLOP/s on an H100 (gist Chillee/2ec89696b8db7ed1c24461159e325405); "
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
