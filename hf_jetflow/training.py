"""Training a head: `JetFlowTrainer`, a transformers `Trainer` whose model is the head and whose teacher is the target.

Per update: many sequences, few random anchors each; block rows see the context strictly before their anchor; the loss
is forward KL to the target's distribution plus an optional feature loss (arXiv 2606.18394, section 3.3).
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from .blocks import Agreement, draft_blocks, score_candidates
from .configuration_jetflow import JetFlowConfig
from .data import AnchorCollator, AnswerDataset, Answers, EpochSampler, FeatureStore
from .losses import depth_weights, feature_loss
from .modeling_jetflow import JetFlowHead
from .target import Target


# Start of the query and key norms where the target has none to copy: the root mean square of the queries and keys in
# SmolLM2's late layers. With 1.0 the attention starts too flat over the context to learn from: top-1 at depth 1 was
# 0.09 after 100 updates of 16 sequences, with this scale 0.15 after 100 updates of 8.
QUERY_KEY_SCALE = 2.2


@dataclass
class JetFlowTrainingConfig(TrainingArguments):
    """
    Options of `JetFlowTrainer`, on top of transformers' `TrainingArguments`.

    Defaults that differ from the parent: `learning_rate` 1e-2 (Muon's), 8 sequences per device, no removal of columns,
    logging every 20 updates, two checkpoints kept.
    """

    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of Muon, which trains the matrices."})
    adamw_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate of AdamW (vectors, norms)."})
    per_device_train_batch_size: int = 8
    anchors_per_sequence: int = field(default=16, metadata={"help": "Random anchors per sequence and update."})
    max_length: int = field(default=512, metadata={"help": "Longest training sequence in tokens."})
    source_weights: dict[str, float] = field(
        default_factory=dict, metadata={"help": "How often per epoch answers of a source occur, 1 if not given."}
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature T_KD of the KL."})
    feature_loss_weight: float = field(default=0.5, metadata={"help": "Weight of the feature loss, 0 for none."})
    depth_gamma: float | None = field(default=None, metadata={"help": "Depth weight exp(-(depth - 1) / gamma)."})
    features_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps target features between epochs; computed online if not set."},
    )
    remove_unused_columns: bool | None = False
    logging_steps: float = 20
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon for the matrices and AdamW for everything else, as one optimizer with one state dict.

    Args:
        head (`nn.Module`): Its trainable parameters are taken: 2-D ones by Muon, the others by AdamW.
        muon_lr (`float`), adamw_lr (`float`): Their learning rates.
    """

    def __init__(self, head: nn.Module, muon_lr: float, adamw_lr: float):
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        self._parts = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([{"params": parameters}], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Let schedulers act on the parts' own groups."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


class _SamplerCallback(TrainerCallback):
    """Tells the sampler the epoch: accelerate does so in some cases only, not after a resume on several devices."""

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

    Raises:
        ValueError: If no answer can be trained on, a source weight does not fit the answers, or the target's output
            embedding is not a plain matrix.
    """

    optimizer: torch.optim.Optimizer | None

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
            raise ValueError(
                f"none of the {len(answers)} answers can be trained on: each needs two answer tokens and a prompt "
                f"shorter than `max_length` = {args.max_length}"
            )
        seed = args.seed if args.data_seed is None else args.data_seed
        self.sampler = EpochSampler(dataset, args.train_batch_size * args.world_size, seed, args.source_weights)
        super().__init__(head, args, AnchorCollator(args.anchors_per_sequence, seed), dataset, **kwargs)
        self.add_callback(_SamplerCallback(self.sampler))
        self.model_accepts_loss_kwargs = False
        self.target = Target(target.requires_grad_(False).eval(), head.config)
        folder = Path(args.features_dir) / features_fingerprint(head.config) if args.features_dir else None
        self.features = FeatureStore(self.target.states, folder)
        self.projection = self.target.plain_output_rows(head.draft_token_ids)
        self._agreement = Agreement()

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
            self.optimizer = MuonAdamW(self.model, self.args.learning_rate, self.args.adamw_learning_rate)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        args, head = self.args, self.accelerator.unwrap_model(model)
        num_depths = head.config.block_size - 1
        features, last_states = self.features.get(inputs)
        drafted = draft_blocks(model, head, self.target, inputs, features, last_states)
        weights = depth_weights(num_depths, args.depth_gamma, features.device)[drafted.depths - 1] * drafted.has_target
        weights = weights / weights.sum()
        kl, corrected, is_top1_corrected = score_candidates(
            drafted, self.projection, weights, args.distillation_temperature, head.config.branch_candidates
        )
        loss = kl.loss
        if args.feature_loss_weight:
            loss = loss + args.feature_loss_weight * feature_loss(drafted.rows, drafted.teacher, weights)
        if corrected is not None:
            loss = loss + ((drafted.depths > 1) * weights * corrected).sum()
        self._agreement.add(drafted, kl, is_top1_corrected, head.draft_token_ids, num_depths)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add agreement with the target and divergence by depth to the training log."""
        if "loss" in logs and self._agreement.sums:
            for name, values in self._agreement.rates().items():
                for depth, value in enumerate(values, 1):
                    logs[f"{name}_depth_{depth}"] = round(value, 4)
            self._agreement = Agreement()
        super().log(logs, *args, **kwargs)


def features_fingerprint(config: JetFlowConfig) -> str:
    """Folder name for the features of one target and one choice of tapped layers."""
    facts = [config.target_name, config.target_model_type, config.num_target_layers, config.target_hidden_size]
    return hashlib.sha256(json.dumps([*facts, config.hidden_state_indices]).encode()).hexdigest()[:16]


def initialize_from_target(head: JetFlowHead, target: PreTrainedModel) -> int:
    """
    Start the head from the target: its layers from late target layers, its norms from the target's, the fusion from
    the mean of the tapped states.

    Tensors whose names or shapes the target does not share keep their random start.

    Returns:
        `int`: Number of tensors copied.
    """
    states = target.base_model.state_dict()
    for name, parameter in head.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data.fill_(QUERY_KEY_SCALE)
    num_layers, num_target = head.config.num_hidden_layers, head.config.num_target_layers
    sources = [max(num_target - 1 - 4 * (num_layers - 1 - i), 0) for i in range(num_layers)]
    pairs = [
        (parameter, states.get(f"layers.{source}.{name}"))
        for layer, source in zip(head.layers, sources, strict=True)
        for name, parameter in layer.named_parameters()
    ]
    pairs.append((head.norm.weight, states.get("norm.weight")))
    # The context takes the place of the normed input of the copied key and value projections.
    pairs.append((head.hidden_norm.weight, states.get(f"layers.{sources[0]}.input_layernorm.weight")))
    copied = 0
    with torch.no_grad():
        for parameter, source_tensor in pairs:
            if source_tensor is not None and source_tensor.shape == parameter.shape:
                parameter.copy_(source_tensor)
                copied += 1
        if head.config.target_hidden_size == head.config.hidden_size:
            num_taps = head.fc.in_features // head.config.hidden_size
            head.fc.weight.copy_(torch.eye(head.config.hidden_size).repeat(1, num_taps) / num_taps)
            copied += 1
    return copied
