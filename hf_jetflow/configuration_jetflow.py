"""The head's configuration by the name that transformers users expect; it lives in `head/configuration_jetflow.py`."""

from .head.configuration_jetflow import JetFlowConfig as JetFlowConfig
