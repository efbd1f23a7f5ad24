import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oats_vision.core.target import propagated_target

OUT, IN, TOKENS = 6, 10, 400


def streams(seed: int, outlier: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The compressed model's inputs, the dense model's, and the difference of the streams."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((TOKENS, IN)) @ generator.standard_normal((IN, IN))
    x[:, 2] *= outlier
    return x, x + 0.3 * generator.standard_normal(x.shape) * x.std(0), generator.standard_normal((TOKENS, OUT))


def target(W: np.ndarray, x: np.ndarray, wanted: np.ndarray, damping: float) -> np.ndarray:
    moments = (torch.from_numpy(wanted.T @ x / len(x)), torch.from_numpy(x.T @ x / len(x)))
    return propagated_target(torch.from_numpy(W), moments[1], moments[0], damping).numpy()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    gain=st.sampled_from([0.001, 0.05, 1.0, 10.0]),
    outlier=st.sampled_from([1.0, 100.0, 1000.0]),
    damping=st.sampled_from([1e-3, 0.01, 0.1]),
)
def test_the_target_is_the_damped_least_squares_solution(seed, gain, outlier, damping):
    x, dense, lost = streams(seed, outlier)
    W = np.random.default_rng(seed + 1).standard_normal((OUT, IN))
    wanted = dense @ W.T + lost / gain  # of a linear that joins the stream through a LayerScale of `gain`
    squares = (x**2).mean(0)
    middle = np.sort(squares)[(IN - 1) // 2]
    # rows that ask for W, as strongly as the damping says
    root = np.sqrt(damping * TOKENS * np.minimum(squares, 10 * middle).mean())
    stacked = np.vstack([x, root * np.eye(IN)])
    solution = np.linalg.lstsq(stacked, np.vstack([wanted, root * W.T]), rcond=None)[0]
    np.testing.assert_allclose(target(W, x, wanted, damping), solution.T, rtol=1e-6, atol=1e-8 * np.abs(solution).max())


def test_equal_streams_leave_the_weight():
    x, _, _ = streams(0)
    W = np.random.default_rng(0).standard_normal((OUT, IN))
    np.testing.assert_allclose(target(W, x, x @ W.T, 0.01), W, atol=1e-10)


def test_neither_the_order_nor_the_number_of_tokens_nor_their_scale_matters():
    x, dense, _ = streams(0)
    W = np.random.default_rng(0).standard_normal((OUT, IN))
    wanted, order = dense @ W.T, np.random.default_rng(1).permutation(TOKENS)
    first = target(W, x, wanted, 0.01)
    np.testing.assert_allclose(target(W, x[order], wanted[order], 0.01), first, rtol=1e-9)
    np.testing.assert_allclose(target(W, np.vstack([x, x]), np.vstack([wanted, wanted]), 0.01), first, rtol=1e-9)
    np.testing.assert_allclose(target(W, 1e4 * x, 1e4 * wanted, 0.01), first, rtol=1e-9)


def test_features_that_are_always_zero_are_left_and_the_others_fitted():
    x, dense, _ = streams(0)
    W = np.random.default_rng(0).standard_normal((OUT, IN))
    dead = np.arange(IN) % 4 != 1
    expected = target(W[:, ~dead], x[:, ~dead], dense @ W.T, 0.01)
    x[:, dead] = 0.0
    found = target(W, x, dense @ W.T, 0.01)
    np.testing.assert_allclose(found[:, ~dead], expected, rtol=1e-9)
    np.testing.assert_allclose(found[:, dead], W[:, dead])
    np.testing.assert_allclose(target(W, 0 * x, dense @ W.T, 0.01), W)


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="second moments are not finite"):
        target(np.ones((2, 2)), np.full((3, 2), np.inf), np.ones((3, 2)), 0.01)
