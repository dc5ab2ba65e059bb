"""Writing heads in other layouts: tensors keep every bit, drafts stay the same, dropped parts are reported."""

import json
from pathlib import Path
from typing import Any

import make_layouts as make
import make_scored_layouts as scored
import pytest
import torch
from helpers import run_command
from safetensors.torch import load_file
from test_layouts import chains

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.convert.convert import LAYOUT_NAMES, convert_head


YARN = dict(rope_type="yarn", rope_theta=900.0, factor=4.0, original_max_position_embeddings=128)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=64)
HEADS: dict[str, dict[str, Any]] = {
    "causal": dict(is_causal=True),
    "bidirectional": dict(is_causal=False),
    "sliding": dict(is_causal=[True, False], **SLIDING),
    "yarn": dict(rope_parameters=YARN),
    "biases": dict(attention_bias=True, rms_norm_eps=1e-5),
    "embeddings tapped": dict(hidden_state_indices=[0, 5]),
}


@pytest.fixture(scope="module")
def target_folder(target, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    target.save_pretrained(folder)
    return folder


def saved_head(folder: Path, **settings: Any) -> JetFlowHead:
    """A saved head of random weights, in bfloat16."""
    fields = {k: v for k, v in make.jetflow(True).items() if k in JetFlowConfig.__dataclass_fields__}
    head = JetFlowHead(JetFlowConfig(**{**fields, "layer_types": None, "dtype": "bfloat16", **settings})).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    if head.config.draft_vocab_size is not None:
        head.d2t.copy_(torch.arange(0, 2 * head.config.draft_vocab_size, 2))
    head.to(torch.bfloat16).save_pretrained(folder)
    return head


def converted(tmp_path: Path, to: str, target: Path | None = None, **settings: Any) -> tuple[JetFlowHead, list[str]]:
    dropped = convert_head(str(tmp_path / "head"), to, tmp_path / to, None if target is None else str(target))
    return JetFlowHead.from_pretrained(tmp_path / to, dtype="auto", **settings).eval(), dropped


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("to", LAYOUT_NAMES)
def test_a_head_goes_to_another_layout_and_back_bit_for_bit(tmp_path, target_folder, to, kind):
    if (to, kind) == ("jetspec", "sliding"):
        pytest.skip("refused, see below")
    head = saved_head(tmp_path / "head", **HEADS[kind])
    back, dropped = converted(tmp_path, to, target_folder)
    assert dropped == []
    ours, theirs = head.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"head", to})
    for name in (
        "causal_layers",
        "layer_windows",
        "hidden_state_indices",
        "block_size",
        "mask_token_id",
        "vocab_size",
    ):
        assert getattr(back.config, name) == getattr(head.config, name), name
    assert {k: v for k, v in back.config.rope_parameters.items() if k in YARN} == head.config.rope_parameters
    assert (back.config.rms_norm_eps, back.config.embedding_scale in (None, 1.0)) == (head.config.rms_norm_eps, True)


@pytest.mark.parametrize("to", LAYOUT_NAMES)
def test_a_converted_head_drafts_the_same_tokens(tmp_path, target, target_folder, to):
    head = saved_head(tmp_path / "head").float()
    back, _ = converted(tmp_path, to, target_folder, is_causal=True)
    assert chains(back.float(), target) == chains(head, target)


@pytest.mark.parametrize("to", [name for name in LAYOUT_NAMES if name != "jetflow"])
def test_a_branch_correction_is_dropped_and_said_to_be(tmp_path, target, target_folder, to):
    head = saved_head(tmp_path / "head", branch_correction="path").float()
    back, dropped = converted(tmp_path, to, target_folder)
    assert dropped == ["the branch correction (path): all branches of a depth share one distribution there"]
    assert not any("branch" in name for name in load_file(tmp_path / to / "model.safetensors"))
    with_it = chains(head, target)
    head.branch_correction = None
    assert chains(back.float(), target) == chains(head, target) != with_it


def test_our_own_layout_holds_a_branch_correction(tmp_path):
    head = saved_head(tmp_path / "head", branch_correction="parent")
    back, dropped = converted(tmp_path, "jetflow")
    assert dropped == []
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in head.state_dict().items())


WRITTEN_BACK = {
    "DFlash 2": "dflash",
    "DFlash 2, scaled": "dflash",
    "speculators dflash2": "speculators",
    "DSpark, SpecForge": "dflash",
    "DSpark, ModelOpt": "dflash",
    "speculators dspark": "speculators",
    "speculators dspark, anchor predicts nothing": "speculators",
    "speculators dspark, recurrent": "speculators",
    "speculators dspark, reduced vocabulary": "speculators",
}
RENAMED = {"logit_head.": "", "markov_w": "markov_head.markov_w", "confidence_proj": "confidence_head.proj"}


def by_usual_name(name: str) -> str:
    """The name that SpecForge and z-lab give a tensor of their older files and of ModelOpt's."""
    old = next((old for old in RENAMED if name.startswith(old)), "")
    return (RENAMED.get(old, "") + name.removeprefix(old)).replace("codebook.weight", "codebook")


@pytest.mark.parametrize("name", WRITTEN_BACK)
def test_a_head_that_scores_branches_is_written_back_bit_for_bit(tmp_path, target, target_folder, name):
    config, tensors = scored.CHECKPOINTS[name]()
    theirs = make.load(tmp_path / "head", config, tensors, ngram_weights=[])
    to = WRITTEN_BACK[name]
    back, dropped = converted(tmp_path, to, target_folder, ngram_weights=[])
    assert dropped == []
    written = load_file(tmp_path / to / "model.safetensors")
    expected = {by_usual_name(name): tensor for name, tensor in tensors.items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    again = json.loads((tmp_path / to / "config.json").read_text())
    for key, value in {**config, **again.get("dflash_config", {}), **config.get("dflash_config", {})}.items():
        if key in ("block_size", "markov_rank", "markov_head_type", "sample_from_anchor", "speculators_model_type"):
            assert again.get("dflash_config", again).get(key, again.get(key)) == value, key
    assert chains(back, target) == chains(theirs, target)


@pytest.mark.parametrize(
    ("name", "other"),
    [("DFlash 2", "speculators"), ("speculators dflash2", "dflash"), ("DSpark, SpecForge", "speculators")],
)
def test_a_head_that_scores_branches_goes_to_another_dialect(tmp_path, target, target_folder, name, other):
    theirs = make.load(tmp_path / "head", *scored.CHECKPOINTS[name](), ngram_weights=[])
    back, dropped = converted(tmp_path, other, target_folder, ngram_weights=[])
    assert dropped == []
    assert back.config.branch_correction == theirs.config.branch_correction
    assert chains(back, target) == chains(theirs, target)


@pytest.mark.parametrize("name", ["TreeFlash", "speculators xpress", "Domino, first depth uncorrected"])
def test_a_scorer_that_no_dialect_holds_is_dropped_and_said_to_be(tmp_path, target_folder, name):
    theirs = make.load(tmp_path / "head", *scored.CHECKPOINTS[name]())
    _, (what,) = converted(tmp_path, "dflash", target_folder)
    assert what.startswith(f"the branch correction ({theirs.config.branch_correction})")


@pytest.mark.parametrize(
    ("name", "to"), [("DFlare", "dflash"), ("DFly", "speculators"), ("DFlash 2", "jetspec")], ids=lambda value: value
)
def test_layers_that_no_dialect_holds_are_refused(tmp_path, target_folder, name, to):
    make.load(tmp_path / "head", *scored.CHECKPOINTS[name]())
    with pytest.raises(ValueError, match="cannot hold the head's convolutions or its mixtures of taps"):
        converted(tmp_path, to, target_folder)


@pytest.mark.parametrize("to", ["jetspec", "dflash"])
def test_a_draft_vocabulary_is_dropped_where_there_is_no_place_for_it(tmp_path, to):
    saved_head(tmp_path / "head", draft_vocab_size=40)
    back, (what,) = converted(tmp_path, to)
    assert what.startswith("the draft vocabulary of 40 tokens")
    assert back.config.draft_vocab_size is None


def test_speculators_stores_the_target_s_rows_of_a_draft_vocabulary(tmp_path, target, target_folder):
    head = saved_head(tmp_path / "head", draft_vocab_size=40)
    back, dropped = converted(tmp_path, "speculators", target_folder)
    assert dropped == []
    assert torch.equal(back.d2t, head.d2t)
    rows = target.get_output_embeddings().weight[head.d2t].to(torch.bfloat16)
    assert torch.equal(back.lm_head.weight, rows)
    written = load_file(tmp_path / "speculators" / "model.safetensors")
    assert written["d2t"].tolist() == list(range(40))  # id 2 i at index i
    assert written["t2d"].nonzero()[:, 0].tolist() == head.d2t.tolist()


def test_a_third_party_head_is_converted_to_ours(tmp_path, target):
    tensors = {**make.body_tensors(), **make.own_tensors()}
    theirs = make.load(tmp_path / "head", make.deepspec(), tensors)
    ours, _ = converted(tmp_path, "jetflow")
    assert json.loads((tmp_path / "jetflow" / "config.json").read_text())["model_type"] == "jetflow"
    assert chains(ours, target) == chains(theirs, target)


def test_deepspec_s_heads_convert_to_speculators_completely(tmp_path, target, target_folder):
    theirs = make.load(tmp_path / "head", make.deepspec(), {**make.body_tensors(), **make.own_tensors()})
    back, dropped = converted(tmp_path, "speculators", target_folder)
    assert dropped == []
    assert chains(back, target) == chains(theirs, target)


def test_scales_and_soft_cap_go_to_dflash(tmp_path):
    saved_head(tmp_path / "head", embedding_scale=2.0, logit_scale=0.5, logit_softcap=20.0)
    back, _ = converted(tmp_path, "dflash")
    assert (back.config.embedding_scale, back.config.logit_scale, back.config.logit_softcap) == (2.0, 0.5, 20.0)


@pytest.mark.parametrize(
    ("to", "settings", "cause"),
    [
        ("jetspec", dict(mask_token_id=None), "cannot hold a learned mask embedding; train with --mask-token"),
        ("jetspec", HEADS["sliding"], "cannot hold layers of both kinds"),
        ("jetspec", dict(logit_softcap=3.0), "cannot hold a logit scale or soft cap"),
        ("jetspec", dict(embedding_scale=2.0), "cannot hold an `embedding_scale` of 2.0"),
        ("dflash", dict(own_lm_head=True), "cannot hold the head's own embedding or LM head"),
        ("dflash", dict(anchor_predicts=True), "an anchor row that predicts"),
        ("dflash", dict(is_causal=[True, False]), "cannot hold `is_causal` [True, False] with layers"),
        ("dflash", dict(num_target_layers=None), "lacks; give --target"),
        ("speculators", dict(logit_scale=2.0, target_name="a/b"), "cannot hold a logit scale or soft cap"),
        ("speculators", dict(embedding_scale=2.0, target_name="a/b"), "cannot hold an `embedding_scale` of 2.0"),
        ("speculators", dict(target_name=None), "speculators stores the target's name"),
        ("speculators", dict(target_name="a/b", draft_vocab_size=40), "give --target to copy its rows from"),
        ("speculators", dict(target_name="a/b", is_causal=[True, True], **SLIDING), "cannot hold `is_causal`"),
        ("eagle", {}, "the layout is 'eagle', expected one of jetflow, jetspec, dflash, speculators"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_a_layout_cannot_hold_is_refused_and_nothing_is_written(tmp_path, to, settings, cause):
    saved_head(tmp_path / "head", **settings)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the parameters match the message
        convert_head(str(tmp_path / "head"), to, tmp_path / "out")
    assert cause in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_a_target_that_scales_its_embeddings_is_noticed(tmp_path, tiny_target):
    gemma = tiny_target("gemma2")
    gemma.save_pretrained(tmp_path / "gemma")
    saved_head(tmp_path / "head")
    for to in ("dflash", "speculators"):
        with pytest.raises(ValueError, match="the scale that this target's embedding module applies"):
            convert_head(str(tmp_path / "head"), to, tmp_path / to, str(tmp_path / "gemma"))
    assert convert_head(str(tmp_path / "head"), "jetspec", tmp_path / "jetspec", str(tmp_path / "gemma")) == []


def test_a_target_that_does_not_fit_is_refused(tmp_path, tiny_target):
    tiny_target("qwen2", num_hidden_layers=3).save_pretrained(tmp_path / "other")
    saved_head(tmp_path / "head")
    with pytest.raises(ValueError, match=r"expects a target with number of layers 5, but .* has 3"):
        convert_head(str(tmp_path / "head"), "dflash", tmp_path / "out", str(tmp_path / "other"))


def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path):
    saved_head(tmp_path / "head")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already; give a new folder"):
        convert_head(str(tmp_path / "head"), "dflash", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_the_command_writes_a_head_and_says_what_is_dropped(tmp_path, target_folder):
    saved_head(tmp_path / "head", branch_correction="path")
    arguments = ["convert", tmp_path / "head", "--to", "speculators", "--target", target_folder]
    result = run_command(*arguments, "--output", tmp_path / "new" / "out")
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "left out: the branch correction (path)" in output
    assert "head in the layout of speculators saved in" in output
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    saved_head(tmp_path / "head")
    result = run_command("convert", tmp_path / "head", "--to", "medusa", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "error: argument --to: invalid choice: 'medusa'" in " ".join(result.output.split())
