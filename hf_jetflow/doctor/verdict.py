"""What follows from the doctor's figures: the faults, each with its fix, and advice."""

from collections.abc import Iterator
from typing import Any

from .mistakes import Mistake


HARDLY_DRAFTS = 1.2  # tokens per round; a head that is never right has 1

Findings = dict[str, Any]


def find_faults(findings: Findings, source: str) -> Iterator[Findings]:
    """Each fault of an examination as `mistake`, `words` and `fix` (lines); `source` is the head's id or folder."""
    if any(each["is_fault"] for each in findings["compared"]):
        words = "the text with the head is not plain decoding's, and not by a near-tie: this must not happen"
        yield {"mistake": "text", "words": words, "fix": ["report it, with the JSON of this run"]}
    now = findings["as_loaded"]["tokens_per_round"]
    better = [each for each in findings["mistakes"] if each["is_better"]]
    if better:
        best = max(better, key=lambda each: each["logprob"])
        gain = best["logprob"] - findings["as_loaded"]["logprob"]
        words = (
            f"{best['cause']}: with {best['change']} each token of the target is {gain:.2f} nats more probable to the "
            f"head, which keeps {best['tokens_per_round']:.2f} tokens per round instead of {now:.2f}"
        )
        mistake = Mistake(**{name: best[name] for name in Mistake.__dataclass_fields__})
        yield {"mistake": best["name"], "words": words, "fix": mistake.fix(source)}
    elif now < HARDLY_DRAFTS:
        yield _why_it_hardly_drafts(findings, now)


def _why_it_hardly_drafts(findings: Findings, now: float) -> Findings:
    forms = [each for each in findings["prompt_forms"] if each["is_better"]]
    if forms:
        words = f"the prompts do not have the form the head was trained on: {_form_words(forms, now)}"
        return {"mistake": "chat template", "words": words, "fix": ["give prompts to `generate` in that form"]}
    head, target = findings["facts"]["head"], findings["facts"]["target"]
    made_for = head["made_for"] or head["made_for_model_type"] or "a target that its config does not name"
    return {
        "mistake": "no fit",
        "words": f"this head does not fit this target: {now:.2f} tokens per round, and no usual mistake explains it",
        "fix": [
            f"check that the target, {target['name']}, is the very model the head was made for: {made_for}; another "
            "finetune of it is another target",
            "check that the head was trained to the end, and that its file is the one that was meant",
            "two mistakes at once hide each other: undo a likely one by hand and run this again",
        ],
    }


def find_advice(findings: Findings) -> Iterator[str]:
    """What is no fault and still worth knowing."""
    forms = [each for each in findings["prompt_forms"] if each["is_better"]]
    if forms and not findings["faults"]:
        now = findings["as_loaded"]["tokens_per_round"]
        yield f"prompts of another form draft better: {_form_words(forms, now)}; use it if that form is what you need"
    head, target = findings["facts"]["head"], findings["facts"]["target"]
    if head["made_for_model_type"] not in (None, target["model_type"]):
        yield f"the head was made for a {head['made_for_model_type']} model, the target is a {target['model_type']}"


def _form_words(forms: list[Findings], now: float) -> str:
    best = max(forms, key=lambda each: each["tokens_per_round"])
    return f"{best['tokens_per_round']:.2f} tokens per round with {best['form']}, {now:.2f} as the template has it"
