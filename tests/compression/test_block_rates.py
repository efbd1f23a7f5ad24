"""OWL and AlphaPruning against restatements in numpy."""

import numpy as np
import pytest
import torch

from oats_vision.compression.block_rates import alpha_rates, hill_exponent, outlier_ratio, owl_rates


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_owl_counts_what_is_five_times_the_mean_of_all_linears_together(generator):
    scores = [np.abs(generator.standard_normal((6, 8))) ** 3, np.abs(generator.standard_normal((4, 8))) ** 6]
    flat = np.concatenate([score.ravel() for score in scores])
    expected = (flat > 5 * flat.mean()).mean()
    assert 0 < expected < 0.5
    assert outlier_ratio([torch.from_numpy(score) for score in scores]) == pytest.approx(expected)


def test_owl_stretches_the_ratios_over_twice_lambda_around_the_global_density():
    D, sparsity, lamda = np.array([3.0, 1.0, 2.5]), 0.6, 0.08
    D = (D - D.min()) / (D.max() - D.min()) * lamda * 2
    expected = 1 - (D - D.mean() + (1 - sparsity))
    assert owl_rates([3.0, 1.0, 2.5], 0.6) == pytest.approx(expected.tolist())
    assert owl_rates([2.0, 2.0], 0.6) == pytest.approx([0.6, 0.6])


def test_hills_estimator_finds_the_exponent_of_a_power_law(generator):
    alpha, n = 3.0, 400
    eigenvalues = generator.pareto(alpha - 1, n) + 1  # density ~ x^-alpha above 1
    basis, _ = np.linalg.qr(generator.standard_normal((n, n)))
    weight = torch.from_numpy(np.sqrt(eigenvalues)[:, None] * basis)
    assert hill_exponent(weight) == pytest.approx(alpha, rel=0.15)


def test_hills_estimator_is_that_of_the_eigenvalues_above_the_peak(generator):
    weight = generator.standard_normal((40, 60)) * np.exp(generator.standard_normal(60))
    logs = np.sort(np.log(np.linalg.svd(weight, compute_uv=False) ** 2))
    counts, edges = np.histogram(logs, bins=100)
    tail = logs[logs >= edges[counts.argmax()]]
    expected = 1 + len(tail) / (tail - tail[0]).sum()
    assert hill_exponent(torch.from_numpy(weight)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.eye(4)])
def test_a_spectrum_without_a_tail_has_a_finite_exponent(weight):
    assert np.isfinite(hill_exponent(weight))


def test_alphapruning_scales_the_stretched_exponents_to_the_global_rate():
    alphas, sizes = np.array([2.0, 4.0, 3.5]), np.array([10, 20, 10])
    psi = (alphas - 2) / 2 * 0.6 + 0.7
    expected = psi * 0.5 * sizes.sum() / (psi * sizes).sum()
    rates = alpha_rates(alphas.tolist(), sizes.tolist(), 0.5)
    assert rates == pytest.approx(expected.tolist())
    assert np.dot(rates, sizes) == pytest.approx(0.5 * sizes.sum())
