"""`JetFlowTrainer`: a transformers `Trainer` whose model is the head and whose teacher is the target.

An update takes many sequences with few random anchors each. Block rows see the context strictly before their anchor.
The loss is forward KL to the target's distribution plus an optional feature loss (arXiv 2606.18394, section 3.3).
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..errors import JetFlowError
from ..head.modeling_jetflow import JetFlowHead
from ..target.target import Target
from .blocks import Agreement, DraftedRows, draft_blocks, make_blocks, score_candidates
from .checkpoints import STATE_NAME, checkpoint_fault, find_checkpoints, is_write_failure
from .data import AnchorCollator, AnswerDataset, Answers, EpochSampler, FeatureStore, features_fingerprint
from .evaluation import tokens_per_round
from .losses import KLResult, depth_weights, feature_errors, logit_shape
from .optimizer import MuonAdamW


logger = logging.getLogger(__name__)


@dataclass
class JetFlowTrainingConfig(TrainingArguments):
    """
    Options of `JetFlowTrainer`, on top of transformers' `TrainingArguments`.

    Defaults that differ from the parent: `learning_rate` 1e-2 (Muon's), 8 sequences per device, no removal of columns,
    logging every 20 updates, at most two checkpoints.
    """

    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of Muon, which trains the matrices."})
    adamw_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate of AdamW (vectors, norms)."})
    per_device_train_batch_size: int = 8
    anchors_per_sequence: int = field(default=16, metadata={"help": "Random anchors per sequence and update."})
    max_length: int = field(default=512, metadata={"help": "Longest training sequence in tokens."})
    source_weights: dict[str, float] = field(
        default_factory=dict, metadata={"help": "How often per epoch answers of a source occur; 1 by default."}
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature T_KD of the KL."})
    feature_loss_weight: float = field(default=0.5, metadata={"help": "Weight of the feature loss; 0 for none."})
    uncorrected_loss_weight: float = field(default=1.0, metadata={"help": "Weight before the branch correction."})
    depth_gamma: float | None = field(default=None, metadata={"help": "Depth weight exp(-(depth - 1) / gamma)."})
    features_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that stores target features between epochs. By default they are recomputed."},
    )
    eval_node_budget: int = field(default=32, metadata={"help": "Node budget for decoding held-out prompts."})
    eval_max_new_tokens: int = field(default=64, metadata={"help": "Tokens decoded per held-out prompt."})
    remove_unused_columns: bool | None = False
    logging_steps: float = 20
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"

    @property
    def device(self) -> torch.device:
        device = super().device
        # With several CPU processes accelerate calls it "cpu:0", to which transformers 5.17 cannot restore tensors.
        return torch.device("cpu") if device.type == "cpu" else device


class _SamplerCallback(TrainerCallback):
    """Tells the sampler the epoch. accelerate does not do so after a resume on several devices."""

    def __init__(self, sampler: EpochSampler):
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._sampler.epoch = int(state.epoch or 0)


class JetFlowTrainer(Trainer):
    """
    Trains a head against a frozen target.

    Args:
        head ([`JetFlowHead`]): The head; only its parameters are trained.
        target (`PreTrainedModel`): The frozen target.
        args ([`JetFlowTrainingConfig`]): Options.
        answers (`Answers` or `list[dict]`): Answers of the target (`id`, `prompt_ids`, `answer_ids`).
        eval_dataset (`dict[str, list[list[int]]]`, *optional*): Held-out prompts as token ids, by name of the set.
            Evaluation decodes them; its metric is `tokens_per_round`, the mean over the sets.

    All drafted rows of an update have the same weight, whatever their process and micro-batch.

    Raises:
        JetFlowError: If no answer can be trained on, a source weight does not fit the answers, the target's output
            embedding is not a plain matrix, or the FSDP configuration does not fit Muon or the head's layout.
    """

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        head: JetFlowHead,
        target: PreTrainedModel,
        args: JetFlowTrainingConfig,
        answers: Answers | list[dict[str, Any]],
        **kwargs: Any,
    ):
        dataset = AnswerDataset(answers, args.max_length)
        if not len(dataset):
            raise JetFlowError(
                f"none of the {len(answers)} answers can be trained on; give answers of at least two tokens, to "
                f"prompts shorter than `max_length` = {args.max_length}"
            )
        seed = args.seed if args.data_seed is None else args.data_seed
        self.sampler = EpochSampler(dataset, args.train_batch_size * args.world_size, seed, args.source_weights)
        super().__init__(head, args, AnchorCollator(args.anchors_per_sequence, seed), dataset, **kwargs)
        if self.is_fsdp_enabled:
            _check_fsdp(self.accelerator.state.fsdp_plugin)
        self.add_callback(_SamplerCallback(self.sampler))
        self.model_accepts_loss_kwargs = False
        self.target = Target(target.requires_grad_(False).eval(), head.config)
        folder = Path(args.features_dir) / features_fingerprint(head.config) if args.features_dir else None
        self.features = FeatureStore(self.target.states, folder)
        self.projection = self.target.embeddings.plain_output_rows(head.draft_token_ids)
        self.teacher_shape = logit_shape(self.target)
        self.block_size = head.config.block_size
        self._agreement = Agreement()
        self.progress: Callable[[int, int, str], None] | None = None  # called while decoding held-out prompts
        self.evaluation_seconds: float | None = None  # of the latest evaluation

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the sampler's order."""
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_size=args.train_batch_size,
            sampler=self.sampler,
            collate_fn=self.data_collator,
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            dtype = torch.bfloat16 if args.bf16 else torch.float32
            self.optimizer = MuonAdamW(self.model, args.learning_rate, args.adamw_learning_rate, dtype)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        args, head = self.args, self.accelerator.unwrap_model(model)
        features, last_states = self.features.get(inputs)
        drafted = draft_blocks(model, head, self.target, inputs, features, last_states)
        kl, corrected, is_top1_corrected = self.score_rows(inputs, drafted, head.config.branch_candidates)
        losses = args.distillation_temperature**2 * kl.divergence
        if args.feature_loss_weight:
            losses = losses + args.feature_loss_weight * feature_errors(drafted.rows, drafted.teacher)
        if corrected is not None:
            losses = torch.where(drafted.depths > 1, args.uncorrected_loss_weight * losses + corrected, losses)
        weights = self.loss_weights(drafted, kl)
        if num_items_in_batch is None:
            weights = weights / weights.sum()
        else:  # the trainer averages over micro-batches and processes
            weights = weights * (self.current_gradient_accumulation_steps * args.world_size / num_items_in_batch)
        loss = (weights * losses).sum()
        self._agreement.add(drafted, kl, is_top1_corrected, head.draft_token_ids, self.block_size - 1)
        return (loss, {"loss": loss}) if return_outputs else loss

    def score_rows(
        self, inputs: dict[str, Any], drafted: DraftedRows, num_candidates: int
    ) -> tuple[KLResult, torch.Tensor | None, torch.Tensor | None]:
        """`score_candidates` of the rows. Subclasses may score by more than the head."""
        temperature = self.args.distillation_temperature
        return score_candidates(drafted, self.projection, temperature, num_candidates, self.teacher_shape)

    def loss_weights(self, drafted: DraftedRows, kl: KLResult) -> torch.Tensor:
        """Weight of each row's loss, (rows,): by depth, 0 without a target. Subclasses may weigh by the draft."""
        return self._row_weights(drafted.depths, drafted.has_target)

    def _row_weights(self, depths: torch.Tensor, has_target: torch.Tensor) -> torch.Tensor:
        """Depth weights of rows with a target, 0 for the others; same shape as the arguments."""
        by_depth = depth_weights(self.block_size - 1, self.args.depth_gamma, depths.device)
        return by_depth[(depths - 1).clamp_min(0)] * has_target

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Total weight of an update's rows, over micro-batches and processes; called before each update."""
        total = torch.zeros((), device=device)
        for batch in batch_samples:
            blocks = make_blocks(batch, self.block_size)
            total += self._row_weights(blocks.depths, blocks.is_drafted).sum().to(device)
        return self.accelerator.reduce(total, "sum")

    def whole_head(self) -> JetFlowHead | None:
        """
        The head with all its tensors. All processes must call this together.

        It is the trained head itself, except under FSDP: there the main process gathers it, and others get `None`.
        """
        head = self.accelerator.unwrap_model(self.model)
        if not self.is_fsdp_enabled:
            return head
        state = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in head.state_dict().items()
        }
        if not self.accelerator.is_main_process:
            return None
        whole = JetFlowHead(head.config).to(self.args.device)
        whole.load_state_dict(state)
        whole.generation_config = head.generation_config
        return whole.eval()

    def evaluate(
        self,
        eval_dataset: dict[str, list[list[int]]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Decode held-out prompts greedily, on the main process.

        Returns:
            `dict`: `eval_tokens_per_round`, the mean over the sets, and `eval_<set>_tokens_per_round` of each.

        Raises:
            JetFlowError: If there are no prompts.
        """
        sets = eval_dataset or self.eval_dataset
        if not sets or not all(sets.values()):
            raise JetFlowError(
                "evaluation needs held-out prompts in every set, but there are none; give them as "
                "`eval_dataset={name: [token ids, ...]}`"
            )
        head = self.whole_head()
        figures: dict[str, float] = {}
        if head is not None and self.accelerator.is_main_process:
            start = time.monotonic()
            figures = {name: self._tokens_per_round(head, prompts) for name, prompts in sets.items()}
            self.evaluation_seconds = time.monotonic() - start
        (figures,) = broadcast_object_list([figures])
        metrics = {f"{metric_key_prefix}_tokens_per_round": sum(figures.values()) / len(figures)}
        metrics.update({f"{metric_key_prefix}_{name}_tokens_per_round": value for name, value in figures.items()})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _tokens_per_round(self, head: JetFlowHead, prompts: list[list[int]]) -> float:
        args = self.args
        return tokens_per_round(
            self.target.model,
            head,
            prompts,
            args.eval_node_budget,
            max_new_tokens=args.eval_max_new_tokens,
            progress=self.progress,
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save the best head so far at once: between two checkpoints it would be lost."""
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train as the parent does, but never continue from an incomplete checkpoint, and make no further update in a
        finished run (with FSDP one is made, as the parent does).

        Args:
            resume_from_checkpoint: A checkpoint's folder, or `True` for the last complete one of the output folder;
                incomplete ones are removed, and without a complete one training starts from scratch.

        Raises:
            JetFlowError: If the given checkpoint is incomplete, or a checkpoint cannot be written.
        """
        if resume_from_checkpoint is True:
            with self.accelerator.main_process_first():
                resume_from_checkpoint = self._last_complete_checkpoint()
        elif resume_from_checkpoint and (fault := checkpoint_fault(Path(resume_from_checkpoint))):
            raise JetFlowError(
                f"cannot continue from {resume_from_checkpoint}: {fault}; give another checkpoint, or `True` for the "
                "last complete one"
            )
        if resume_from_checkpoint and not self.is_fsdp_enabled and self._is_finished(resume_from_checkpoint):
            self._load_from_checkpoint(resume_from_checkpoint)
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
                self._load_best_model()
            return TrainOutput(self.state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _is_finished(self, checkpoint: str) -> bool:
        """Whether the checkpoint is the end of a run; its state is then this trainer's."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_NAME))
        if self.args.max_steps > 0:
            is_finished = state.global_step >= self.args.max_steps
        else:
            is_finished = (state.epoch or 0) >= self.args.num_train_epochs
        if is_finished:
            self.state = state
        return is_finished

    def _last_complete_checkpoint(self) -> str | None:
        complete, faults = find_checkpoints(Path(self.args.output_dir))
        last = complete[-1] if complete else None
        if self.accelerator.is_main_process:
            for folder, fault in faults.items():
                logger.warning(
                    "%s is incomplete and removed: %s; continuing from %s",
                    *(folder, fault, last or "the start"),
                )
                shutil.rmtree(folder)
        return None if last is None else str(last)

    def _save_rng_state(self, output_dir: str) -> None:
        """Other processes write this last; after it the main process completes the checkpoint."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder, ignore_errors=True)
            if not is_write_failure(error):
                raise
            complete, _ = find_checkpoints(folder.parent)
            earlier = f"the last complete one is {complete[-1]}" if complete else "there is no earlier one"
            raise JetFlowError(
                f"{folder} cannot be written ({error}) and is removed; {earlier}: free disk space, check the "
                "permissions and start the same command again"
            ) from error

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add agreement with the target and divergence by depth to the training log."""
        if "loss" in logs and self._agreement.sums:
            for name, values in self._agreement.rates().items():
                for depth, value in enumerate(values, 1):
                    logs[f"{name}_depth_{depth}"] = round(value, 4)
            self._agreement = Agreement()
        super().log(logs, *args, **kwargs)


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise JetFlowError(
            f"`fsdp_version` is {plugin.fsdp_version}, which flattens the matrices; Muon needs their shape: set it "
            "to 2 (see examples/accelerate/fsdp.yaml)"
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise JetFlowError(
            f"`fsdp_state_dict_type` is {plugin.state_dict_type}, which saves the head in pieces; set it "
            "to FULL_STATE_DICT (see examples/accelerate/fsdp.yaml)"
        )


def leave_together() -> None:
    """
    End this process together with the others, if there are several. Everything must be written before.

    After an ordinary exit the launcher can report a failed run: a thread of gloo drops the tensors of the last
    collective late, and crashes if the interpreter is gone by then (pytorch issue 190489). `destroy_process_group`
    does not end these threads while DTensor's caches refer to the connection.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    state.wait_for_everyone()
    state.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
