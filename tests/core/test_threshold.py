import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oats_vision.core.budget import Budget, Pattern
from oats_vision.core.threshold import keep_largest

# few distinct values: many ties, zeros among them
matrices = arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 17)),
    elements=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 3.0]),
)


def _groups(x: torch.Tensor, pattern: Pattern) -> list[torch.Tensor]:
    if pattern.kind == "layer":
        return [x.flatten()]
    if pattern.kind == "row":
        return list(x)
    return [group for row in x for group in row.split(pattern.m)]


@given(matrices, st.sampled_from(["row", "layer", "2:4", "1:3", "5:8"]), st.floats(0, 1))
def test_each_group_keeps_its_largest_and_exactly_as_many_as_there_is_room_for(array, text, density):
    x, pattern = torch.from_numpy(array), Pattern.parse(text)
    per_group = {
        "row": int(density * x.shape[1]),
        "layer": int(density * x.numel()),
        "n:m": pattern.n,
    }[pattern.kind]
    nonzeros = per_group * {"row": len(x), "layer": 1, "n:m": 0}[pattern.kind]
    S = keep_largest(x, Budget(0, nonzeros, pattern))

    assert torch.equal(S[S != 0], x[S != 0])
    for before, after in zip(_groups(x, pattern), _groups(S, pattern), strict=True):
        expected = before.abs().sort(descending=True).values[:per_group]
        kept = after.abs().sort(descending=True).values[: len(expected)]
        assert torch.equal(kept, expected)
        assert int((after != 0).sum()) == int((expected != 0).sum())


def test_writes_into_out():
    x, out = torch.randn(4, 8), torch.full((4, 8), 7.0)
    assert keep_largest(x, Budget(0, 8), out=out) is out
    assert torch.equal(out, keep_largest(x, Budget(0, 8)))
