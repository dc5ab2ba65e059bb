"""Conclusions from the doctor's figures: faults, each with its fix, and advice."""

from collections.abc import Iterator
from typing import Any

from .mistakes import Mistake


MIN_TOKENS_PER_ROUND = 1.2  # a head that is never accepted has 1

UNTRAINED_NORMS = "all weights of the head's norms are exactly 1, as before training: the file lost the trained ones"

Findings = dict[str, Any]


def find_faults(findings: Findings, source: str) -> Iterator[Findings]:
    """Faults as `mistake`, `message` and `fix` (lines); `source` is the head's Hub id or folder."""
    if any(each["is_fault"] for each in findings["compared"]):
        message = (
            "the text with the head differs from plain decoding, and no near-tie explains it; this must not happen"
        )
        yield {"mistake": "text", "message": message, "fix": ["report it, with the JSON of this run"]}
    now = findings["as_loaded"]["tokens_per_round"]
    better = [each for each in findings["mistakes"] if each["is_better"]]
    if better:
        best = max(better, key=lambda each: each["logprob"])
        gain = best["logprob"] - findings["as_loaded"]["logprob"]
        message = (
            f"{best['cause']}: with {best['change']} the log-probability of the target's tokens rises by {gain:.2f} "
            f"nats per token, and tokens per round go from {now:.2f} to {best['tokens_per_round']:.2f}"
        )
        mistake = Mistake(**{name: best[name] for name in Mistake.__dataclass_fields__})
        yield {"mistake": best["name"], "message": message, "fix": mistake.fix(source)}
    elif now < MIN_TOKENS_PER_ROUND:
        yield _low_acceptance_fault(findings, now)
    elif not findings["facts"]["head"]["has_trained_norms"]:
        yield {
            "mistake": "norms",
            "message": UNTRAINED_NORMS,
            "fix": ["download another copy, or save the head again"],
        }


def _low_acceptance_fault(findings: Findings, now: float) -> Findings:
    """The fault of a head whose drafts are almost never accepted, when no single change explains it."""
    forms = [each for each in findings["prompt_forms"] if each["is_better"]]
    if forms:
        message = f"the head was trained on prompts of another form: {_form_message(forms, now)}"
        return {"mistake": "chat template", "message": message, "fix": ["pass prompts to `generate` in that form"]}
    head, target = findings["facts"]["head"], findings["facts"]["target"]
    trained_for = head["trained_for"] or head["trained_for_model_type"] or "unknown, not named in its config"
    return {
        "mistake": "no fit",
        "message": f"this head does not fit this target: {now:.2f} tokens per round, which no common mistake explains",
        "fix": [
            f"check that the target, {target['name']}, is exactly the model that the head was trained for "
            f"({trained_for}); a finetuned model is another target",
            "check that the head's training finished, and that this is the right checkpoint",
            *([] if head["has_trained_norms"] else [UNTRAINED_NORMS]),
            "two mistakes can hide each other: revert a likely one by hand and run the doctor again",
        ],
    }


def find_advice(findings: Findings) -> Iterator[str]:
    """Observations that are not faults."""
    forms = [each for each in findings["prompt_forms"] if each["is_better"]]
    if forms and not findings["faults"]:
        now = findings["as_loaded"]["tokens_per_round"]
        yield f"another prompt form is accepted more often: {_form_message(forms, now)}; use it if it suits your task"
    head, target = findings["facts"]["head"], findings["facts"]["target"]
    trained_for = head["trained_for_model_type"]
    if trained_for not in (None, target["model_type"]):
        yield f"the head was trained for a {trained_for} model, the target is a {target['model_type']}"


def _form_message(forms: list[Findings], now: float) -> str:
    best = max(forms, key=lambda each: each["tokens_per_round"])
    return f"{best['tokens_per_round']:.2f} tokens per round with {best['form']}, {now:.2f} with the chat template"
