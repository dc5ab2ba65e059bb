"""Sampling with a head draws the text of plain sampling: the same one from a seed, the same distribution without."""

import itertools

import pytest
import torch
from reference import assert_same_text
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, WatermarkingConfig

from hf_jetflow.trees.walk import Chooser


NUM_TOKENS = 25


class BoostNeighbors(LogitsProcessor):
    """Depends on the whole prefix and on how often it was called, as a grammar or a state machine would."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        boosted = (input_ids.sum() * self.num_calls + torch.arange(5, device=scores.device)) % scores.shape[-1]
        scores = scores.clone()
        scores[:, boosted] += 4.0
        return scores


def only_far_tokens(_batch_id: int, input_ids: torch.Tensor) -> list[int]:
    last = int(input_ids[-1])
    return [token for token in range(3, 257) if abs(token - last) > 100 or token % 7 == last % 7]


# Settings that change the choice of plain greedy decoding too ...
PROCESSORS = {
    "repetition_penalty": dict(repetition_penalty=1.5),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=1),
    "bad_words_ids": dict(bad_words_ids=[[token] for token in range(3, 130)] + [[200, 201], [140, 150]]),
    "prefix_allowed_tokens_fn": dict(prefix_allowed_tokens_fn=only_far_tokens),
    "sequence_bias": dict(sequence_bias=[[[token], -5.0] for token in range(3, 100)] + [[[130, 131], 5.0]]),
    "suppress_tokens": dict(suppress_tokens=list(range(0, 257, 2))),
    "begin_suppress_tokens": dict(begin_suppress_tokens=list(range(0, 257, 2))),
    "exponential_decay_length_penalty": dict(exponential_decay_length_penalty=(5, 1.1), eos_token_id=2),
    "forced_eos_token_id": dict(forced_eos_token_id=2, eos_token_id=2),
    "min_new_tokens": dict(min_new_tokens=12, eos_token_id=list(range(3, 200))),
    "guidance_scale": dict(guidance_scale=2.0),
    "watermarking_config": dict(watermarking_config=WatermarkingConfig(bias=3.0)),
}
# ... and those for sampling only.
WARPERS = {
    "nothing": dict(top_k=0),
    "low temperature": dict(temperature=0.5, top_k=0),
    "high temperature": dict(temperature=1.5, top_k=0),
    "top_k": dict(top_k=5),
    "top_p": dict(top_p=0.7, top_k=0),
    "min_p": dict(min_p=0.2, top_k=0),
    "typical_p": dict(typical_p=0.7, top_k=0),
    "epsilon_cutoff": dict(epsilon_cutoff=0.02, top_k=0),
    "eta_cutoff": dict(eta_cutoff=0.02, top_k=0),
    "several at once": dict(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2, renormalize_logits=True),
}


def generate(target, input_ids, head=None, **kwargs):
    """The text, and the state that the random number generator is left in."""
    torch.manual_seed(5)
    kwargs = dict(max_new_tokens=NUM_TOKENS, do_sample=True) | kwargs
    if kwargs.pop("custom_processor", False):
        kwargs["logits_processor"] = LogitsProcessorList([BoostNeighbors()])
    text = target.generate(input_ids, assistant_model=head, **kwargs)
    return text, torch.get_rng_state()


def check_same(target, prompt, head_of_kind, kind, **kwargs):
    plain, plain_state = generate(target, prompt, **kwargs)
    head = head_of_kind(kind, target, plain)
    drafted, drafted_state = generate(target, prompt, head, **kwargs)
    assert_same_text(plain, drafted)
    assert torch.equal(plain_state, drafted_state), "the head draws more or fewer random numbers than plain decoding"
    return head


@pytest.mark.parametrize(
    ("settings", "kind"),
    [(settings, "noisy") for settings in (*WARPERS, *PROCESSORS)]
    + [(settings, "echo") for settings in ("nothing", "several at once", "min_new_tokens", "guidance_scale")],
)
def test_sampling_draws_the_same_text_from_the_same_seed(settings, kind, tiny_target, head_of_kind, prompt):
    kwargs = (WARPERS | PROCESSORS)[settings]
    check_same(tiny_target("llama"), prompt, head_of_kind, kind, **kwargs)


@pytest.mark.parametrize("settings", PROCESSORS)
def test_greedy_decoding_runs_every_processor_on_the_true_prefix(settings, tiny_target, head_of_kind, prompt):
    target = tiny_target("llama")
    kwargs = PROCESSORS[settings] | dict(do_sample=False)
    free, _ = generate(target, prompt, do_sample=False)
    plain, _ = generate(target, prompt, **kwargs)
    assert not torch.equal(free, plain), "the setting does not matter here, so this test shows nothing"
    check_same(target, prompt, head_of_kind, "noisy", **kwargs)


@pytest.mark.any_release
@pytest.mark.parametrize(
    ("kind", "do_sample"),
    [(kind, True) for kind in ("random", "echo", "wrong", "noisy", "parent", "path")] + [("noisy", False)],
)
def test_a_custom_processor_is_called_once_per_token(do_sample, kind, tiny_target, head_of_kind, prompt):
    check_same(tiny_target("llama"), prompt, head_of_kind, kind, custom_processor=True, do_sample=do_sample)


@pytest.mark.any_release
@pytest.mark.parametrize("node_budget", [1, 2, 7, 256])
def test_every_node_budget_draws_the_same_text_from_the_same_seed(node_budget, tiny_target, noisy_head, prompt):
    target = tiny_target("qwen3")
    plain, _ = generate(target, prompt)
    head = noisy_head(target, plain)
    head.generation_config.node_budget = node_budget
    assert_same_text(plain, generate(target, prompt, head)[0])


class StopAfter(StoppingCriteria):
    """Ends the text at a length, which no draft knows of."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


@pytest.fixture
def num_chosen_alone(monkeypatch):
    """As on a GPU, choices at all nodes are made at once where that is possible; lists the calls where it is not."""
    calls, choose = [], Chooser.choose
    monkeypatch.setattr("hf_jetflow.trees.walk._reads_once", lambda _device: True)
    monkeypatch.setattr(Chooser, "choose", lambda *args: calls.append(args) or choose(*args))
    return calls


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings", [name for name in WARPERS if name not in ("eta_cutoff", "several at once")])
def test_choices_at_all_nodes_at_once_draw_the_same_text(
    settings, batch, tiny_target, head_of_kind, prompt, num_chosen_alone
):
    kwargs = WARPERS[settings] | dict(renormalize_logits=True, remove_invalid_values=True)
    head = check_same(tiny_target("llama"), prompt.repeat(batch, 1), head_of_kind, "noisy", **kwargs)
    assert head.last_stats.num_accepted > 5
    assert len(num_chosen_alone) == batch, "only the token after the prompt is chosen alone"


@pytest.mark.parametrize(
    "kwargs",
    [
        WARPERS["eta_cutoff"],
        PROCESSORS["repetition_penalty"],
        dict(custom_processor=True),
        dict(return_dict_in_generate=True, output_scores=True),
    ],
    ids=["eta_cutoff", "repetition_penalty", "custom", "output_scores"],
)
def test_what_depends_on_the_text_or_is_recorded_is_chosen_node_by_node(
    kwargs, tiny_target, noisy_head, prompt, num_chosen_alone
):
    target = tiny_target("llama")
    plain, state = generate(target, prompt, **kwargs)
    plain = plain if torch.is_tensor(plain) else plain.sequences
    drafted, drafted_state = generate(target, prompt, noisy_head(target, plain), **kwargs)
    assert_same_text(plain, drafted if torch.is_tensor(drafted) else drafted.sequences)
    assert torch.equal(state, drafted_state)
    assert len(num_chosen_alone) == NUM_TOKENS


@pytest.mark.parametrize("length", range(26, 32))
def test_draws_behind_the_end_of_the_text_are_taken_back(length, tiny_target, head_of_kind, prompt, num_chosen_alone):
    stop = [StopAfter(length)]
    head = check_same(tiny_target("llama"), prompt, head_of_kind, "echo", top_k=0, stopping_criteria=stop)
    assert head.last_stats.num_accepted > 0


def test_draws_behind_a_closed_streamer_are_taken_back(tiny_target, head_of_kind, prompt, num_chosen_alone):
    class Closed:
        num_put = 0

        def put(self, _value):
            self.num_put += 1
            if self.num_put == 10:
                raise BrokenPipeError

    target, states = tiny_target("llama"), []
    plain, _ = generate(target, prompt, top_k=0)
    for head in (None, head_of_kind("echo", target, plain)):
        with pytest.raises(BrokenPipeError):
            generate(target, prompt, head, top_k=0, streamer=Closed())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_probabilities_that_are_not_finite_raise_as_in_plain_decoding(
    tiny_target, noisy_head, prompt, num_chosen_alone
):
    target = tiny_target("llama")
    head = noisy_head(target, generate(target, prompt, top_k=0)[0])
    num_calls = 0

    def spoil(_module, _args, output):
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1:
            output.logits[..., 7] = float("nan")

    handle = target.register_forward_hook(spoil)
    try:
        with pytest.raises(RuntimeError, match=r"inf.*nan"):
            generate(target, prompt, head, top_k=0)
    finally:
        handle.remove()


def test_every_family_draws_the_same_text_from_the_same_seed(family, tiny_target, head_of_kind, prompt):
    head = check_same(tiny_target(family), prompt, head_of_kind, "echo", temperature=0.7)
    assert head.last_stats.tokens_per_round == head.config.block_size, "a right draft was rejected"


def test_a_warm_generator_is_left_alone_by_greedy_decoding(tiny_target, noisy_head, prompt):
    target = tiny_target("llama")
    plain, state = generate(target, prompt, do_sample=False)
    _, after = generate(target, prompt, noisy_head(target, plain), do_sample=False)
    assert torch.equal(state, after), "drafting draws random numbers"


def joint_probabilities(target, input_ids, num_tokens, temperature):
    """Probability of every text of `num_tokens` tokens under plain sampling, by enumeration."""
    texts = list(itertools.product(range(target.config.vocab_size), repeat=num_tokens))
    continuations = torch.tensor(texts)
    with torch.no_grad():
        logits = target(torch.cat([input_ids.expand(len(texts), -1), continuations], dim=1), use_cache=False).logits
    logprobs = torch.log_softmax(logits[:, input_ids.shape[1] - 1 : -1] / temperature, dim=-1)
    totals = logprobs.gather(-1, continuations[..., None]).sum(dim=(1, 2)).exp()
    return dict(zip(texts, totals.tolist(), strict=True))


@pytest.mark.any_release
@pytest.mark.parametrize("node_budget", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_sampled_texts_are_distributed_as_in_plain_sampling(node_budget, tiny_target, random_head):
    target = tiny_target("llama", vocab_size=3, num_hidden_layers=2)
    input_ids = torch.tensor([[1, 0, 2, 2, 1]])
    num_tokens, num_samples, temperature = 4, 400, 1.5
    expected = joint_probabilities(target, input_ids, num_tokens, temperature)
    head = random_head(target, block_size=4)
    head.generation_config.node_budget = node_budget
    counts = dict.fromkeys(expected, 0)
    num_accepted = 0
    settings = dict(max_new_tokens=num_tokens, do_sample=True, temperature=temperature, top_k=0)
    for _ in range(num_samples):
        text = target.generate(input_ids, attention_mask=torch.ones_like(input_ids), assistant_model=head, **settings)
        counts[tuple(text[0, -num_tokens:].tolist())] += 1
        num_accepted += head.last_stats.num_accepted
    assert num_accepted > num_samples / 2, "barely any draft was accepted, so this test shows nothing"

    rare = [text for text, share in expected.items() if share * num_samples < 5]
    cells = [([text], share) for text, share in expected.items() if text not in rare]
    cells.append((rare, sum(expected[text] for text in rare)))
    statistic = 0.0
    for texts, share in cells:
        surplus = sum(counts[text] for text in texts) - share * num_samples
        statistic += surplus**2 / (share * num_samples)
    p_value = float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)))
    assert p_value > 1e-3, f"chi-square {statistic:.1f} over {len(cells)} cells: the head bends the distribution"
