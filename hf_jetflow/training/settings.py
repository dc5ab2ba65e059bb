"""`TrainRecipe`: the settings of `hf-jetflow train`, described once; the command line is made from them."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from ..errors import JetFlowError, check_at_least
from ..extras import require_package
from ..files import check_writable
from ..jsonl import check_same_settings, read_jsonl
from ..prompts import read_prompts


Correction = Literal["path", "parent", "none"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

LAYOUT_OPTIONS = ("num_layers", "num_taps")  # set by the head, where one is given
# Changed in the middle of a run, these would leave a head that no single command trains.
FIXED_OPTIONS = (
    *LAYOUT_OPTIONS,
    *("head", "train_only", "branch_correction", "block_size", "mask_token", "batch_size", "accumulation", "anchors"),
    *("learning_rate", "feature_loss", "uncorrected_loss", "depth_gamma", "max_length", "weights", "seed"),
    "draft_vocab",
)
MINIMUMS = {
    **dict.fromkeys(("num_layers", "num_taps", "eval_num_prompts", "eval_max_new_tokens", "max_new_tokens"), 1),
    **dict.fromkeys(("generation_batch_size", "max_steps", "batch_size", "accumulation", "anchors", "save_steps"), 1),
    **dict.fromkeys(("eval_steps", "patience", "draft_vocab", "temperature", "feature_loss", "uncorrected_loss"), 0),
    **{"block_size": 2, "max_length": 3},
}
# What transformers reports to; each is the name of a package.
REPORTERS = (
    *("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "swanlab"),
    *("tensorboard", "trackio", "wandb"),
)
REPEATABLE = {"action": "extend"}  # `--prompts a b` and `--prompts a --prompts b`


class Reporter(Protocol):
    """Where progress goes."""

    def __call__(self, done: int, total: int, what: str, share: float | None = None) -> None:
        """
        `done` of `total` of `what`. A stage starts with a call before its first item; it can start again.

        `share` is how much of this run's work is done, from 0 to 1, where items that are done do not tell it.
        """

    def say(self, text: str) -> None:
        """A line of the log; warnings start with `warning: `."""


@dataclass
class TrainRecipe:
    """Settings of `hf-jetflow train`."""

    target: str = field(metadata={"help": "Target model: a Hub id, a folder, or a .gguf file."})
    output: Path = field(
        metadata={"help": "Folder of the run. The head is saved in it; a killed run continues with the same command."}
    )
    prompts: list[Path] = field(
        default_factory=list,
        metadata={
            **REPEATABLE,
            "help": "Prompts for the target to answer: JSON lines files with `messages`, `turns` or `prompt`.",
        },
    )
    answers: list[Path] = field(
        default_factory=list,
        metadata={
            **REPEATABLE,
            "help": "Answers of the target: JSON lines files with `prompt_ids` and `answer_ids`, or with `messages` "
            "that end in the answer.",
        },
    )
    weights: list[str] = field(
        default_factory=list,
        metadata={
            **REPEATABLE,
            "help": "How often per epoch the answers of a source occur: 1 by default; 0.5 is every second epoch. The "
            "source is a record's field `source`, or the name of its file without the suffix.",
            "metavar": "NAME=WEIGHT",
            "aliases": "--weight",
        },
    )
    eval_prompts: list[Path] = field(
        default_factory=list,
        metadata={
            **REPEATABLE,
            "help": "Held-out prompts: decoded during training, to keep the best head, and at the end.",
        },
    )
    eval_steps: int = field(
        default=0, metadata={"help": "Updates between two evaluations; 0 for the value of --save-steps."}
    )
    eval_num_prompts: int = field(
        default=8, metadata={"help": "Held-out prompts of each file that are decoded during training."}
    )
    eval_max_new_tokens: int = field(
        default=64, metadata={"help": "Tokens decoded per held-out prompt during training."}
    )
    eval_node_budgets: list[int] = field(
        default_factory=lambda: [16, 32, 64], metadata={"help": "Node budgets of the evaluation at the end."}
    )
    patience: int = field(
        default=0, metadata={"help": "Evaluations without improvement after which training stops; 0 for never."}
    )
    head: str | None = field(
        default=None, metadata={"help": "Trained head to continue from: a Hub id or a folder. By default a new one."}
    )
    train_only: Literal["correction"] | None = field(
        default=None, metadata={"help": "`correction` trains the branch correction and freezes the rest of the head."}
    )
    target_name: str | None = field(
        default=None, metadata={"help": "Name of the target for the head's config and card."}
    )
    num_layers: int = field(default=3, metadata={"help": "Layers of the head."})
    num_taps: int = field(default=5, metadata={"help": "Target layers whose hidden states the head reads."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of a block: the anchor and one row per drafted depth. By default 8, or those of --head; "
            "another number changes its blocks."
        },
    )
    draft_vocab: int = field(
        default=0,
        metadata={
            "help": "Size of the draft vocabulary, the most frequent answer tokens; 0 for all tokens, or for those of "
            "--head."
        },
    )
    mask_token: str | None = field(
        default=None,
        metadata={"help": "Unused special token whose embedding fills the MASK rows. By default a learned embedding."},
    )
    branch_correction: Correction = field(
        default="path",
        metadata={
            "help": "What the branch correction reads: `path` (all tokens of the branch), `parent` (the last one) or "
            "`none` (there is no correction)."
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer of the target, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the target's answers; 0 for greedy."})
    generation_batch_size: int = field(default=32, metadata={"help": "Prompts that the target answers in one batch."})
    max_steps: int = field(default=4000, metadata={"help": "Updates of the head."})
    batch_size: int = field(default=8, metadata={"help": "Sequences per device and micro-batch."})
    accumulation: int = field(default=1, metadata={"help": "Micro-batches per update."})
    anchors: int = field(default=16, metadata={"help": "Random anchors per sequence and update."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of Muon."})
    feature_loss: float = field(default=0.5, metadata={"help": "Weight of the feature loss; 0 for none."})
    uncorrected_loss: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the loss before the branch correction, at the depths that it corrects. Below 1 the "
            "rows serve more what follows a branch, less what is likely behind any."
        },
    )
    depth_gamma: float | None = field(
        default=None,
        metadata={
            "help": "Weight of a depth in the loss: exp(-(depth - 1) / gamma). By default all depths weigh the same."
        },
    )
    max_length: int = field(
        default=512, metadata={"help": "Longest training sequence, prompt and answer together, in tokens."}
    )
    cache_features: bool = field(
        default=False, metadata={"help": "Store the target's hidden states on disk, for later epochs."}
    )
    save_steps: int = field(default=200, metadata={"help": "Updates between two checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seed of sampled answers, initialization, order and anchors."})
    dtype: DType = field(
        default="auto", metadata={"help": "Dtype of the target; `auto` is bfloat16 where the device computes in it."}
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={
            **REPEATABLE,
            "help": "Where transformers reports losses and figures, such as wandb, tensorboard or trackio.",
        },
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Repository on the Hub that the head is uploaded to.", "metavar": "ORG/NAME"}
    )
    license: str | None = field(
        default=None, metadata={"help": "License of the head for its card, as the Hub spells it, such as apache-2.0."}
    )

    @property
    def source_weights(self) -> dict[str, float]:
        """Weights by source."""
        weights = {}
        for text in self.weights:
            name, _, weight = text.rpartition("=")
            try:
                weights[name] = float(weight)
            except ValueError:
                raise JetFlowError(f"`--weights`: expected NAME=WEIGHT such as `code=2.0`, got {text!r}") from None
        return weights

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings that must not change when a run is continued."""
        return {name: value for name, value in asdict(self).items() if name in FIXED_OPTIONS}

    def check(self) -> None:
        """
        Refuse settings that would fail later, before anything is computed.

        Raises:
            JetFlowError: Naming the option, its value and what is expected.
        """
        if not self.prompts and not self.answers:
            raise JetFlowError("nothing to train on: give `--prompts`, or the target's answers with `--answers`")
        check_at_least(self, **MINIMUMS)
        kinds = list(get_args(Correction))
        for is_refused, message in (
            (
                self.branch_correction not in kinds,
                f"`--branch-correction` is {self.branch_correction!r}, expected one of {kinds}",
            ),
            (
                self.train_only not in (None, "correction"),
                f"`--train-only` is {self.train_only!r}, expected 'correction'; remove the option to train all of it",
            ),
            (
                self.train_only is not None and self.head is None,
                "`--train-only correction` needs a trained head; give it with `--head`",
            ),
            (
                self.depth_gamma is not None and self.depth_gamma <= 0,
                f"`--depth-gamma` is {self.depth_gamma}, expected more than 0; remove it to weigh all depths alike",
            ),
            (
                self.patience > 0 and not self.eval_prompts,
                f"`--patience` {self.patience} needs held-out prompts; give them with `--eval-prompts`",
            ),
            (
                self.eval_steps > 0 and self.save_steps % self.eval_steps > 0,
                f"`--save-steps` {self.save_steps} must be a multiple of `--eval-steps` {self.eval_steps}; change one",
            ),
            (
                self.push_to_hub is not None and self.push_to_hub.count("/") != 1,
                f"`--push-to-hub` is {self.push_to_hub!r}, expected ORG/NAME, such as org/head",
            ),
            (
                self.push_to_hub is not None and not _has_token(),
                f"`--push-to-hub` {self.push_to_hub} needs a token of the Hub, but there is none; run `hf auth "
                "login`, or remove the option and upload the head later",
            ),
        ):
            if is_refused:
                raise JetFlowError(message)
        for package in self.report_to:
            if package not in ("none", "all", *REPORTERS):
                raise JetFlowError(f"`--report-to` is {package!r}, expected one of {', '.join(REPORTERS)}")
            if package in REPORTERS:
                require_package(package, f"reports to {package}")
        _ = self.source_weights  # raises where one is no number

    def check_run(self) -> None:
        """
        Refuse an output that is no folder, and other settings than those that the run there was started with.

        Raises:
            JetFlowError: Naming the path, or each setting that differs.
        """
        check_writable(self.output / "config.json", "--output")
        if self.settings_path.exists() and any(self.output.glob("checkpoint-*/trainer_state.json")):
            earlier = json.loads(self.settings_path.read_text(encoding="utf-8"))
            check_same_settings(self.output, earlier, self.fixed, "give another folder with --output")
        answers, path = self.output / "answers.jsonl", self.output / "answers.settings.json"
        if self.prompts and answers.exists() and answers.stat().st_size and path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            names = ("max_new_tokens", "temperature")  # the others depend on the target
            mine = {name: getattr(self, name) for name in names}
            check_same_settings(answers, {name: earlier.get(name) for name in names}, mine)

    @property
    def settings_path(self) -> Path:
        """The settings that a run was started with, which it keeps."""
        return self.output / "train_settings.json"

    def check_files(self) -> None:
        """
        Refuse unreadable prompts, and files of answers whose first record is unreadable.

        Raises:
            JetFlowError: Naming file and line.
        """
        for paths in (self.prompts, *([path] for path in self.eval_prompts)):
            read_prompts(paths)
        for path in self.answers:
            next(read_jsonl(path), None)


def _has_token() -> bool:
    from huggingface_hub import get_token  # imported late: it takes longer than to print the help

    return get_token() is not None
