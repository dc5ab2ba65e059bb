"""The command line: `hf-jetflow` and its commands `train`, `bench`, `doctor` and others. Parsing and printing only."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
console = Console(stderr=True)

TargetOption = Annotated[str, typer.Option(help="Target model: a Hub id, a folder, or a .gguf file.")]
PromptsOption = Annotated[
    list[Path],
    typer.Option(help="JSON lines of prompts (`messages`, `turns` or `prompt`); may be given several times."),
]
AnswersOption = Annotated[
    list[Path],
    typer.Option(
        help="JSON lines of the target's own answers: `prompt_ids` and `answer_ids`, or `messages` that end in the "
        "answer; may be given several times."
    ),
]
WeightOption = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=WEIGHT",
        help="How often per epoch the answers of a source occur, 1 if not given; 0.5 is every second epoch. The "
        "source is a record's field `source`, or the name of its file without the ending; may be given several times.",
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", help="No progress bars and no log: warnings, errors and the closing lines only.")
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
    answers: AnswersOption = [],  # noqa: B006
    weight: WeightOption = [],  # noqa: B006
    eval_prompts: Annotated[
        list[Path],
        typer.Option(help="Held-out prompts, decoded during training to keep the best head, and at the end."),
    ] = [],  # noqa: B006
    eval_steps: Annotated[int, typer.Option(min=0, help="Updates between two evaluations; 0 for --save-steps.")] = 0,
    eval_num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of each file decoded during training.")] = 8,
    eval_max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded of each during training.")] = 64,
    patience: Annotated[
        int, typer.Option(min=0, help="Evaluations without a better figure after which training stops; 0 for never.")
    ] = 0,
    head: Annotated[
        str | None, typer.Option(help="Trained head to continue from: a Hub id or a folder; a new one if not given.")
    ] = None,
    train_only: Annotated[str | None, typer.Option(help="`correction` freezes all but the branch correction.")] = None,
    target_name: Annotated[str | None, typer.Option(help="Name of the target for the head's config and card.")] = None,
    num_layers: Annotated[int, typer.Option(min=1, help="Layers of the head.")] = 3,
    num_taps: Annotated[int, typer.Option(min=1, help="Target layers the head listens to.")] = 5,
    block_size: Annotated[int, typer.Option(min=2, help="Rows of a block: the drafted depths and one.")] = 8,
    draft_vocab: Annotated[int, typer.Option(min=0, help="Commonest answer tokens that are scored; 0 for all.")] = 0,
    mask_token: Annotated[
        str | None, typer.Option(help="Unused special token for the MASK rows; a learned embedding if not given.")
    ] = None,
    branch_correction: Annotated[
        str, typer.Option(help="What corrects the scores of a branch: path, parent (its last token only), or none.")
    ] = "path",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest regenerated answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of regenerated answers, 0 for greedy.")] = 0.0,
    generation_batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at one time.")] = 32,
    max_steps: Annotated[int, typer.Option(min=1, help="Updates of the head.")] = 4000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per device and update.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches per update.")] = 1,
    anchors: Annotated[int, typer.Option(min=1, help="Random anchors per sequence and update.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Muon.")] = 1e-2,
    feature_loss: Annotated[float, typer.Option(min=0, help="Weight of the feature loss, 0 for none.")] = 0.5,
    depth_gamma: Annotated[float | None, typer.Option(help="Weight exp(-(depth - 1) / gamma) in the loss.")] = None,
    max_length: Annotated[int, typer.Option(min=3, help="Longest training sequence.")] = 512,
    cache_features: Annotated[bool, typer.Option(help="Keep the target's features on disk between epochs.")] = False,
    save_steps: Annotated[int, typer.Option(min=1, help="Updates between checkpoints.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers, initialisation, order and anchors.")] = 0,
    dtype: DtypeOption = "auto",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Repository on the Hub that the head is uploaded to.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the head for its card, as the Hub spells it, such as apache-2.0.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """
    Train a draft head for a target. Example:

    hf-jetflow train --target Qwen/Qwen3-0.6B --prompts prompts.jsonl --output runs/qwen3-0.6b
    """
    from ..training.recipe import train_head
    from ..training.settings import TrainRecipe
    from ..training.trainer import leave_together

    options = {name: value for name, value in locals().items() if name in TrainRecipe.__dataclass_fields__}
    _hush(quiet)
    with _readable_errors(), _progress(quiet) as bars:
        summary = train_head(TrainRecipe(**options, weights=weight), _Reporter(bars, quiet))
    console.print(f"head saved in {output}" + "".join(f"\n  {name}: {value}" for name, value in summary.items()))
    leave_together()


@app.command()
def bench(
    target: TargetOption,
    head: Annotated[str, typer.Option(help="Draft head: a Hub id or a folder.")],
    prompts: PromptsOption,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: plain, chain, jetflow, and to compare with: native-dflash (transformers' own chain "
            "loop, with the same head), prompt-lookup, assistant:ID (a small model: Hub id, folder or .gguf file)."
        ),
    ] = "plain,chain,jetflow",
    node_budgets: Annotated[
        str, typer.Option(help="Comma-separated node budgets of jetflow; auto is one.")
    ] = "16,32,64,auto",
    temperature: Annotated[str, typer.Option(help="Comma-separated temperatures, 0 for greedy.")] = "0",
    context_lengths: Annotated[
        str,
        typer.Option(help="Comma-separated lengths that prompts are padded to with the file's own texts, in tokens."),
    ] = "",
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated numbers of prompts answered at a time.")] = "1",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens generated per prompt.")] = 128,
    num_prompts: Annotated[int, typer.Option(help="Prompts taken from each file.")] = 20,
    repeats: Annotated[int, typer.Option(help="Passes over the prompts.")] = 1,
    dtype: DtypeOption = "auto",
    cache: Annotated[str, typer.Option(help="The target's cache: dynamic, static or compiled.")] = "dynamic",
    json: Annotated[
        Path | None, typer.Option(help="File for the result as JSON; a killed bench then continues where it stopped.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="File (.png or .svg) or folder for a figure of the result.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no tables.")] = False,
) -> None:
    """
    Measure a head against plain decoding, interleaved in one process. Example:

    hf-jetflow bench --target model.gguf --head examples/heads/smollm2-135m-instruct --prompts prompts.jsonl
    """
    from ..bench.bench import bench_pair
    from ..bench.report import closing_sentences, print_tables
    from ..bench.settings import BenchSettings
    from ..target.loading import PairSettings

    _hush(quiet)
    with _readable_errors():
        settings = BenchSettings(
            prompts=prompts,
            methods=methods.split(","),
            node_budgets=node_budgets.split(","),
            temperatures=[_number(float, value) for value in temperature.split(",")],
            context_lengths=[_number(int, length) for length in context_lengths.split(",") if length],
            batch_sizes=[_number(int, size) for size in batch_sizes.split(",")],
            max_new_tokens=max_new_tokens,
            num_prompts=num_prompts,
            repeats=repeats,
            cache=cache,  # type: ignore[arg-type]
            json=json,
            plot=plot,
        )
        with _progress(quiet) as bars:
            result = bench_pair(PairSettings(target, head, dtype), settings, _Reporter(bars, quiet))  # type: ignore[arg-type]
    output = Console(width=None if sys.stdout.isatty() else 120)
    if not quiet:
        print_tables(result, output)
    output.print(*closing_sentences(result["rows"]), sep="\n", highlight=False, soft_wrap=True)
    for path in (json, plot):
        if path is not None:
            console.print(f"written to {path}")


@app.command()
def doctor(
    target: TargetOption,
    head: Annotated[str, typer.Option(help="Draft head: a Hub id or a folder.")],
    prompts: Annotated[
        list[Path],
        typer.Option(help="JSON lines of prompts in place of the built-in ones; may be given several times."),
    ] = [],  # noqa: B006
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts taken of those given.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    dtype: DtypeOption = "auto",
    json: Annotated[Path | None, typer.Option(help="File for all findings as JSON.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="The verdict only.")] = False,
) -> None:
    """
    Check a head against a target, and find the mistake if it drafts badly. Example:

    hf-jetflow doctor --target org/model --head org/head

    Exit status: 0 if no fault was found, 1 if one was, 2 if the examination could not be made.
    """
    from ..doctor.doctor import DoctorSettings, examine_pair
    from ..doctor.report import print_findings, verdict_lines
    from ..target.loading import PairSettings

    _hush(quiet)
    with _readable_errors(status=2):
        settings = DoctorSettings(prompts, num_prompts, max_new_tokens, json)
        with _progress(quiet) as bars:
            findings = examine_pair(PairSettings(target, head, dtype), settings, _Reporter(bars, quiet))  # type: ignore[arg-type]
    output = Console(width=None if sys.stdout.isatty() else 120)
    if json is not None:
        console.print(f"written to {json}")
    if not quiet:
        print_findings(findings, output)
    output.print(*verdict_lines(findings), sep="\n", markup=False, highlight=False, soft_wrap=True)
    if findings["faults"]:
        raise SystemExit(1)


@app.command()
def convert(
    head: Annotated[str, typer.Argument(help="Head to convert, in any layout that loads: a Hub id or a folder.")],
    to: Annotated[str, typer.Option(help="Layout to write: jetspec, dflash, speculators or jetflow.")],
    output: Annotated[Path, typer.Option(help="New folder for the converted head.")],
    target: Annotated[
        str | None,
        typer.Option(help="The head's target: a Hub id, a folder, or a .gguf file; some layouts name it."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """
    Write a head in another project's layout. Example:

    hf-jetflow convert runs/my-head --to speculators --target org/model --output runs/my-head-speculators
    """
    from ..convert.convert import convert_head

    _hush(quiet)
    with _readable_errors():
        left_out = convert_head(head, to, output, target)
    for what in left_out:
        console.print(f"left out: {what}", markup=False)
    console.print(f"head in the layout of {to} saved in {output}")


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} stands where a number is needed, in a list such as `16,32`") from None


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="JSON that `hf-jetflow bench --json` wrote.")],
    figure: Annotated[Path, typer.Argument(help="File (.png or .svg) or folder to draw into.")],
) -> None:
    """
    Draw the figure of a bench from its JSON. Example:

    hf-jetflow plot bench.json bench.png
    """
    from ..bench.bench import read_result
    from ..bench.plots import draw_bench

    with _readable_errors():
        path = draw_bench(read_result(result), figure)
    console.print(f"written to {path}")


@app.command()
def show(
    target: TargetOption,
    head: Annotated[str, typer.Option(help="Draft head: a Hub id or a folder.")],
    output: Annotated[
        Path,
        typer.Option(
            help="File to write: .html is a page of all rounds, which needs no network; .svg or .png is a picture."
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="The user's message.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines of prompts (`messages`, `turns` or `prompt`) to take one from.")
    ] = None,
    index: Annotated[int, typer.Option(help="Which prompt of the file; the first is 0.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answer.")] = 96,
    node_budget: Annotated[str, typer.Option(help="Nodes verified per round, root included, or auto.")] = "32",
    round: Annotated[
        int | None,
        typer.Option(help="The one round to draw, the first is 1; on a page, the one that is shown first."),
    ] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """
    Draw the draft trees of an answer. Example:

    hf-jetflow show --target org/model --head org/head --prompt "Why is the sky blue?" --output trees.html
    """
    from ..show.show import ShowSettings, show_pair
    from ..target.loading import PairSettings

    with _readable_errors():
        settings = ShowSettings(output, prompt, prompts, index, max_new_tokens, node_budget=node_budget, round=round)
        stats = show_pair(PairSettings(target, head, dtype), settings)  # type: ignore[arg-type]
    console.print(f"{stats.num_rounds} rounds, {stats.tokens_per_round:.2f} tokens per round; written to {output}")


class _Reporter:
    """Progress bars by what runs: `reporter(done, in_all, what)`; a quiet one says warnings only."""

    def __init__(self, bars: Progress, quiet: bool = False):
        self._bars = bars
        self._quiet = quiet
        self._tasks: dict[str, Any] = {}

    def __call__(self, done: int, total: int, what: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def say(self, text: str) -> None:
        if not self._quiet or text.startswith("warning: "):
            self._bars.console.print(text, markup=False)


def _progress(quiet: bool = False) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=quiet)


def _hush(quiet: bool) -> None:
    """Without the progress bars of transformers and the Hub, if it is to be quiet."""
    if quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


class _readable_errors:
    """Print user errors as one line and leave with status 1, or another; anything else is a bug and keeps its
    traceback."""

    def __init__(self, status: int = 1):
        self._status = status

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        is_missing_package = isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError)
        if isinstance(error, ValueError | OSError) or is_missing_package:
            console.print(f"error: {_words(error)}", style="red", markup=False)
            raise SystemExit(self._status)


def _words(error: BaseException | None) -> str:
    """What went wrong and what to do; the system's own errors name a file and no remedy."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename} does not exist; check the path"
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"{error.filename} may not be read or written here; change its permissions or give another path"
    return str(error)


@app.command()
def simulate(
    target: Annotated[
        str, typer.Option(help="Target: a Hub id, a folder, its config.json, or a .gguf file; no weights are loaded.")
    ],
    head: Annotated[str, typer.Option(help="Draft head: a Hub id or a folder; no weights are loaded.")],
    acceptance: Annotated[
        Path, typer.Option(help="Tokens per round: JSON of bench, of a replay, or of examples/measure_ranks.py.")
    ],
    hardware: Annotated[
        str,
        typer.Option(
            help="h100, h100-graphed, a100, a100-graphed, a JSON file of hardware figures, or the JSON of a bench of "
            "this target and head, from which they are fitted."
        ),
    ] = "h100",
    node_budgets: Annotated[
        str | None, typer.Option(help="Comma-separated node budgets; those of the acceptance file if not given.")
    ] = None,
    batch_sizes: Annotated[
        str, typer.Option(help="Comma-separated numbers of sequences decoded together.")
    ] = "1,4,16",
    context: Annotated[int, typer.Option(help="Tokens in the cache of each sequence.")] = 512,
    json: Annotated[Path | None, typer.Option(help="File for the result as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the lines as .png, .svg or .pdf.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No table.")] = False,
) -> None:
    """
    Predict speedup by node budget and batch size on other hardware (docs/cost-model.md says how well). Example:

    hf-jetflow simulate --target Qwen/Qwen3-8B --head runs/my-head --acceptance bench.json --hardware h100-graphed
    """
    from ..simulate.report import speedup_table
    from ..simulate.simulate import SimulateSettings, run_simulation

    with _readable_errors():
        result = run_simulation(
            SimulateSettings(
                target,
                head,
                acceptance,
                hardware,
                [] if node_budgets is None else [_number(int, each) for each in node_budgets.split(",")],
                [_number(int, each) for each in batch_sizes.split(",")],
                context,
                json,
                plot,
            )
        )
    if not quiet:
        Console(width=None if sys.stdout.isatty() else 120).print(speedup_table(result))
    for path in (json, plot):
        if path is not None:
            console.print(f"written to {path}")


def main() -> None:
    """Entry point of `hf-jetflow` and `python -m hf_jetflow`."""
    app(prog_name="hf-jetflow")
