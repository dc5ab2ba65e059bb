"""Tree speculative decoding with causal parallel draft heads, inside transformers' `generate`."""

from . import versions as versions  # first: it says what to do when transformers is too old
from .configuration_jetflow import JetFlowConfig
from .drafting import JetFlowCandidateGenerator
from .integration import disable, enable
from .modeling_jetflow import JetFlowHead
from .stats import GenerationStats


__version__ = "0.1.0"

__all__ = ["GenerationStats", "JetFlowCandidateGenerator", "JetFlowConfig", "JetFlowHead", "disable", "enable"]

enable()
