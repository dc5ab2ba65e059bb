"""Exact batched decoding of sequences that advance at different speeds: which processors and criteria allow it."""

import copy

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation import logits_process, stopping_criteria

from .._compat import class_of
from ..target.layer_kinds import is_recurrent, scaling_step, takes_trees


# Processors and criteria that look at one sequence at a time and remember nothing.
PER_SEQUENCE = {
    *(
        class_of(logits_process, name)
        for name in (
            "MinLengthLogitsProcessor",
            "MinNewTokensLengthLogitsProcessor",
            "TemperatureLogitsWarper",
            "TopPLogitsWarper",
            "TopKLogitsWarper",
            "TopHLogitsWarper",
            "MinPLogitsWarper",
            "TypicalLogitsWarper",
            "EpsilonLogitsWarper",
            "EtaLogitsWarper",
            "NoRepeatNGramLogitsProcessor",
            "SequenceBiasLogitsProcessor",
            "NoBadWordsLogitsProcessor",
            "ForcedBOSTokenLogitsProcessor",
            "ForcedEOSTokenLogitsProcessor",
            "InfNanRemoveLogitsProcessor",
            "ExponentialDecayLengthPenalty",
            "LogitNormalization",
            "SuppressTokensAtBeginLogitsProcessor",
            "SuppressTokensLogitsProcessor",
            "WatermarkLogitsProcessor",
            # These three with a copy for each sequence, see `sequence_processors`.
            "RepetitionPenaltyLogitsProcessor",
            "PrefixConstrainedLogitsProcessor",
            "SynthIDTextWatermarkLogitsProcessor",
        )
    ),
    *(class_of(stopping_criteria, name) for name in ("MaxTimeCriteria", "StopStringCriteria")),
}
# Those of them that look at the scores alone, and whose code makes no host wait for a device.
TEXT_BLIND = {
    class_of(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopPLogitsWarper",
        "TopKLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    )
}
RECORDED = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")


def is_row_wise(part: object) -> bool:
    """Whether a processor or criterion looks at one sequence at a time and remembers nothing; callers say so of their
    own by an attribute of this name."""
    return type(part) in PER_SEQUENCE or bool(getattr(part, "is_row_wise", False))


def draw_nothing(parts: LogitsProcessorList | StoppingCriteriaList) -> bool:
    """Whether processors or criteria are known to draw no random numbers themselves."""
    return all(is_row_wise(part) or type(part) in (MaxLengthCriteria, EosTokenCriteria) for part in parts)


def plain_batch_reason(
    model: PreTrainedModel,
    logits_processor: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    cache: object,
) -> str | None:
    """Reason to decode a batch plainly, because its sequences cannot advance at different speeds; `None` if there is
    none."""
    if not takes_trees(model) or scaling_step(model) is not None:
        return (
            f"`{model.config.model_type}` depends on the index of a token in its cache, which draft trees of a batch "
            "do not preserve"
        )
    unsupported = sorted({type(part).__name__ for part in logits_processor if not is_row_wise(part)})
    if unsupported:
        return (
            f"{', '.join(unsupported)} may look at the whole batch, or remember earlier calls; give it an "
            "attribute `is_row_wise = True` if it does neither"
        )
    recorded = [name for name in RECORDED if getattr(generation_config, name)]
    if recorded and generation_config.return_dict_in_generate:
        return f"`{recorded[0]}` returns something for every step of the whole batch"
    if isinstance(cache, StaticCache):
        return "the sequences of a static cache have one length"
    is_returned = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    if is_returned and is_recurrent(model) and (asked := split_criteria(criteria, 2)[1]):
        names = sorted({type(criterion).__name__ for criterion in asked})
        return (
            f"{', '.join(names)} may end a sequence at a token behind which others were decoded, and the "
            f"recurrent states of `{model.config.model_type}` in the returned cache cannot be rolled back"
        )
    return None


def stops_each(criteria: StoppingCriteriaList) -> bool:
    """Whether plain decoding ends sequences one by one: without an EOS token it goes on with all of a batch until
    each of them has been stopped once."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


def split_criteria(
    criteria: StoppingCriteriaList, num_sequences: int
) -> tuple[StoppingCriteriaList, StoppingCriteriaList]:
    """The criteria besides length and EOS: those asked about one sequence of a batch, and about the whole of it."""
    is_split = num_sequences > 1 and stops_each(criteria)
    of_sequence, of_batch = StoppingCriteriaList(), StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria):
            (of_sequence if is_split and is_row_wise(criterion) else of_batch).append(criterion)
    return of_sequence, of_batch


def sequence_processors(logits_processor: LogitsProcessorList, sequence: int) -> LogitsProcessorList:
    """The processors for one sequence of the batch, to be called with that sequence alone."""
    return LogitsProcessorList(_sequence_processor(processor, sequence) for processor in logits_processor)


def _sequence_processor(processor: LogitsProcessor, sequence: int) -> LogitsProcessor:
    if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
        processor = copy.copy(processor)
        if isinstance(processor.prompt_ignore_length, torch.Tensor):  # one for each sequence
            processor.prompt_ignore_length = processor.prompt_ignore_length[sequence : sequence + 1]
    elif isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        processor = copy.copy(processor)
        processor._prefix_allowed_tokens_fn = lambda _, prefix_ids: allowed(sequence, prefix_ids)
    elif isinstance(processor, logits_process.SynthIDTextWatermarkLogitsProcessor):
        processor = copy.deepcopy(processor)  # remembers the contexts it has seen
    return processor
