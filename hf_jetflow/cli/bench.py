"""Measure a head against plain decoding, interleaved in one process.

Example:

    hf-jetflow bench --target model.gguf --head examples/heads/smollm2-135m-instruct --prompts prompts.jsonl

`--plot` needs the extra `bench`, a .gguf target the extra `train`: pip install 'hf-jetflow[bench,train]'.
"""

from dataclasses import dataclass, field

from ..bench.settings import BenchSettings
from ..jsonl import check_file
from ..target.settings import PairSettings


@dataclass
class Output:
    """What is printed."""

    quiet: bool = field(default=False, metadata={"help": "Print neither progress nor tables."})


SETTINGS = (PairSettings, BenchSettings, Output)


def check(_: PairSettings, settings: BenchSettings, __: Output) -> None:
    for path in settings.prompts:
        check_file(path)


def run(pair: PairSettings, settings: BenchSettings, output: Output) -> None:
    from ..bench.bench import bench_pair
    from ..bench.report import closing_sentences, print_tables
    from .console import note_files, progress, table_console

    with progress(output.quiet) as report:
        result = bench_pair(pair, settings, report)
    console = table_console()
    if not output.quiet:
        print_tables(result, console)
    console.print(*closing_sentences(result["rows"]), sep="\n", highlight=False, soft_wrap=True)
    note_files([settings.json, settings.plot])
