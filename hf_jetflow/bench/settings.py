"""`BenchSettings`: the options of `hf-jetflow bench`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..decoding.settings import read_node_budget
from ..errors import JetFlowError, check_at_least, flag
from ..extras import require_package
from ..files import check_json_path, check_writable


FILES = ("prompts", "json", "plot")  # settings that name files: results must not depend on paths
LOOP_METHODS = ("jetflow", "chain")  # run by our loop, which records `GenerationStats`
ASSISTANT = "assistant:"
RIVALS = ("native-dflash", "prompt-lookup", f"{ASSISTANT}ID")
METHODS = ("plain", *LOOP_METHODS, *RIVALS)
PLOT_SUFFIXES = (".png", ".svg")
CACHES = ("dynamic", "static", "compiled")  # compiled is static with compiled forwards


@dataclass
class BenchSettings:
    """
    What a bench measures, and the files that it writes.

    Raises:
        JetFlowError: If a setting is unknown or out of range, or the figure cannot be drawn.
    """

    prompts: list[Path] = field(
        metadata={
            "action": "extend",  # `--prompts a b` and `--prompts a --prompts b`
            "help": "JSON lines files of prompts (`messages`, `turns` or `prompt`); each is a set of its own.",
        }
    )
    methods: list[str] = field(
        default_factory=lambda: ["plain", *LOOP_METHODS],
        metadata={
            "help": "plain, chain, jetflow, and to compare with: native-dflash (transformers' own chain loop with the "
            "same head), prompt-lookup, assistant:ID (a small model: Hub id, folder or .gguf file)."
        },
    )
    node_budgets: list[str] = field(
        default_factory=lambda: ["16", "32", "64", "auto"],
        metadata={"help": "Node budgets of jetflow: numbers or auto."},
    )
    temperatures: list[float] = field(
        default_factory=lambda: [0.0],
        metadata={"help": "Temperatures, 0 for greedy.", "aliases": ["--temperature"]},
    )
    context_lengths: list[int] = field(
        default_factory=list,
        metadata={"help": "Tokens that prompts are padded to with the file's other texts; not padded if not given."},
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Numbers of prompts answered in one batch."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens generated per prompt."})
    num_prompts: int = field(default=20, metadata={"help": "Prompts taken from each file."})
    repeats: int = field(default=1, metadata={"help": "Passes over the prompts."})
    cache: Literal["dynamic", "static", "compiled"] = field(
        default="dynamic", metadata={"help": "The target's cache: dynamic, static or compiled."}
    )
    json: Path | None = field(
        default=None,
        metadata={"help": "File for the result as JSON; a killed bench then continues where it stopped."},
    )
    plot: Path | None = field(
        default=None, metadata={"help": "File (.png or .svg) or folder for a figure of the result."}
    )

    @property
    def facts(self) -> dict[str, Any]:
        """What the measurements depend on, besides prompts, target and head."""
        return {name: value for name, value in asdict(self).items() if name not in FILES}

    @property
    def partial_path(self) -> Path | None:
        """Where finished measurements are stored until the bench ends; `None` without a JSON file."""
        return None if self.json is None else Path(f"{self.json}.partial")

    def __post_init__(self) -> None:
        self.node_budgets = [str(budget) for budget in self.node_budgets]
        if unknown := sorted(each for each in self.methods if each not in METHODS[:3] and not is_rival(each)):
            raise JetFlowError(f"unknown methods {', '.join(unknown)}; choose from {', '.join(METHODS)}")
        if self.cache not in CACHES:
            raise JetFlowError(f"unknown cache {self.cache!r}; choose from {', '.join(CACHES)}")
        for name in ("methods", "temperatures", "batch_sizes", "node_budgets"):
            if not getattr(self, name):
                raise JetFlowError(f"`{flag(name)}` is empty; leave the option out for its default")
        check_json_path(self.json)
        check_at_least(self, temperatures=0, max_new_tokens=1, num_prompts=1, repeats=1)
        check_at_least(self, context_lengths=1, batch_sizes=1)
        rivals = ", ".join(filter(is_rival, self.methods))
        if rivals and self.cache != "dynamic":
            raise JetFlowError(f"{rivals} cannot use a {self.cache} cache; leave out either")
        if rivals and set(self.batch_sizes) != {1}:
            raise JetFlowError(f"{rivals} cannot answer batches; leave out either")
        for budget in self.node_budgets:
            read_node_budget(budget, "node_budgets")
        if self.plot is not None:
            self.plot = plot_path(self.plot)


def is_rival(method: str) -> bool:
    """Whether a method is one of `RIVALS`."""
    return method in RIVALS[:2] or method.removeprefix(ASSISTANT) not in ("", method)


def plot_path(path: Path) -> Path:
    """
    The file to draw into: `path`, or `path/bench.png` if it is a folder.

    Raises:
        JetFlowError: If the suffix is unknown, the path cannot be written or matplotlib is missing.
    """
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path = path / "bench.png"
    if path.suffix not in PLOT_SUFFIXES:
        raise JetFlowError(
            f"cannot draw into {path}: expected a folder or a name that ends in {' or '.join(PLOT_SUFFIXES)}"
        )
    check_writable(path, "--plot")
    require_package("matplotlib", "plots")
    return path
