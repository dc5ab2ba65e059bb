"""The doctor: whether a head drafts well for its target, and which of the usual mistakes it is if not.

A head that was read wrongly still loads and still leaves the text as it is, it only drafts worse. So each usual
mistake is undone on a head with the same tensors, and the target's own answers are scored again: every answer is
decoded once, each mistake costs two forwards of target and head per answer. What decides is the probability that the
head gives to the target's tokens: over a few answers it tells far smaller differences from chance than tokens per
round do.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..head.checkpoint_files import WEIGHT_PATTERNS, locate, read_config, read_tensors
from ..head.formats import read_checkpoint, recognize
from ..head.modeling_jetflow import JetFlowHead
from ..integration import check_pairing
from ..stats import GenerationStats
from ..target.target import Target
from ..training.evaluation import decoding_with
from ..training.replay import answer_logprobs, replay
from .mistakes import encode, other_encodings, usual_mistakes, windows_tried, with_fields
from .verdict import HARDLY_DRAFTS, find_advice, find_faults


NODE_BUDGET = 32
NUM_COMPARED = 2  # prompts decoded with the head, next to plain decoding
FEWEST_PROMPTS = 3
# A change is better if the mean gain over prompts is more than two of its standard errors and no trifle, and if the
# head then drafts at all.
STANDARD_ERRORS = 2
TRIFLE = 0.02  # nats per token
CLEAR_GAIN_OF_PROMPTS = 1.3  # in tokens per round: prompts of another form have other answers, which may be easier
NEAR_TIE = 0.5  # nats; rounding in bfloat16 or float16 may choose between tokens that are closer than this

BUILT_IN_PROMPTS = (
    "Tom has 3 boxes with 12 pencils each and gives away 9 pencils. How many pencils does he have left?",
    "A train travels 180 km in 2.5 hours. What is its average speed, and how far does it get in 4 hours?",
    "Write a Python function that checks whether a word is a palindrome.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "Write a SQL query that counts the orders of each customer.",
    "Name three things to see in Lisbon and say why.",
    "Explain to a child why the sky is blue.",
    "Write an e-mail that moves a meeting from Monday to Thursday.",
)

Text = tuple[list[int], int]  # token ids of prompt and greedy answer, and of how many the prompt is
Progress = Callable[[int, int, str], None]
Findings = dict[str, Any]


@dataclass
class Figures:
    """How a head drafts known answers."""

    tokens_per_round: float
    by_prompt: list[float]  # tokens per round of each
    acceptance_by_depth: list[float]
    logprob_by_prompt: list[float]  # mean over all drafted tokens of each

    @property
    def logprob(self) -> float:
        """Mean log-probability of the target's tokens, in nats, each prompt counting alike."""
        return statistics.mean(self.logprob_by_prompt)

    def as_dict(self) -> Findings:
        return {**asdict(self), "logprob": self.logprob}


def layout_facts(source: str) -> Findings:
    """What a head's files were taken for, and where its causality was read from."""
    place = locate(source, {})
    settings = read_config(place)
    layout = recognize(settings)
    reading = read_checkpoint(layout, settings, read_tensors(place.folder(*WEIGHT_PATTERNS)), {})
    return {
        "layout": layout.name,
        "causality_from": reading.causality or "`is_causal`",
        "overruled": reading.contradictions,
    }


def examine(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: JetFlowHead,
    conversations: Sequence[list[dict[str, str]]] | None = None,
    *,
    target_name: str = "",
    head_name: str = "org/head",
    max_new_tokens: int = 64,
    progress: Progress | None = None,
) -> Findings:
    """
    Find out what is wrong with a head and a target.

    Args:
        conversations (*optional*): Prompts as chat messages; the built-in ones if not given.
        target_name (`str`), head_name (`str`): Hub ids or folders, for facts and fixes.
        max_new_tokens (`int`): Tokens of each answer.
        progress: Called with what is done, of how much, and what it is.

    Returns:
        `dict`: `facts`; `compared`, texts with and without the head; `as_loaded`, `mistakes` and `prompt_forms`, how
        the head drafts; `untested`; `faults` (empty for a sound pair), each with `mistake`, `words` and `fix`; and
        `advice`. Of a head that cannot go with the target at all only `facts`, `faults` and `advice`.

    Raises:
        ValueError: If fewer than three prompts have answers of two tokens or more.
    """
    say = progress or (lambda *_: None)
    findings: Findings = {"facts": pairing_facts(target, tokenizer, head), "faults": [], "advice": []}
    findings["facts"]["target"]["name"] = target_name or target.name_or_path
    findings["facts"]["head"]["name"] = head_name
    try:
        check_pairing(target, head)
    except ValueError as error:
        findings["faults"].append({"mistake": "pairing", "words": str(error), "fix": []})
        return findings
    conversations = conversations or [[{"role": "user", "content": text}] for text in BUILT_IN_PROMPTS]
    prompts = [encode(tokenizer, messages) for messages in conversations]
    texts = list(_greedy_texts(target, prompts, max_new_tokens, say, "plain answers"))
    places = [place for place, text in enumerate(texts) if _has_rounds(text)]
    if len(places) < FEWEST_PROMPTS:
        raise ValueError(
            f"{len(places)} of the {len(texts)} prompts have answers of two tokens or more, but at least "
            f"{FEWEST_PROMPTS} are needed to tell a difference from chance; give other prompts"
        )
    conversations, texts = [conversations[place] for place in places], [texts[place] for place in places]
    findings["compared"] = list(_compare(target, head, texts[:NUM_COMPARED], say))
    as_loaded = _draft(target, head, texts)
    findings["as_loaded"] = as_loaded.as_dict()
    findings["mistakes"] = list(_try_mistakes(target, tokenizer, head, texts, as_loaded, say))
    findings["prompt_forms"] = list(
        _try_prompt_forms(target, tokenizer, head, conversations, as_loaded, max_new_tokens, say)
    )
    findings["untested"] = _untested(target, head, texts)
    findings["faults"] = list(find_faults(findings, head_name))
    findings["advice"] = list(find_advice(findings))
    return findings


def pairing_facts(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: JetFlowHead) -> Findings:
    """What there is to know of a pair without running it."""
    config, text = head.config, target.config.get_text_config(decoder=True)
    return {
        "target": {
            "model_type": target.config.model_type,
            "num_layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            "tokenizer_size": len(tokenizer),
            "has_chat_template": bool(tokenizer.chat_template),
            "dtype": str(target.dtype).removeprefix("torch."),
        },
        "head": {
            "made_for": config.target_name,
            "made_for_model_type": config.target_model_type,
            "num_parameters": sum(parameter.numel() for parameter in head.parameters()),
            "num_layers": config.num_hidden_layers,
            "block_size": config.block_size,
            "is_causal": config.causal_layers,
            "windows": config.layer_windows,
            "hidden_state_indices": config.hidden_state_indices,
            "mask_token_id": config.mask_token_id,
            "draft_vocab_size": config.draft_vocab_size,
            "own_embedding": config.own_embedding,
            "own_lm_head": config.own_lm_head,
            "branch_correction": config.branch_correction,
            "rope_parameters": config.rope_parameters,
        },
    }


@torch.no_grad()
def _greedy_texts(
    target: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int, say: Progress, what: str
) -> Iterator[Text]:
    for number, ids in enumerate(prompts, 1):
        yield ids + _generate(target, ids, max_new_tokens), len(ids)
        say(number, len(prompts), what)


def _generate(target: PreTrainedModel, ids: list[int], max_new_tokens: int, **kwargs: Any) -> list[int]:
    input_ids = torch.tensor([ids], device=target.device)
    mask = torch.ones_like(input_ids)
    output = target.generate(input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, **kwargs)
    return output[0, len(ids) :].tolist()


def _has_rounds(text: Text) -> bool:
    return len(text[0]) - text[1] >= 2


@torch.no_grad()
def _compare(target: PreTrainedModel, head: JetFlowHead, texts: Sequence[Text], say: Progress) -> Iterator[Findings]:
    """Decode with the head what was decoded plainly, and look at the first token that differs."""
    for number, (ids, num_prompt) in enumerate(texts, 1):
        plain = ids[num_prompt:]
        with decoding_with(head, NODE_BUDGET):
            drafted = _generate(target, ids[:num_prompt], len(plain), assistant_model=head)
        say(number, len(texts), "compared with the head")
        place = next((place for place, pair in enumerate(zip_longest(plain, drafted)) if len(set(pair)) > 1), None)
        found: Findings = {"num_tokens": len(plain), "first_difference": place, "margin": None}
        if place is not None and place < len(drafted):
            prefix = torch.tensor([ids[: num_prompt + place]], device=target.device)
            logits = target(prefix).logits[0, -1].float()
            found["margin"] = round(abs(float(logits[plain[place]] - logits[drafted[place]])), 4)
        is_near_tie = target.dtype != torch.float32 and found["margin"] is not None and found["margin"] <= NEAR_TIE
        yield {**found, "is_fault": place is not None and not is_near_tie}


def _draft(target: PreTrainedModel, head: JetFlowHead, texts: Sequence[Text]) -> Figures:
    view = Target(target, head.config)
    each = [replay(view, head, [text], [NODE_BUDGET])[NODE_BUDGET] for text in texts]
    total = GenerationStats(
        num_rounds=sum(stats.num_rounds for stats in each),
        num_accepted=sum(stats.num_accepted for stats in each),
        offered_by_depth=_sums(stats.offered_by_depth for stats in each),
        accepted_by_depth=_sums(stats.accepted_by_depth for stats in each),
    )
    logprobs = [float(answer_logprobs(view, head, *text).mean()) for text in texts]
    by_prompt = [stats.tokens_per_round for stats in each]
    return Figures(total.tokens_per_round, by_prompt, total.acceptance_by_depth, logprobs)


def _sums(lists: Iterator[list[int]]) -> list[int]:
    return [sum(values) for values in zip_longest(*lists, fillvalue=0)]


def _is_gain(ours: Sequence[float], theirs: Sequence[float], trifle: float = 0.0) -> bool:
    """Whether the mean difference over prompts is more than chance, and than a trifle."""
    gains = [one - other for one, other in zip(ours, theirs, strict=True)]
    noise = STANDARD_ERRORS * statistics.stdev(gains) / len(gains) ** 0.5
    return statistics.mean(gains) > max(noise, trifle)


def _try_mistakes(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: JetFlowHead,
    texts: Sequence[Text],
    as_loaded: Figures,
    say: Progress,
) -> Iterator[Findings]:
    mistakes = list(usual_mistakes(head, target, tokenizer))
    for number, mistake in enumerate(mistakes, 1):
        figures = _draft(target, with_fields(head, mistake.fields), texts)
        say(number, len(mistakes), "usual mistakes")
        is_gain = _is_gain(figures.logprob_by_prompt, as_loaded.logprob_by_prompt, TRIFLE)
        is_better = is_gain and figures.tokens_per_round >= HARDLY_DRAFTS
        yield {**asdict(mistake), **figures.as_dict(), "is_better": is_better}


def _try_prompt_forms(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: JetFlowHead,
    conversations: Sequence[list[dict[str, str]]],
    as_loaded: Figures,
    max_new_tokens: int,
    say: Progress,
) -> Iterator[Findings]:
    """Tokens per round where the prompts take another form; the target answers them anew."""
    for form, prompts in other_encodings(tokenizer, conversations).items():
        texts = list(_greedy_texts(target, prompts, max_new_tokens, say, form))
        places = [place for place, text in enumerate(texts) if _has_rounds(text)]
        if len(places) < FEWEST_PROMPTS:
            continue
        figures = _draft(target, head, [texts[place] for place in places])
        is_gain = _is_gain(figures.by_prompt, [as_loaded.by_prompt[place] for place in places])
        enough = max(HARDLY_DRAFTS, CLEAR_GAIN_OF_PROMPTS * as_loaded.tokens_per_round)
        yield {"form": form, **figures.as_dict(), "is_better": is_gain and figures.tokens_per_round >= enough}


def _untested(target: PreTrainedModel, head: JetFlowHead, texts: Sequence[Text]) -> list[str]:
    window = windows_tried(head.config, target)
    longest = max(len(ids) for ids, _ in texts) + head.config.block_size
    if window is None or longest > window:
        return []
    return [f"sliding windows: no text leaves a window of {window} tokens; give longer prompts to tell"]
