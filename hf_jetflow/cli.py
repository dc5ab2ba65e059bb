"""The command line: `hf-jetflow train` and `hf-jetflow bench`. Parsing and printing only."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
console = Console(stderr=True)

TargetOption = Annotated[str, typer.Option(help="Target model: a Hub id, a folder, or a .gguf file.")]
PromptsOption = Annotated[
    list[Path],
    typer.Option(help="JSON lines of prompts (`messages`, `turns` or `prompt`); may be given several times."),
]
DtypeOption = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: bfloat16 where the device computes in it.")
]


@app.callback()
def _main() -> None:
    """Tree speculative decoding with causal parallel draft heads, inside transformers' generate."""


@app.command()
def train(
    target: TargetOption,
    output: Annotated[
        Path, typer.Option(help="Folder of the run; the head is saved in it, a killed run continues in it.")
    ],
    prompts: PromptsOption = [],  # noqa: B006
    answers: Annotated[
        list[Path],
        typer.Option(
            help="JSON lines of the target's own answers: `prompt_ids` and `answer_ids`, or `messages` that end in "
            "the answer; may be given several times."
        ),
    ] = [],  # noqa: B006
    weight: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=WEIGHT",
            help="How often per epoch the answers of a source occur, 1 if not given; 0.5 is every second epoch. The "
            "source is a record's field `source`, or the name of its file without the ending; may be given several "
            "times.",
        ),
    ] = [],  # noqa: B006
    eval_prompts: Annotated[
        list[Path],
        typer.Option(help="Held-out prompts, decoded during training to keep the best head, and at the end."),
    ] = [],  # noqa: B006
    eval_steps: Annotated[int, typer.Option(help="Updates between two evaluations; 0 for --save-steps.")] = 0,
    eval_num_prompts: Annotated[int, typer.Option(help="Prompts of each file decoded during training.")] = 8,
    eval_max_new_tokens: Annotated[int, typer.Option(help="Tokens decoded of each during training.")] = 64,
    patience: Annotated[
        int, typer.Option(help="Evaluations without a better figure after which training stops; 0 for never.")
    ] = 0,
    head: Annotated[
        str | None, typer.Option(help="Trained head to continue from: a Hub id or a folder; a new one if not given.")
    ] = None,
    train_only: Annotated[str | None, typer.Option(help="`correction` freezes all but the branch correction.")] = None,
    target_name: Annotated[str | None, typer.Option(help="Name of the target for the head's config and card.")] = None,
    num_layers: Annotated[int, typer.Option(help="Layers of the head.")] = 3,
    num_taps: Annotated[int, typer.Option(help="Target layers the head listens to.")] = 5,
    block_size: Annotated[int, typer.Option(help="Rows of a block; one less is the number of drafted depths.")] = 8,
    draft_vocab: Annotated[int, typer.Option(help="Commonest answer tokens that the head scores; 0 for all.")] = 0,
    mask_token: Annotated[
        str | None, typer.Option(help="Unused special token for the MASK rows; a learned embedding if not given.")
    ] = None,
    branch_correction: Annotated[
        str, typer.Option(help="What corrects the scores of a branch: path, parent (its last token only), or none.")
    ] = "path",
    max_new_tokens: Annotated[int, typer.Option(help="Longest regenerated answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="Temperature of regenerated answers, 0 for greedy.")] = 0.0,
    generation_batch_size: Annotated[int, typer.Option(help="Prompts answered at one time.")] = 32,
    max_steps: Annotated[int, typer.Option(help="Updates of the head.")] = 4000,
    batch_size: Annotated[int, typer.Option(help="Sequences per device and update.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Micro-batches per update.")] = 1,
    anchors: Annotated[int, typer.Option(help="Random anchors per sequence and update.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Muon.")] = 1e-2,
    feature_loss: Annotated[float, typer.Option(help="Weight of the feature loss, 0 for none.")] = 0.5,
    depth_gamma: Annotated[float | None, typer.Option(help="Weight exp(-(depth - 1) / gamma) in the loss.")] = None,
    max_length: Annotated[int, typer.Option(help="Longest training sequence.")] = 512,
    cache_features: Annotated[bool, typer.Option(help="Keep the target's features on disk between epochs.")] = False,
    save_steps: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers, initialisation, order and anchors.")] = 0,
    dtype: DtypeOption = "auto",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Repository on the Hub that the head is uploaded to.")
    ] = None,
) -> None:
    """
    Train a draft head for a target. Example:

    hf-jetflow train --target Qwen/Qwen3-0.6B --prompts prompts.jsonl --output runs/qwen3-0.6b
    """
    from .recipe import TrainRecipe, train_head
    from .training import leave_together

    options = {name: value for name, value in locals().items() if name in TrainRecipe.__dataclass_fields__}
    with _readable_errors(), _progress() as bars:
        summary = train_head(TrainRecipe(**options, weights=_weights(weight)), _Reporter(bars))
    console.print(f"head saved in {output}" + "".join(f"\n  {name}: {value}" for name, value in summary.items()))
    leave_together()


def _weights(texts: list[str]) -> dict[str, float]:
    """Weights by source from `NAME=WEIGHT`."""
    weights = {}
    for text in texts:
        name, _, weight = text.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"the weight is {text!r}, but NAME=WEIGHT is needed, such as `code=2.0`") from None
    return weights


@app.command()
def bench(
    target: TargetOption,
    head: Annotated[str, typer.Option(help="Draft head: a Hub id or a folder.")],
    prompts: PromptsOption,
    methods: Annotated[str, typer.Option(help="Comma-separated: plain, chain, jetflow.")] = "plain,chain,jetflow",
    node_budgets: Annotated[
        str, typer.Option(help="Comma-separated node budgets of jetflow; auto is one.")
    ] = "16,32,64,auto",
    temperature: Annotated[str, typer.Option(help="Comma-separated temperatures, 0 for greedy.")] = "0",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens generated per prompt.")] = 128,
    num_prompts: Annotated[int, typer.Option(help="Prompts taken from each file.")] = 20,
    repeats: Annotated[int, typer.Option(help="Passes over the prompts.")] = 1,
    dtype: DtypeOption = "auto",
    json: Annotated[Path | None, typer.Option(help="File for the result as JSON.")] = None,
) -> None:
    """
    Measure a head against plain decoding, interleaved in one process. Example:

    hf-jetflow bench --target model.gguf --head examples/heads/smollm2-135m-instruct --prompts prompts.jsonl
    """
    from .bench import run_bench, write_json
    from .loading import fast_dtype, load_target
    from .modeling_jetflow import JetFlowHead

    with _readable_errors():
        model, tokenizer = load_target(target, fast_dtype() if dtype == "auto" else dtype)
        draft_head = JetFlowHead.from_pretrained(head, dtype=model.dtype).to(model.device)
        with _progress() as bars:
            reporter = _Reporter(bars)
            result = run_bench(
                model,
                tokenizer,
                draft_head,
                prompts,
                methods=methods.split(","),
                node_budgets=[budget if budget == "auto" else int(budget) for budget in node_budgets.split(",")],
                temperatures=[float(value) for value in temperature.split(",")],
                max_new_tokens=max_new_tokens,
                num_prompts=num_prompts,
                repeats=repeats,
                progress=reporter,
            )
    output = Console(width=None if sys.stdout.isatty() else 120)
    output.print(_bench_table(result))
    if any(result["agreement"].values()):
        output.print(_agreement_table(result["agreement"]))
    if json is not None:
        write_json(result, json)
        console.print(f"written to {json}")


def _bench_table(result: dict[str, Any]) -> Table:
    facts = result["environment"]
    table = Table(title=f"{facts['processor']}, {facts['num_threads']} threads, torch {facts['torch']}")
    for column in ("prompts", "T", "method", "nodes", "tokens/round", "tokens/s", "speedup", "quartiles", "identical"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("prompts", "method") else "right")
    for row in result["rows"]:
        low, high = row["speedup_spread"]
        table.add_row(
            row["prompts"],
            f"{row['temperature']:g}",
            row["method"],
            str(row["node_budget"] or ""),
            f"{row['tokens_per_round']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{100 * row['identical_to_plain']:.0f} %",
        )
    return table


def _agreement_table(agreement: dict[str, dict[str, list[float]]]) -> Table:
    """How often the head ranks the target's token first, by depth."""
    measures = {
        "spine_top1": "on the greedy spine",
        "spine_corrected_top1": "the same, corrected",
        "sibling_top1": "after an accepted sibling",
        "sibling_corrected_top1": "the same, corrected",
    }
    depths = max(len(values) for rates in agreement.values() for values in rates.values())
    table = Table(title="Share of the target's tokens that the head ranks first, by depth")
    for column in ("prompts", "where", *map(str, range(1, depths + 1))):
        table.add_column(column, no_wrap=True, justify="left" if column in ("prompts", "where") else "right")
    for prompts, rates in agreement.items():
        for name, words in measures.items():
            if name in rates:
                start = 1 if name.startswith("sibling") else 0  # depth 1 follows the anchor, which has no sibling
                cells = ["-"] * start + [f"{value:.2f}" for value in rates[name][start:]]
                table.add_row(prompts, words, *cells)
    return table


class _Reporter:
    """Progress bars by what runs: `reporter(done, in_all, what)`."""

    def __init__(self, bars: Progress):
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, done: int, total: int, what: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def say(self, text: str) -> None:
        self._bars.console.print(text)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class _readable_errors:
    """Print user errors as one line and leave with status 1; anything else is a bug and keeps its traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if isinstance(error, ValueError | OSError):
            console.print(f"error: {error}", style="red", markup=False)
            raise SystemExit(1)


def main() -> None:
    """Entry point of `hf-jetflow` and `python -m hf_jetflow`."""
    app(prog_name="hf-jetflow")
