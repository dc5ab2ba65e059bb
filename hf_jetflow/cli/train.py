"""Train a draft head for a target.

Example:

    hf-jetflow train --target Qwen/Qwen3-0.6B --prompts prompts.jsonl --output runs/qwen3-0.6b

A .gguf target needs the extra `train`: pip install 'hf-jetflow[train]'.
"""

from dataclasses import dataclass, field

from ..target.settings import check_head, model_source
from ..training.settings import TrainRecipe


@dataclass
class Output:
    """What is printed."""

    quiet: bool = field(
        default=False, metadata={"help": "Print warnings, errors and the closing lines only, no progress and no log."}
    )


INTERRUPTED = "; the same command continues where it stopped"
SETTINGS = (TrainRecipe, Output)


def check(recipe: TrainRecipe, _: Output) -> None:
    recipe.check()
    recipe.check_run()
    recipe.check_files()
    model_source(recipe.target)
    if recipe.head is not None:
        check_head(recipe.head)


def run(recipe: TrainRecipe, output: Output) -> None:
    from ..training.recipe import train_head
    from ..training.trainer import leave_together
    from .console import note, progress

    with progress(output.quiet) as report:
        report.say(f"loading {recipe.target} ...")
        summary = train_head(recipe, report)
    note(f"head saved in {recipe.output}" + "".join(f"\n  {name}: {value}" for name, value in summary.items()))
    leave_together()
