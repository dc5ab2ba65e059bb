"""The command line is made from the settings: names, types and defaults; what is misspelled gets a suggestion."""

import os
import runpy
import subprocess
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest
from helpers import run_command, write_lines

from hf_jetflow.bench.settings import BenchSettings
from hf_jetflow.cli.console import progress
from hf_jetflow.cli.main import COMMANDS, command_parser, load, parse
from hf_jetflow.cli.parser import Parser, add_options, make_settings, options


ROOT = Path(__file__).resolve().parents[1]
GIVEN = {
    "train": ["--target", "t", "--output", "o", "--prompts", "PROMPTS"],
    "bench": ["--target", "t", "--head", "h", "--prompts", "PROMPTS"],
    "doctor": ["--target", "t", "--head", "h"],
    "convert": ["h", "--to", "dflash", "--output", "o"],
    "show": ["--target", "t", "--head", "h", "--prompt", "Why?", "--output", "x.html"],
}


@dataclass
class Settings:
    """One field of each kind."""

    source: Path = field(metadata={"help": "A path.", "is_positional": True})
    name: str = field(metadata={"help": "100 % required."})
    files: list[Path] = field(default_factory=list, metadata={"help": "Paths."})
    rates: list[float] = field(default_factory=lambda: [0.0, 0.5], metadata={"help": "Rates.", "aliases": ["--rate"]})
    words: list[str] = field(default_factory=list, metadata={"help": "Words.", "metavar": "WORD"})
    size: int | None = field(default=None, metadata={"help": "A size."})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "A choice."})
    is_loud: bool = field(default=False, metadata={"help": "A flag."})


def parsed(*arguments):
    parser = Parser(prog="program")
    add_options(parser, Settings)
    return make_settings(Settings, parser.parse_args(arguments))


def test_what_is_not_given_has_the_default_of_the_settings():
    assert parsed("x", "--name", "n") == Settings(Path("x"), "n")


def test_values_have_the_types_of_the_settings():
    line = "x --name n --files a,b c --files d --rate 1,2 3 --words a,b --size 4 --kind b --is-loud"
    given = parsed(*line.split())
    files = [Path("a,b"), Path("c"), Path("d")]
    assert given == Settings(Path("x"), "n", files, [1.0, 2.0, 3.0], ["a", "b"], 4, "b", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("x", "the following arguments are required: --name"),
        ("x --name n --size two", "argument --size: expected an integer such as 16, got 'two'"),
        ("x --name n --rates 1,two", "argument --rates/--rate: expected numbers such as 0,0.7, got '1,two'"),
        ("x --name n --kind c", "argument --kind: invalid choice: 'c' (choose from "),
    ],
)
def test_a_value_that_does_not_fit_is_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parsed(*arguments.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith(f"error: {message}")
    assert error.endswith("; run `program --help`\n")
    assert error.count("\n") == 1


def test_defaults_are_shown_as_they_are_typed():
    shown = {option.names[0]: option.default for option in options(Settings)}
    assert (shown["--rates"], shown["--kind"], shown["--is-loud"], shown["--size"]) == ("0,0.5", "a", "", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_has_a_help_and_no_name_twice(name):
    found = [option for kind in load(name).SETTINGS for option in options(kind)]
    names = [each for option in found for each in option.names]
    assert len(set(names)) == len(names)
    assert all(option.field.metadata["help"].endswith(".") for option in found)


@pytest.mark.parametrize("name", GIVEN)
def test_a_command_has_the_defaults_of_its_settings(name, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", {"prompt": "Why?"})
    given = [str(prompts) if argument == "PROMPTS" else argument for argument in GIVEN[name]]
    for settings in parse([name, *given]).settings:
        for each in fields(settings):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if f"--{each.name.replace('_', '-')}" not in GIVEN[name] and default is not MISSING:
                assert getattr(settings, each.name) == default, each.name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_shows_an_example_and_the_extra_that_it_needs(name):
    help_text = command_parser(name).format_help()
    assert f"    hf-jetflow {name} " in help_text
    assert ("pip install 'hf-jetflow[" in help_text) == (name != "heads")  # which needs none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian', did you mean train?"),
        (["xyz"], "unknown command 'xyz'; run"),
        (["bench", "--taget", "x"], "unknown option --taget, did you mean --target?"),
        (["plot", "a.json", "b.png", "--zzz=1"], "unknown option --zzz; run `hf-jetflow plot --help`"),
        (["plot", "a.json", "b.png", "c"], "unrecognized arguments: c"),
    ],
)
def test_a_misspelled_name_is_refused_and_the_closest_one_suggested(arguments, message):
    done = run_command(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert done.output.count("\n") == 1


def test_without_arguments_the_commands_are_listed():
    done = run_command()
    assert done.exit_code == 2
    assert all(f"\n  {name}" in done.output for name in COMMANDS)


def test_an_error_that_nobody_can_mend_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("hf_jetflow.cli.plot.run", lambda _: int("x"))
    monkeypatch.setattr("hf_jetflow.cli.plot.check", lambda _: None)
    with pytest.raises(ValueError, match="invalid literal"):
        run_command("plot", "a.json", "b.png")


def start(*arguments):
    """The entry point in a process of its own, which prints the heavy packages that it has imported at the end."""
    code = (
        "import sys; from hf_jetflow_cli import main\n"
        "status = 0\n"
        "try: main()\n"
        "except SystemExit as exit: status = exit.code or 0\n"
        "print(status, *sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--version"], "0", "hf-jetflow 0"),
        (["--help"], "0", "simulate  Predict"),
        (["train", "--help"], "0", "--eval-node-budgets INTEGER"),
        (["bench", "--target", "t"], "2", "error: the following arguments are required: --head, --prompts"),
        (["train", "--target", "t", "--output", "o"], "1", "error: nothing to train on"),
        (["bench", "--target", "t", "--head", "h", "--prompts", "no.jsonl"], "1", "error: no.jsonl does not exist"),
        (["doctor", "--target", "t", "--head", "h", "--prompts", "no.jsonl"], "2", "error: no.jsonl does not exist"),
        (["show", "--target", "t", "--head", "h", "--prompt", "Why?", "--output", "x.gif"], "1", "is x.gif, "),
        (
            ["simulate", "--target", "t", "--head", "h", "--acceptance", "no.json"],
            "1",
            "error: no.json does not exist",
        ),
        (["plot", "no.json", "x.png"], "1", "error: no.json does not exist"),
        (["plot", "examples/published_speeds.json", "x.png"], "1", "is not the result of a bench"),
        (["doctor", "--target", "t", "--head", "./no"], "2", "error: `./no` does not exist"),
        (["show", "--target", "t", "--head", "docs", "--prompt", "Why?", "--output", "x.html"], "1", "no config.json"),
        (["heads", "SmolLM2"], "1", "did you mean SmolLM2-135M-Instruct"),
        (["heads", "Qwen3-8B"], "0", "JetSpec/jetspec-qwen3-8b"),
        (["heads", "Qwen3-9B"], "1", "no head is listed for 'Qwen3-9B'; did you mean"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_help_refusals_and_light_commands_import_neither_torch_nor_transformers(arguments, status, text):
    last, printed = start(*arguments)
    assert last == status, "the last line has the exit status, then what was imported"
    assert text in printed


PAIR = ["--target", "t", "--head", "h"]
SHOW = ["show", *PAIR, "--output", "x.html"]
RANKS = {"acceptance_by_rank": {"x": [[0.5]]}}


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--target", "t", "--output", "o", "--prompts", "BAD"],
        ["train", "--target", "t", "--output", "o", "--prompts", "GOOD", "--eval-prompts", "BAD"],
        ["train", "--target", "t", "--output", "o", "--answers", "BAD"],
        ["bench", *PAIR, "--prompts", "GOOD", "BAD"],
        ["doctor", *PAIR, "--prompts", "BAD"],
        ["show", *PAIR, "--prompts", "BAD", "--output", "x.html"],
    ],
    ids=["train", "train --eval-prompts", "train --answers", "bench", "doctor", "show"],
)
def test_a_malformed_file_is_refused_before_torch_is_imported(arguments, tmp_path):
    files = {"GOOD": tmp_path / "good.jsonl", "BAD": tmp_path / "bad.jsonl"}
    write_lines(files["GOOD"], {"prompt": "Why?"})
    write_lines(files["BAD"], "{not json}")
    last, printed = start(*(str(files.get(argument, argument)) for argument in arguments))
    assert last in ("1", "2"), "the last line has the exit status, then what was imported"
    assert f"error: {files['BAD']}, line 1: not valid JSON" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--output", "o", "--prompts", "GOOD"],
        ["bench", "--head", "h", "--prompts", "GOOD"],
        ["doctor", "--head", "h"],
        ["show", "--head", "h", "--prompt", "Why?", "--output", "x.html"],
        ["simulate", "--head", "h", "--acceptance", "RESULT"],
        ["convert", "h", "--to", "dflash", "--output", "o"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_target_file_that_does_not_exist_is_refused_before_torch_is_imported(arguments, tmp_path):
    files = {"GOOD": write_lines(tmp_path / "good.jsonl", {"prompt": "Why?"})}
    files["RESULT"] = write_lines(tmp_path / "result.json", RANKS)
    last, printed = start(*(str(files.get(argument, argument)) for argument in arguments), "--target", "no.gguf")
    assert last in ("1", "2"), "the last line has the exit status, then what was imported"
    assert "error: `no.gguf` does not exist; give the path of a .gguf file" in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench", *PAIR, "--prompts", "GOOD", "--plot", "x.gif"], "error: cannot draw into x.gif: expected"),
        (["plot", "RESULT", "x.gif"], "error: cannot draw into x.gif: expected"),
        (["simulate", *PAIR, "--acceptance", "RESULT", "--plot", "x.gif"], "error: `--plot` is x.gif, expected"),
        (["convert", "h", "--to", "dflash", "--output", "FOLDER"], "exists already; give a new folder"),
        (["bench", *PAIR, "--prompts", "GOOD", "--json", "FOLDER"], "error: `--json` is the folder"),
        (["simulate", *PAIR, "--acceptance", "RESULT", "--json", "FOLDER"], "error: `--json` is the folder"),
        (["doctor", *PAIR, "--json", "FOLDER"], "error: `--json` is the folder"),
        (["doctor", *PAIR, "--json", "GOOD/x.json"], "good.jsonl is a file; give a path"),
        (
            ["bench", *PAIR, "--prompts", "GOOD", "--plot", "GOOD/x.png"],
            "good.jsonl is a file; give a path",
        ),
        (["show", *PAIR, "--prompt", "Why?", "--output", "GOOD/a/x.html"], "error: `--output` is "),
        (["simulate", *PAIR, "--acceptance", "RESULT", "--plot", "GOOD/x.svg"], "error: `--plot` is "),
        (["convert", "h", "--to", "dflash", "--output", "GOOD/x"], "error: `--output` is "),
        (["train", "--target", "t", "--prompts", "GOOD", "--output", "GOOD"], "good.jsonl is a file; give a path"),
        (["show", "--target", "EMPTY", "--head", "h", "--prompt", "Why?", "--output", "x.html"], "or no GGUF file"),
        (
            ["bench", *PAIR, "--prompts", "GOOD", "--json", "STARTED"],
            "`max_new_tokens` was 9 and is 128; use",
        ),
        ([*SHOW, "--prompt", "Why?", "--round", "0"], "error: `--round` is 0, expected at least 1"),
        ([*SHOW, "--prompt", " "], "error: `--prompt` is empty; give the text to answer"),
        (["doctor", *PAIR, "--num-prompts", "2"], "error: `--num-prompts` is 2, expected at least 3"),
        (["doctor", *PAIR, "--prompts", "GOOD"], "error: `--prompts`: expected at least 3 prompts, got 1; add some"),
        (
            ["simulate", *PAIR, "--acceptance", "RESULT", "--hardware", "BENCH"],
            "and 1 fixed node budget; run it again",
        ),
        (
            ["train", "--target", "t", "--prompts", "GOOD", "--output", "RUN", "--max-new-tokens", "5"],
            "was 9 and is 5",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_torch_is_imported(arguments, text, tmp_path):
    files = {"GOOD": tmp_path / "good.jsonl", "RESULT": tmp_path / "result.json", "FOLDER": tmp_path}
    files |= {"BENCH": tmp_path / "bench.json", "RUN": tmp_path / "run", "EMPTY": tmp_path / "empty.gguf"}
    files["EMPTY"].touch()
    files["STARTED"] = tmp_path / "started.json"
    started = {"settings": {**BenchSettings([]).facts, "max_new_tokens": 9, "prompts": {"good": "hash"}}}
    write_lines(tmp_path / "started.json.partial", started, {"key": ["good"], "record": []})
    rows = [{"method": "plain", "node_budget": None}, {"method": "jetflow", "node_budget": 16}]
    write_lines(files["BENCH"], {"rows": [{**row, "prompts": "a"} for row in rows]})
    files["RUN"].mkdir()
    write_lines(files["RUN"] / "answers.jsonl", {"id": "0", "prompt_ids": [1], "answer_ids": [2]})
    write_lines(files["RUN"] / "answers.settings.json", {"target": "t", "max_new_tokens": 9, "temperature": 0.0})
    write_lines(files["GOOD"], {"prompt": "Why?"})
    write_lines(files["RESULT"], RANKS)
    for name, path in files.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    last, printed = start(*arguments)
    assert last in ("1", "2")
    assert text in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--target", "t", "--output", "o", "--prompts", "GOOD", "--head", "HEAD"],
        ["bench", "--target", "t", "--prompts", "GOOD", "--head", "HEAD"],
        ["simulate", "--target", "t", "--acceptance", "RESULT", "--head", "HEAD"],
        ["convert", "HEAD", "--to", "dflash", "--output", "o"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_no_head_is_refused_before_torch_is_imported(arguments, tmp_path):
    files = {"GOOD": tmp_path / "good.jsonl", "RESULT": tmp_path / "result.json"}
    write_lines(files["GOOD"], {"prompt": "Why?"})
    write_lines(files["RESULT"], RANKS)
    for head, fault in ((tmp_path, "has no config.json"), (files["GOOD"], "is a file"), (tmp_path / "no", "does not")):
        last, printed = start(*(str({**files, "HEAD": head}.get(argument, argument)) for argument in arguments))
        assert last == "1"
        assert f"error: `{head}` {fault}" in printed


def test_a_terminal_is_told_what_takes_the_first_seconds(tmp_path):
    read, write = os.openpty()
    code = "from hf_jetflow_cli import main; main()"
    command = [sys.executable, "-c", code, "convert", "no/head", "--to", "dflash", "--output", tmp_path / "out"]
    subprocess.run(command, cwd=ROOT, stderr=write, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert os.read(read, 1000).startswith(b"importing torch and transformers ...")


def test_a_command_runs_with_the_whole_package(tmp_path):
    pytest.importorskip("matplotlib")
    result = ROOT / "examples" / "results" / "bench_smollm2_bf16.json"
    code = (
        "from hf_jetflow_cli import main; main()\n"
        "import hf_jetflow; from transformers import GenerationMixin\n"
        "print(hf_jetflow.JetFlowHead.__name__, hasattr(GenerationMixin._assisted_decoding, '__wrapped__'))"
    )
    command = [sys.executable, "-c", code, "plot", result, tmp_path / "bench.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "JetFlowHead True\n"
    assert (tmp_path / "bench.png").exists()


def test_python_m_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_jetflow", "--version"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("hf_jetflow", run_name="__main__")
    assert capsys.readouterr().out.startswith("hf-jetflow 0")


def test_a_reader_that_closes_its_pipe_ends_a_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hf_jetflow", "heads"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_bar_starts_where_an_earlier_run_ended_and_a_stage_can_start_again():
    with progress(quiet=True) as report:
        seen = []
        for done, what in ((5, "answers"), (6, "answers"), (0, "prompts"), (2, "answers"), (1, "prompts")):
            report(done, 9, what)
            seen.append([task.completed for task in report._bars.tasks])
    assert seen == [[5], [6], [6, 0], [2, 0], [2, 1]]
