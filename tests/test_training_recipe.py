"""The recipe around the updates: where a head starts, what is trained, evaluation, checkpoints, the Hub."""

import copy
import dataclasses
import errno
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import alter, write_lines
from huggingface_hub import HfApi, ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_training import copied_state, make_answers, make_head, make_trainer
from transformers import EarlyStoppingCallback, HfArgumentParser, PreTrainedModel, TrainerCallback
from transformers.integrations import integration_utils

from hf_jetflow import JetFlowHead
from hf_jetflow.errors import JetFlowError
from hf_jetflow.training import recipe
from hf_jetflow.training.checkpoints import HEAD_FILES, checkpoint_fault, find_checkpoints
from hf_jetflow.training.data import frequent_tokens
from hf_jetflow.training.evaluation import tokens_per_round
from hf_jetflow.training.recipe import train_head
from hf_jetflow.training.settings import FIXED_OPTIONS, LAYOUT_OPTIONS, TrainRecipe
from hf_jetflow.training.starting import initialize_from_target, start_from_head, train_correction_only
from hf_jetflow.training.trainer import JetFlowTrainer


@pytest.fixture
def target(tiny_target) -> PreTrainedModel:
    """A copy: training freezes its target."""
    return copy.deepcopy(tiny_target("llama"))


# Where a head starts, and what of it is trained


class SecondGradients(TrainerCallback):
    """Stores the gradients of the second update: in the first, zero output projections let none through."""

    def __init__(self):
        self.by_name: dict[str, torch.Tensor | None] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if state.global_step == 1:
            self.by_name = {name: parameter.grad for name, parameter in model.named_parameters()}
            self.by_name = {name: None if grad is None else grad.clone() for name, grad in self.by_name.items()}


@pytest.mark.parametrize("kind", ["path", "parent"])
def test_the_correction_learns_with_the_head_and_the_target_stays(target, tmp_path, kind):
    trainer = make_trainer(target, tmp_path, make_head(target, branch_correction=kind), max_steps=2)
    frozen = copied_state(target)
    gradients = SecondGradients()
    trainer.add_callback(gradients)
    trainer.train()
    silent = [name for name, gradient in gradients.by_name.items() if gradient is None or not gradient.abs().sum() > 0]
    assert silent == []
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in target.state_dict().items())


def test_training_only_the_correction_changes_no_other_bit(target, tmp_path):
    head = make_head(target, branch_correction="path")
    train_correction_only(head)
    before = copied_state(head)
    gradients = SecondGradients()
    trainer = make_trainer(target, tmp_path, head, max_steps=2)
    trainer.add_callback(gradients)
    trainer.train()
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("branch_correction."), name
        assert (gradients.by_name[name] is None) != name.startswith("branch_correction."), name


def test_a_head_without_a_correction_cannot_train_it_only(target):
    with pytest.raises(ValueError, match=r"the head has no branch correction; give `--branch-correction path`"):
        train_correction_only(make_head(target))


def test_a_correction_is_added_to_a_head_and_everything_else_is_loaded(target, tmp_path):
    old = make_head(target, draft_vocab_size=100)
    alter(old)
    old.generation_config.node_budget = 17
    old.save_pretrained(tmp_path / "old")
    head = start_from_head(str(tmp_path / "old"), target, "path", seed=1)
    assert (head.config.branch_correction, head.generation_config.node_budget) == ("path", 17)
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in old.state_dict().items())
    fresh = head.branch_correction.state_dict()
    assert not fresh["down_proj.weight"].any()
    assert fresh["token_proj.weight"].any()
    again = start_from_head(str(tmp_path / "old"), target, "path", seed=1).branch_correction.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in fresh.items())


def test_a_head_with_the_requested_correction_is_continued_unchanged(target, tmp_path):
    old = make_head(target, branch_correction="parent")
    alter(old)
    old.to(torch.bfloat16).save_pretrained(tmp_path / "old")
    head = start_from_head(str(tmp_path / "old"), target, "parent", seed=1)
    assert head.dtype == torch.float32
    assert all(torch.equal(head.state_dict()[name], tensor.float()) for name, tensor in old.state_dict().items())


@pytest.mark.parametrize("asked", ["path", None])
def test_a_correction_of_another_kind_is_not_exchanged(target, tmp_path, asked):
    make_head(target, branch_correction="parent").save_pretrained(tmp_path / "old")
    with pytest.raises(
        ValueError, match=r"of kind 'parent', which cannot become .*; give `--branch-correction parent`"
    ):
        start_from_head(str(tmp_path / "old"), target, asked, seed=1)


def test_a_head_of_another_target_is_not_continued(target, tmp_path, tiny_target):
    make_head(tiny_target("llama", hidden_size=32)).save_pretrained(tmp_path / "old")
    with pytest.raises(ValueError, match="expects a target with hidden size 32, but this target has 64"):
        start_from_head(str(tmp_path / "old"), target, None, seed=1)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "llama"])
def test_norms_of_a_new_head_compute_the_same_as_the_target_s(tiny_target, name):
    target = copy.deepcopy(tiny_target(name))
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 0.5)
    head = make_head(target)
    initialize_from_target(head, target)
    last, x = target.model.layers[-1], torch.randn(3, target.config.hidden_size)
    before_mlp = getattr(last, "pre_feedforward_layernorm", last.post_attention_layernorm)
    pairs = [
        (head.norm, target.model.norm),
        (head.layers[-1].input_layernorm, last.input_layernorm),
        (head.layers[-1].post_attention_layernorm, before_mlp),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours(x), theirs(x))
    if hasattr(last.self_attn, "q_norm"):
        x = torch.randn(3, head.config.head_dim)
        torch.testing.assert_close(head.layers[-1].self_attn.q_norm(x), last.self_attn.q_norm(x))


def test_a_norm_after_the_attention_is_not_copied_to_the_norm_before_the_mlp(tiny_target):
    target = copy.deepcopy(tiny_target("olmo2"))
    with torch.no_grad():
        target.model.layers[-1].post_attention_layernorm.weight.fill_(3.0)
    head = make_head(target)
    initialize_from_target(head, target)
    assert torch.equal(head.layers[-1].post_attention_layernorm.weight, torch.ones(64))


# Evaluation by decoding

PROMPTS = {"chat": [[5, 6, 7], [8, 9]], "code": [[10, 11, 12, 13]]}
KEEP_BEST = dict(
    eval_strategy="steps",
    eval_steps=1,
    save_strategy="steps",
    save_steps=100,
    metric_for_best_model="tokens_per_round",
    greater_is_better=True,
    load_best_model_at_end=True,
)


def evaluating_trainer(target, folder, figures=None, monkeypatch=None, **args):
    """A trainer with held-out prompts; `figures` are what evaluation finds, one after the other."""
    trainer = make_trainer(target, folder, eval_dataset=PROMPTS, **{**KEEP_BEST, **args})
    if figures is not None:
        steps = iter(figures)
        monkeypatch.setattr(trainer, "_tokens_per_round", lambda head, prompts: next(steps))
        trainer.eval_dataset = {"chat": PROMPTS["chat"]}
    return trainer


def evaluations(trainer) -> list[float]:
    return [entry["eval_tokens_per_round"] for entry in trainer.state.log_history if "eval_tokens_per_round" in entry]


def test_evaluation_decodes_each_set_and_logs_their_mean(target, tmp_path):
    trainer = evaluating_trainer(target, tmp_path, max_steps=1, eval_node_budget=8, eval_max_new_tokens=6)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "eval_tokens_per_round" in entry]
    figures = [tokens_per_round(target, trainer.model, prompts, 8, max_new_tokens=6) for prompts in PROMPTS.values()]
    assert [entry["eval_chat_tokens_per_round"], entry["eval_code_tokens_per_round"]] == figures
    assert entry["eval_tokens_per_round"] == pytest.approx(sum(figures) / 2)
    assert all(figure >= 1 for figure in figures)


def test_evaluation_changes_nothing_of_the_training(target, tmp_path):
    heads = []
    for number, args in enumerate((KEEP_BEST, {})):
        settings = {**args, "load_best_model_at_end": False, "eval_max_new_tokens": 5}
        trainer = make_trainer(target, tmp_path / str(number), eval_dataset=PROMPTS, max_steps=3, **settings)
        trainer.train()
        heads.append(trainer.model)
    assert len(evaluations(trainer)) == 0
    assert all(torch.equal(tensor, heads[1].state_dict()[name]) for name, tensor in heads[0].state_dict().items())


def test_evaluation_restores_mode_settings_and_statistics_of_the_head(target, tmp_path, monkeypatch):
    trainer = evaluating_trainer(target, tmp_path, eval_node_budget=8, eval_max_new_tokens=4)
    head = trainer.model.train()
    head.generation_config.node_budget, head.last_stats = 17, "earlier"
    settings = head.generation_config
    trainer.evaluate()
    monkeypatch.setattr(target, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate()
    assert head.training
    assert head.generation_config is settings
    assert (settings.node_budget, head.last_stats) == (17, "earlier")


def test_the_best_head_is_stored_between_checkpoints_and_loaded_at_the_end(target, tmp_path, monkeypatch):
    trainer = evaluating_trainer(target, tmp_path, [1.0, 3.0, 2.0, 2.5], monkeypatch, save_total_limit=1)
    states = {}
    determine = trainer._determine_best_metric
    monkeypatch.setattr(
        trainer,
        "_determine_best_metric",
        lambda metrics, trial: (
            states.update({trainer.state.global_step: copied_state(trainer.model)}) or determine(metrics, trial)
        ),
    )
    trainer.train()
    assert evaluations(trainer) == [1.0, 3.0, 2.0, 2.5]
    assert [path.name for path in find_checkpoints(tmp_path)[0]] == ["checkpoint-2"]
    assert all(torch.equal(tensor, states[2][name]) for name, tensor in trainer.model.state_dict().items())
    assert not all(torch.equal(tensor, states[2][name]) for name, tensor in states[4].items())


def test_training_stops_early_and_a_resumed_run_goes_on_counting(target, tmp_path, monkeypatch):
    figures = [2.0, 1.0, 1.5, 1.9, 1.0]
    settings = dict(max_steps=9, save_steps=2, restore_callback_states_from_checkpoint=True)
    trainer = evaluating_trainer(target, tmp_path, figures[:2], monkeypatch, **{**settings, "max_steps": 2})
    trainer.add_callback(EarlyStoppingCallback(3))
    trainer.train()
    resumed = evaluating_trainer(target, tmp_path, figures[2:], monkeypatch, **settings)
    resumed.add_callback(EarlyStoppingCallback(3))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert evaluations(resumed) == figures[:4]


@pytest.mark.parametrize("prompts", [None, {"chat": []}])
def test_evaluation_without_prompts_is_refused(target, tmp_path, prompts):
    trainer = make_trainer(target, tmp_path, eval_dataset=prompts)
    with pytest.raises(ValueError, match="evaluation needs held-out prompts in every set, but there are none"):
        trainer.evaluate()


# Checkpoints

EVERY_TWO = dict(max_steps=4, save_strategy="steps", save_steps=2)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def finished_run(tiny_target, tmp_path_factory):
    """The trainer of a run with two checkpoints."""
    trainer = make_trainer(copy.deepcopy(tiny_target("llama")), tmp_path_factory.mktemp("run"), **EVERY_TWO)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (
            lambda folder: (folder / "trainer_state.json").unlink(),
            "trainer_state.json, which is written last, is missing",
        ),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is cut off"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors cut off"),
        (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt cut off"),
        (lambda folder: cut(folder / "rng_state.pth"), "rng_state.pth cut off"),
    ],
)
def test_an_incomplete_checkpoint_is_removed_and_the_one_before_is_continued(
    finished_run, target, tmp_path, caplog, harm, fault
):
    shutil.copytree(finished_run.args.output_dir, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoint-4"
    harm(last)
    assert checkpoint_fault(last) == fault
    with pytest.raises(ValueError, match=f"checkpoint-4: {fault}; give another checkpoint"):
        make_trainer(target, tmp_path, **EVERY_TWO).train(resume_from_checkpoint=str(last))
    trainer = make_trainer(target, tmp_path, **EVERY_TWO)
    with caplog.at_level(logging.WARNING, "hf_jetflow"):
        trainer.train(resume_from_checkpoint=True)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_jetflow")]
    assert f"{last} is incomplete and removed: {fault}" in message
    assert message.endswith(f"continuing from {tmp_path / 'checkpoint-2'}")
    assert all(
        torch.equal(tensor, finished_run.model.state_dict()[name])
        for name, tensor in trainer.model.state_dict().items()
    )
    assert checkpoint_fault(last) == ""


def test_training_starts_again_when_the_only_checkpoint_is_incomplete(target, tmp_path, caplog):
    (tmp_path / "checkpoint-2").mkdir()
    trainer = make_trainer(target, tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    assert "continuing from the start" in caplog.text
    assert not (tmp_path / "checkpoint-2").exists()


FULL_DISK = [
    ("safetensors.torch.save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")),
    ("transformers.trainer_callback.TrainerState.save_to_json", OSError(errno.ENOSPC, "No space left on device")),
]


@pytest.mark.parametrize(("writer", "error"), FULL_DISK, ids=["tensors", "optimizer", "state"])
@pytest.mark.parametrize("step", [2, 4])
def test_a_full_disk_is_reported_and_leaves_no_partial_checkpoint(target, tmp_path, monkeypatch, writer, error, step):
    if writer.startswith("safetensors"):
        writer = "transformers.modeling_utils.safe_save_file"
    trainer = make_trainer(target, tmp_path, **EVERY_TWO)

    class FillDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == step:
                monkeypatch.setattr(writer, fail)

    def fail(*_, **__):
        raise error

    trainer.add_callback(FillDisk())
    earlier = "the last complete one is" if step == 4 else "there is no earlier one"
    with pytest.raises(
        JetFlowError, match=f"checkpoint-{step} cannot be written .* and is removed; {earlier}.* free disk"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == (["checkpoint-2"] if step == 4 else [])


def test_an_error_that_is_no_full_disk_keeps_its_own_message(target, tmp_path, monkeypatch):
    trainer = make_trainer(target, tmp_path, **EVERY_TWO)

    def fail(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# The whole recipe, from files to a head and its card


class Report:
    def __init__(self):
        self.said: list[str] = []
        self.bars: dict[str, list[tuple[int, int]]] = {}

    def __call__(self, done: int, total: int, what: str, share: float | None = None) -> None:
        self.bars.setdefault(what, []).append((done, total))

    def say(self, text: str) -> None:
        self.said.append(text)


class Tokenizer:
    """One whose vocabulary is `t003` to `t009`."""

    def get_vocab(self) -> dict[str, int]:
        return {f"t00{number}": number for number in range(3, 10)}


@pytest.fixture
def run(target, tmp_path, monkeypatch, short_measurements):
    """`run(**options)`: the recipe on the tiny target and ready answers; returns its summary and what it said."""
    monkeypatch.setattr(recipe, "load_tokenizer", lambda _: Tokenizer())
    monkeypatch.setattr(recipe, "load_target_config", lambda _: target.config)
    monkeypatch.setattr(recipe, "load_model", lambda *_: target)
    monkeypatch.setattr(recipe, "with_token_ids", lambda path, *_: path)
    monkeypatch.setattr(recipe, "encode_chat", lambda _, messages: [5, 6, len(messages[0]["content"])])
    monkeypatch.setattr(recipe, "fast_dtype", lambda: "float32")
    answers = write_lines(tmp_path / "answers.jsonl", *make_answers())
    held_out = write_lines(tmp_path / "held_out.jsonl", {"prompt": "one"}, {"prompt": "three"})

    def run(output="run", **options):
        settings = dict(max_steps=2, save_steps=1, batch_size=2, anchors=3, num_layers=1, num_taps=2, block_size=4)
        settings |= dict(eval_prompts=[held_out], eval_max_new_tokens=4, eval_node_budgets=[4, 8])
        if "head" in options:
            settings = {key: value for key, value in settings.items() if key not in LAYOUT_OPTIONS}
        report = Report()
        options = {**settings, "answers": [answers], "target_name": "org/target", **options}
        run.report = report
        return train_head(TrainRecipe("org/target", tmp_path / output, **options), report), report.said

    return run


def test_a_head_with_a_path_correction_is_the_default(run, tmp_path):
    summary, said = run()
    assert JetFlowHead.from_pretrained(tmp_path / "run").config.branch_correction == "path"
    assert list(summary) == [f"tokens per round on held_out, {budget} nodes" for budget in (4, 8)]
    assert any(text.startswith("update 2: tokens per round: mean ") for text in said)
    assert run.report.bars == {
        "updates": [(0, 2), (1, 2), (2, 2)],
        "held-out prompts, 32 nodes": [(0, 2), (1, 2), (2, 2)] * 2,  # after each update
        "held-out prompts, 4 nodes": [(0, 2), (1, 2), (2, 2)],
        "held-out prompts, 8 nodes": [(0, 2), (1, 2), (2, 2)],
    }


def test_the_settings_are_parsed_by_transformers_argument_parser(tmp_path):
    parser = HfArgumentParser(TrainRecipe)
    (parsed,) = parser.parse_args_into_dataclasses(["--target", "org/model", "--output", str(tmp_path)])
    assert parsed == TrainRecipe("org/model", tmp_path)
    command = "--target a --output b --prompts c --prompts d --weight code=2 math=0.5"
    command += " --train-only correction --depth-gamma 5 --eval-node-budgets 8 16"
    command += " --cache-features --report-to wandb trackio"
    (parsed,) = parser.parse_args_into_dataclasses(command.split())
    assert (parsed.prompts, parsed.source_weights) == ([Path("c"), Path("d")], {"code": 2.0, "math": 0.5})
    assert (parsed.train_only, parsed.depth_gamma, parsed.cache_features) == ("correction", 5.0, True)
    assert (parsed.eval_node_budgets, parsed.report_to) == ([8, 16], ["wandb", "trackio"])
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainRecipe))
    assert "--weights NAME=WEIGHT" in parser.format_help()
    assert parser.parse_args_into_dataclasses(["--target", "a", "--output", "b"])[0].prompts == []


def test_the_end_of_training_says_what_remains(run, tmp_path):
    _, said = run()
    (line,) = [text for text in said if text.startswith("all 2 updates are done")]
    assert f"{tmp_path / 'run'} holds the head of update " in line
    assert "2 held-out prompts are decoded with node budgets 4, 8, for the card: at most about" in line
    assert run(max_steps=2)[1][-1].endswith("for the card")  # a finished run timed no evaluation
    assert (
        run("other", eval_prompts=[])[1][-1]
        == f"all 2 updates are done; {tmp_path / 'other'} holds the head of update 2"
    )


def kill_at_update(monkeypatch, number: int) -> None:
    """Kill the run when it reports this update."""

    def report(self, done: int, total: int, what: str) -> None:
        if (done, what) == (number, "updates"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Report, "__call__", report)


@pytest.mark.parametrize("figures", [[2.0, 1.0, 1.5], [1.0, 2.0, 1.5], None])
def test_the_best_head_so_far_lies_in_the_output_folder_during_training(run, tmp_path, monkeypatch, figures):
    monkeypatch.setattr(JetFlowTrainer, "_tokens_per_round", lambda *_: next(found))
    found = iter(figures or [])
    options = {} if figures else {"eval_prompts": []}
    kill_at_update(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(max_steps=4, **options)
    best = 2 if figures is None else 1 + figures.index(2.0)
    saved = JetFlowHead.from_pretrained(tmp_path / "run")
    assert (saved.dtype, saved.generation_config.node_budget) == (torch.bfloat16, "auto")
    trained = load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(tensor, trained[name].to(tensor.dtype)) for name, tensor in saved.state_dict().items())
    assert f"{best} updates of 2 sequences" in (tmp_path / "run" / "README.md").read_text()


def test_a_resumed_run_says_from_what_and_counts_on(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at_update(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(eval_prompts=[])
    _, said = run(eval_prompts=[])
    assert f"continuing from checkpoint-1 of {tmp_path / 'run'}" in said
    assert run.report.bars["updates"] == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learning_rate=1e-3), "`learning_rate` was 0.01 and is 0.001"),
        (dict(num_layers=2), "`num_layers` was 1 and is 2"),
        (dict(weights=["answers=2"]), r"`weights` was \[\] and is \[\"answers=2\"\]"),
    ],
)
def test_a_run_is_not_continued_with_other_settings(run, monkeypatch, change, message):
    run(eval_prompts=[])
    monkeypatch.setattr(recipe, "load_tokenizer", lambda _: 1 / 0)
    with pytest.raises(JetFlowError, match=f"{message}; use the same settings to finish it, or give another folder"):
        run(**change)
    assert change.keys() <= set(FIXED_OPTIONS)


def test_losses_and_figures_reach_the_trackers(run, monkeypatch):
    logged = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            logged.extend(logs)

    monkeypatch.setattr("hf_jetflow.training.settings.require_package", lambda *_: None)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    run(report_to=["wandb"], max_steps=1)
    assert "eval_held_out_tokens_per_round" in logged


def test_a_correction_is_trained_onto_a_finished_head(run, tmp_path):
    run(branch_correction="none")
    old = JetFlowHead.from_pretrained(tmp_path / "run").state_dict()
    assert not any(name.startswith("branch_correction") for name in old)
    run("more", head=str(tmp_path / "run"), train_only="correction", eval_prompts=[], uncorrected_loss=0.3)
    new = JetFlowHead.from_pretrained(tmp_path / "more").state_dict()
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert new["branch_correction.down_proj.weight"].any()
    card = (tmp_path / "more" / "README.md").read_text()
    assert "both at 0.3 before the correction; only the branch correction was trained" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(answers=[]), "nothing to train on: give `--prompts`"),
        (
            dict(branch_correction="tree"),
            r"`--branch-correction` is 'tree', expected one of \['path', 'parent', 'none'\]",
        ),
        (dict(train_only="norms"), "`--train-only` is 'norms', expected 'correction'"),
        (dict(train_only="correction"), "needs a trained head; give it with `--head`"),
        (dict(depth_gamma=0.0), "`--depth-gamma` is 0.0, expected more than 0"),
        (dict(uncorrected_loss=-0.1), "`--uncorrected-loss` is -0.1, expected at least 0"),
        (dict(patience=3, eval_prompts=[]), "`--patience` 3 needs held-out prompts; give them with `--eval-prompts`"),
        (dict(save_steps=10, eval_steps=3), "`--save-steps` 10 must be a multiple of `--eval-steps` 3"),
        (dict(block_size=1), "`--block-size` is 1, expected at least 2"),
        (dict(temperature=float("nan")), "`--temperature` is nan, expected at least 0"),
        (dict(weights=["answers"]), "`--weights`: expected NAME=WEIGHT such as `code=2.0`, got 'answers'"),
        (dict(report_to=["nowhere"]), "`--report-to` is 'nowhere', expected one of .*tensorboard, trackio, wandb"),
        (dict(report_to=["clearml"]), "reports to clearml need clearml, which is not installed; run `pip install"),
        (dict(push_to_hub="head"), "`--push-to-hub` is 'head', expected ORG/NAME, such as org/head"),
        (dict(push_to_hub="org/head"), "`--push-to-hub` org/head needs a token .* but there is none; run `hf auth"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_target_is_loaded(run, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(recipe, "load_tokenizer", lambda _: 1 / 0)
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.fixture
def head_before(target, run, tmp_path) -> dict[str, bytes]:
    """The folder of a run holds a head already; its files."""
    make_head(target).save_pretrained(tmp_path / "run")
    return {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("failing", ["save_pretrained", "write_text"])
def test_a_save_that_fails_leaves_the_head_that_was_there(run, monkeypatch, head_before, tmp_path, failing):
    owner = JetFlowHead if failing == "save_pretrained" else Path
    write = getattr(owner, failing)

    def fail(self, *args, **kwargs):
        write(self, *args, **kwargs)
        if ".head.partial" in f"{self} {args}":
            raise OSError("disk full")

    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(JetFlowError, match=r"the head cannot be written to .*disk full.* free disk space"):
        run()
    folder = tmp_path / "run"
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name: content for name, content in files.items() if name != "train_settings.json"} == head_before
    assert not list(folder.glob(".head*"))


@pytest.mark.parametrize("num_moved", [0, 3])
def test_a_save_that_is_killed_between_two_files_leaves_no_head(run, monkeypatch, head_before, tmp_path, num_moved):
    replace, moved = os.replace, []

    def replace_some(source, place):
        if ".head.partial" in str(source):
            if len(moved) == num_moved:
                raise KeyboardInterrupt
            moved.append(place)
        replace(source, place)

    monkeypatch.setattr(os, "replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr(os, "replace", replace)
    run()
    assert JetFlowHead.from_pretrained(tmp_path / "run").config.branch_correction == "path"
    files = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert files == {*HEAD_FILES, "train_settings.json"}


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (None, dict(num_taps=99), "`--num-taps` is 99, but the target has 5 layers; give at most as many"),
        (None, dict(mask_token="<none>"), "`--mask-token`: the token '<none>' is not in the tokenizer's vocabulary"),
        ({}, dict(mask_token="<none>"), "`--mask-token`: the token '<none>' is not in the tokenizer's vocabulary"),
        ({}, dict(mask_token="t005"), "`--mask-token` is 't005', but the head .*old was trained with another one"),
        ({}, dict(num_layers=5), "`--num-layers` is 5, but the head .*old has 2; remove the option to"),
        ({}, dict(num_taps=3), "`--num-taps` is 3, but the head .*old has 2; remove the option to"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_weights_are_read(
    run, target, tmp_path, monkeypatch, head, options, message
):
    if head is not None:
        make_head(target, **head).save_pretrained(tmp_path / "old")
        options["head"] = str(tmp_path / "old")
    monkeypatch.setattr(recipe, "load_model", lambda *_: 1 / 0)
    with pytest.raises(JetFlowError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (dict(vocab_size=9), {}, "the head expects a target with vocabulary size 9, but this target has"),
        (dict(branch_correction="parent"), {}, "has a branch correction of kind 'parent', which cannot become 'path'"),
        ({}, dict(branch_correction="none", train_only="correction"), "but the head has no branch correction"),
        (dict(logit_scale=2.0), {}, "has parts of another layout"),
    ],
)
def test_a_head_that_cannot_be_continued_is_refused_before_answers_are_made(
    run, target, tmp_path, monkeypatch, head, options, message
):
    make_head(target, **head).save_pretrained(tmp_path / "old")
    monkeypatch.setattr(recipe, "_answers", lambda *_: 1 / 0)
    with pytest.raises(JetFlowError, match=message):
        run(head=str(tmp_path / "old"), **options)


def test_a_target_that_cannot_teach_is_refused_before_answers_are_made(run, monkeypatch, target):
    monkeypatch.setattr(target, "lm_head", torch.nn.Sequential(target.lm_head, torch.nn.Sigmoid()))
    monkeypatch.setattr(recipe, "_answers", lambda *_: 1 / 0)
    with pytest.raises(JetFlowError, match="the loss needs a plain linear layer without bias"):
        run()


@pytest.mark.parametrize(("asked", "expected"), [(None, 4), (7, 7)])
def test_a_given_head_keeps_its_block_size_unless_another_is_asked_for(run, target, tmp_path, asked, expected):
    make_head(target).save_pretrained(tmp_path / "old")
    run(head=str(tmp_path / "old"), block_size=asked, branch_correction="none", max_steps=1)
    head = JetFlowHead.from_pretrained(tmp_path / "run")
    assert (head.config.block_size, head.generation_config.max_depth) == (expected, expected - 1)


@pytest.mark.parametrize("own", [None, 30, 12])
def test_a_given_head_gets_the_draft_vocabulary_of_these_answers(run, target, tmp_path, own):
    make_head(target, draft_vocab_size=own).save_pretrained(tmp_path / "old")
    run(head=str(tmp_path / "old"), draft_vocab=12, branch_correction="none", max_steps=1)
    head = JetFlowHead.from_pretrained(tmp_path / "run")
    eos = [] if target.generation_config.eos_token_id is None else [target.generation_config.eos_token_id]
    assert head.d2t.tolist() == frequent_tokens(make_answers(), 12, eos).tolist()
    assert head.d2t.tolist() != list(range(12))


def test_a_given_head_keeps_its_draft_vocabulary_by_default(run, target, tmp_path):
    old = make_head(target, draft_vocab_size=12)
    old.d2t.copy_(torch.arange(3, 27, 2))
    old.save_pretrained(tmp_path / "old")
    run(head=str(tmp_path / "old"), branch_correction="none", max_steps=1)
    assert JetFlowHead.from_pretrained(tmp_path / "run").d2t.tolist() == old.d2t.tolist()


def test_agreement_is_printed_by_depth_also_from_the_tenth_on():
    logs = {f"{kind}top1_depth_{depth}": depth / 100 for depth in (11, 10, *range(1, 10)) for kind in ("", "spine_")}
    expected = [f"{depth / 100:.2f}" for depth in range(1, 12)]
    assert recipe._by_depth(logs, "").split() == recipe._by_depth(logs, "spine_").split() == expected


@pytest.fixture
def uploads(monkeypatch) -> dict[str, dict[str, bytes]]:
    """Files uploaded to the Hub, by repository; nothing leaves the machine."""
    repositories: dict[str, dict[str, bytes]] = {}

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            repositories[repo_id][operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo_id, **__: repositories.setdefault(repo_id, {}))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    return repositories


def test_the_head_and_its_card_are_uploaded(run, uploads, tmp_path):
    summary, _ = run(push_to_hub="org/head", license="mit")
    files = uploads["org/head"]
    assert sorted(files) == sorted(HEAD_FILES)
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model, card.data.license) == (
        "transformers",
        "org/target",
        "mit",
    )
    assert "speculative-decoding" in card.data.tags
    figures = " | ".join(f"{value:.2f}" for value in summary.values())
    assert f"| tokens per round | 4 nodes | 8 nodes |\n|---|---|---|\n| held_out | {figures} |" in card.text
    assert re.search(r'from_pretrained\(\s*"org/head",\s+dtype', card.text)


def test_a_repository_that_the_hub_refuses_is_known_before_training(run, uploads, monkeypatch):
    def refuse(*_, **__):
        raise OSError("403 Forbidden")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr(recipe, "load_tokenizer", lambda _: 1 / 0)
    with pytest.raises(JetFlowError, match=r"the Hub refuses the repository \(403 Forbidden\); check the name"):
        run(push_to_hub="org/head")
