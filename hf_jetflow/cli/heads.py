"""List published draft heads, and which of them load.

Example:

    hf-jetflow heads Qwen/Qwen3-8B

Reads a list that comes with this release and asks no server. Without a target it lists all of them.
"""

from dataclasses import dataclass, field

from ..head.catalog import catalog_sources, listed_heads, published_heads


@dataclass
class HeadsSettings:
    """The target to list heads for."""

    target: str | None = field(
        default=None, metadata={"help": "Hub id or name; all targets if not given.", "is_positional": True}
    )


SETTINGS = (HeadsSettings,)
IS_LIGHT = True  # runs without torch


def check(settings: HeadsSettings) -> None:
    listed_heads(settings.target)


def run(settings: HeadsSettings) -> None:
    target = None
    for head in published_heads(settings.target):
        if head.target != target:
            target = head.target
            print(target)
        refusal = head.refusal
        print(f"  {head.head}")
        print(f"    {'loads' if refusal is None else f'does not load: {refusal}'}")
        parts = [f"layout {head.layout}", f"license {head.license or 'not stated'}", head.note]
        print(f"    {'; '.join(part for part in parts if part)}")
    print(catalog_sources())
    print("Weights on the Hub have not been tried: run `hf-jetflow doctor` with your target.")
