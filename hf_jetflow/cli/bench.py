"""Measure a head against plain decoding, interleaved in one process.

Example:

    hf-jetflow bench --target model.gguf --head examples/heads/smollm2-135m-instruct --prompts prompts.jsonl

`--plot` needs the extra `bench`, a .gguf target the extra `train`: pip install 'hf-jetflow[bench,train]'.
"""

from dataclasses import dataclass, field

from ..bench.log import num_measurements
from ..bench.settings import BenchSettings
from ..prompts import read_prompts
from ..target.settings import PairSettings


@dataclass
class Output:
    """What is printed."""

    quiet: bool = field(default=False, metadata={"help": "Print neither progress nor tables."})
    count: bool = field(
        default=False,
        metadata={"help": "Instead, count launches and host waits of a round by step, on a CUDA device."},
    )


SETTINGS = (PairSettings, BenchSettings, Output)
INTERRUPTED = "; with --json, the same command continues after the last finished answer"


def check(pair: PairSettings, settings: BenchSettings, __: Output) -> None:
    for path in settings.prompts:
        read_prompts([path])
    pair.check()
    num_measurements(settings.partial_path, settings.facts)  # refuses to continue with other settings


def run(pair: PairSettings, settings: BenchSettings, output: Output) -> None:
    if output.count:
        return count(pair, settings)
    from ..bench.bench import bench_pair
    from ..bench.report import closing_sentences, print_tables
    from .console import note_files, progress, table_console

    with progress(output.quiet) as report:
        num_measured = num_measurements(settings.partial_path, settings.facts)
        if num_measured:
            report.say(f"continuing after {num_measured} measurements in {settings.partial_path}")
        report.say(f"loading {pair.target} and {pair.head} ...")
        result = bench_pair(pair, settings, report)
    console = table_console()
    if not output.quiet:
        print_tables(result, console)
    console.print(*closing_sentences(result["rows"]), sep="\n", highlight=False, soft_wrap=True)
    note_files([settings.json, settings.plot])


def count(pair: PairSettings, settings: BenchSettings) -> None:
    """Print, for every node budget, what a round asks of the host in an answer to the first prompt."""
    from ..bench.counts import check_device, count_steps
    from ..bench.prompts import make_prompt_sets
    from ..bench.runs import make_variants
    from ..files import write_json
    from ..target.loading import load_pair
    from .console import note_files, table_console

    check_device()
    target, tokenizer, head = load_pair(pair)
    prompt_ids = make_prompt_sets(target, tokenizer, settings)[0].prompt_ids[0]
    budgets = [each.node_budget for each in make_variants(settings) if each.method == "jetflow"]
    counts = {str(nodes): count_steps(target, head, settings, prompt_ids, nodes).per_round() for nodes in budgets}
    for nodes, steps in counts.items():
        lines = [
            f"{step:10} {each['launches']:8.1f} launches {each['waits']:6.2f} waits" for step, each in steps.items()
        ]
        table_console().print(f"{nodes} nodes, {settings.cache} cache", *lines, sep="\n", highlight=False)
    if settings.json is not None:
        write_json({"counts": counts}, settings.json)
        note_files([settings.json])
