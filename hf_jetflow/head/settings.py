"""A head's decoding settings for the time of a run."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .modeling_jetflow import JetFlowHead


RESTORED = ("generation_config", "last_stats", "record_trees", "last_trees")


@contextmanager
def head_settings(head: JetFlowHead, *, record_trees: bool = False, **settings: Any) -> Iterator[None]:
    """
    Decode with other settings inside the block, in evaluation mode and without gradients.

    Afterwards the head is as it was, records of its latest call included: read these inside the block.

    Args:
        record_trees: Whether `head.last_trees` records the draft trees.
        settings: Fields of `head.generation_config`, such as `node_budget`.
    """
    was_training, restored = head.training, {name: getattr(head, name) for name in RESTORED}
    head.record_trees = record_trees
    head.generation_config = copy.deepcopy(head.generation_config)
    for name, value in settings.items():
        setattr(head.generation_config, name, value)
    head.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, value in restored.items():
            setattr(head, name, value)
        head.train(was_training)
