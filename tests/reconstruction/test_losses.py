"""How far a window is from the float one."""

import pytest
import torch

from qcompiler.reconstruction.losses import LossTerms, divergence, total_loss, window_loss


def test_the_squared_error_is_a_part_of_the_target() -> None:
    target = torch.tensor([[3.0, 4.0]])
    found = torch.tensor([[3.0, 5.0]])
    assert float(window_loss(found, target, LossTerms())) == pytest.approx(1 / 25)
    scaled = window_loss(found * 10, target * 10, LossTerms())
    assert float(scaled) == pytest.approx(1 / 25)


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 5), -1), ((2, 5, 3, 3), 1), ((4, 5), -1)])
def test_the_divergence_is_over_channels(shape: tuple[int, ...], axis: int) -> None:
    target, found = torch.randn(shape), torch.randn(shape)
    p, q = target.softmax(axis), found.softmax(axis)
    expected = (p * (p.log() - q.log())).sum(axis).mean()
    assert float(divergence(found, target)) == pytest.approx(float(expected), rel=1e-4)
    assert float(divergence(target, target)) == pytest.approx(0, abs=1e-6)


def test_tokens_that_do_not_count_are_left_out() -> None:
    target = torch.ones(2, 3, 4)
    found = target.clone()
    found[0, 2] = 100
    keep = torch.tensor([[True, True, False], [True, True, True]])
    assert float(window_loss(found, target, LossTerms(), keep)) == 0
    assert float(window_loss(found, target, LossTerms())) > 100
    # What is no `[batch, tokens, channels]` counts whole.
    assert float(window_loss(found[:, :, 0], target[:, :, 0], LossTerms(), keep)) > 0


def test_branches_are_averaged_and_outputs_added() -> None:
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    terms = LossTerms()
    near = float(window_loss(one, two, terms))
    assert float(total_loss([one], [[two], [one]], terms, None)) == pytest.approx(near / 2)
    assert float(total_loss([one, one], [[two, two]], terms, None)) == pytest.approx(2 * near)
