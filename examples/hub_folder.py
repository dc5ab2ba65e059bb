"""Assemble a Hub repository: a head, its card, and the `custom_generate/` folder that lets `generate` find the loop.

    python examples/hub_folder.py --head runs/my-head --repo me/my-head --output runs/hub
    hf upload me/my-head runs/hub

Then anyone with hf_jetflow installed can decode with the head, without importing the package:

    target.generate(**inputs, custom_generate="me/my-head", trust_remote_code=True)
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard

from hf_jetflow import JetFlowHead
from hf_jetflow.training.checkpoints import HEAD_FILES


RECIPE = Path(__file__).resolve().parent / "custom_generate"
RECIPE_FILES = ("generate.py", "requirements.txt")
CARD_SECTION = """
## Without an import

This repository has its own `generate`. With `hf_jetflow` installed,

```python
output = target.generate(**inputs, custom_generate="{repo}", trust_remote_code=True, max_new_tokens=256)
```

decodes with this head. transformers requires `trust_remote_code` for every `custom_generate` from the Hub; the code is
`custom_generate/generate.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True, help="folder that `hf-jetflow train` wrote")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository it will be uploaded to")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise SystemExit(f"error: expected a repository ORG/NAME, got {args.repo!r}")
    if args.output.exists():
        raise SystemExit(f"error: {args.output} exists already; give a new folder")
    missing = [name for name in HEAD_FILES if not (args.head / name).is_file()]
    if missing:
        raise SystemExit(f"error: {args.head} lacks {', '.join(missing)}; give a folder that `hf-jetflow train` wrote")
    JetFlowHead.from_pretrained(args.head)  # a head that does not load must not be uploaded
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as name:
        folder = Path(name) / "repository"
        fill(folder, args.head, args.repo)
        folder.rename(args.output)
    print(f"written: {args.output}; upload it with `hf upload {args.repo} {args.output}`")


def fill(folder: Path, head: Path, repo: str) -> None:
    """Write the files of the repository."""
    (folder / "custom_generate").mkdir(parents=True)
    for name in HEAD_FILES:
        shutil.copyfile(head / name, folder / name)
    for name in RECIPE_FILES:
        text = (RECIPE / name).read_text(encoding="utf-8")
        (folder / "custom_generate" / name).write_text(text.replace('"org/head"', f'"{repo}"'), encoding="utf-8")
    card = ModelCard.load(folder / "README.md")
    card.data.tags = [*(card.data.tags or []), "custom_generate"]
    card.text = card.text.rstrip() + "\n" + CARD_SECTION.format(repo=repo)
    card.save(folder / "README.md")


if __name__ == "__main__":
    main()
