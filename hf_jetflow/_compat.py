"""The range of transformers that this package works with, checked before anything else is imported."""

from dataclasses import fields

import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast


LOWEST = (5, 17)


def check_transformers(version: str) -> None:
    """
    Refuse releases that lack what the loop is built on.

    Raises:
        ImportError: Naming the version found and how to install one that works.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < LOWEST:
        raise ImportError(
            f"hf_jetflow needs transformers 5.17 or newer (before 6), but found {version}; "
            "install one with `pip install 'transformers>=5.17,<6'`"
        )


check_transformers(transformers.__version__)

# What `generate`, forwards and their outputs call the target's cache: "cache" since 5.24, "past_key_values" before.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
