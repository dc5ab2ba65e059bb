"""Parity with other implementations: heads that they save, read by us, and heads that we write, read by them.

    make parity

creates a separate environment with the packages `dflash` and `speculators`, which need other versions than ours, and
runs this file in it. Heads and target are small and random, in float32 on the CPU. Each row of the result compares the
logits of all drafted rows after several prompts, and the chains drafted from them, between their model and ours. The
exit status is 1 if a difference is above 1e-4.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from hf_jetflow import JetFlowCandidateGenerator, JetFlowConfig, JetFlowHead
from hf_jetflow.convert.convert import convert_head
from hf_jetflow.target.prefilled import TargetStates
from hf_jetflow.target.target import Target


TOLERANCE = 1e-4
VOCAB, HIDDEN, TARGET_LAYERS, BLOCK, MASK, LENGTH = 257, 64, 5, 8, 3, 512
LAYER_IDS = [1, 3]  # entries 2 and 4 of `hidden_states`
PROMPTS = (9, 14, 23)  # lengths, anchor included
BODY: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=LENGTH,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    layer_types=["full_attention"] * 2,
)
WINDOWED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=12, use_sliding_window=True)
Logits = Callable[
    [torch.Tensor, torch.Tensor], torch.Tensor
]  # ids (1, seq), features of all but the last -> (depth, ...)


Chain = Callable[[torch.Tensor, torch.Tensor], list[int]]  # of the same, the tokens drafted
WHOLE: dict[str, Any] = {"branch_candidates": VOCAB, "ngram_weights": []}  # compare the heads alone


def small_target(folder: Path) -> PreTrainedModel:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "llama",
        **{key: BODY[key] for key in BODY if key not in ("num_hidden_layers", "layer_types", "rope_parameters")},
        num_hidden_layers=TARGET_LAYERS,
        tie_word_embeddings=False,
    )
    target = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3 if "embed" in name else 10)
    target.save_pretrained(folder)
    return target


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Give every tensor of a head random values, norms included, but not those of the target."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if not any(part in name for part in ("verifier", "embed_tokens", "lm_head")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))


# --- the two sides ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def our_logits(target: PreTrainedModel, head: JetFlowHead, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (depth, draft_vocab) of our drafter, with the whole draft vocabulary as candidates."""
    drafter = JetFlowCandidateGenerator(head, Target(target, head.config))
    position = ids.shape[1] - 1
    drafter.observe(TargetStates(torch.empty(1, 0, VOCAB), (features,), torch.arange(position)[None]))
    draft = drafter.propose(ids[:, -1:], torch.tensor([position]), head.config.block_size - 1, width=VOCAB)
    candidates = draft.candidates
    known = torch.arange(VOCAB) if head.draft_token_ids is None else head.draft_token_ids
    by_token = torch.full((head.config.block_size - 1, VOCAB), float("-inf")).scatter(
        1, candidates.tokens[0], candidates.logprobs[0]
    )
    return by_token[:, known]


def dflash_rows(target: PreTrainedModel, model: Any, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Rows (1, block_size, hidden) of a block of theirs."""
    from dflash.model import _draft_value, _raw_input_embeddings

    block = torch.tensor([[int(ids[0, -1])] + [model.mask_token_id] * (model.block_size - 1)])
    scale = float(_draft_value(model.config, "input_embedding_scale", 1.0))
    return model(
        target_hidden=features,
        noise_embedding=_raw_input_embeddings(target, block, scale),
        position_ids=torch.arange(ids.shape[1] - 1 + model.block_size)[None],
    )


def dflash_logits(target: PreTrainedModel, model: Any) -> Logits:
    @torch.no_grad()
    def logits(ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return model.compute_logits(dflash_rows(target, model, ids, features)[0, 1:], target.lm_head)

    return logits


@torch.no_grad()
def speculators_rows(model: Any, ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden rows (block_size, hidden) of a block of theirs and their logits (block_size, draft_vocab)."""
    # This is the forward of training: an anchor within a longer text, the rest of which the block must not see.
    anchor, length = ids.shape[1] - 1, ids.shape[1] + model.block_size
    text = torch.cat([ids, ids.new_full((1, length - ids.shape[1]), 7)], dim=1)
    shown = torch.cat([features, torch.randn(1, length - anchor, features.shape[-1])], dim=1)
    is_anchor = (torch.arange(length) == anchor)[None]
    hidden, drafted, *_ = model._backbone_forward(
        shown,
        text,
        is_anchor.float(),
        torch.zeros(1, length, HIDDEN),
        torch.zeros(1, length, dtype=torch.long),
        max_anchors=1,
    )
    return hidden[0], drafted[0]


def speculators_logits(model: Any) -> Logits:
    def logits(ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        _, drafted = speculators_rows(model, ids, features)
        return drafted if model.config.sample_from_anchor else drafted[1:]

    return logits


def speculators_chain(model: Any) -> Chain:
    """The greedy chain, drafted token by token with the teacher-forced modules of training."""
    kind = model.config.speculators_model_type

    @torch.no_grad()
    def chain(ids: torch.Tensor, features: torch.Tensor) -> list[int]:
        hidden, logits = speculators_rows(model, ids, features)
        first, anchor, tokens = 0 if model.config.sample_from_anchor else 1, int(ids[0, -1]), []
        before = torch.full((1, len(hidden)), anchor)  # the token before each row's own
        if first and kind == "xpress":
            before[0, 0] = ids[0, -2]
        for row in range(first, len(hidden)):
            if kind == "dflash2":
                found, scores = model.candidate_selector.select(logits[row], hidden[row], before[0, row])
                token = int(found[scores.argmax()])
            else:
                module = model.markov_head if kind == "dspark" else model.refiner_head
                bias = module.block_bias(prev_token_ids=before, hidden_states=hidden[None])[0, row]
                token = int((logits[row] + bias).argmax())
            if model.config.draft_vocab_size != VOCAB:
                token += int(model.d2t[token])
            tokens.append(token)
            if row + 1 < len(hidden):
                before[0, row + 1] = token
        return tokens

    return chain


@torch.no_grad()
def our_chain(target: PreTrainedModel, head: JetFlowHead, ids: torch.Tensor, features: torch.Tensor) -> list[int]:
    """The tree of width one that our drafter grows behind ids (1, seq)."""
    drafter = JetFlowCandidateGenerator(head, Target(target, head.config))
    drafter.observe(TargetStates(torch.empty(1, 0, VOCAB), (features,), torch.arange(ids.shape[1] - 1)[None]))
    return drafter.get_candidates(ids)[0][0, ids.shape[1] :].tolist()


def compare(
    target: PreTrainedModel, head: JetFlowHead, theirs: Logits, their_chain: Chain | None = None
) -> dict[str, Any]:
    """Maximum difference of log-probabilities before any branch scorer, and whether all chains are equal."""
    view = Target(target, head.config)
    generator, differences, is_same = torch.Generator().manual_seed(3), [], True
    for length in PROMPTS:
        ids = torch.randint(8, VOCAB, (1, length), generator=generator)
        features, _ = view.states(ids[:, :-1])
        ours = our_logits(target, head, ids, features)
        expected = torch.log_softmax(theirs(ids, features).float(), dim=-1)
        differences.append(float((ours - expected).abs().max()))
        is_same &= torch.equal(ours.argmax(dim=-1), expected.argmax(dim=-1))
        if their_chain is not None:
            is_same &= our_chain(target, head, ids, features) == their_chain(ids, features)
    return {"max_difference": max(differences), "same_chains": is_same, "num_depths": len(ours)}


# --- dflash ----------------------------------------------------------------------------------------------------------

SECTION = {"mask_token_id": MASK, "target_layer_ids": LAYER_IDS}
DFLASH_CASES: dict[str, dict[str, Any]] = {
    "block_size at the top, bidirectional": {"block_size": BLOCK, "dflash_config": SECTION},
    "block_size in the section, causal": {"dflash_config": {**SECTION, "block_size": BLOCK}, "is_causal": True},
    "sliding and full layers": {"block_size": BLOCK, "dflash_config": SECTION, **WINDOWED},
    "sliding layers, bidirectional": {"block_size": BLOCK, "dflash_config": SECTION, "is_causal": False, **WINDOWED},
    "scales and soft cap": {
        "block_size": BLOCK,
        "dflash_config": {
            **SECTION,
            "input_embedding_scale": 1.5,
            "output_multiplier": 0.5,
            "final_logit_softcapping": 4.0,
        },
    },
}


DFLASH2 = {"block_size": BLOCK, "conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 8, "selector_top_k": 6}
SCALES = {"input_embedding_scale": 1.5, "output_multiplier": 0.5, "final_logit_softcapping": 4.0}
DFLASH2_CASES: dict[str, dict[str, Any]] = {
    "DFlash 2": {"dflash_config": {**SECTION, **DFLASH2}},
    "DFlash 2, sliding and full layers, soft cap": {"dflash_config": {**SECTION, **DFLASH2, **SCALES}, **WINDOWED},
}


def selector_walk(target: PreTrainedModel, model: Any) -> Chain:
    """The greedy walk of a DFlash 2 head's selector."""

    @torch.no_grad()
    def walk(ids: torch.Tensor, features: torch.Tensor) -> list[int]:
        rows = dflash_rows(target, model, ids, features)
        return model.propose(rows[:, 1:], ids[:, -1], target.lm_head, 0.0)[0][0].tolist()

    return walk


def compare_dflash(target: PreTrainedModel, folder: Path) -> Iterator[dict[str, Any]]:
    from dflash.model import DFlash2DraftModel, DFlashDraftModel, dflash_generate

    for number, (case, settings) in enumerate(DFLASH_CASES.items()):
        model = DFlashDraftModel(Qwen3Config(**{**BODY, **settings, "num_target_layers": TARGET_LAYERS})).eval()
        randomize(model)
        model.save_pretrained(saved := folder / f"theirs-{number}")
        head = JetFlowHead.from_pretrained(saved, **WHOLE).eval()
        yield {"case": case, "saved_by": "dflash", **compare(target, head, dflash_logits(target, model))}
    for number, (case, settings) in enumerate(DFLASH2_CASES.items()):
        config = Qwen3Config(**{**BODY, "is_causal": False, **settings, "num_target_layers": TARGET_LAYERS})
        model = DFlash2DraftModel(config).eval()
        randomize(model)
        model.save_pretrained(saved := folder / f"theirs-2-{number}")
        head = JetFlowHead.from_pretrained(saved, **WHOLE).eval()
        theirs = dflash_logits(target, model)
        row = compare(target, head, theirs, selector_walk(target, model))
        yield {"case": case, "saved_by": "dflash", **row}
        convert_head(str(saved), "dflash", written := folder / f"back-2-{number}", target=str(folder / "target"))
        model = DFlash2DraftModel.from_pretrained(written).eval()
        row = compare(target, head, dflash_logits(target, model), selector_walk(target, model))
        yield {"case": f"{case}, written back", "saved_by": "hf_jetflow", **row}
    for number, (case, settings) in enumerate(OUR_CASES.items()):
        head, written = our_head(folder, number, "dflash", settings)
        model = DFlashDraftModel.from_pretrained(written).eval()
        row = compare(target, head, dflash_logits(target, model))
        ids = torch.randint(8, VOCAB, (1, 12), generator=torch.Generator().manual_seed(4))
        theirs = dflash_generate(model, target, ids, 24, None)
        ours = target.generate(ids, assistant_model=head, max_new_tokens=24, do_sample=False, eos_token_id=None)
        yield {"case": case, "saved_by": "hf_jetflow", **row, "same_text": torch.equal(theirs, ours)}


# --- speculators -----------------------------------------------------------------------------------------------------

SPECULATORS_CASES: dict[str, dict[str, Any]] = {
    "whole vocabulary, bidirectional": {},
    "reduced vocabulary": {"draft_vocab_size": 40},
    "rows predict from the anchor": {"sample_from_anchor": True},
    # A sliding window starts at the anchor in training, at every row in decoding: equal while the text is shorter
    # than the window.
    "sliding and full layers": {"layers": {**WINDOWED, "sliding_window": 64}},
    "sliding layers, bidirectional": {"layers": {**WINDOWED, "sliding_window": 64}, "sliding_window_non_causal": True},
}


def compare_speculators(target: PreTrainedModel, folder: Path) -> Iterator[dict[str, Any]]:
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig

    for number, (case, settings) in enumerate(SPECULATORS_CASES.items()):
        model = DFlashDraftModel(speculators_config(folder, DFlashSpeculatorConfig, settings)).eval()
        if "draft_vocab_size" in settings:
            model.load_vocab_mappings(*vocabulary_maps(settings["draft_vocab_size"]))
        model.load_verifier_weights()
        randomize(
            torch.nn.ModuleDict({name: getattr(model, name) for name in ("layers", "fc", "norm", "hidden_norm")})
        )
        model.save_pretrained(saved := folder / f"theirs-{number}")
        head = JetFlowHead.from_pretrained(saved, **WHOLE).eval()
        yield {"case": case, "saved_by": "speculators", **compare(target, head, speculators_logits(model))}
    yield from compare_scored_speculators(target, folder)
    for number, (case, settings) in enumerate({**OUR_CASES, **OUR_SPECULATORS_CASES}.items()):
        head, written = our_head(folder, number, "speculators", settings)
        config = DFlashSpeculatorConfig.from_pretrained(str(written))
        config.transformer_layer_config._attn_implementation = "eager"
        model = DFlashDraftModel.from_pretrained(str(written), config=config).eval()
        yield {"case": case, "saved_by": "hf_jetflow", **compare(target, head, speculators_logits(model))}


# Each with settings of speculators' configuration; the type's name is the first word.
SPECULATORS_SCORED_CASES: dict[str, dict[str, Any]] = {
    "dflash2": {"conv_group_size": 8, "selector_rank": 8, "selector_top_k": 6},
    "dspark vanilla": {"markov_rank": 8},
    "dspark gated": {"markov_rank": 8, "markov_head_type": "gated", "sample_from_anchor": False},
    "dspark recurrent": {"markov_rank": 8, "markov_head_type": "rnn"},
    "dspark recurrent, anchor predicts nothing": {
        "markov_rank": 8,
        "markov_head_type": "rnn",
        "sample_from_anchor": False,
    },
    "dspark reduced vocabulary": {"markov_rank": 8, "draft_vocab_size": 40},
    "xpress": {"xpress_rank": 8},
    "xpress, anchor predicts": {"xpress_rank": 8, "sample_from_anchor": True},
}


def compare_scored_speculators(target: PreTrainedModel, folder: Path) -> Iterator[dict[str, Any]]:
    """Heads that score branches: logits of all rows, and the chain token by token."""
    from speculators.models.dflash2.core import DFlash2DraftModel
    from speculators.models.dspark.core import DSparkDraftModel
    from speculators.models.xpress.core import XPressDraftModel

    models: dict[str, Any] = {"dflash2": DFlash2DraftModel, "dspark": DSparkDraftModel, "xpress": XPressDraftModel}
    for number, (case, settings) in enumerate(SPECULATORS_SCORED_CASES.items()):
        kind = case.split()[0].rstrip(",")
        model = models[kind](speculators_config(folder, models[kind].config_class, settings)).eval()
        if "draft_vocab_size" in settings:
            model.load_vocab_mappings(*vocabulary_maps(settings["draft_vocab_size"]))
        model.load_verifier_weights()
        randomize(model)
        model.save_pretrained(saved := folder / f"theirs-{kind}-{number}")
        head = JetFlowHead.from_pretrained(saved, **WHOLE).eval()
        row = compare(target, head, speculators_logits(model), speculators_chain(model))
        yield {"case": case, "saved_by": "speculators", **row}
        if kind == "xpress":
            continue  # it is not written
        convert_head(str(saved), "speculators", written := folder / f"back-{kind}-{number}", str(folder / "target"))
        config = models[kind].config_class.from_pretrained(str(written))
        config.transformer_layer_config._attn_implementation = "eager"
        model = models[kind].from_pretrained(str(written), config=config).eval()
        row = compare(target, head, speculators_logits(model), speculators_chain(model))
        yield {"case": f"{case}, written back", "saved_by": "hf_jetflow", **row}


def speculators_config(folder: Path, config_class: Any, settings: dict[str, Any]) -> Any:
    """A configuration of one of their models."""
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    settings = dict(settings)
    layers = Qwen3Config(**{**BODY, **settings.pop("layers", {})})
    layers._attn_implementation = "eager"
    proposal = GreedyTokenProposalConfig(speculative_tokens=BLOCK - 1)
    verifier = VerifierConfig(name_or_path=str(folder / "target"), architectures=["LlamaForCausalLM"])
    return config_class(
        transformer_layer_config=layers,
        draft_vocab_size=settings.pop("draft_vocab_size", VOCAB),
        block_size=BLOCK,
        aux_hidden_state_layer_ids=[index + 1 for index in LAYER_IDS],
        mask_token_id=MASK,
        speculators_config=SpeculatorsConfig(
            algorithm="dflash", proposal_methods=[proposal], default_proposal_method="greedy", verifier=verifier
        ),
        **settings,
    )


def vocabulary_maps(num_drafted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """speculators' `t2d` and `d2t` of a random draft vocabulary."""
    token_ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))[:num_drafted].sort().values
    return torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, token_ids, True), token_ids - torch.arange(num_drafted)


# --- heads we write --------------------------------------------------------------------------------------------------

OUR_CASES: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "bidirectional": {"is_causal": False},
    "causal sliding and open full layers": {
        "is_causal": [True, False],
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64,
    },
}
OUR_SPECULATORS_CASES: dict[str, dict[str, Any]] = {
    "reduced vocabulary, causal": {"is_causal": True, "draft_vocab_size": 40},
}


def our_head(folder: Path, number: int, to: str, settings: dict[str, Any]) -> tuple[JetFlowHead, Path]:
    """A head of ours, and the folder with it in their layout."""
    config = JetFlowConfig(
        **{**BODY, **settings},
        ngram_weights=[],  # compare the heads alone
        block_size=BLOCK,
        mask_token_id=MASK,
        hidden_state_indices=[index + 1 for index in LAYER_IDS],
        num_target_layers=TARGET_LAYERS,
    )
    head = JetFlowHead(config).eval()
    randomize(head)
    if config.draft_vocab_size is not None:
        in_draft, _ = vocabulary_maps(config.draft_vocab_size)
        head.d2t.copy_(in_draft.nonzero()[:, 0])
    head.save_pretrained(folder / f"ours-{number}")
    convert_head(str(folder / f"ours-{number}"), to, folder / f"written-{number}", target=str(folder / "target"))
    return head, folder / f"written-{number}"


PACKAGES = {"dflash": compare_dflash, "speculators": compare_speculators}


def run(package: str) -> list[dict[str, Any]]:
    """All comparisons with one package."""
    with tempfile.TemporaryDirectory() as name:
        target = small_target(Path(name, "target"))
        rows = []
        for row in PACKAGES[package](target, Path(name)):
            is_good = row["max_difference"] <= TOLERANCE and row["same_chains"] and row.get("same_text", True)
            rows.append({"package": package, **row, "passed": is_good})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    rows, versions = [], {name: version(name) for name in ("torch", "transformers")}
    versions = {"date": date.today().isoformat(), **versions}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            print(f"{package} is not installed; skipped")
            continue
        rows += run(package)
    for row in rows:
        verdict = "ok  " if row["passed"] else "FAIL"
        print(
            f"{verdict} {row['package']:<12} saved by {row['saved_by']:<12} {row['max_difference']:.1e}  {row['case']}"
        )
    if args.json is not None:
        args.json.write_text(json.dumps({"versions": versions, "tolerance": TOLERANCE, "rows": rows}, indent=2) + "\n")
    sys.exit(not rows or not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
