"""Noise of sampling: that of plain decoding at whatever step, and known to the drafts before it is drawn."""

import pytest
import torch
from conftest import make_prompt
from helpers import drafter_of
from transformers import LogitsProcessorList, StoppingCriteria

from hf_jetflow.decoding import noise as noise_module
from hf_jetflow.decoding.noise import NOISE_WEIGHT, Noise, SequenceNoise, draft_noise
from hf_jetflow.decoding.ranking import Ranker


PROBS = torch.full((1, 50), 0.02)


@pytest.mark.parametrize("max_bytes", [0, 2**20], ids=["drawn again", "stored"])
def test_noise_is_that_of_multinomial_in_whatever_order_it_is_asked_for(max_bytes, monkeypatch):
    monkeypatch.setattr("hf_jetflow.decoding.noise.MAX_NOISE_BYTES", max_bytes)
    probs = torch.softmax(2 * torch.randn(6, 3, 50), dim=-1)
    torch.manual_seed(8)
    expected = torch.stack([torch.multinomial(step, num_samples=1)[:, 0] for step in probs])
    state = torch.get_rng_state()
    torch.manual_seed(8)
    noise = Noise(3)
    got = torch.empty_like(expected)
    for sequence in (1, 0, 2):
        draws = SequenceNoise(noise, sequence)
        for step in range(6):
            got[step, sequence] = draws.draw(probs[step, sequence : sequence + 1])
    assert got.tolist() == expected.tolist()
    assert torch.equal(torch.get_rng_state(), state)


def test_one_sequence_stores_nothing_of_the_steps_that_it_has_drawn():
    noise = Noise(1)
    draws = SequenceNoise(noise, 0)
    draws.draw(PROBS)
    draws.ahead(4)
    draws.advance()
    assert list(noise._noise) == list(noise._states) == [2, 3, 4]


def test_probabilities_that_are_none_raise_as_in_plain_decoding():
    with pytest.raises(RuntimeError, match=r"inf.*nan"):
        SequenceNoise(Noise(2), 0).draw(torch.tensor([[0.5, float("nan")]]))


def draws_of(num_sequences: int, num_drawn: list[int]) -> list[SequenceNoise]:
    """Draws of a batch whose sequences are at these steps."""
    torch.manual_seed(3)
    noise = Noise(num_sequences)
    draws = [SequenceNoise(noise, sequence) for sequence in range(num_sequences)]
    for each, steps in zip(draws, num_drawn, strict=True):
        for _ in range(steps):
            each.draw(PROBS)
    return draws


def test_noise_of_drafts_is_that_of_each_sequence_s_next_draws():
    draws = draws_of(2, [1, 3])
    added = draft_noise(draws, 4, temperature=0.5)
    assert added.shape == (2, 4, 50)
    logits = torch.randn(2, 4, 50)
    for each, rows, of_sequence in zip(draws, logits, added, strict=True):
        for row, change in zip(rows, of_sequence, strict=True):
            drawn = each.draw(torch.softmax(row / 0.5, -1)[None])
            assert drawn == int((row + change / NOISE_WEIGHT).argmax())


def test_noise_that_would_have_to_be_drawn_again_is_left_out_of_drafts(monkeypatch):
    monkeypatch.setattr(noise_module, "MAX_NOISE_BYTES", 3 * 2 * 50 * 4)  # three steps of two sequences
    slow_and_fast = draws_of(2, [1, 9])
    added = draft_noise(slow_and_fast, 2, temperature=1.0)
    assert not added[0].any()
    assert added[1].all()
    assert draft_noise(slow_and_fast[:1], 2, temperature=1.0) is None


@pytest.mark.parametrize("others", [0, 2])
def test_noise_drawn_ahead_is_taken_back_unless_something_else_has_drawn(others):
    torch.manual_seed(3)
    noise = Noise(1)
    draws = SequenceNoise(noise, 0)
    draws.draw(PROBS)
    state = torch.get_rng_state()
    draws.ahead(4)
    if others:  # another thread would be given the same numbers again
        torch.rand(others)
        state = torch.get_rng_state()
    noise.rewind(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_zero_stays_finite(monkeypatch):
    draws = draws_of(1, [1])
    draws[0].ahead(1)[0][7] = 0.0
    added = draft_noise(draws, 1, temperature=1.0)
    assert added.isfinite().all()
    assert int(added.argmax()) == 7


@pytest.mark.parametrize("drafted", [None, list(range(40, 140))], ids=["whole vocabulary", "draft vocabulary"])
@pytest.mark.parametrize("vocab_size", [256, 200, 300])
def test_a_draft_ranks_first_what_would_be_drawn_from_the_head(vocab_size, drafted, tiny_target, random_head):
    target = tiny_target("llama", vocab_size=256)
    size = None if drafted is None else len(drafted)
    head = random_head(target, ngram_weights=[], branch_correction=None, draft_vocab_size=size)
    if drafted is not None:
        head.d2t.copy_(torch.tensor(drafted))
    ids, depth = torch.cat([make_prompt(9, seed=1), make_prompt(9, seed=2)]).clamp_max(255), head.config.block_size - 1
    noise = 3 * torch.randn(2, depth, vocab_size, generator=torch.Generator().manual_seed(1))
    anchors = torch.full((2,), ids.shape[1] - 1)
    alone = drafter_of(head, target, ids).propose(ids, anchors, depth, width=size or 256).candidates
    draft = drafter_of(head, target, ids).propose(ids, anchors, depth, 5, noise).candidates
    known = torch.cat([noise, torch.zeros(2, depth, 300 - vocab_size)], -1)  # of the target's ids
    expected = torch.log_softmax(alone.logprobs + known.gather(-1, alone.tokens), -1).topk(5)
    assert torch.equal(draft.tokens, alone.tokens.gather(-1, expected.indices))
    torch.testing.assert_close(draft.logprobs, expected.values)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_head_that_knows_the_distribution_drafts_every_draw(batch, temperature, target, random_head, monkeypatch):
    """However random the text is: without the noise a chain accepts next to nothing here."""
    logits = 0.5 * torch.randn(target.config.vocab_size, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(noise_module, "NOISE_WEIGHT", 1.0)
    monkeypatch.setattr(
        Ranker, "logprobs", lambda _self, rows, _outside=None: logits.log_softmax(-1).expand(*rows.shape[:-1], -1)
    )
    head = random_head(target, ngram_weights=[], branch_correction=None)
    head.generation_config.width = 1
    head.generation_config.node_budget = head.config.block_size

    def know_nothing(_module, _args, output):
        output.logits = logits.expand_as(output.logits).clone()

    handle = target.register_forward_hook(know_nothing)
    try:
        settings = dict(do_sample=True, temperature=temperature, top_k=0, max_new_tokens=31)
        texts = []
        for assistant in (None, head):
            torch.manual_seed(7)
            texts.append(target.generate(make_prompt(5).repeat(batch, 1), assistant_model=assistant, **settings))
    finally:
        handle.remove()
    assert torch.equal(*texts)
    assert len(set(texts[0][0].tolist())) > 5
    assert head.last_stats.num_accepted == head.last_stats.num_drafted == 26 * batch


class Random(StoppingCriteria):
    """Draws random numbers itself; as a processor it changes scores by them, too."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.rand(len(input_ids), device=input_ids.device) < 0

    def process(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.randn_like(scores)


@pytest.mark.parametrize("where", ["criterion", "processor", "nowhere"])
def test_no_noise_is_drawn_ahead_of_what_may_draw_too(where, target, random_head, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "hf_jetflow.decoding.session.draft_noise", lambda *args: calls.append(args) or draft_noise(*args)
    )
    settings = {"do_sample": True, "max_new_tokens": 16}
    if where == "criterion":
        settings["stopping_criteria"] = [Random()]
    elif where == "processor":
        settings["logits_processor"] = LogitsProcessorList([Random().process])
    texts, states = [], []
    for assistant in (None, random_head(target)):
        torch.manual_seed(7)
        texts.append(target.generate(make_prompt(5), assistant_model=assistant, **settings))
        states.append(torch.get_rng_state())
    assert torch.equal(*texts)
    assert torch.equal(*states)
    assert bool(calls) == (where == "nowhere")
