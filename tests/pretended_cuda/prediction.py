"""Seconds of a round on an H100, computed from counts and the cost model. Nothing here was measured on a GPU."""

import json
from pathlib import Path

from transformers import Qwen3Config

from hf_jetflow import JetFlowConfig
from hf_jetflow.simulate.hardware import PRESETS
from hf_jetflow.simulate.roofline import head_shape, round_seconds, target_shape


LAUNCH_SECONDS = 11e-6  # Qwen3-8B's published plain step, 22 ms in transformers, divided by its 1,960 launches
WAIT_SECONDS = 25e-6  # assumed: from the end of the device's work to the host's next launch
OPERATION_SECONDS = 1e-6  # assumed: an operation of other captured functions; 2 us a kernel, two operations in each
PUBLISHED = Path(__file__).parents[2] / "examples" / "published_speeds.json"  # holds configurations, too
ASSUMPTIONS = f"""Computed for Qwen3-8B on an H100, never measured. Weights and cache: the cost model's roofline.
A launch: {1e6 * LAUNCH_SECONDS:g} us. A wait: {1e6 * WAIT_SECONDS:g} us.
An operation of the other captured functions: {1e6 * OPERATION_SECONDS:g} us.
Launches of eager forwards overlap with the device's work."""


def predict(steps: dict[str, dict[str, float]], nodes: int, **head_config: object) -> dict[str, float]:
    """Milliseconds of a plain step and of a round, with counts by step as `__main__.table` gives them."""
    config = Qwen3Config(**json.loads(PUBLISHED.read_text(encoding="utf-8"))["models"]["Qwen3-8B"])
    head = JetFlowConfig.for_target(config, num_hidden_layers=5, block_size=16, mask_token_id=0, **head_config)
    device = round_seconds(target_shape(config), head_shape(head), PRESETS["h100-graphed"], nodes, context=1000)
    forwards = device.draft + device.correct + device.verify
    launches = LAUNCH_SECONDS * steps["round"]["launches"]
    small = OPERATION_SECONDS * (steps["round"]["captured"] - steps["round"]["forward"])
    is_captured = steps["round"]["forward"] > 0
    busy = forwards + small + launches if is_captured else max(forwards, launches)
    plain = device.plain if is_captured else LAUNCH_SECONDS * steps["verify"]["launches"]
    return {"plain": 1e3 * plain, "round": 1e3 * (busy + WAIT_SECONDS * steps["round"]["waits"])}
