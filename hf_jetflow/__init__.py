"""Tree speculative decoding with causal parallel draft heads, inside transformers' `generate`."""

from . import _compat as _compat  # first: it says what to do when transformers is too old
from ._version import __version__ as __version__
from .decoding.drafter import JetFlowCandidateGenerator
from .head.configuration_jetflow import JetFlowConfig
from .head.modeling_jetflow import JetFlowHead
from .integration import disable, enable
from .stats import GenerationStats


__all__ = ["GenerationStats", "JetFlowCandidateGenerator", "JetFlowConfig", "JetFlowHead", "disable", "enable"]

enable()
