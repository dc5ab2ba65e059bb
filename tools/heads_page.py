"""Write the table of docs/published-heads.md from hf_jetflow/head/catalog.json.

make docs
"""

from pathlib import Path
from textwrap import fill

from hf_jetflow.head.catalog import catalog_sources, catalog_table, published_heads


PAGE = Path(__file__).resolve().parents[1] / "docs" / "published-heads.md"
INTRODUCTION = """# Which head for my model

Published draft heads by target, and whether this release loads them. This prints the heads of one target:

```bash
hf-jetflow heads Qwen/Qwen3-8B
```

Give a head's id to `JetFlowHead.from_pretrained` ([usage](usage.md)). The first one comes with the
repository: give the path of its folder.

- Prefer a head that loads, has a large block (15 or 16), and was trained for the exact target: base and instruct
  models differ.
- "Loads" follows from the layout. Weights on the Hub have not been tried: run `hf-jetflow doctor`.
- {sources}
  Read the license on the head's own page.
- No head for your model? [Train one](training.md). [Layouts](heads.md) says how each layout was checked.

The table is written by `make docs` from [`catalog.json`](../hf_jetflow/head/catalog.json): add a line there.
"""


def page() -> str:
    """The page as Markdown."""
    sources = fill(catalog_sources(), 150, subsequent_indent="  ", break_on_hyphens=False)
    introduction = INTRODUCTION.replace("{sources}", sources)
    return f"{introduction}\n{catalog_table(published_heads())}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
