"""The doctor: a good head has no fault, and every mistake in reading it is named with a fix that works."""

import copy
import functools
import json
from typing import Any

import pytest
import torch
from conftest import build_target
from helpers import run_command, save_pair, tiny_tokenizer, word, write_lines
from torch.nn.functional import cross_entropy

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.decoding.drafter import JetFlowCandidateGenerator
from hf_jetflow.doctor import doctor
from hf_jetflow.doctor.doctor import examine
from hf_jetflow.doctor.mistakes import encode, with_fields
from hf_jetflow.doctor.verdict import find_advice
from hf_jetflow.prompts import encode_chat
from hf_jetflow.target.prefilled import TargetStates
from hf_jetflow.target.target import Target
from hf_jetflow.training import replay as replay_module
from hf_jetflow.training.blocks import draft_blocks
from hf_jetflow.training.optimizer import MuonAdamW
from hf_jetflow.training.replay import answer_logprobs, replay


NUM_NEW, WINDOW = 20, 8
WORDS = [[10 + 7 * number, 20 + 11 * number, 30 + 5 * number] for number in range(4)]
CONVERSATIONS = [[{"role": "user", "content": " ".join(map(word, words))}] for words in WORDS]
TOKENIZER = tiny_tokenizer(257)
PLAIN_TEXTS: dict[tuple[int, ...], list[int]] = {}
SLOW = pytest.mark.slow
FULL, SLIDING = ["full_attention"] * 2, ["sliding_attention"] * 2


@pytest.fixture(autouse=True)
def plain_texts(monkeypatch):
    """The shared target decodes a plain text once for all tests."""
    decode = doctor.greedy_ids

    def greedy_ids(target, ids, max_new_tokens, assistant_model=None):
        if assistant_model is not None or target is not build_target("llama"):
            return decode(target, ids, max_new_tokens, assistant_model=assistant_model)
        key = (*ids, max_new_tokens)
        if key not in PLAIN_TEXTS:
            PLAIN_TEXTS[key] = decode(target, ids, max_new_tokens)
        return list(PLAIN_TEXTS[key])

    monkeypatch.setattr(doctor, "greedy_ids", greedy_ids)


@functools.cache
def good_head(**config: Any) -> JetFlowHead:
    """
    A head that memorized the target's answers to `CONVERSATIONS`, and drafts them only if it is read correctly: with
    flipped causality it is trained to give other tokens.
    """
    target = copy.deepcopy(build_target("llama")).requires_grad_(
        False
    )  # shared with other tests, which need no gradients
    prompts = [torch.tensor([encode_chat(TOKENIZER, messages)]) for messages in CONVERSATIONS]
    ids = torch.cat([target.generate(prompt, max_new_tokens=NUM_NEW, do_sample=False) for prompt in prompts])
    num_prompt = prompts[0].shape[1]
    settings = dict(num_hidden_layers=2, block_size=6, mask_token_id=0, hidden_state_indices=[2, 4], is_causal=True)
    if "sliding_window" in config:
        settings["layer_types"] = SLIDING
    torch.manual_seed(0)
    head = JetFlowHead(JetFlowConfig.for_target(target.config, **{**settings, **config}))
    flipped = with_fields(head, {"is_causal": not head.config.causal_layers[0]})
    optimizer = MuonAdamW(head, 2e-2, 3e-3)
    anchors = torch.arange(num_prompt, ids.shape[1] - 1).expand(len(ids), -1)
    inputs = {"input_ids": ids, "lengths": torch.full((len(ids),), ids.shape[1]), "anchors": anchors}
    view = Target(target, head.config)
    features, last_states = view.states(ids)
    projection = target.get_output_embeddings().weight.detach()
    for _ in range(40):
        loss = torch.zeros(())
        for model, shift in ((head, 0), (flipped, 7)):
            drafted = draft_blocks(model, model, view, inputs, features, last_states)
            scored = drafted.has_target
            loss = loss + cross_entropy(drafted.rows[scored] @ projection.T, (drafted.tokens[scored] + shift) % 257)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


def with_own_lm_head(head: JetFlowHead, weight: torch.Tensor) -> JetFlowHead:
    other = JetFlowHead(JetFlowConfig.from_dict({**head.config.to_dict(), "own_lm_head": True}))
    other.load_state_dict({**head.state_dict(), "lm_head.weight": weight})
    return other


def saved(head: JetFlowHead, folder, **fields: Any):
    """The folder of the head, with other fields in its config.json."""
    head.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def diagnose(folder, target=None, tokenizer=TOKENIZER, conversations=CONVERSATIONS) -> dict[str, Any]:
    head = JetFlowHead.from_pretrained(folder)
    target = target or build_target("llama")
    return examine(target, tokenizer, head, conversations, max_new_tokens=NUM_NEW, head_name=str(folder))


def tokens_per_round(head: JetFlowHead) -> float:
    target = build_target("llama")
    prompts = [encode(TOKENIZER, messages) for messages in CONVERSATIONS]
    plain = [target.generate(torch.tensor([ids]), max_new_tokens=NUM_NEW, do_sample=False) for ids in prompts]
    texts = [(text[0].tolist(), len(ids)) for text, ids in zip(plain, prompts, strict=True)]
    return replay(Target(target, head.config), head, texts, [32])[32].tokens_per_round


def test_a_good_head_has_no_fault(tmp_path):
    findings = diagnose(saved(good_head(), tmp_path))
    assert findings["faults"] == []
    assert findings["advice"] == []
    assert findings["as_loaded"]["tokens_per_round"] > 4
    assert [each["first_difference"] for each in findings["compared"]] == [None, None]
    assert {each["name"] for each in findings["mistakes"]} >= {"causality", "taps"}
    assert not any(each["is_better"] for each in findings["mistakes"])


def test_a_head_of_another_kind_of_target_is_advised_against():
    facts = {"head": {"trained_for_model_type": "qwen3"}, "target": {"model_type": "llama"}}
    advice = list(find_advice({"facts": facts, "prompt_forms": [], "faults": []}))
    assert advice == ["the head was trained for a qwen3 model, the target is a llama"]


FAULTS = {
    "causal as bidirectional": ("causality", {}, {"is_causal": [False, False]}, {"is_causal": True}),
    "bidirectional as causal": ("causality", {"is_causal": False}, {"is_causal": True}, {"is_causal": False}),
    "taps one too late": ("taps", {}, {"hidden_state_indices": [3, 5]}, {"hidden_state_indices": [2, 4]}),
    "taps one too early": ("taps", {}, {"hidden_state_indices": [1, 3]}, {"hidden_state_indices": [2, 4]}),
    "a window that is ignored": (
        "window", {"sliding_window": WINDOW}, {"layer_types": FULL}, {"layer_types": SLIDING, "sliding_window": WINDOW}
    ),
    "a window that is not there": (
        "window", {}, {"layer_types": SLIDING, "sliding_window": 4}, {"layer_types": FULL}
    ),
    "scaled rope": (
        "rope",
        {},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "another mask token": ("mask token", {}, {"mask_token_id": 5}, {"mask_token_id": 0}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_the_config_is_named_and_its_fix_works(fault, tmp_path, monkeypatch):
    name, trained, changed, undone = FAULTS[fault]
    findings = diagnose(saved(good_head(**trained), tmp_path / "head", **changed))
    (found,) = findings["faults"]
    assert found["mistake"] == name, found["message"]
    best = max(findings["mistakes"], key=lambda each: each["logprob"])
    assert best["fields"] == undone
    monkeypatch.chdir(tmp_path)
    exec("\n".join(found["fix"]))
    assert tokens_per_round(JetFlowHead.from_pretrained("fixed-head")) == tokens_per_round(good_head(**trained))


@functools.cache
def selecting_head() -> JetFlowHead:
    """The good head with almost flat logits and a selector that memorized which token follows which."""
    target, head = build_target("llama"), good_head()
    more = {"branch_correction": "selector", "first_corrected_depth": 0, "branch_rank": 32, "branch_top_k": 257}
    fields = {**head.config.to_dict(), **more, "branch_candidates": 257, "logit_scale": 0.02, "ngram_weights": []}
    other = JetFlowHead(JetFlowConfig.from_dict(fields)).eval()
    other.load_state_dict(head.state_dict(), strict=False)
    texts = []
    for messages in CONVERSATIONS:
        ids = encode(TOKENIZER, messages)
        text = target.generate(torch.tensor([ids]), max_new_tokens=NUM_NEW, do_sample=False)[0].tolist()
        texts.append((text, len(ids)))
    drafter = JetFlowCandidateGenerator(other, Target(target, other.config))
    pairs = []  # rows, the token before and the token itself
    for text, num_prompt in texts:
        rows = replay_module._rows_of_all_anchors(drafter, text, num_prompt).detach()
        for anchor, of_anchor in enumerate(rows, num_prompt):
            for depth, row in enumerate(of_anchor[: len(text) - anchor - 1]):
                pairs.append((row, text[anchor + depth], text[anchor + depth + 1]))
    rows = torch.stack([row for row, _, _ in pairs])
    before, after = torch.tensor([pair[1:] for pair in pairs]).T
    scorer = other.branch_correction
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=0.02)
    with torch.enable_grad():
        for _ in range(120):
            queries = scorer.predecessor_codebook[before] * scorer.hidden_projection(rows)
            loss = cross_entropy(queries @ scorer.successor_codebook.T, after)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return other


def test_a_good_selector_has_no_fault(tmp_path):
    findings = diagnose(saved(selecting_head(), tmp_path))
    assert findings["faults"] == []
    assert findings["as_loaded"]["tokens_per_round"] > 3
    assert {each["name"] for each in findings["mistakes"]} >= {"first depth", "selector", "layout", "context norm"}


@pytest.mark.parametrize(
    "fault", ["first depth", *(pytest.param(name, marks=SLOW) for name in ("selector", "layout"))]
)
def test_a_mistake_in_reading_a_selector_is_named_and_its_fix_works(fault, tmp_path, monkeypatch):
    head = copy.deepcopy(selecting_head())
    changed = {
        "first depth": {"first_corrected_depth": 1},
        "selector": {},
        "layout": {"anchor_predicts": True, "block_size": head.config.block_size + 1},
    }[fault]
    if fault == "selector":
        scorer = head.branch_correction
        first, second = scorer.predecessor_codebook, scorer.successor_codebook
        scorer.predecessor_codebook, scorer.successor_codebook = second, first
    (found,) = diagnose(saved(head, tmp_path / "head", **changed))["faults"]
    assert found["mistake"] == fault, found["message"]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(found["fix"]))
    assert tokens_per_round(JetFlowHead.from_pretrained("fixed-head")) == tokens_per_round(selecting_head())


def test_norms_that_are_all_ones_are_noticed(tmp_path):
    head = copy.deepcopy(good_head())
    for name, parameter in head.named_parameters():
        if parameter.ndim == 1:
            assert "norm" in name
            parameter.data.fill_(1.0)
    (found,) = diagnose(saved(head, tmp_path))["faults"]
    lines = [found["message"], *found["fix"]]
    assert any("norms are exactly 1" in line for line in lines)


def test_a_head_that_was_trained_without_a_norm_of_the_taps_is_noticed(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(JetFlowHead, "_fuse", lambda head, features: head.fc(features))
        head = good_head.__wrapped__()
    (found,) = diagnose(saved(head, tmp_path))["faults"]
    assert found["mistake"] == "context norm", found["message"]
    assert "head.hidden_norm = torch.nn.Identity()" in "".join(found["fix"])


def test_an_lm_head_of_another_model_is_named_and_the_fix_removes_it(tmp_path, monkeypatch):
    weight = build_target("llama").get_output_embeddings().weight.detach().roll(1, dims=0)
    findings = diagnose(saved(with_own_lm_head(good_head(), weight), tmp_path / "head"))
    (found,) = findings["faults"]
    assert found["mistake"] == "LM head"
    monkeypatch.chdir(tmp_path)
    exec("\n".join(found["fix"]))
    assert tokens_per_round(JetFlowHead.from_pretrained("fixed-head")) == tokens_per_round(good_head())


def test_an_untrained_head_does_not_fit(tmp_path, tiny_target, random_head):
    findings = diagnose(saved(random_head(tiny_target("llama")), tmp_path))
    (found,) = findings["faults"]
    assert found["mistake"] == "no fit"
    assert "does not fit this target" in found["message"]


def test_a_head_for_another_target_is_refused_by_name_before_anything_is_decoded(tmp_path, tiny_target):
    findings = diagnose(saved(good_head(), tmp_path), tiny_target("llama", num_hidden_layers=4))
    (found,) = findings["faults"]
    assert found["mistake"] == "pairing"
    assert "number of layers 5, but this target has 4" in found["message"]
    assert "as_loaded" not in findings


def template(text: str) -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = text
    return tokenizer


def test_prompts_that_need_the_thinking_switch_are_detected(tmp_path):
    switched = template(TOKENIZER.chat_template + "{% if enable_thinking is not false %} t006{% endif %}")
    (found,) = diagnose(saved(good_head(), tmp_path), tokenizer=switched)["faults"]
    assert found["mistake"] == "chat template"
    assert "enable_thinking=False" in found["message"]


def test_prompts_that_need_no_template_are_detected(tmp_path):
    plain = [[{"role": "user", "content": f"t003 {' '.join(map(word, words))} t004 t005"}] for words in WORDS]
    (found,) = diagnose(saved(good_head(), tmp_path), conversations=plain)["faults"]
    assert found["mistake"] == "chat template"
    assert "no chat template" in found["message"]


def test_a_tokenizer_without_template_works(tmp_path):
    plain = [[{"role": "user", "content": f"t003 {' '.join(map(word, words))} t004 t005"}] for words in WORDS]
    findings = diagnose(saved(good_head(), tmp_path), tokenizer=template(""), conversations=plain)
    assert findings["faults"] == []
    assert findings["prompt_forms"] == []


def test_too_few_answers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least 3 prompts"):
        diagnose(saved(good_head(), tmp_path), conversations=CONVERSATIONS[:2])


def test_windows_longer_than_all_texts_are_reported_as_untested(tmp_path):
    findings = diagnose(saved(good_head(), tmp_path, sliding_window=64))
    assert findings["untested"] == [
        "sliding windows: no text is longer than the window of 64 tokens; give longer prompts"
    ]
    assert diagnose(saved(good_head(), tmp_path, sliding_window=16))["untested"] == []


@pytest.mark.parametrize(
    ("dtype", "near_tie", "is_fault"), [("float32", 1e9, True), ("bfloat16", 1e9, False), ("bfloat16", 0.0, True)]
)
def test_different_text_is_a_fault_unless_a_near_tie_explains_it(dtype, near_tie, is_fault, tmp_path, monkeypatch):
    def generate(*args: Any, assistant_model: Any = None) -> list[int]:
        ids = plain_generate(*args)
        return ids if assistant_model is None else [*ids[:3], (ids[3] + 1) % 257, *ids[4:]]

    plain_generate = doctor.greedy_ids
    monkeypatch.setattr(doctor, "greedy_ids", generate)
    monkeypatch.setattr(doctor, "NEAR_TIE", near_tie)
    target = copy.deepcopy(build_target("llama")).to(getattr(torch, dtype))
    head = copy.deepcopy(good_head()).to(target.dtype)
    findings = examine(target, TOKENIZER, head, CONVERSATIONS, max_new_tokens=NUM_NEW)
    assert [each["first_difference"] for each in findings["compared"]] == [3, 3]
    assert all(each["margin"] > 0 for each in findings["compared"])
    assert ("text" in [fault["mistake"] for fault in findings["faults"]]) == is_fault


OWN = {"own_embedding": True, "own_lm_head": True, "anchor_predicts": True, "logit_scale": 2.0, "is_causal": False}


@pytest.mark.parametrize(
    "config", [{}, {"draft_vocab_size": 200}, OWN], ids=["plain", "draft vocabulary", "all its own"]
)
def test_answers_are_scored_like_drafts(config, tiny_target, random_head, prompt):
    target, head = tiny_target("llama"), random_head(tiny_target("llama"), ngram_weights=[], **config)
    if "draft_vocab_size" in config:
        head.d2t.copy_(torch.arange(20, 220))
    view, num_prompt, num_depths = Target(target, head.config), prompt.shape[1], head.config.block_size - 1
    text = target.generate(prompt, max_new_tokens=9, do_sample=False)
    features, _ = view.states(text)
    expected = []
    for position in range(num_prompt, text.shape[1] - 1):
        drafter = JetFlowCandidateGenerator(head, view)
        drafter.observe(TargetStates(torch.empty(1, 0), (features[:, :position],), torch.arange(position)[None]))
        draft = drafter.propose(text[:, position : position + 1], torch.tensor([position]), num_depths, width=257)
        drafted = draft.candidates
        for depth, token in enumerate(text[0, position + 1 : position + 1 + num_depths].tolist()):
            expected += drafted.logprobs[0, depth][drafted.tokens[0, depth] == token].tolist()
    scores = answer_logprobs(view, head, text[0].tolist(), num_prompt)
    assert len(scores) > 15
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.fixture
def files(tmp_path):
    save_pair(tmp_path, build_target("llama"))
    write_lines(tmp_path / "prompts.jsonl", *({"messages": messages} for messages in CONVERSATIONS))
    return tmp_path


def run(files, *more: Any):
    arguments = ["--target", files / "target", "--head", files / "head", "--prompts", files / "prompts.jsonl"]
    return run_command("doctor", *arguments, "--max-new-tokens", NUM_NEW, "--dtype", "float32", *more)


def test_the_command_prints_facts_figures_and_a_verdict_and_exits_with_zero(files):
    saved(good_head(), files / "head")
    result = run(files, "--json", files / "out" / "doctor.json")
    assert result.exit_code == 0, result.output
    for expected in (
        "causal (from `is_causal`)",
        "[2, 4]",
        "taps +1: [3, 5]",
        "No fault found",
        f"This rests on {len(CONVERSATIONS)} answers. More prompts, from your own task, tell more: --prompts FILE",
        "tokens equal plain decoding",
    ):
        assert expected in result.output
    findings = json.loads((files / "out" / "doctor.json").read_text())
    assert findings["faults"] == []
    assert findings["facts"]["layout"]["layout"] == "JetFlow"
    assert findings["facts"]["target"]["num_layers"] == 5
    assert findings["settings"]["head"] == str(files / "head")
    assert len(findings["as_loaded"]["by_prompt"]) == len(CONVERSATIONS)
    assert len(findings["as_loaded"]["acceptance_by_depth"]) >= 5
    assert {"environment", "compared", "mistakes", "prompt_forms", "untested", "advice"} <= findings.keys()
    assert [path.name for path in (files / "out").iterdir()] == ["doctor.json"]


def test_the_command_names_a_fault_with_its_fix_and_exits_with_one(files):
    saved(good_head(), files / "head", hidden_state_indices=[3, 5])
    result = run(files, "--quiet")
    assert result.exit_code == 1
    assert "FAULT (taps): the tapped layers are off by one" in result.output
    assert f"head = JetFlowHead.from_pretrained('{files / 'head'}', hidden_state_indices=[2, 4])" in result.output
    assert "as loaded, accepted by depth" not in result.output


def test_a_pair_that_does_not_fit_has_its_facts_in_the_json_and_status_one(files, tiny_target):
    saved(good_head(), files / "head")
    tiny_target("llama", num_hidden_layers=4).save_pretrained(files / "target")
    result = run(files, "--json", files / "doctor.json")
    assert result.exit_code == 1
    assert "FAULT (pairing): the head expects a target with number of layers 5" in " ".join(result.output.split())
    assert json.loads((files / "doctor.json").read_text())["facts"]["head"]["block_size"] == 6


@pytest.mark.parametrize(
    ("options", "cause"), [([], "has no config.json"), (["--dtype", "int3"], "'int3'"), (["--warp"], "--warp")]
)
def test_an_impossible_examination_exits_with_two(files, options, cause):
    (files / "head").mkdir()
    result = run(files, *options)
    assert result.exit_code == 2
    assert cause in " ".join(result.output.split())
    assert "Traceback" not in result.output
