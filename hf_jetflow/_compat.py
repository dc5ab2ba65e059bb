"""What differs between releases of transformers, checked before anything else is imported."""

from dataclasses import fields
from types import ModuleType
from typing import Any

import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging


logger = logging.get_logger(__name__)
LOWEST, HIGHEST = (5, 17), (5, 24)  # the tested range


def check_transformers(version: str) -> None:
    """
    Refuse releases that lack what the loop is built on; warn of those that are newer than the tested range.

    Raises:
        ImportError: Naming the version found and how to install one that works.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < LOWEST:
        raise ImportError(
            f"hf_jetflow needs transformers 5.17 or newer (before 6), but found {version}; "
            "install one with `pip install 'transformers>=5.17,<6'`"
        )
    if numbers > HIGHEST:
        logger.warning(
            f"hf_jetflow is tested with transformers 5.17 to 5.24, but found {version}. If something fails, install "
            "a tested release: `pip install 'transformers<5.25'`."
        )


check_transformers(transformers.__version__)

# What `generate`, forwards and their outputs call the target's cache: "cache" since 5.24, "past_key_values" before.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def class_of(module: ModuleType, name: str) -> Any:
    """A class of transformers; where this release has none of that name, one without instances."""
    return getattr(module, name, None) or type(name, (), {})
