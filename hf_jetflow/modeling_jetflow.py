"""The head's network by the name that transformers users expect; it lives in `head/modeling_jetflow.py`."""

from .head.modeling_jetflow import JetFlowHead as JetFlowHead
