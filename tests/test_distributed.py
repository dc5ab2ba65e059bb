"""Two processes on the CPU, started with the configurations of `examples/accelerate`."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from distributed_worker import make_start, train
from helpers import ROOT, run_processes

from hf_jetflow import JetFlowHead
from hf_jetflow.training.trainer import _check_fsdp


LIMIT = 150  # seconds; a quiet machine needs about ten


def launch(kind: str, folder: Path) -> dict:
    """Facts of a training by two processes."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", ROOT / "examples" / "accelerate" / f"{kind}.yaml"]
    command += [ROOT / "tests" / "distributed_worker.py", folder, LIMIT]
    folder.mkdir()
    run_processes(command, folder, LIMIT)
    return json.loads((folder / "facts.json").read_text())


def logged(history: list[dict], name: str) -> list[float]:
    return [entry[name] for entry in history if name in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The trainer of one process, and the folder of its head."""
    folder = tmp_path_factory.mktemp("alone")
    return train(folder, batch_size=4), folder


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_with_half_the_batch_train_the_same_head(alone, tmp_path, kind):
    alone, alone_folder = alone
    together = launch(kind, tmp_path / "together")
    assert (together["kind"], together["world"]) == ({"ddp": "MULTI_CPU", "fsdp": "FSDP"}[kind], 2)
    for name in ("loss", "grad_norm"):
        assert logged(together["history"], name) == pytest.approx(logged(alone.state.log_history, name), rel=2e-4)
    assert logged(together["history"], "eval_tokens_per_round") == logged(
        alone.state.log_history, "eval_tokens_per_round"
    )
    heads = [JetFlowHead.from_pretrained(folder / "final") for folder in (alone_folder, tmp_path / "together")]
    assert set(heads[0].state_dict()) == set(heads[1].state_dict())
    start = make_start(alone.target.model).state_dict()
    for name, tensor in heads[0].state_dict().items():
        # Muon makes much of rounding where a gradient is nearly zero, as behind a projection that starts at zero.
        if not name.startswith("branch_correction.") or name.endswith("down_proj.weight"):
            difference, movement = (heads[1].state_dict()[name] - tensor).norm(), (tensor - start[name]).norm()
            assert difference < 0.3 * movement, f"{name}: {difference} of {movement}"

    assert together["checkpoints"] == ["checkpoint-2", "checkpoint-3"]
    resumed = JetFlowHead.from_pretrained(tmp_path / "together" / "resumed").state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in heads[1].state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"fsdp_version": 1, "state_dict_type": "FULL_STATE_DICT"},
            "`fsdp_version` is 1, which flattens .* set it to 2",
        ),
        ({"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}, "in pieces; set it to FULL_STATE_DICT"),
    ],
)
def test_configurations_that_cannot_work_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        _check_fsdp(FullyShardedDataParallelPlugin(**settings))
