"""The chunked loss against the same loss written out with autograd."""

import pytest
import torch

from hf_jetflow.training.losses import LogitShape, chunked_forward_kl, depth_weights, feature_errors


ROWS, HIDDEN, VOCAB = 11, 6, 17


def make_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head rows that want a gradient, teacher rows, projection, row weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, HIDDEN), (ROWS, HIDDEN), (VOCAB, HIDDEN))
    rows, teacher, projection = (torch.randn(shape, generator=generator) for shape in shapes)
    return rows.requires_grad_(), teacher, projection, torch.rand(ROWS, generator=generator)


def dense_divergence(
    rows: torch.Tensor, teacher: torch.Tensor, projection: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    log_q = torch.log_softmax(rows @ projection.T / temperature, dim=-1)
    log_p = torch.log_softmax(teacher @ projection.T / temperature, dim=-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 1024])  # 4 does not divide 11
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_chunked_divergences_and_their_gradients_equal_autograd_s(chunk_size, temperature):
    rows, teacher, projection, weights = make_rows()
    weights[3] = 0
    dense = dense_divergence(rows, teacher, projection, temperature)
    (expected,) = torch.autograd.grad((dense * weights).sum(), rows)
    result = chunked_forward_kl(rows, teacher, projection, temperature, chunk_size)
    (gradient,) = torch.autograd.grad((result.divergence * weights).sum(), rows)
    torch.testing.assert_close(result.divergence, dense)
    torch.testing.assert_close(gradient, expected)
    assert bool((gradient[3] == 0).all())


def test_gradients_reach_the_head_s_rows_only():
    rows, teacher, projection, _ = make_rows()
    others = [part.requires_grad_() for part in (teacher, projection)]
    chunked_forward_kl(rows, *others).divergence.sum().backward()
    assert rows.grad is not None
    assert [part.grad for part in others] == [None, None]


def test_equal_rows_have_no_divergence_and_no_gradient():
    _, teacher, projection, _ = make_rows()
    rows = teacher.clone().requires_grad_()
    result = chunked_forward_kl(rows, teacher, projection)
    (gradient,) = torch.autograd.grad(result.divergence.sum(), rows)
    assert result.divergence.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6
    assert bool(result.is_top1.all())


def test_agreement_on_the_best_token_is_reported_by_row():
    rows, teacher, projection, _ = make_rows()
    expected = (rows @ projection.T).argmax(dim=-1) == (teacher @ projection.T).argmax(dim=-1)
    rows.data[5] = teacher[5]
    expected[5] = True
    assert torch.equal(chunked_forward_kl(rows, teacher, projection, chunk_size=4).is_top1, expected)


def test_rows_of_a_narrower_type_get_gradients_of_that_type():
    rows, teacher, projection, _ = make_rows()
    narrow = rows.detach().bfloat16().requires_grad_()
    result = chunked_forward_kl(narrow, teacher, projection)
    result.divergence.sum().backward()
    exact = chunked_forward_kl(narrow.detach().float(), teacher, projection)
    assert narrow.grad.dtype == torch.bfloat16
    torch.testing.assert_close(result.divergence, exact.divergence)


def test_no_rows_give_a_loss_of_zero():
    rows, teacher, projection, _ = make_rows()
    loss = chunked_forward_kl(rows[:0], teacher[:0], projection).divergence.sum()
    loss.backward()
    assert loss.item() == 0


def test_depth_weights_fall_off_by_gamma():
    expected = torch.tensor([1.0, torch.e**-0.5, torch.e**-1.0])
    torch.testing.assert_close(depth_weights(3, gamma=2.0), expected)


def test_depths_weigh_the_same_without_gamma():
    assert depth_weights(3, gamma=None).tolist() == [1, 1, 1]


def test_the_feature_errors_are_in_units_of_each_teacher_row_s_variance():
    rows, teacher, _, _ = make_rows()
    expected = [
        float((row - wanted).square().mean() / wanted.var())
        for row, wanted in zip(rows.detach(), teacher, strict=True)
    ]
    assert feature_errors(rows, teacher).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_feature_errors_do_not_depend_on_the_scale_of_the_states():
    rows, teacher, _, _ = make_rows()
    torch.testing.assert_close(feature_errors(10 * rows, 10 * teacher), feature_errors(rows, teacher))


def test_the_feature_errors_of_equal_rows_are_zero():
    _, teacher, _, _ = make_rows()
    assert feature_errors(teacher, teacher).tolist() == [0.0] * ROWS


def test_the_feature_errors_pull_rows_towards_the_teacher():
    rows, teacher, _, _ = make_rows()
    feature_errors(rows, teacher).sum().backward()
    assert bool(((rows - teacher) * rows.grad >= 0).all())


def test_the_teacher_s_logits_get_the_target_s_scale_and_cap():
    rows, teacher, projection, _ = make_rows()
    shape = LogitShape(scale=0.4, cap=3.0)
    log_q = torch.log_softmax(rows @ projection.T, dim=-1)
    log_p = torch.log_softmax(3 * torch.tanh(0.4 * teacher @ projection.T / 3), dim=-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    result = chunked_forward_kl(rows, teacher, projection, chunk_size=4, teacher_shape=shape)
    torch.testing.assert_close(result.divergence, expected)
    assert not torch.allclose(expected, dense_divergence(rows, teacher, projection))
