"""The whole way from prompts to a saved head: what `hf-jetflow train` runs."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import CommitOperationAdd, HfApi
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from ..errors import JetFlowError
from ..files import write_json
from ..head.card import card_text
from ..head.modeling_jetflow import JetFlowHead
from ..prompts import encode_chat, read_prompts
from ..target.loading import fast_dtype, load_model, load_target_config, load_tokenizer
from ..target.target import Target
from .answers import MAX_SURPRISE, regenerate_answers, surprise, with_token_ids
from .checkpoints import HEAD_FILES, write_head
from .data import Answers, check_weights, read_answers
from .evaluation import tokens_per_round
from .losses import logit_shape
from .settings import Reporter, TrainRecipe
from .starting import check_start, choose_draft_vocab, starting_head
from .trainer import JetFlowTrainer, JetFlowTrainingConfig


FINAL_NEW_TOKENS = 128  # decoded per held-out prompt in the evaluation at the end


def train_head(recipe: TrainRecipe, report: Reporter) -> dict[str, Any]:
    """
    Regenerate answers, train, and save the best head and its card in `recipe.output`.

    A killed run continues where it stopped, at every stage. The output folder holds the best head so far during
    training too (the newest one, without held-out prompts).

    Returns:
        `dict`: Tokens per round by evaluation set and node budget.

    Raises:
        JetFlowError: If there is nothing to train on, a setting does not fit the target, the head or the run to be
            continued, a file is missing or cannot be written, or the Hub refuses the repository.
    """
    recipe.check()
    # Before the target is loaded, which takes the device of the process from it. The timeout is for the processes that
    # wait while the main one writes answers or evaluates the head.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
    if state.is_main_process:
        _store_settings(recipe)
        if recipe.push_to_hub:
            _create_repository(recipe.push_to_hub)
    prompts = read_prompts(recipe.prompts)
    eval_prompts = {path.stem: read_prompts([path]) for path in recipe.eval_prompts}
    tokenizer = load_tokenizer(recipe.target)
    check_start(recipe, load_target_config(recipe.target), tokenizer)  # what is refused costs seconds, not minutes
    target = load_model(recipe.target, recipe.dtype)
    head = starting_head(recipe, target, tokenizer)  # what only the target shows is refused before hours of answers
    logit_shape(Target(target, head.config))
    eval_sets = {
        name: [encode_chat(tokenizer, prompt["messages"]) for prompt in group] for name, group in eval_prompts.items()
    }
    with state.main_process_first():  # the other processes then find every answer written
        answers = _answers(recipe, target, tokenizer, prompts, report)
    del prompts
    if recipe.draft_vocab:
        choose_draft_vocab(head, target, answers)
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
    trainer.add_callback(_BestHeadCallback(recipe, trainer, answers))
    trainer.progress = report
    trainer.remove_callback(PrinterCallback)  # the reporter prints a shorter log
    if trainer.train_dataset.skipped:
        report.say(f"of {len(answers)} answers: {trainer.train_dataset.skipped} (see --max-length)")
    trainer.train(resume_from_checkpoint=True)
    trained = trainer.whole_head()
    figures: dict[str, dict[int, float]] = {}
    if state.is_main_process:
        assert trained is not None
        report.say(_closing_line(recipe, trainer, eval_sets))
        for name, ids in eval_sets.items():
            figures[name] = {
                budget: round(
                    tokens_per_round(target, trained, ids, budget, max_new_tokens=FINAL_NEW_TOKENS, progress=report), 3
                )
                for budget in recipe.eval_node_budgets
            }
        _save(recipe, trained.eval(), answers, trainer.state.global_step, figures)
        if recipe.push_to_hub:
            _upload(recipe.push_to_hub, recipe.output)
    return {
        f"tokens per round on {name}, {budget} nodes": figure
        for name, by_budget in figures.items()
        for budget, figure in by_budget.items()
    }


def _store_settings(recipe: TrainRecipe) -> None:
    """Refuse to continue a run with other settings; a new run gets its settings stored."""
    recipe.check_run()
    write_json(recipe.fixed, recipe.settings_path)


def _create_repository(name: str) -> None:
    try:
        HfApi().create_repo(name, exist_ok=True)
    except OSError as error:
        raise JetFlowError(
            f"`--push-to-hub` {name}: the Hub refuses the repository ({error}); check the name and the token's rights"
        ) from error


def _upload(name: str, folder: Path) -> None:
    files = [CommitOperationAdd(file, folder / file) for file in HEAD_FILES]
    try:
        HfApi().create_commit(name, files, commit_message="Draft head")
    except OSError as error:
        raise JetFlowError(
            f"`--push-to-hub` {name}: the upload failed ({error}); the head is in {folder}: upload it with "
            f"`hf upload {name} {folder} --include {' '.join(HEAD_FILES)}`"
        ) from error


def _answers(
    recipe: TrainRecipe,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    report: Reporter,
) -> Answers:
    """The given answers, checked first, and the target's answers to the prompts."""
    given = [with_token_ids(path, target, tokenizer, recipe.output / "tokenized") for path in recipe.answers]
    answers = read_answers(given, target.get_input_embeddings().num_embeddings)
    own_answers = recipe.output / "answers.jsonl"
    check_weights(recipe.source_weights, {*answers.sources, *(prompt["source"] for prompt in prompts)})
    ends = [*answers.starts, len(answers)][1:]
    for path, start, end in zip(recipe.answers, answers.starts, ends, strict=True):
        _warn_of_other_answers(path, target, answers, range(start, end), recipe.max_length, report)
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
            max_prompt_tokens=recipe.max_length - 2,  # an anchor and a drafted token must fit
            report=report,
        )
        if too_long:
            report.say(f"{too_long} of {len(prompts)} prompts skipped: longer than --max-length {recipe.max_length}")
    if own_answers.exists():
        answers.add(own_answers)
    return answers


def _warn_of_other_answers(
    path: Path, target: PreTrainedModel, answers: Answers, indices: range, max_length: int, report: Reporter
) -> None:
    """Warn if 32 answers spread over a file do not look like the target's own."""
    sample = indices[:: max(len(indices) // 32, 1)][:32]
    figure = surprise(target, [answers[index] for index in sample], max_length)
    if figure > MAX_SURPRISE:
        report.say(
            f"warning: {path}: another model or a person seems to have written these answers. They surprise the "
            f"target by {figure:.2f} nats per token more than its own would (limit {MAX_SURPRISE}); regenerate them "
            "with this target: give their prompts with --prompts"
        )


def _training_config(recipe: TrainRecipe) -> JetFlowTrainingConfig:
    return JetFlowTrainingConfig(
        output_dir=str(recipe.output),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        anchors_per_sequence=recipe.anchors,
        learning_rate=recipe.learning_rate,
        feature_loss_weight=recipe.feature_loss,
        uncorrected_loss_weight=recipe.uncorrected_loss,
        depth_gamma=recipe.depth_gamma,
        max_length=recipe.max_length,
        source_weights=recipe.source_weights,
        features_dir=str(recipe.output / "features") if recipe.cache_features else None,
        save_steps=recipe.save_steps,
        **_evaluation_options(recipe),
        warmup_steps=20,
        # Constant, then a decay over the last 40 %: --max-steps can be changed until the decay begins.
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(0.4 * recipe.max_steps), "min_lr_ratio": 0.02},
        seed=recipe.seed,
        bf16=fast_dtype() == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=recipe.report_to or "none",
        run_name=recipe.output.name,
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
    """Reports updates and, at every log, the agreement with the target."""

    def __init__(self, report: Reporter):
        self._report = report

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self._report.say(f"continuing from checkpoint-{state.global_step} of {args.output_dir}")
        self._report(state.global_step, state.max_steps, "updates")

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
    names = takewhile(logs.__contains__, (f"{kind}top1_depth_{depth}" for depth in count(1)))
    return " ".join(f"{logs[name]:.2f}" for name in names)


class _BestHeadCallback(TrainerCallback):
    """Writes the head of every checkpoint that is the best so far to the output folder."""

    def __init__(self, recipe: TrainRecipe, trainer: JetFlowTrainer, answers: Answers):
        self._recipe, self._trainer, self._answers = recipe, trainer, answers

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._recipe.eval_prompts and state.best_global_step != state.global_step:
            return
        head = self._trainer.whole_head()
        if head is not None and state.is_world_process_zero:
            _save(self._recipe, head, self._answers, state.global_step, {})


def _closing_line(
    recipe: TrainRecipe, trainer: JetFlowTrainer, eval_sets: Mapping[str, Sequence[Sequence[int]]]
) -> str:
    """What is done when training ends, what remains and, if an evaluation was timed, how long that takes."""
    best = trainer.state.best_global_step if recipe.eval_prompts else trainer.state.global_step
    done = f"all {trainer.state.global_step} updates are done; {recipe.output} holds the head of update {best}"
    num_prompts = sum(map(len, eval_sets.values()))
    if not num_prompts:
        return done
    budgets = ", ".join(map(str, recipe.eval_node_budgets))
    line = f"{done}. Last, {num_prompts} held-out prompts are decoded with node budgets {budgets}, for the card"
    if trainer.evaluation_seconds is None:
        return line
    num_timed = recipe.eval_max_new_tokens * sum(min(len(ids), recipe.eval_num_prompts) for ids in eval_sets.values())
    num_tokens = FINAL_NEW_TOKENS * num_prompts * len(recipe.eval_node_budgets)
    return f"{line}: at most about {trainer.evaluation_seconds * num_tokens / num_timed / 60:.0f} min"


def _save(
    recipe: TrainRecipe,
    head: JetFlowHead,
    answers: Answers,
    num_updates: int,
    figures: dict[str, dict[int, float]],
) -> None:
    """Write the head and its card to the output folder."""
    start = "" if recipe.head is None else f"Continued from `{recipe.head}`. "
    training = (
        f"{start}{len(answers)} answers of the target ({sum(answers.num_answer)} tokens), {num_updates} updates of "
        f"{recipe.batch_size * recipe.accumulation * PartialState().num_processes} sequences with {recipe.anchors} "
        f"anchors each, Muon and AdamW, forward KL with a feature loss of weight {recipe.feature_loss:g}"
        f"{'' if recipe.uncorrected_loss == 1 else f', both at {recipe.uncorrected_loss:g} before the correction'}"
        f"{'; only the branch correction was trained' if recipe.train_only else ''}."
    )
    card = card_text(
        head.config,
        name=recipe.push_to_hub or str(recipe.output),
        num_parameters=head.num_parameters(),
        training=training,
        tokens_per_round=figures,
        license=recipe.license,
    )
    write_head(head, card, recipe.output)
