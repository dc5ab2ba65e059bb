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
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .configuration_jetflow import JetFlowConfig
from .data import AnchorCollator, AnswerDataset, FeatureStore
from .losses import KLResult, chunked_forward_kl, depth_weights, feature_loss
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


class JetFlowTrainer(Trainer):
    """
    Trains a head against a frozen target.

    Args:
        head ([`JetFlowHead`]): The head; only its parameters are trained.
        target (`PreTrainedModel`): The frozen target.
        args ([`JetFlowTrainingConfig`]): Options.
        answers (`list[dict]`): Answers of the target (`id`, `prompt_ids`, `answer_ids`).

    Raises:
        ValueError: If no answer can be trained on, or the target's output embedding is not a plain matrix.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        head: JetFlowHead,
        target: PreTrainedModel,
        args: JetFlowTrainingConfig,
        answers: list[dict[str, Any]],
        **kwargs: Any,
    ):
        dataset = AnswerDataset(answers, args.max_length)
        if not len(dataset):
            raise ValueError(
                f"none of the {len(answers)} answers can be trained on: each needs two answer tokens and a prompt "
                f"shorter than `max_length` = {args.max_length}"
            )
        super().__init__(head, args, AnchorCollator(args.anchors_per_sequence), dataset, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.target = Target(target.requires_grad_(False).eval(), head.config)
        folder = Path(args.features_dir) / features_fingerprint(head.config) if args.features_dir else None
        self.features = FeatureStore(self.target.states, folder)
        projection = self.target.output_rows(head.draft_token_ids)
        if projection is None:
            kind = type(target.get_output_embeddings()).__name__
            raise ValueError(
                f"the target's output embedding is a `{kind}`, but the loss needs a plain linear layer without bias; "
                "load the target unquantized"
            )
        self.projection = projection
        self._depth_sums: dict[str, torch.Tensor] = {}

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = MuonAdamW(self.model, self.args.learning_rate, self.args.adamw_learning_rate)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        args, config = self.args, self.accelerator.unwrap_model(model).config
        features, last_states = self.features.get(inputs)
        block = make_blocks(inputs, config.block_size)
        rows = model(
            inputs_embeds=self._embed_blocks(model, inputs, block),
            features=features,
            position_ids=block.position_ids,
            context_position_ids=torch.arange(features.shape[1], device=features.device).expand(features.shape[:2]),
            anchor_position_ids=block.anchor_position_ids,
        )
        # Every drafted slot takes part, those without a target at weight zero: with shapes that change from update to
        # update, the CPU's matrix kernels would be compiled anew each time.
        is_slot = block.depths > 0
        places = (block.position_ids - 1).clamp(0, last_states.shape[1] - 1)[..., None]
        teacher = last_states.gather(1, places.expand(-1, -1, last_states.shape[-1]))[is_slot]
        drafted, depths, has_target = rows[is_slot], block.depths[is_slot], block.is_drafted[is_slot]
        weights = depth_weights(config.block_size - 1, args.depth_gamma, rows.device)[depths - 1] * has_target
        weights = weights / weights.sum()
        kl = chunked_forward_kl(drafted, teacher, self.projection, weights, args.distillation_temperature)
        loss = kl.loss
        if args.feature_loss_weight:
            loss = loss + args.feature_loss_weight * feature_loss(drafted, teacher, weights)
        self._count_depths(depths, has_target, kl, config.block_size - 1)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _embed_blocks(self, model: nn.Module, inputs: dict[str, Any], block: "Blocks") -> torch.Tensor:
        """Embeddings of the block rows: the true token at each anchor, MASK behind it."""
        head = self.accelerator.unwrap_model(model)
        anchors = inputs["input_ids"].gather(1, block.anchor_position_ids.clamp_min(0))
        return self.target.embed_block(anchors, block.depths == 0, head.mask_embedding)

    def _count_depths(self, depths: torch.Tensor, has_target: torch.Tensor, kl: KLResult, num_depths: int) -> None:
        for name, values in (("count", torch.ones_like(kl.divergence)), ("top1", kl.is_top1), ("kl", kl.divergence)):
            sums = torch.zeros(num_depths, device=values.device).index_add_(0, depths - 1, values * has_target.float())
            self._depth_sums[name] = self._depth_sums.get(name, 0) + sums

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add agreement with the target and divergence by depth to the training log."""
        if "loss" in logs and self._depth_sums:
            count = self._depth_sums["count"].clamp_min(1)
            for name in ("top1", "kl"):
                for depth, value in enumerate((self._depth_sums[name] / count).tolist(), 1):
                    logs[f"{name}_depth_{depth}"] = round(value, 4)
            self._depth_sums = {}
        super().log(logs, *args, **kwargs)


@dataclass
class Blocks:
    """Block rows of a batch, (batch, anchors x block_size) each."""

    position_ids: torch.Tensor  # absolute position of each row
    anchor_position_ids: torch.Tensor  # position of its anchor; negative where there is no block
    depths: torch.Tensor  # slot in the block, 0 = anchor
    is_drafted: torch.Tensor  # bool: has a target to learn (not an anchor, not past the end)


def make_blocks(inputs: dict[str, Any], block_size: int) -> Blocks:
    """The blocks that start at `inputs["anchors"]` (batch, anchors)."""
    anchors = inputs["anchors"]
    # Absent anchors get distinct negative positions, so that their rows see one another's blocks as little as any.
    filler = -(1 + torch.arange(anchors.shape[1], device=anchors.device)) * block_size
    anchors = torch.where(anchors < 0, filler, anchors)
    slots = torch.arange(block_size, device=anchors.device)
    position_ids = (anchors[..., None] + slots).flatten(1)
    anchor_position_ids = anchors.repeat_interleave(block_size, dim=1)
    depths = slots.repeat(anchors.shape[1]).expand_as(position_ids)
    is_drafted = (depths > 0) & (anchor_position_ids >= 0) & (position_ids < inputs["lengths"][:, None])
    return Blocks(position_ids, anchor_position_ids, depths, is_drafted)


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
