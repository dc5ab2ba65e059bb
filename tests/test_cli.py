"""The command line, end to end on a tiny target: train, resume, bench, and one-line errors."""

import json

import pytest
from helpers import run_command, save_pair, write_lines

from hf_jetflow import JetFlowHead
from hf_jetflow.errors import JetFlowError


pytestmark = pytest.mark.usefixtures("short_measurements")
MADE_ELSEWHERE = [{"prompt_ids": [5, 6], "answer_ids": list(range(n, n + 9))} for n in range(40, 44)]


@pytest.fixture
def target_folder(target, tmp_path):
    return save_pair(tmp_path, target)[1]


@pytest.fixture
def prompts(tmp_path):
    lines = ({"id": f"p{i}", "prompt": f"t0{i + 10} t020"} for i in range(8))
    return write_lines(tmp_path / "prompts.jsonl", *lines)


def train(target_folder, prompts, output, max_steps, *more):
    options = (
        "--num-layers 1 --num-taps 2 --block-size 4 --max-new-tokens 12 --batch-size 2 --anchors 3 --save-steps 2"
    )
    files = ["--target", target_folder, "--prompts", prompts, "--output", output]
    return run_command("train", *files, "--max-steps", max_steps, "--save-steps", 2, *options.split(), *more)


def test_train_writes_a_loadable_head_and_its_card_and_reports_tokens_per_round(target_folder, prompts, tmp_path):
    output = tmp_path / "run"
    held_out = write_lines(tmp_path / "held_out.jsonl", {"prompt": "t030 t031"})
    options = ["--eval-prompts", held_out, "--mask-token", "t006", "--cache-features"]
    result = train(target_folder, prompts, output, 4, *options)
    assert result.exit_code == 0, result.output
    assert "tokens per round on held_out, 16 nodes" in result.output
    head = JetFlowHead.from_pretrained(output)
    config = head.config
    assert (config.block_size, config.mask_token_id, len(config.hidden_state_indices)) == (4, 6, 2)
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "This is a draft head for" in card
    assert len((output / "answers.jsonl").read_text().splitlines()) == 8


def test_a_run_continues_from_its_last_checkpoint_and_regenerates_nothing(target_folder, prompts, tmp_path):
    output = tmp_path / "run"
    assert train(target_folder, prompts, output, 2).exit_code == 0
    answers = (output / "answers.jsonl").read_bytes()
    result = train(target_folder, prompts, output, 4)
    assert result.exit_code == 0, result.output
    assert (output / "answers.jsonl").read_bytes() == answers
    states = [json.loads(path.read_text()) for path in output.glob("checkpoint-*/trainer_state.json")]
    assert max(state["global_step"] for state in states) == 4


def test_answers_made_elsewhere_are_trained_on_with_weights_and_a_warning(target_folder, prompts, tmp_path):
    made = write_lines(tmp_path / "made.jsonl", *MADE_ELSEWHERE, {**MADE_ELSEWHERE[0], "answer_ids": [7]})
    options = ["--answers", made, "--weight", "made=0.5", "--weight", "prompts=2"]
    result = train(target_folder, prompts, tmp_path / "run", 2, *options)
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "made.jsonl: another model or a person seems to have written these answers" in output
    assert "of 13 answers: 1 skipped, fewer than two answer tokens (see --max-length)" in output


@pytest.fixture
def saved_head(head, tmp_path):
    head.save_pretrained(tmp_path / "head")


def bench(target_folder, prompts, tmp_path, *more):
    arguments = ["bench", "--target", target_folder, "--head", tmp_path / "head", "--prompts", prompts]
    arguments += ["--dtype", "float32", "--max-new-tokens", 4, "--num-prompts", 1, "--node-budgets", 4, *more]
    return run_command(*arguments)


@pytest.mark.usefixtures("saved_head")
def test_bench_prints_a_table_and_writes_json(target_folder, prompts, tmp_path):
    options = ["--num-prompts", 2, "--node-budgets", "4,8,auto", "--json", tmp_path / "bench.json"]
    result = bench(target_folder, prompts, tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "100 %" in result.output
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["node_budget"] for row in rows if row["method"] == "jetflow"] == [4, 8, "auto"]
    assert "after an accepted sibling" in result.output
    assert "prompts, greedy: " in result.output, "no closing sentence"


@pytest.mark.usefixtures("saved_head")
def test_bench_with_all_options_writes_json_and_figure_and_nothing_else(target_folder, prompts, tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    methods = f"plain,jetflow,prompt-lookup,assistant:{target_folder}"
    result = bench(
        target_folder, prompts, tmp_path, "--methods", methods, "--temperature", "0,1", "--context-lengths", "20,30",
        "--json", output / "bench.json", "--plot", output, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((output / "bench.json").read_text())["rows"]
    assert len(rows) == 4 * 2 * 2
    assert {row["method"] for row in rows} == set(methods.split(","))
    assert {(row["temperature"], row["context_length"]) for row in rows} == {(0, 20), (0, 30), (1, 20), (1, 30)}
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "bench.png"]
    assert "tokens/round" not in result.output
    assert "prompts, 30 tokens, temperature 1: " in result.output
    drawn = run_command("plot", str(output / "bench.json"), str(tmp_path / "again.svg"))
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "again.svg").stat().st_size > 10_000


@pytest.mark.usefixtures("saved_head")
def test_a_bench_continues_a_killed_one_and_refuses_other_settings(target_folder, prompts, tmp_path, monkeypatch):
    json_path = tmp_path / "bench.json"
    with monkeypatch.context() as patch:
        patch.setattr("hf_jetflow.bench.bench.make_row", lambda *_: 1 / 0)  # a crash behind the runs
        with pytest.raises(ZeroDivisionError):
            bench(target_folder, prompts, tmp_path, "--json", json_path)
    partial = tmp_path / "bench.json.partial"
    assert partial.exists()
    assert not json_path.exists()
    refused = bench(target_folder, prompts, tmp_path, "--json", json_path, "--repeats", 2)
    assert refused.exit_code == 1
    assert "`repeats` was 1 and is 2" in " ".join(refused.output.split())
    monkeypatch.setattr("hf_jetflow.bench.bench.timed_run", lambda *_, **__: 1 / 0)  # nothing is answered again
    result = bench(target_folder, prompts, tmp_path, "--json", json_path)
    assert result.exit_code == 0, result.output
    assert len(json.loads(json_path.read_text())["rows"]) == 3
    assert not partial.exists()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--methods", "plain,warp"], "unknown methods warp"),
        (["--methods", "assistant:nowhere/at/all"], "`assistant:nowhere/at/all` cannot be loaded"),
        (["--node-budgets", "4,many"], "`--node-budgets` is 'many', expected 'auto' or a number"),
        (
            ["--plot", "figure.gif"],
            "cannot draw into figure.gif: expected a folder or a name that ends in .png or .svg",
        ),
        (["--context-lengths", "100000"], "do not fit the target"),
        (["--max-new-tokens", "100000"], "do not fit the target"),
    ],
)
@pytest.mark.usefixtures("saved_head")
def test_a_bench_that_cannot_be_run_says_why(target_folder, prompts, tmp_path, options, cause):
    result = bench(target_folder, prompts, tmp_path, *options)
    assert result.exit_code == 1
    assert cause in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


TRAIN = "train --target TARGET --prompts PROMPTS --output OUT"


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("train --target x.gguf --prompts PROMPTS --output OUT", "`x.gguf` does not exist"),
        ("train --target TARGET --output OUT", "nothing to train on"),
        ("train --target TARGET --prompts BAD --output OUT", "line 1: not valid JSON"),
        (f"{TRAIN} --mask-token <none>", "'<none>'"),
        (f"{TRAIN} --weight code=2", "`--weights` names 'code', but the sources are ['prompts']"),
        (f"{TRAIN} --weight prompts", "expected NAME=WEIGHT such as `code=2.0`, got 'prompts'"),
        (f"{TRAIN} --depth-gamma 0", "`--depth-gamma` is 0.0, expected more than 0"),
        ("train --target TARGET --answers PROMPTS --output OUT", "line 1: expected `prompt_ids` and `answer_ids`"),
        ("bench --target TARGET --head TARGET --prompts PROMPTS", "no draft head of a known layout"),
        ("bench --target TARGET --head nowhere/at/all --prompts PROMPTS", "nowhere/at/all"),
        ("bench --target HEAD --head HEAD --prompts PROMPTS", "is a draft head, not a model that generates text"),
        ("train --target HEAD --prompts PROMPTS --output OUT", "is a draft head, not a model that generates text"),
        (
            "train --target TARGET --prompts PROMPTS --output PROMPTS",
            "prompts.jsonl is a file; give a path",
        ),
        (
            "train --target TARGET --prompts PROMPTS --output PROMPTS/run",
            "prompts.jsonl is a file; give a path",
        ),
        ("simulate --target TARGET --head HEAD --acceptance OTHER", "`--acceptance"),
        (
            "simulate --target TARGET --head HEAD --acceptance RANKS --hardware h200",
            "`--hardware` is 'h200', expected one",
        ),
        ("simulate --target TARGET --head HEAD --acceptance RANKS --hardware OTHER", "figures ['x']"),
        ("bench --target x.gguf --head HEAD --prompts no.jsonl", "no.jsonl does not exist"),
        ("plot PROMPTS x.png", "is not valid JSON"),
        ("plot nowhere.json x.png", "nowhere.json does not exist; give the path of a JSON file"),
    ],
)
@pytest.mark.usefixtures("saved_head")
def test_a_user_error_is_one_line_with_its_cause_and_status_one(target_folder, prompts, tmp_path, command, cause):
    paths = {"TARGET": target_folder, "PROMPTS": prompts, "OUT": tmp_path / "out", "HEAD": tmp_path / "head"}
    paths["BAD"] = write_lines(tmp_path / "bad.jsonl", "{not json}")
    paths["OTHER"] = write_lines(tmp_path / "other.json", {"x": 1})
    paths["RANKS"] = write_lines(tmp_path / "ranks.json", {"acceptance_by_rank": {"x": [[0.5]]}})
    paths["PROMPTS/run"] = prompts / "run"
    result = run_command(*(paths.get(argument, argument) for argument in command.split()))
    assert result.exit_code == 1
    assert cause in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("out/answers.jsonl")), "answers were made before the refusal"


@pytest.mark.parametrize(
    "command", ["train --target", "bench --target", "doctor --target", "plot bench.json", "simulate --target"]
)
def test_help_of_each_command_shows_an_example(command):
    result = run_command(command.split()[0], "--help")
    assert result.exit_code == 0
    assert f"hf-jetflow {command}" in result.output


SIZES = "batch-size accumulation anchors max-steps save-steps generation-batch-size num-layers num-taps max-new-tokens"


@pytest.mark.parametrize("option", [f"--{name}" for name in [*SIZES.split(), "eval-num-prompts"]])
def test_a_number_that_is_too_small_is_refused_before_anything_is_loaded(prompts, option):
    result = run_command("train", "--target", "nowhere", "--output", "run", "--prompts", prompts, option, 0)
    assert result.exit_code == 1
    assert result.output == f"error: `{option}` is 0, expected at least 1\n"


def test_a_quiet_training_says_only_where_the_head_is_and_warnings(target_folder, prompts, tmp_path):
    made = write_lines(tmp_path / "made.jsonl", *MADE_ELSEWHERE)
    result = train(target_folder, prompts, tmp_path / "run", 2, "--answers", made, "--quiet")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert text.startswith("warning: ")
    assert text.endswith(f"head saved in {tmp_path / 'run'}")
    assert not [word for word in ("updates", "answers regenerated", "Loading", "%|") if word in result.output]


@pytest.mark.usefixtures("saved_head")
def test_a_quiet_conversion_says_what_it_left_out(target_folder, tmp_path):
    arguments = ["convert", tmp_path / "head", "--to", "dflash", "--target", target_folder, "--quiet", "--output"]
    result = run_command(*arguments, tmp_path / "converted")
    assert result.exit_code == 0, result.output
    assert result.output.split() == f"head in the layout of dflash saved in {tmp_path / 'converted'}".split()


def test_a_package_that_loading_needs_is_named_without_a_traceback(monkeypatch, prompts):
    def refuse(*_):
        raise JetFlowError("GGUF files need gguf, which is not installed; run `pip install gguf`")

    monkeypatch.setattr("hf_jetflow.target.loading.load_target", refuse)
    monkeypatch.setattr("hf_jetflow.target.loading.load_head", lambda *_: None)
    result = run_command("bench", "--target", "x", "--head", "head", "--prompts", str(prompts))
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "loading x and head ...",
        "error: GGUF files need gguf, which is not installed; run `pip install gguf`",
    ]


def test_an_interrupted_bench_says_how_to_go_on_and_the_next_one_that_it_does(monkeypatch, prompts, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_jetflow.target.loading.load_target", interrupt)
    monkeypatch.setattr("hf_jetflow.target.loading.load_head", lambda *_: None)
    partial = tmp_path / "bench.json.partial"
    partial.write_text('{"settings": {}}\n{"key": [], "record": 1}\n{"key": [1], "record": 2}\n')
    command = ["bench", "--target", "x", "--head", "head", "--prompts", prompts, "--json", tmp_path / "bench.json"]
    result = run_command(*command)
    assert result.exit_code == 130
    assert result.output.splitlines() == [
        f"continuing after 2 measurements in {partial}",
        "loading x and head ...",
        "interrupted; with --json, the same command continues after the last finished answer",
    ]
