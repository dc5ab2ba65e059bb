"""The documents: links lead somewhere, blocks of code run or at least parse, what is generated is up to date."""

import importlib.util
import itertools
import os
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
from helpers import tiny_tokenizer
from markdown_it import MarkdownIt

import hf_jetflow
from hf_jetflow.cli.main import COMMANDS, command_parser


ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(
        part.startswith(".") or part in ("runs", "data", "build", "site") for part in path.relative_to(ROOT).parts
    )
)
WRITTEN = [path for path in DOCUMENTS if "reference" not in path.parts]
RUN_ELSEWHERE = {ROOT / "docs" / "training-cost.md": "test_cost.py"}  # with what it prints
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def load(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(text):
    """The anchors that GitHub gives the headings of a document; a second one of a name gets a number."""
    tokens = MarkdownIt().parse(text)
    found = {}
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            heading = "".join(child.content for child in inline.children)
            slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            count = found[slug] = found.get(slug, -1) + 1
            if count:
                found[f"{slug}-{count}"] = 0
    return set(found)


def links(text):
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                yield target


def repository_urls():
    """Where the index's page of the package finds files and pictures of the repository."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    url = re.search(r'^Repository = "(.*)"$', pyproject, re.MULTILINE)[1]
    return f"{url}/blob/main/", url.replace("github.com", "raw.githubusercontent.com") + "/main/"


HOSTED = repository_urls()


def broken_links(path):
    for link in links(path.read_text(encoding="utf-8")):
        place, _, anchor = link.partition("#")
        if place.startswith(HOSTED):
            place = os.path.relpath(ROOT / place.removeprefix(HOSTED[0]).removeprefix(HOSTED[1]), path.parent)
        elif re.match(r"[a-z]+:", link):
            continue
        target = (path.parent / place).resolve() if place else path
        if not target.exists():
            yield f"{link}: no such file"
        elif ROOT not in (target, *target.parents):
            yield f"{link}: outside the repository"
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_between_documents_lead_somewhere(path):
    assert list(broken_links(path)) == []


def test_the_link_check_sees_missing_files_and_headings(tmp_path, monkeypatch):
    monkeypatch.setattr("test_docs.ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# One `two`, three\n\n## Same\n\n## Same\n\n```\n# code\n[no](link.md)\n```\n")
    good = "[a](b.md) [b](b.md#one-two-three) [c](b.md#same-1) [d](#here) [e](https://x.y/z) ![f](b.md)\n\n# Here\n"
    good += f"[g]({HOSTED[0]}b.md#same) ![h]({HOSTED[1]}b.md)\n"
    bad = "| t |\n|---|\n| [a](c.md) |\n\n[b](b.md#code) [c](b.md#same-2) [d](#there) ![e](p.png) [f](../x)\n"
    bad += f"[g]({HOSTED[0]}b.md#no) ![h]({HOSTED[1]}p.png)\n"
    (tmp_path / "a.md").write_text(good)
    assert list(broken_links(tmp_path / "a.md")) == []
    (tmp_path / "a.md").write_text(bad)
    assert len(list(broken_links(tmp_path / "a.md"))) == 8


def test_the_readme_reads_the_same_on_the_package_index():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [link for link in links(text) if not link.startswith(("https://", "#"))] == [], "relative links break there"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert [link for link in pictures if not link.startswith(HOSTED[1])] == []


# --- code ------------------------------------------------------------------------------------------------------------


def blocks(language):
    for path in WRITTEN:
        for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
            if token.type == "fence" and token.info.strip() == language:
                name = f"{path.relative_to(ROOT).as_posix()}:{token.map[0] + 1}"
                yield pytest.param(path, token.content, id=name)


@pytest.fixture
def reader(target, random_head, tmp_path, monkeypatch):
    """Names as a reader of the documents has them, in a folder where the ids that they use are tiny models."""
    tokenizer = tiny_tokenizer(target.config.vocab_size)
    head = random_head(target)
    for folder in ("org/target", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-8B"):
        target.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    for folder in ("org/head", "examples/heads/smollm2-135m-instruct", "JetSpec/jetspec-qwen3-8b"):
        head.save_pretrained(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    tokenizer.pad_token = "t000"
    inputs = tokenizer("t005 t006 t007", return_tensors="pt", return_token_type_ids=False)
    return {"target": target, "tokenizer": tokenizer, "head": head, "inputs": inputs}


@pytest.mark.parametrize(("path", "code"), list(blocks("python")))
def test_python_in_the_documents_runs(path, code, reader):
    if path in RUN_ELSEWHERE:
        assert path.name in (ROOT / "tests" / RUN_ELSEWHERE[path]).read_text(encoding="utf-8")
        return
    shorter = re.sub(r"max_new_tokens=\d{3}", "max_new_tokens=24", code)
    exec(compile(shorter, str(path), "exec"), reader)
    if "output = target.generate(" in code and "do_sample" not in code and "return_dict_in_generate" not in code:
        inputs, output = reader["inputs"], reader["output"]
        num_new = output.shape[1] - inputs["input_ids"].shape[1]
        plain = reader["target"].generate(**inputs, max_new_tokens=num_new, do_sample=False)
        assert output.tolist() == plain.tolist()
        assert reader["head"].last_stats.num_new_tokens == num_new > 0


def commands(text):
    """Command lines of a shell block as lists of words: without comments, variables before them and continuations."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\|", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


@pytest.mark.parametrize(("path", "text"), list(blocks("bash")))
def test_commands_in_the_documents_exist_with_their_options(path, text):
    for words in commands(text):
        check_command(words)


def check_command(words):
    if "-m" in words and words[words.index("-m") + 1] == "hf_jetflow":
        words = ["hf-jetflow", *words[words.index("-m") + 2 :]]
    elif words[0] == "python" and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        if "make_parser(" in source:  # options that scripts share
            source += (ROOT / "examples" / "replayed.py").read_text(encoding="utf-8")
        missing = [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source]
        assert not missing, f"{words[1]} has no {missing}"
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert [target for target in targets if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)] == []
        variables = [word.partition("=")[0] for word in words[1:] if "=" in word]
        assert [name for name in variables if not re.search(rf"^{name} *[?:]?=", MAKEFILE, re.MULTILINE)] == []
    if words[0] == "hf-jetflow":
        arguments = [word for word in words[2:] if word != "..."]
        parser = command_parser(words[1])
        parser.check_names(arguments)
        parser.parse_args(arguments)


def test_a_command_with_an_unknown_option_is_seen():
    with pytest.raises(SystemExit):
        check_command(["hf-jetflow", "plot", "a.json", "b.png", "--no-such-option"])
    with pytest.raises(AssertionError):
        check_command(["make", "no-such-target"])


def test_the_readme_names_the_test_command():
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


# --- what is generated -----------------------------------------------------------------------------------------------


def test_the_page_of_the_command_line_is_that_of_the_settings():
    written = load("tools/command_page.py")
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), "run `make docs`"
    assert [name for name in COMMANDS if f"## hf-jetflow {name}\n" not in written.page()] == []


def stubs():
    """Entries of the reference: their heading, and the name that mkdocstrings describes."""
    for path in sorted((ROOT / "docs" / "reference").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        for heading, name in re.findall(r"^## (.*)\n\n::: (.*)$", text, flags=re.MULTILINE):
            yield pytest.param(heading, name, id=heading)


@pytest.mark.parametrize(("heading", "name"), list(stubs()))
def test_the_reference_describes_what_exists(heading, name):
    assert pkgutil.resolve_name(name).__doc__
    assert name.endswith(f".{heading}") or heading == "JetFlowHead.custom_generate"


def test_the_reference_describes_all_that_the_package_exports():
    api = anchors((ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8"))
    assert {name.lower() for name in hf_jetflow.__all__} <= api


def test_every_page_is_in_the_navigation_of_the_site():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    listed = re.findall(r"^ +- (?:\w+: )?(\S+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted({*pages, "index.md"})
