"""The whole way from prompts to a saved head: what `hf-jetflow train` runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .answers import FOREIGN_SURPRISE, regenerate_answers, surprise, with_token_ids
from .configuration_jetflow import JetFlowConfig, spaced_layer_ids
from .data import Answers, check_weights, encode_chat, frequent_tokens, read_answers, read_prompts
from .loading import fast_dtype, load_target
from .model_card import card_text
from .modeling_jetflow import JetFlowHead
from .training import JetFlowTrainer, JetFlowTrainingConfig, initialize_from_target


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
    target_name: str | None = None
    num_layers: int = 3
    num_taps: int = 5
    block_size: int = 8
    draft_vocab: int = 0
    mask_token: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    generation_batch_size: int = 32
    max_steps: int = 4000
    batch_size: int = 8
    accumulation: int = 1
    anchors: int = 16
    learning_rate: float = 1e-2
    feature_loss: float = 0.5
    max_length: int = 512
    cache_features: bool = False
    save_steps: int = 200
    seed: int = 0
    dtype: str = "auto"
    eval_node_budgets: Sequence[int] = field(default=(16, 32, 64))


def train_head(recipe: TrainRecipe, report: Reporter) -> dict[str, Any]:
    """
    Regenerate answers, train, evaluate by decoding, save the head and its card in `recipe.output`.

    Every stage continues where a killed run stopped.

    Returns:
        `dict`: Tokens per round by evaluation set and node budget.

    Raises:
        ValueError: If there is nothing to train on, or an option does not fit the target.
    """
    if not recipe.prompts and not recipe.answers:
        raise ValueError(
            "nothing to train on: give prompts with `--prompts`, or the target's answers with `--answers`"
        )
    prompts = read_prompts(recipe.prompts)
    target, tokenizer = load_target(recipe.target, fast_dtype() if recipe.dtype == "auto" else recipe.dtype)
    state = PartialState()
    with state.main_process_first():  # the other processes then find every answer written
        answers = _answers(recipe, target, tokenizer, prompts, report)
    del prompts
    head = new_head(recipe, target, tokenizer, answers)
    trainer = JetFlowTrainer(head, target, _training_config(recipe), answers, callbacks=[_ProgressCallback(report)])
    if trainer.train_dataset.left_out:
        report.say(f"of {len(answers)} answers: {trainer.train_dataset.left_out} (see --max-length)")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(recipe.output)) is not None)
    head.eval()
    summary: dict[str, Any] = {}
    if not state.is_main_process:
        return summary
    for path in recipe.eval_prompts:
        ids = [encode_chat(tokenizer, prompt["messages"]) for prompt in read_prompts([path])]
        for budget in recipe.eval_node_budgets:
            figure = tokens_per_round(target, head, ids, budget, progress=report)
            summary[f"tokens per round on {path.stem}, {budget} nodes"] = round(figure, 3)
    _save(recipe, head, target, answers, summary)
    return summary


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


def new_head(
    recipe: TrainRecipe, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Answers
) -> JetFlowHead:
    """A head for the target, initialised from the target's own layers."""
    num_target_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    config = JetFlowConfig.for_target(
        target.config,
        num_hidden_layers=recipe.num_layers,
        block_size=recipe.block_size,
        hidden_state_indices=[layer + 1 for layer in spaced_layer_ids(num_target_layers, recipe.num_taps)],
        mask_token_id=None if recipe.mask_token is None else _mask_token_id(tokenizer, recipe.mask_token),
        draft_vocab_size=recipe.draft_vocab or None,
        target_name=recipe.target_name or recipe.target,
    )
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
        max_length=recipe.max_length,
        source_weights=dict(recipe.weights),
        features_dir=str(recipe.output / "features") if recipe.cache_features else None,
        save_steps=recipe.save_steps,
        warmup_steps=20,
        # Constant, then down to almost nothing over the last 40 %: the length can be changed until the decay begins.
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(0.4 * recipe.max_steps), "min_lr_ratio": 0.02},
        seed=recipe.seed,
        bf16=fast_dtype() == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )


class _ProgressCallback(TrainerCallback):
    """Feeds the reporter with updates done and, at every log, the agreement with the target."""

    def __init__(self, report: Reporter):
        self._report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state.global_step, state.max_steps, "updates")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "top1_depth_1" in logs:
            top1 = " ".join(f"{logs[name]:.2f}" for name in sorted(logs) if name.startswith("top1_depth_"))
            self._report.say(f"update {state.global_step}: loss {float(logs['loss']):.3f}, top-1 by depth {top1}")


@torch.no_grad()
def tokens_per_round(
    target: PreTrainedModel,
    head: JetFlowHead,
    prompts: Sequence[Sequence[int]],
    node_budget: int,
    *,
    max_new_tokens: int = 128,
    progress: Reporter | None = None,
) -> float:
    """
    Tokens per round of greedy decoding over prompts given as token ids: what training is for.

    The mean is over all rounds of all prompts.
    """
    head.generation_config.node_budget = node_budget
    rounds = accepted = 0
    for number, ids in enumerate(prompts, 1):
        input_ids = torch.tensor([list(ids)], device=target.device)
        target.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            assistant_model=head,
        )
        rounds += head.last_stats.num_rounds
        accepted += head.last_stats.num_accepted
        if progress is not None:
            progress(number, len(prompts), f"held-out prompts, {node_budget} nodes")
    return (accepted + rounds) / rounds if rounds else 0.0


def _save(
    recipe: TrainRecipe,
    head: JetFlowHead,
    target: PreTrainedModel,
    answers: Answers,
    summary: dict[str, Any],
) -> None:
    """The head in bfloat16 and its card."""
    head.generation_config.node_budget = 64
    head.to(torch.bfloat16).save_pretrained(recipe.output)
    num_tokens = sum(answers.num_answer)
    facts = "".join(f"\n- {name}: {value}" for name, value in summary.items())
    training = (
        f"{len(answers)} answers of the target ({num_tokens} tokens), {recipe.max_steps} updates of "
        f"{recipe.batch_size * recipe.accumulation} sequences with {recipe.anchors} anchors each, Muon and AdamW, "
        f"forward KL with a feature loss of weight {recipe.feature_loss:g}.{facts}"
    )
    card = card_text(head.config, name=recipe.output.name, num_parameters=head.num_parameters(), training=training)
    (recipe.output / "README.md").write_text(card, encoding="utf-8")
