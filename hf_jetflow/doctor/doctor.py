"""Check whether a head drafts well for its target, and find the common mistake if it does not.

A misread head still loads, and the text stays exact: only acceptance drops. So the doctor reverts each common mistake
on a head with the same weights and scores the target's own answers again. Answers are decoded once; each mistake costs
two forwards of target and head per answer. The criterion is the log-probability of the target's tokens under the head:
over a few answers it shows far smaller differences than tokens per round do.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ..bench.environment import environment
from ..errors import JetFlowError
from ..files import write_json
from ..head.checkpoint_files import WEIGHT_PATTERNS, locate, read_config, read_tensors
from ..head.formats import read_checkpoint, recognize
from ..head.modeling_jetflow import JetFlowHead
from ..head.settings import head_settings
from ..integration import check_pairing
from ..stats import GenerationStats
from ..target.loading import load_pair
from ..target.settings import PairSettings
from ..target.target import Target
from ..training.evaluation import greedy_ids
from ..training.replay import answer_logprobs, replay
from .mistakes import common_mistakes, encode, other_encodings, window_to_try
from .settings import MIN_PROMPTS, DoctorSettings
from .verdict import MIN_TOKENS_PER_ROUND, find_advice, find_faults


NODE_BUDGET = 32
NUM_COMPARED = 2  # prompts decoded with the head and compared with plain decoding
# A change is better if its mean gain over prompts exceeds both thresholds and the head then drafts at all.
NUM_STANDARD_ERRORS = 2
MIN_GAIN = 0.02  # nats per token
MIN_PROMPT_FORM_RATIO = 1.3  # of tokens per round: another prompt form has other answers, which may be easier
NEAR_TIE = 0.5  # nats: below this margin, rounding in bfloat16 or float16 may decide between two tokens

Text = tuple[list[int], int]  # token ids of prompt and greedy answer, and the length of the prompt
Progress = Callable[[int, int, str], None]
Findings = dict[str, Any]


@dataclass
class Figures:
    """How a head drafts known answers."""

    tokens_per_round: float
    by_prompt: list[float]  # tokens per round
    acceptance_by_depth: list[float]
    logprob_by_prompt: list[float]  # mean over the drafted tokens

    @property
    def logprob(self) -> float:
        """Mean log-probability of the target's tokens, in nats; every prompt has the same weight."""
        return statistics.mean(self.logprob_by_prompt)

    def as_dict(self) -> Findings:
        return {**asdict(self), "logprob": self.logprob}


def examine_pair(pair: PairSettings, settings: DoctorSettings, progress: Progress | None = None) -> Findings:
    """
    Load a target and a head, examine them, and write the findings if the settings ask for it.

    Returns:
        The findings of `examine`, with `environment`, `settings`, and the layout of the head's files in `facts`.
    """
    conversations = settings.conversations()
    target, tokenizer, head = load_pair(pair)
    layout = layout_facts(pair.head)
    findings = examine(
        target,
        tokenizer,
        head,
        conversations,
        target_name=pair.target,
        head_name=pair.head,
        max_new_tokens=settings.max_new_tokens,
        progress=progress,
    )
    findings["facts"]["layout"] = layout
    used = {
        "target": pair.target,
        "head": pair.head,
        "node_budget": NODE_BUDGET,
        "max_new_tokens": settings.max_new_tokens,
    }
    findings = {"environment": environment(head), "settings": used, **findings}
    if settings.json is not None:
        write_json(findings, settings.json)
    return findings


def layout_facts(source: str) -> Findings:
    """The layout of a head's files, and the source of its causality."""
    checkpoint = locate(source, {})
    settings = read_config(checkpoint)
    layout = recognize(settings)
    reading = read_checkpoint(layout, settings, read_tensors(checkpoint.folder(*WEIGHT_PATTERNS)), {})
    return {
        "layout": layout.name,
        "causality_from": reading.causality or "`is_causal`",
        "overridden": reading.contradictions,
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
    Find out why a head drafts badly for a target.

    Args:
        conversations (*optional*): Prompts as chat messages; built-in prompts if not given.
        target_name (`str`), head_name (`str`): Hub ids or folders, for facts and fixes.
        max_new_tokens (`int`): Tokens of each answer.
        progress: Called with (steps done, steps in total, name of the step).

    Returns:
        `dict`: `facts`; `compared`, texts with and without the head; `as_loaded`, `mistakes` and `prompt_forms`, how
        the head drafts; `untested`; `faults` (empty for a sound pair), each with `mistake`, `message` and `fix`; and
        `advice`. If head and target do not fit together, only `facts`, `faults` and `advice`.

    Raises:
        JetFlowError: If fewer than three prompts have answers of two tokens or more.
    """
    say = progress or (lambda *_: None)
    findings: Findings = {"facts": pairing_facts(target, tokenizer, head), "faults": [], "advice": []}
    findings["facts"]["target"]["name"] = target_name or target.name_or_path
    findings["facts"]["head"]["name"] = head_name
    try:
        check_pairing(target, head)
    except ValueError as error:
        findings["faults"].append({"mistake": "pairing", "message": str(error), "fix": []})
        return findings
    conversations = conversations or DoctorSettings().conversations()
    prompts = [encode(tokenizer, messages) for messages in conversations]
    texts = list(_greedy_texts(target, prompts, max_new_tokens, say, "plain answers"))
    usable = [index for index, text in enumerate(texts) if _has_rounds(text)]
    if len(usable) < MIN_PROMPTS:
        raise JetFlowError(
            f"expected at least {MIN_PROMPTS} prompts with answers of two tokens or more, got {len(usable)} of "
            f"{len(texts)}; use more or other prompts"
        )
    conversations, texts = [conversations[index] for index in usable], [texts[index] for index in usable]
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
    """Facts about a pair from its configurations."""
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
            "trained_for": config.target_name,
            "trained_for_model_type": config.target_model_type,
            "num_parameters": sum(parameter.numel() for parameter in head.parameters()),
            "num_layers": config.num_hidden_layers,
            "has_trained_norms": _has_trained_norms(head),
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


def _has_trained_norms(head: JetFlowHead) -> bool:
    norms = [module.weight for module in head.modules() if isinstance(module, Qwen3RMSNorm)]
    return any(bool((weight != 1).any()) for weight in norms)


@torch.no_grad()
def _greedy_texts(
    target: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int, say: Progress, what: str
) -> Iterator[Text]:
    for number, ids in enumerate(prompts, 1):
        yield ids + greedy_ids(target, ids, max_new_tokens), len(ids)
        say(number, len(prompts), what)


def _has_rounds(text: Text) -> bool:
    return len(text[0]) - text[1] >= 2


@torch.no_grad()
def _compare(target: PreTrainedModel, head: JetFlowHead, texts: Sequence[Text], say: Progress) -> Iterator[Findings]:
    """Decode again with the head, and find the first token that differs from plain decoding."""
    for number, (ids, num_prompt) in enumerate(texts, 1):
        plain = ids[num_prompt:]
        with head_settings(head, node_budget=NODE_BUDGET):
            drafted = greedy_ids(target, ids[:num_prompt], len(plain), assistant_model=head)
        say(number, len(texts), "compared with the head")
        first = next((index for index, pair in enumerate(zip_longest(plain, drafted)) if len(set(pair)) > 1), None)
        found: Findings = {"num_tokens": len(plain), "first_difference": first, "margin": None}
        if first is not None and first < len(drafted):
            prefix = torch.tensor([ids[: num_prompt + first]], device=target.device)
            logits = target(prefix).logits[0, -1].float()
            found["margin"] = round(abs(float(logits[plain[first]] - logits[drafted[first]])), 4)
        is_near_tie = target.dtype != torch.float32 and found["margin"] is not None and found["margin"] <= NEAR_TIE
        yield {**found, "is_fault": first is not None and not is_near_tie}


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


def _is_gain(changed: Sequence[float], as_loaded: Sequence[float], min_gain: float = 0.0) -> bool:
    """Whether the mean gain over prompts is significant and above a minimum."""
    gains = [one - other for one, other in zip(changed, as_loaded, strict=True)]
    noise = NUM_STANDARD_ERRORS * statistics.stdev(gains) / len(gains) ** 0.5
    return statistics.mean(gains) > max(noise, min_gain)


def _try_mistakes(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: JetFlowHead,
    texts: Sequence[Text],
    as_loaded: Figures,
    say: Progress,
) -> Iterator[Findings]:
    mistakes = list(common_mistakes(head, target, tokenizer))
    for number, mistake in enumerate(mistakes, 1):
        figures = _draft(target, mistake.reverted(head), texts)
        say(number, len(mistakes), "common mistakes")
        is_gain = _is_gain(figures.logprob_by_prompt, as_loaded.logprob_by_prompt, MIN_GAIN)
        is_better = is_gain and figures.tokens_per_round >= MIN_TOKENS_PER_ROUND
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
    """Tokens per round with other prompt forms; the target answers these prompts again."""
    for form, prompts in other_encodings(tokenizer, conversations).items():
        texts = list(_greedy_texts(target, prompts, max_new_tokens, say, form))
        usable = [index for index, text in enumerate(texts) if _has_rounds(text)]
        if len(usable) < MIN_PROMPTS:
            continue
        figures = _draft(target, head, [texts[index] for index in usable])
        is_gain = _is_gain(figures.by_prompt, [as_loaded.by_prompt[index] for index in usable])
        enough = max(MIN_TOKENS_PER_ROUND, MIN_PROMPT_FORM_RATIO * as_loaded.tokens_per_round)
        yield {"form": form, **figures.as_dict(), "is_better": is_gain and figures.tokens_per_round >= enough}


def _untested(target: PreTrainedModel, head: JetFlowHead, texts: Sequence[Text]) -> list[str]:
    window = window_to_try(head.config, target)
    longest = max(len(ids) for ids, _ in texts) + head.config.block_size
    if window is None or longest > window:
        return []
    return [f"sliding windows: no text is longer than the window of {window} tokens; give longer prompts"]
