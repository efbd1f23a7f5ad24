import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oats_vision.core.correlations import Correlations


def moments(features: int, seed: int) -> torch.Tensor:
    x = torch.randn(3 * features, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x @ torch.randn(features, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return x.T @ x / len(x)


def whole(found: Correlations) -> torch.Tensor:
    """C as one matrix, in the features' own order."""
    return found.C.times(torch.eye(len(found.d), dtype=found.d.dtype))


@settings(max_examples=30, deadline=None)
@given(size=st.sampled_from([3, 4, 6, 12]), count=st.sampled_from([1, 2, 4]), seed=st.integers(0, 100))
def test_blocks_are_those_of_the_matrix_and_the_rest_is_zero(size, count, seed):
    G = moments(size * count, seed)
    found = Correlations.of(G, torch.float64, 0.1, largest=size)
    C = G / G.diagonal().sqrt() / G.diagonal().sqrt()[:, None] + 0.1 * torch.eye(len(G)).double()
    ours = whole(found)
    together = ours != 0
    torch.testing.assert_close(ours, C * together)
    assert (together.sum(1) == size).all()
    assert (together == together.T).all()
    torch.testing.assert_close(found.C.diagonal(), C.diagonal())
    d = G.diagonal().sqrt()
    torch.testing.assert_close(found.moments().times(torch.eye(len(G)).double()), ours * d * d[:, None])


@settings(max_examples=30, deadline=None)
@given(size=st.sampled_from([3, 4, 6, 12]), count=st.sampled_from([1, 2, 4]), seed=st.integers(0, 100))
def test_rotations_diagonalise_it_from_both_sides_and_lead_back(size, count, seed):
    found = Correlations.of(moments(size * count, seed), torch.float64, 0.1, largest=size)
    values, rotation = found.C.eigen
    X = torch.randn(size * count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rotation.rows(found.C.times(X)), values[:, None] * rotation.rows(X))
    torch.testing.assert_close(rotation.rows_back(rotation.rows(X)), X)
    torch.testing.assert_close(rotation.columns(X.T), rotation.rows(X).T)
    torch.testing.assert_close(rotation.columns_back(rotation.columns(X.T)), X.T)
    assert (values > 0).all()


def test_features_that_go_together_with_many_are_in_one_block():
    """The even ones are copies of one signal with noise, the odd ones are on their own."""
    torch.manual_seed(0)
    x = torch.randn(500, 16, dtype=torch.float64)
    x[:, ::2] += 2 * torch.randn(500, 1, dtype=torch.float64)
    found = Correlations.of(x.T @ x / 500, torch.float64, largest=8)
    assert sorted(found.C.order[:8].tolist()) == list(range(0, 16, 2))
