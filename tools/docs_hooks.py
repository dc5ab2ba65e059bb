"""Hooks of mkdocs: the README as start page, linked files outside docs/, and links for names in docstrings."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# How the README links to files of the repository, so that its links work on the package index too.
HOSTED = re.compile(
    r"https://(?:github\.com/[\w-]+/hf_jetflow/blob|raw\.githubusercontent\.com/[\w-]+/hf_jetflow)/main/"
)
LINK = re.compile(r"(\]\()([^)#\s]+)")
STUB = re.compile(r"^::: (\S+)", re.MULTILINE)
NAME = re.compile(r"\[<code>(~?)([\w.]+)</code>\](?!\()")  # [`name`] and [`~module.name`], as transformers writes
TYPE = re.compile(r"<code>([^<]*`[^<]*)</code>")  # of an argument, whose marks are left as they are
MARKS = re.compile(r"\[`~?|`\]|`|\*")

_documented = {name.rpartition(".")[2]: name for page in DOCS.rglob("*.md") for name in STUB.findall(page.read_text())}


def source_of(uri: str) -> Path:
    """The file of the repository that a file of the site is made from."""
    if uri == "index.md":
        return ROOT / "README.md"
    return DOCS / uri if (DOCS / uri).exists() else ROOT / uri


def uri_of(source: Path) -> str:
    """Where a file of the repository lies in the site."""
    if source == ROOT / "README.md":
        return "index.md"
    return source.relative_to(DOCS if DOCS in source.parents else ROOT).as_posix()


def linked_files(source: Path) -> dict[str, Path]:
    """Files of the repository that a document links to, by the link as it is written."""
    links = [match[2] for match in LINK.finditer(source.read_text(encoding="utf-8"))]
    paths = {link: (source.parent / HOSTED.sub(f"{ROOT}/", link)).resolve() for link in links}
    return {link: path for link, path in paths.items() if path.is_file()}


def on_files(files: Files, config: Any) -> Files:
    """Add the README and, step by step, all files that documents link to."""
    waiting = [ROOT / "README.md", *DOCS.rglob("*.md")]
    seen = set()
    while waiting:
        source = waiting.pop()
        seen.add(source)
        if files.get_file_from_path(uri_of(source)) is None:
            files.append(File.generated(config, uri_of(source), abs_src_path=str(source)))
        if source.suffix == ".md":
            waiting += set(linked_files(source).values()) - seen
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the site's copies."""
    uri = page.file.src_uri
    targets = linked_files(source_of(uri))

    def moved(match: re.Match) -> str:
        target = targets.get(match[2])
        return match[0] if target is None else match[1] + os.path.relpath(uri_of(target), os.path.dirname(uri))

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Make links of the names in docstrings."""

    def link(match: re.Match) -> str:
        shown = match[2].rpartition(".")[2] if match[1] else match[2]
        name = _documented.get(match[2].rpartition(".")[2])
        code = f"<code>{shown}</code>"
        return f'<autoref identifier="{name}" optional>{code}</autoref>' if name else code

    html = TYPE.sub(lambda match: f"<code>{MARKS.sub('', match[1])}</code>", html)
    return NAME.sub(link, html)
