import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oats_vision.calibration.statistics import SCALES, Gram, MeanAndVariance, MedianMagnitude, SecondMoment


def _tokens(seed: int, tokens: int = 512, features: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 5, features, generator=generator)
    x[..., 2] *= 1000  # an outlier feature
    x[..., 5] = 0  # a dead one
    return x


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.sampled_from([1, 7, 256]))
def test_second_moment_does_not_depend_on_batches_or_order(seed, batch):
    x = _tokens(seed)
    whole, parts = SecondMoment(12), SecondMoment(12)
    whole.update(x)
    for part in x[torch.randperm(len(x))].split(batch):
        parts.update(part)
    reference = x.double().square().mean((0, 1))
    np.testing.assert_allclose(whole.compute(), reference, rtol=1e-6)
    np.testing.assert_allclose(parts.compute(), reference, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_second_moment_of_other_precisions(dtype):
    x = _tokens(3).to(dtype)
    moment = SecondMoment(12)
    moment.update(x)
    np.testing.assert_allclose(moment.compute(), x.double().square().mean((0, 1)), rtol=1e-6)


def test_squares_that_overflow_float32_are_kept():
    moment = SecondMoment(1)
    moment.update(torch.full((4, 1), 1e30))
    assert moment.compute().item() == pytest.approx(1e60)


def test_products_that_overflow_float32_are_kept():
    gram = Gram(2)
    gram.update(torch.tensor([[1e30, 1.0], [-1e30, 3.0]]))
    np.testing.assert_allclose(gram.compute(), [[1e60, -1e30], [-1e30, 5.0]], rtol=1e-6)


@pytest.mark.parametrize("kind", [SecondMoment, MedianMagnitude])
def test_masked_tokens_do_not_count(kind):
    x = _tokens(1)
    mask = torch.rand(x.shape[:2]) > 0.4
    masked, alone = kind(12), kind(12)
    masked.update(torch.where(mask[..., None], x, 1e4), mask)
    alone.update(x[mask])
    np.testing.assert_allclose(masked.compute(), alone.compute(), rtol=1e-6)
    assert masked.tokens == int(mask.sum())


def test_median_is_numpys_to_half_a_bin_and_exactly_order_free():
    x = _tokens(4)
    whole, parts = MedianMagnitude(12), MedianMagnitude(12)
    whole.update(x)
    for part in x.flip(0).split(3):
        parts.update(part)
    assert torch.equal(whole.compute(), parts.compute())
    np.testing.assert_allclose(whole.compute(), np.median(np.abs(x.numpy()), (0, 1)), rtol=2 ** (1 / 16) - 1)


@pytest.mark.parametrize("kind", SCALES.values())
def test_scales_are_finite_and_positive(kind):
    statistic = kind(12)
    statistic.update(_tokens(5))
    assert (statistic.scale() > 0).all()
    assert statistic.scale().isfinite().all()


def test_no_token_is_an_error():
    with pytest.raises(ValueError, match="no token was seen"):
        SecondMoment(3).compute()


def test_gram_mean_and_variance_are_numpys_whatever_the_batches():
    x = _tokens(6).double()
    flat = x.flatten(0, -2).numpy()
    gram, moments = Gram(12), MeanAndVariance(12)
    for part in x.split(3):
        gram.update(part)
        moments.update(part)
    np.testing.assert_allclose(gram.compute(), flat.T @ flat / len(flat))
    mean, variance = moments.mean_and_variance()
    np.testing.assert_allclose(mean, flat.mean(0))
    np.testing.assert_allclose(variance, flat.var(0))
    np.testing.assert_allclose(moments.compute(), (flat**2).mean(0))


@pytest.mark.parametrize("in_features", [Gram.BLOCK, 2 * Gram.BLOCK + 5])
def test_gram_of_many_features_is_put_together_from_its_blocks(in_features):
    x = torch.randn(9000, in_features, generator=torch.Generator().manual_seed(0)).double()  # more than one chunk
    gram = Gram(in_features)
    gram.update(x)
    np.testing.assert_allclose(gram.compute(), (x.T @ x / len(x)).numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("in_features", "blocks"), [(40, (1, 40, 40)), (2050, (2, 1025, 1025))])
def test_inputs_weigh_together_in_pieces_where_there_are_many(in_features, blocks):
    gram = Gram(in_features)
    gram.update(torch.randn(10, in_features))
    assert gram.correlations().C.blocks.shape == blocks
    assert gram.correlations() is gram.correlations()


def test_shares_are_the_mean_over_its_mean_square_and_follow_new_tokens():
    gram, x = Gram(3), torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    gram.update(x[:1] * 1e30)
    assert gram.shares(torch.float32).isfinite().all()  # whose squares are beyond float32
    gram.update(x[1:] * 1e30)
    G = (x.T @ x / 2).double()
    torch.testing.assert_close(gram.shares(torch.float64), G / G.diagonal().mean())
    assert gram.shares(torch.float32).dtype == torch.float32


def test_noise_is_a_share_of_the_median_of_what_is_not_zero():
    gram, x = Gram(5), torch.tensor([[1.0, 2.0, 0.0, 1e-3, 30.0]])
    gram.noise = 0.1
    gram.update(x)
    noise = torch.tensor([0.1, 0.1, 0.0, 0.1, 0.1]).double()  # the median of 1, 4, 1e-6 and 900 is the lower one, 1
    torch.testing.assert_close(gram.compute(), x.double().T @ x.double() + noise.diag())
    torch.testing.assert_close(gram.mean(), x.double().T @ x.double())
    gram.update(x)
    torch.testing.assert_close(gram.compute(), gram.mean() + noise.diag())
    silent = Gram(2)
    silent.noise = 0.1
    silent.update(torch.zeros(3, 2))
    assert not silent.compute().any()
