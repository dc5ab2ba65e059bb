"""The whole way from prompts to a saved head: what `hf-jetflow train` runs."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from ..head.card import card_text
from ..head.configuration_jetflow import BRANCH_CORRECTIONS, JetFlowConfig, spaced_layer_ids
from ..head.modeling_jetflow import JetFlowHead
from ..prompts import encode_chat, read_prompts
from ..target.loading import fast_dtype, load_target
from .answers import FOREIGN_SURPRISE, regenerate_answers, surprise, with_token_ids
from .data import Answers, check_weights, frequent_tokens, read_answers
from .evaluation import tokens_per_round
from .starting import initialize_from_target, start_from_head, train_correction_only
from .trainer import JetFlowTrainer, JetFlowTrainingConfig


LAYOUT_OPTIONS = ("num_layers", "num_taps", "block_size", "draft_vocab")  # a given head has its own
HEAD_FILES = ("README.md", "config.json", "generation_config.json", "model.safetensors")


class Reporter(Protocol):
    """Where progress goes."""

    def __call__(self, done: int, total: int, what: str) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass
class TrainRecipe:
    """Options of `hf-jetflow train`; the command's help describes them."""

    target: str
    output: Path
    prompts: Sequence[Path] = ()
    answers: Sequence[Path] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    eval_prompts: Sequence[Path] = ()
    eval_steps: int = 0
    eval_num_prompts: int = 8
    eval_max_new_tokens: int = 64
    patience: int = 0
    head: str | None = None
    train_only: str | None = None
    target_name: str | None = None
    num_layers: int = 3
    num_taps: int = 5
    block_size: int = 8
    draft_vocab: int = 0
    mask_token: str | None = None
    branch_correction: str = "path"
    max_new_tokens: int = 256
    temperature: float = 0.0
    generation_batch_size: int = 32
    max_steps: int = 4000
    batch_size: int = 8
    accumulation: int = 1
    anchors: int = 16
    learning_rate: float = 1e-2
    feature_loss: float = 0.5
    depth_gamma: float | None = None
    max_length: int = 512
    cache_features: bool = False
    save_steps: int = 200
    seed: int = 0
    dtype: str = "auto"
    push_to_hub: str | None = None
    license: str | None = None
    eval_node_budgets: Sequence[int] = field(default=(16, 32, 64))


def train_head(recipe: TrainRecipe, report: Reporter) -> dict[str, Any]:
    """
    Regenerate answers, train, keep the best head by decoding, save it and its card in `recipe.output`.

    Every stage continues where a killed run stopped.

    Returns:
        `dict`: Tokens per round by evaluation set and node budget.

    Raises:
        ValueError: If there is nothing to train on, or an option does not fit the target, the head or the others.
        OSError: If a file cannot be read or written, or the Hub refuses the repository.
    """
    _check_options(recipe)
    # Before the target is loaded: it gives each process a device of its own. The main process alone writes the answers
    # and measures the head, for hours, and the others wait.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
    if recipe.push_to_hub and state.is_main_process:
        HfApi().create_repo(recipe.push_to_hub, exist_ok=True)
    prompts = read_prompts(recipe.prompts)
    target, tokenizer = load_target(recipe.target, fast_dtype() if recipe.dtype == "auto" else recipe.dtype)
    eval_sets = {
        path.stem: [encode_chat(tokenizer, prompt["messages"]) for prompt in read_prompts([path])]
        for path in recipe.eval_prompts
    }
    if recipe.head is None:
        head_config(recipe, target, tokenizer)  # what is wrong with it is said before hours of answers
    with state.main_process_first():  # the other processes then find every answer written
        answers = _answers(recipe, target, tokenizer, prompts, report)
    del prompts
    head = _starting_head(recipe, target, tokenizer, answers)
    trainer = JetFlowTrainer(
        head,
        target,
        _training_config(recipe),
        answers,
        eval_dataset={name: ids[: recipe.eval_num_prompts] for name, ids in eval_sets.items()} or None,
        callbacks=[
            *([_ProgressCallback(report)] if state.is_main_process else []),
            *([EarlyStoppingCallback(recipe.patience)] if recipe.patience else []),
        ],
    )
    trainer.progress = report
    trainer.remove_callback(PrinterCallback)  # the reporter says it in fewer words
    if trainer.train_dataset.left_out:
        report.say(f"of {len(answers)} answers: {trainer.train_dataset.left_out} (see --max-length)")
    trainer.train(resume_from_checkpoint=True)
    whole = trainer.whole_head()
    figures: dict[str, dict[int, float]] = {}
    if state.is_main_process:
        assert whole is not None
        for name, ids in eval_sets.items():
            figures[name] = {
                budget: round(tokens_per_round(target, whole, ids, budget, progress=report), 3)
                for budget in recipe.eval_node_budgets
            }
        _save(recipe, whole.eval(), answers, trainer.state.global_step, figures)
    return {
        f"tokens per round on {name}, {budget} nodes": figure
        for name, by_budget in figures.items()
        for budget, figure in by_budget.items()
    }


def _check_options(recipe: TrainRecipe) -> None:
    """Refuse what would fail later, before anything is computed."""
    if not recipe.prompts and not recipe.answers:
        raise ValueError(
            "nothing to train on: give prompts with `--prompts`, or the target's answers with `--answers`"
        )
    if recipe.branch_correction not in (*BRANCH_CORRECTIONS, "none"):
        raise ValueError(
            f"`--branch-correction` is {recipe.branch_correction!r}, but one of {[*BRANCH_CORRECTIONS, 'none']} is "
            "needed"
        )
    if recipe.train_only not in (None, "correction"):
        raise ValueError(
            f"`--train-only` is {recipe.train_only!r}, but only 'correction' can be trained by itself; leave the "
            "option out to train the whole head"
        )
    if recipe.train_only and recipe.head is None:
        raise ValueError(
            "`--train-only correction` leaves the rest of the head as it is, so a trained one is needed: give it "
            "with `--head`"
        )
    if recipe.depth_gamma is not None and recipe.depth_gamma <= 0:
        raise ValueError(
            f"`--depth-gamma` is {recipe.depth_gamma}, but more than 0 is needed; leave the option out to weigh all "
            "depths alike"
        )
    if recipe.patience and not recipe.eval_prompts:
        raise ValueError(
            f"`--patience` {recipe.patience} stops training when held-out prompts are drafted no better, but there "
            "are none: give them with `--eval-prompts`"
        )
    if recipe.eval_steps and recipe.save_steps % recipe.eval_steps:
        raise ValueError(
            f"`--save-steps` {recipe.save_steps} is no multiple of `--eval-steps` {recipe.eval_steps}, as it must "
            "be; change one of them"
        )
    if recipe.push_to_hub and get_token() is None:
        raise ValueError(
            f"`--push-to-hub` {recipe.push_to_hub} needs a token for the Hub, but there is none; run `hf auth login`, "
            "or leave the option out and upload the head later"
        )


def _answers(
    recipe: TrainRecipe,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    report: Reporter,
) -> Answers:
    """The given answers, checked before the target writes those to the prompts."""
    given = [with_token_ids(path, target, tokenizer, recipe.output / "tokenized") for path in recipe.answers]
    answers = read_answers(given, target.get_input_embeddings().num_embeddings)
    own_answers = recipe.output / "answers.jsonl"
    check_weights(recipe.weights, {*answers.sources, *(prompt["source"] for prompt in prompts)})
    ends = [*answers.starts, len(answers)][1:]
    for path, start, end in zip(recipe.answers, answers.starts, ends, strict=True):
        _warn_of_foreign_answers(path, target, answers, range(start, end), recipe.max_length, report)
    if prompts:
        too_long = regenerate_answers(
            target,
            tokenizer,
            prompts,
            own_answers,
            temperature=recipe.temperature,
            seed=recipe.seed,
            batch_size=recipe.generation_batch_size,
            max_new_tokens=recipe.max_new_tokens,
            max_prompt_tokens=recipe.max_length - 2,  # room for an anchor and a drafted token
            progress=lambda done, total: report(done, total, "answers regenerated"),
        )
        if too_long:
            report.say(f"{too_long} of {len(prompts)} prompts left out: they fill --max-length {recipe.max_length}")
    if own_answers.exists():
        answers.add(own_answers)
    return answers


def _warn_of_foreign_answers(
    path: Path, target: PreTrainedModel, answers: Answers, indices: range, max_length: int, report: Reporter
) -> None:
    """Look at 32 answers spread over a file, and say it if they are not the target's own."""
    sample = indices[:: max(len(indices) // 32, 1)][:32]
    figure = surprise(target, [answers[index] for index in sample], max_length)
    if figure > FOREIGN_SURPRISE:
        report.say(
            f"warning: {path}: these answers surprise the target by {figure:.2f} nats per token more than its own "
            f"would (limit {FOREIGN_SURPRISE}); a head trained on them learns text that the target does not write: "
            "regenerate them with this target, by giving their prompts with --prompts"
        )


def _starting_head(
    recipe: TrainRecipe, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Answers
) -> JetFlowHead:
    """The head as training starts with it: a given one, or a new one; frozen where it is not to be trained."""
    if recipe.head is None:
        return new_head(recipe, target, tokenizer, answers)
    kind = None if recipe.branch_correction == "none" else recipe.branch_correction
    head = start_from_head(recipe.head, target, kind, recipe.seed)
    config = head.config
    assert config.hidden_state_indices is not None
    defaults = {field.name: field.default for field in fields(TrainRecipe)}
    given: dict[str, Any] = {name: getattr(recipe, name) for name in LAYOUT_OPTIONS}
    own: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "num_taps": len(config.hidden_state_indices),
        "block_size": config.block_size,
        "draft_vocab": config.draft_vocab_size or 0,
    }
    for name in LAYOUT_OPTIONS:
        if given[name] not in (defaults[name], own[name]):
            raise ValueError(
                f"`--{name.replace('_', '-')}` is {given[name]}, but the head {recipe.head} has {own[name]}; leave "
                "the option out to go on with the head, or leave out `--head` to train a new one"
            )
    if recipe.mask_token is not None and _mask_token_id(tokenizer, recipe.mask_token) != config.mask_token_id:
        raise ValueError(
            f"`--mask-token` is {recipe.mask_token!r}, but the head {recipe.head} was trained with another (its "
            f"`mask_token_id` is {config.mask_token_id}); leave the option out"
        )
    if recipe.target_name is not None:
        config.target_name = recipe.target_name
    if recipe.train_only:
        train_correction_only(head)
    return head


def head_config(recipe: TrainRecipe, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> JetFlowConfig:
    """The configuration of a new head for the target."""
    num_target_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    return JetFlowConfig.for_target(
        target.config,
        num_hidden_layers=recipe.num_layers,
        block_size=recipe.block_size,
        hidden_state_indices=[layer + 1 for layer in spaced_layer_ids(num_target_layers, recipe.num_taps)],
        mask_token_id=None if recipe.mask_token is None else _mask_token_id(tokenizer, recipe.mask_token),
        draft_vocab_size=recipe.draft_vocab or None,
        branch_correction=None if recipe.branch_correction == "none" else recipe.branch_correction,
        target_name=recipe.target_name or recipe.target,
    )


def new_head(
    recipe: TrainRecipe, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Answers
) -> JetFlowHead:
    """A head for the target, initialised from the target's own layers."""
    config = head_config(recipe, target, tokenizer)
    torch.manual_seed(recipe.seed)
    head = JetFlowHead(config).to(target.device)
    initialize_from_target(head, target)
    if recipe.draft_vocab:
        eos = target.generation_config.eos_token_id
        always = eos if isinstance(eos, list) else [] if eos is None else [eos]
        head.d2t.copy_(frequent_tokens(answers, recipe.draft_vocab, always))
    return head


def _mask_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids = tokenizer.get_vocab()
    if token not in ids:
        raise ValueError(
            f"the mask token {token!r} is not in the tokenizer's vocabulary; name an unused special token"
        )
    return ids[token]


def _training_config(recipe: TrainRecipe) -> JetFlowTrainingConfig:
    return JetFlowTrainingConfig(
        output_dir=str(recipe.output),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        anchors_per_sequence=recipe.anchors,
        learning_rate=recipe.learning_rate,
        feature_loss_weight=recipe.feature_loss,
        depth_gamma=recipe.depth_gamma,
        max_length=recipe.max_length,
        source_weights=dict(recipe.weights),
        features_dir=str(recipe.output / "features") if recipe.cache_features else None,
        save_steps=recipe.save_steps,
        **_evaluation_options(recipe),
        warmup_steps=20,
        # Constant, then down to almost nothing over the last 40 %: the length can be changed until the decay begins.
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(0.4 * recipe.max_steps), "min_lr_ratio": 0.02},
        seed=recipe.seed,
        bf16=fast_dtype() == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )


def _evaluation_options(recipe: TrainRecipe) -> dict[str, Any]:
    if not recipe.eval_prompts:
        return {}
    return dict(
        eval_strategy="steps",
        eval_steps=recipe.eval_steps or recipe.save_steps,
        eval_max_new_tokens=recipe.eval_max_new_tokens,
        metric_for_best_model="tokens_per_round",
        greater_is_better=True,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=bool(recipe.patience),
    )


class _ProgressCallback(TrainerCallback):
    """Feeds the reporter with updates done and, at every log, the agreement with the target."""

    def __init__(self, report: Reporter):
        self._report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state.global_step, state.max_steps, "updates")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "top1_depth_1" in logs:
            parts = [
                f"update {state.global_step}: loss {float(logs['loss']):.3f}, top-1 by depth {_by_depth(logs, '')}"
            ]
            if "corrected_top1_depth_1" in logs:
                parts.append(f"corrected {_by_depth(logs, 'corrected_')}")
            self._report.say(", ".join(parts))
        if logs and "eval_tokens_per_round" in logs:
            figures = {name: value for name, value in logs.items() if name.endswith("_tokens_per_round")}
            parts = [f"{name[5:-17] or 'mean'} {value:.2f}" for name, value in figures.items()]
            self._report.say(f"update {state.global_step}: tokens per round: {', '.join(parts)}")


def _by_depth(logs: dict[str, Any], kind: str) -> str:
    return " ".join(f"{logs[name]:.2f}" for name in sorted(logs) if name.startswith(f"{kind}top1_depth_"))


def _save(
    recipe: TrainRecipe,
    head: JetFlowHead,
    answers: Answers,
    num_updates: int,
    figures: dict[str, dict[int, float]],
) -> None:
    """The head in bfloat16 and its card, on the Hub too if asked for."""
    head.generation_config.node_budget = "auto"
    num_tokens = sum(answers.num_answer)
    start = "" if recipe.head is None else f"Continued from `{recipe.head}`. "
    training = (
        f"{start}{len(answers)} answers of the target ({num_tokens} tokens), {num_updates} updates of "
        f"{recipe.batch_size * recipe.accumulation * PartialState().num_processes} sequences with {recipe.anchors} "
        f"anchors each, Muon and AdamW, forward KL with a feature loss of weight {recipe.feature_loss:g}"
        f"{'; only the branch correction was trained' if recipe.train_only else ''}."
    )
    card = card_text(
        head.config,
        name=recipe.push_to_hub or recipe.output.name,
        num_parameters=head.num_parameters(),
        training=training,
        tokens_per_round=figures,
        license=recipe.license,
    )
    _write_head(head.to(torch.bfloat16), card, recipe.output)
    if recipe.push_to_hub:
        files = [CommitOperationAdd(name, recipe.output / name) for name in HEAD_FILES]
        HfApi().create_commit(recipe.push_to_hub, files, commit_message="Draft head")


def _write_head(head: JetFlowHead, card: str, folder: Path) -> None:
    """Put the files of a head into a folder: what it had stays until all are written; never is it a part of a head."""
    partial = folder / ".head.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    try:
        head.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        (folder / "config.json").unlink(missing_ok=True)  # without it the others are no head, and it comes last
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
