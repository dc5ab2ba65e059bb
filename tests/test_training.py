"""Training on a tiny target: what moves, what does not, and what is the same however the work is split."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_target
from helpers import HIDDEN, tiny_config
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.target.target import Target
from hf_jetflow.training.blocks import make_blocks
from hf_jetflow.training.data import AnchorCollator, AnswerDataset, features_fingerprint
from hf_jetflow.training.losses import logit_shape
from hf_jetflow.training.optimizer import Muon, MuonAdamW
from hf_jetflow.training.starting import initialize_from_target
from hf_jetflow.training.trainer import JetFlowTrainer, JetFlowTrainingConfig


BLOCK_SIZE = 4


@pytest.fixture
def target(tiny_target) -> PreTrainedModel:
    """A copy: training freezes its target."""
    return copy.deepcopy(tiny_target("llama"))


def make_head(target: PreTrainedModel, **config: Any) -> JetFlowHead:
    settings = dict(num_hidden_layers=2, block_size=BLOCK_SIZE, mask_token_id=0)
    torch.manual_seed(3)
    return JetFlowHead(JetFlowConfig.for_target(target.config, **{**settings, **config}))


def make_answers(num: int = 8, num_answer: int | None = 8) -> list[dict[str, Any]]:
    """Random answers, of one length or of 3, 4, 5, ... tokens."""
    generator = torch.Generator().manual_seed(4)
    records = []
    for number in range(num):
        ids = torch.randint(3, 257, (5 + (num_answer or number + 3),), generator=generator).tolist()
        records.append({"id": f"a{number}", "prompt_ids": ids[:5], "answer_ids": ids[5:]})
    return records


def make_trainer(
    target: PreTrainedModel,
    folder: Path,
    head: JetFlowHead | None = None,
    answers: list | None = None,
    eval_dataset: dict | None = None,
    **args: Any,
) -> JetFlowTrainer:
    settings = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        anchors_per_sequence=3,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    settings = JetFlowTrainingConfig(**{**settings, **args})
    answers = answers or make_answers()
    return JetFlowTrainer(head or make_head(target), target, settings, answers, eval_dataset=eval_dataset)


def losses(trainer: JetFlowTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def copied_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Gradients(TrainerCallback):
    """Stores the gradients of the first update, before clipping."""

    def __init__(self):
        self.by_name: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if not self.by_name:
            self.by_name = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def first_gradients(target: PreTrainedModel, folder: Path, **args: Any) -> dict[str, torch.Tensor]:
    trainer = make_trainer(target, folder, **{"max_steps": 1, "max_grad_norm": 0.0, **args})
    callback = Gradients()
    trainer.add_callback(callback)
    trainer.train()
    return callback.by_name


def assert_close_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


HEADS = pytest.mark.parametrize(
    "config",
    [{}, {"mask_token_id": None, "attention_bias": True}, {"is_causal": False, "draft_vocab_size": 100}],
    ids=["plain", "mask embedding and biases", "bidirectional, draft vocabulary"],
)


@HEADS
def test_every_parameter_of_the_head_gets_a_gradient(target, tmp_path, config):
    gradients = first_gradients(target, tmp_path, head=make_head(target, **config))
    silent = [name for name, gradient in gradients.items() if not gradient.abs().sum() > 0]
    assert silent == []


@HEADS
def test_every_parameter_of_the_head_moves_and_none_of_the_target(target, tmp_path, config):
    head = make_head(target, **config)
    before, frozen = copied_state(head), copied_state(target)
    make_trainer(target, tmp_path, head=head).train()
    moved = {name for name, tensor in head.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, _ in head.named_parameters()}
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in target.state_dict().items())
    assert all(parameter.grad is None for parameter in target.parameters())


@pytest.mark.any_release
def test_the_loss_goes_down_on_answers_seen_often(target, tmp_path):
    trainer = make_trainer(
        target, tmp_path, answers=make_answers(2), max_steps=40, learning_rate=1e-2, adamw_learning_rate=1e-2
    )
    trainer.train()
    history = losses(trainer)
    assert sum(history[-5:]) < 0.3 * sum(history[:5])


def test_the_log_shows_agreement_and_divergence_by_depth(target, tmp_path):
    trainer = make_trainer(target, tmp_path, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    for name in ("top1", "kl"):
        assert [key for key in entry if key.startswith(name)] == [f"{name}_depth_{depth}" for depth in (1, 2, 3)]
    assert all(0 <= entry[f"top1_depth_{depth}"] <= 1 for depth in (1, 2, 3))


def one_batch(trainer: JetFlowTrainer, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])


@torch.no_grad()
def dense_loss(trainer: JetFlowTrainer, batch: dict[str, Any], weigh=lambda depth: 1.0) -> float:
    """The KL part of the loss, row by row, from what decoding would see: one block at a time, no later position."""
    head, target = trainer.model.eval(), trainer.target.model
    total, weight, taps = 0.0, 0.0, head.config.hidden_state_indices
    for row, anchors in enumerate(batch["anchors"].tolist()):
        ids = batch["input_ids"][row : row + 1, : batch["lengths"][row]]
        outputs = target(input_ids=ids, output_hidden_states=True)
        for anchor in (anchor for anchor in anchors if anchor >= 0):
            block_ids = torch.full((1, BLOCK_SIZE), head.config.mask_token_id)
            block_ids[0, 0] = ids[0, anchor]
            rows = head(
                inputs_embeds=target.get_input_embeddings()(block_ids),
                features=torch.cat([outputs.hidden_states[tap][:, :anchor] for tap in taps], dim=-1),
                position_ids=torch.arange(anchor, anchor + BLOCK_SIZE)[None],
                context_position_ids=torch.arange(anchor)[None],
            )
            for depth in range(1, min(BLOCK_SIZE, ids.shape[1] - anchor)):
                log_q = torch.log_softmax(target.lm_head(rows[0, depth]), dim=-1)
                log_p = torch.log_softmax(outputs.logits[0, anchor + depth - 1], dim=-1)
                total += weigh(depth) * float((log_p.exp() * (log_p - log_q)).sum())
                weight += weigh(depth)
    return total / weight


@pytest.mark.parametrize("gamma", [None, 2.0])
def test_the_loss_is_the_divergence_in_decoding(target, tmp_path, gamma):
    trainer = make_trainer(target, tmp_path, answers=make_answers(4, None), feature_loss_weight=0.0, depth_gamma=gamma)
    batch = one_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx(
        dense_loss(trainer, batch, lambda depth: math.exp(-(depth - 1) / (gamma or 1e9))), rel=1e-4
    )


def test_uncorrected_losses_weigh_less_where_the_correction_follows(target, tmp_path):
    head = make_head(target, branch_correction="path")

    def loss(**args):
        answers = make_answers(4, 12)  # so long that no block is cut
        trainer = make_trainer(target, tmp_path, head=head, answers=answers, feature_loss_weight=0.0, **args)
        batch = one_batch(trainer)
        return trainer.compute_loss(head.eval(), batch).item(), trainer, batch

    (whole, trainer, batch), (corrected, *_), (mixed, *_) = (
        loss(uncorrected_loss_weight=weight) for weight in (1.0, 0.0, 0.25)
    )
    blocks = make_blocks(batch, BLOCK_SIZE)
    share = (blocks.is_drafted & (blocks.depths > 1)).sum() / blocks.is_drafted.sum()
    deep = share.item() * dense_loss(trainer, batch, lambda depth: float(depth > 1))
    assert whole - corrected == pytest.approx(deep, rel=1e-4)
    assert whole - mixed == pytest.approx(0.75 * deep, rel=1e-4)


def test_padding_after_a_short_answer_changes_nothing(target, tmp_path):
    trainer = make_trainer(target, tmp_path, answers=make_answers(1, 8), anchors_per_sequence=9)
    batch = one_batch(trainer)
    padded = {**batch, "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 6))}
    head = trainer.model.eval()
    torch.testing.assert_close(trainer.compute_loss(head, padded), trainer.compute_loss(head, batch))


def test_missing_anchors_change_nothing(target, tmp_path):
    trainer = make_trainer(target, tmp_path, answers=make_answers(2, 8), anchors_per_sequence=7)
    batch = one_batch(trainer)
    more = {**batch, "anchors": torch.nn.functional.pad(batch["anchors"], (0, 3), value=-1)}
    head = trainer.model.eval()
    torch.testing.assert_close(trainer.compute_loss(head, more), trainer.compute_loss(head, batch))


def test_features_on_disk_give_the_same_gradients(target, tmp_path):
    online = first_gradients(target, tmp_path)
    for _ in range(2):  # written, then read
        stored = first_gradients(target, tmp_path, features_dir=str(tmp_path / "features"))
        assert_close_gradients(online, stored)
    (folder,) = (tmp_path / "features").iterdir()
    assert folder.name == features_fingerprint(make_head(target).config)


@pytest.mark.parametrize(
    ("num_answer", "depth_gamma", "num_parts"),
    [(8, None, 2), (None, None, 8), (None, 2.0, 2)],
    ids=["of one length", "of unequal lengths", "weighted by depth"],
)
def test_accumulated_sequences_equal_one_batch_of_them(target, tmp_path, num_answer, depth_gamma, num_parts):
    settings = dict(answers=make_answers(8, num_answer), feature_loss_weight=2.0, depth_gamma=depth_gamma)
    whole = first_gradients(target, tmp_path, per_device_train_batch_size=8, **settings)
    settings |= dict(per_device_train_batch_size=8 // num_parts, gradient_accumulation_steps=num_parts)
    assert_close_gradients(whole, first_gradients(target, tmp_path, **settings))


class Seen(TrainerCallback):
    """Stores the inputs of every micro-batch."""

    def __init__(self, trainer: JetFlowTrainer):
        self.batches: list[tuple[list, list]] = []
        compute_loss = trainer.compute_loss

        def record(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.batches.append((inputs["input_ids"].tolist(), inputs["anchors"].tolist()))
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = record


def run_in_parts(target: PreTrainedModel, folder: Path, **args: Any) -> tuple[JetFlowHead, JetFlowHead]:
    """Heads after six updates: in one go, and continued by another trainer from the checkpoint after three."""
    settings = dict(max_steps=6, save_strategy="steps", save_steps=3, **args)
    whole = make_trainer(target, folder / "whole", **settings)
    seen = Seen(whole)
    whole.train()
    resumed = make_trainer(target, folder / "resumed", **settings)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()
    torch.randn(7)  # the global generator stands elsewhere in another process
    seen_again = Seen(resumed)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    assert seen_again.batches == seen.batches[len(seen.batches) // 2 :]
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    return whole.model, resumed.model


@pytest.mark.parametrize(
    ("num_answers", "args"),
    [
        (12, {}),
        (32, {}),
        (10, {"source_weights": {"answers": 1.5}}),
        (21, {"gradient_accumulation_steps": 2}),
        (20, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    ],
    ids=["between epochs", "within the first epoch", "within the second epoch", "accumulation", "workers"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(target, tmp_path, num_answers, args):
    whole, resumed = run_in_parts(target, tmp_path, answers=make_answers(num_answers, None), **args)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "length", [{"max_steps": 4}, {"num_train_epochs": 2, "max_steps": -1}], ids=["steps", "epochs"]
)
def test_a_finished_run_makes_no_further_update(target, tmp_path, length):
    settings = dict(save_strategy="steps", save_steps=2, **length)
    trainer = make_trainer(target, tmp_path, **settings)
    trainer.train()
    again = make_trainer(target, tmp_path, **settings)
    updates = []
    again.add_callback(type("Count", (TrainerCallback,), {"on_step_end": lambda *_, **__: updates.append(1)})())
    assert again.train(resume_from_checkpoint=True).global_step == trainer.state.global_step
    assert not updates
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_every_epoch_has_other_anchors(target, tmp_path):
    trainer = make_trainer(target, tmp_path, answers=make_answers(4, 60), max_steps=3)
    seen = Seen(trainer)
    trainer.train()
    anchors = [anchors for _, drawn in seen.batches for anchors in drawn]
    assert len(anchors) == len({tuple(row) for row in anchors}) == 12


def test_a_checkpoint_is_a_head_that_can_be_loaded(target, tmp_path):
    trainer = make_trainer(target, tmp_path, save_strategy="steps", save_steps=4)
    trainer.model.generation_config.node_budget = 17
    trainer.train()
    loaded = JetFlowHead.from_pretrained(tmp_path / "checkpoint-4")
    assert loaded.generation_config.node_budget == 17
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in trainer.model.state_dict().items())


def take_steps(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(num_steps):
        for number, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def test_the_optimizer_saves_the_moments_of_both_parts():
    optimizer = MuonAdamW(JetFlowHead(tiny_config()), muon_lr=1e-2, adamw_lr=1e-2)
    take_steps(optimizer, 1)
    saved = optimizer.state_dict()
    moments = [set(saved["state"][group["params"][0]]) for group in saved["param_groups"]]
    assert moments == [{"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}]


def test_a_restored_optimizer_takes_the_same_steps(tmp_path):
    whole = JetFlowHead(tiny_config())
    optimizer = MuonAdamW(whole, muon_lr=1e-2, adamw_lr=1e-2)
    take_steps(optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    head = copy.deepcopy(whole)
    restored = MuonAdamW(head, muon_lr=5.0, adamw_lr=5.0)
    restored.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for each in (optimizer, restored):
        take_steps(each, 2)
    assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_newton_schulz_is_torchs_in_bfloat16_and_close_to_it_in_float32():
    start = JetFlowHead(tiny_config())
    changes = {}
    for name, make in {
        "torch": lambda matrices: torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0),
        "bfloat16": lambda matrices: Muon(matrices, 1e-2, torch.bfloat16),
        "float32": lambda matrices: Muon(matrices, 1e-2, torch.float32),
    }.items():
        head = copy.deepcopy(start)
        matrices = [parameter for parameter in head.parameters() if parameter.ndim == 2]
        take_steps(make(matrices), 3)
        changes[name] = [matrix.detach() - old for matrix, old in zip(matrices, matrices_of(start), strict=True)]
    for name, closeness in {"bfloat16": 0.0, "float32": 0.03}.items():
        for change, expected in zip(changes[name], changes["torch"], strict=True):
            assert (change - expected).norm() <= closeness * expected.norm()


def matrices_of(head: JetFlowHead) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in head.parameters() if parameter.ndim == 2]


@pytest.mark.parametrize("is_bf16", [False, True])
def test_newton_schulz_takes_the_dtype_of_the_training(target, tmp_path, is_bf16):
    optimizer = make_trainer(target, tmp_path, bf16=is_bf16).create_optimizer()
    assert optimizer._parts[0]._dtype == (torch.bfloat16 if is_bf16 else torch.float32)


def test_a_scheduler_changes_the_learning_rates_of_both_parts():
    optimizer = MuonAdamW(JetFlowHead(tiny_config()), muon_lr=4.0, adamw_lr=1.0)
    for rates in ([2.0, 0.5], [1.0, 0.25]):  # before and after a restore
        for group in optimizer.param_groups:
            group["lr"] /= 2
        assert [part.param_groups[0]["lr"] for part in optimizer._parts] == rates
        optimizer.load_state_dict(optimizer.state_dict())


def test_every_parameter_belongs_to_one_part_of_the_optimizer():
    head = JetFlowHead(tiny_config(mask_token_id=None, attention_bias=True))
    groups = MuonAdamW(head, 1.0, 1.0).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(head.parameters()))
    assert all(parameter.ndim == 2 for parameter in groups[0]["params"])
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])


def test_blocks_equal_their_definition():
    answers = make_answers(3, None)
    batch = AnchorCollator(4)(list(AnswerDataset(answers, max_length=100)))
    blocks = make_blocks(batch, BLOCK_SIZE)
    for row, anchors in enumerate(batch["anchors"].tolist()):
        for number, anchor in enumerate(anchors):
            for slot in range(BLOCK_SIZE):
                column = number * BLOCK_SIZE + slot
                drafted = bool(blocks.is_drafted[row, column])
                assert int(blocks.depths[row, column]) == slot
                if anchor < 0:
                    assert int(blocks.anchor_position_ids[row, column]) < 0
                    assert not drafted
                    continue
                assert int(blocks.anchor_position_ids[row, column]) == anchor
                assert int(blocks.position_ids[row, column]) == anchor + slot
                assert drafted == (slot > 0 and anchor + slot < int(batch["lengths"][row]))


def test_missing_blocks_do_not_see_one_another():
    batch = {"anchors": torch.tensor([[4, -1, -1]]), "lengths": torch.tensor([9])}
    starts = make_blocks(batch, BLOCK_SIZE).anchor_position_ids[0, ::BLOCK_SIZE].tolist()
    assert len(set(starts)) == 3


def test_a_head_starts_from_the_target_s_late_layers_and_norms(target):
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.uniform_()  # norms too: their initial values are all ones
    head = make_head(target, num_hidden_layers=2)
    initialize_from_target(head, target)
    states = target.state_dict()
    for layer, source in enumerate((0, 4)):  # of five, the last and the one four before it
        for name, tensor in head.layers[layer].state_dict().items():
            if name not in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):  # which this target has not
                assert torch.equal(tensor, states[f"model.layers.{source}.{name}"])
    assert torch.equal(head.norm.weight, states["model.norm.weight"])
    assert torch.equal(head.hidden_norm.weight, states["model.layers.0.input_layernorm.weight"])


def test_a_head_takes_the_query_and_key_norms_of_a_target_that_has_them(tiny_target):
    target = copy.deepcopy(tiny_target("qwen3"))
    with torch.no_grad():
        target.model.layers[4].self_attn.q_norm.weight.uniform_()
    head = make_head(target)
    initialize_from_target(head, target)
    assert torch.equal(head.layers[1].self_attn.q_norm.weight, target.model.layers[4].self_attn.q_norm.weight)


def test_a_head_starts_with_the_mean_of_the_tapped_states(target):
    head = make_head(target)
    initialize_from_target(head, target)
    taps = torch.randn(2, target.config.hidden_size)
    torch.testing.assert_close(head.fc(taps.flatten()), taps.mean(dim=0))


def test_tensors_of_other_shapes_stay_random(target):
    head = make_head(target, intermediate_size=40)
    before = copied_state(head)
    initialize_from_target(head, target)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert torch.equal(head.layers[0].mlp.get_submodule(name).weight, before[f"layers.0.mlp.{name}.weight"])


def test_the_fusion_of_a_head_of_another_width_stays_random(target):
    head = make_head(target, target_hidden_size=HIDDEN)
    before = head.fc.weight.clone()
    initialize_from_target(head, target)
    assert torch.equal(head.fc.weight, before)


@pytest.mark.parametrize("answers", [[], [{"id": "a", "prompt_ids": [1], "answer_ids": [2]}]], ids=["none", "short"])
def test_answers_that_cannot_be_trained_on_are_refused(target, tmp_path, answers):
    with pytest.raises(ValueError, match=f"none of the {len(answers)} answers can be trained on; give answers of at"):
        JetFlowTrainer(make_head(target), target, JetFlowTrainingConfig(output_dir=str(tmp_path)), answers)


def test_a_target_whose_output_is_no_plain_matrix_is_refused(target, tmp_path):
    head = make_head(target)
    target.set_output_embeddings(nn.Linear(target.config.hidden_size, target.config.vocab_size, bias=True))
    with pytest.raises(ValueError, match=r"output embedding is a `Linear`, but the loss needs .* without bias"):
        make_trainer(target, tmp_path, head=head)


def test_the_fingerprint_tells_targets_and_taps_apart(target):
    configs = [
        make_head(target).config,
        make_head(target, target_name="org/other").config,
        make_head(target, hidden_state_indices=[1, 2]).config,
    ]
    assert len({features_fingerprint(config) for config in configs}) == 3


@pytest.mark.parametrize(
    ("family", "scale", "cap"),
    [("llama", 1, None), ("cohere", 0.0625, None), ("granite", 0.5, None), ("gemma2", 1, 30.0), ("nanochat", 1, 15.0)],
)
def test_the_teacher_is_the_target_s_own_distribution(family, scale, cap):
    settings = {"logits_scaling": 2.0} if family == "granite" else {}
    target = build_target(family, **settings)
    config = JetFlowConfig.for_target(target.config, num_hidden_layers=1, block_size=4)
    view = Target(target, config)
    shape = logit_shape(view)
    assert shape.cap == cap
    assert shape.scale == pytest.approx(scale, rel=1e-3)
    ids = torch.randint(3, 257, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        raw = view.states(ids)[1][0] @ view.embeddings.plain_output_rows(None).T
        torch.testing.assert_close(shape(raw), target(ids).logits[0], atol=1e-3, rtol=1e-3)


def test_a_target_with_another_kind_of_logits_is_refused():
    target = copy.deepcopy(build_target("llama"))
    target.lm_head.register_forward_hook(lambda _module, _args, logits: logits.square())
    view = Target(target, JetFlowConfig.for_target(target.config, num_hidden_layers=1, block_size=4))
    with pytest.raises(ValueError, match=r"logits of `llama` are not those of its output embedding"):
        logit_shape(view)
