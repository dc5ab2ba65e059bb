"""What each process of `test_distributed.py` runs: `distributed_worker.py FOLDER`."""

import copy
import faulthandler
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import build_target
from test_training import make_answers, make_head, make_trainer
from transformers import PreTrainedModel

from hf_jetflow import JetFlowHead
from hf_jetflow.training.trainer import JetFlowTrainer, leave_together


def make_start(target: PreTrainedModel) -> JetFlowHead:
    return make_head(target, mask_token_id=None, branch_correction="path")


def train(folder: Path, batch_size: int, name: str = "final", **args: Any) -> JetFlowTrainer:
    """Three updates on answers of unequal lengths; the head is saved in `folder / name`."""
    target = copy.deepcopy(build_target("llama"))
    settings = dict(max_steps=3, per_device_train_batch_size=batch_size, depth_gamma=4.0)
    settings |= dict(eval_strategy="steps", eval_steps=2, eval_node_budget=8, eval_max_new_tokens=4)
    settings |= dict(save_strategy="steps", save_steps=2, learning_rate=1e-3, adamw_learning_rate=1e-3)
    trainer = make_trainer(
        target, folder, make_start(target), make_answers(12, None), {"chat": [[5, 6, 7]]}, **{**settings, **args}
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / name))
    return trainer


def allow_sharding_on_cpus() -> None:
    """accelerate reads an FSDP configuration on accelerators only; the rest of it works on CPUs too."""
    initialize = AcceleratorState.__init__

    def initialize_with_plugin(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = initialize_with_plugin


def main(folder: Path, limit: float) -> None:
    """Train, and once more as if the run had been killed in the third update."""
    faulthandler.dump_traceback_later(limit, exit=True)
    torch.set_num_threads(1)
    allow_sharding_on_cpus()
    trainer = train(folder, 2)
    if trainer.is_world_process_zero():
        facts = dict(history=trainer.state.log_history, kind=str(trainer.accelerator.distributed_type.value))
        facts["checkpoints"] = sorted(path.name for path in folder.glob("checkpoint-*"))
        (folder / "facts.json").write_text(json.dumps({**facts, "world": trainer.args.world_size}))
        shutil.rmtree(folder / "checkpoint-3")
    trainer.accelerator.wait_for_everyone()
    train(folder, 2, "resumed")
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
