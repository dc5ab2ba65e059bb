"""`SimulateSettings`: the options of `hf-jetflow simulate`."""

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import check_at_least
from ..files import check_json_path


@dataclass
class SimulateSettings:
    """
    What to predict, from which files. Weights are never loaded.

    Raises:
        JetFlowError: If a number is too small, or a file to write is a folder.
    """

    target: str = field(metadata={"help": "Target: a Hub id, a folder, its config.json, or a .gguf file."})
    head: str = field(metadata={"help": "Draft head: a Hub id or a folder."})
    acceptance: Path = field(
        metadata={"help": "Tokens per round: JSON of bench, of a replay, or of examples/measure_ranks.py."}
    )
    hardware: str = field(
        default="h100",
        metadata={
            "help": "h100, h100-graphed, a100, a100-graphed, a JSON file of hardware figures, or the JSON of a bench "
            "of this target and head, to which they are fitted."
        },
    )
    node_budgets: list[int] = field(
        default_factory=list, metadata={"help": "Node budgets; those of the acceptance file if not given."}
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 4, 16], metadata={"help": "Numbers of sequences decoded together."}
    )
    context: int = field(default=512, metadata={"help": "Cached tokens per sequence."})
    json: Path | None = field(default=None, metadata={"help": "File for the result as JSON."})
    plot: Path | None = field(default=None, metadata={"help": "File for a figure: .png, .svg or .pdf."})

    def __post_init__(self) -> None:
        check_at_least(self, node_budgets=2, batch_sizes=1, context=0)
        check_json_path(self.json)
