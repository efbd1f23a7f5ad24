"""Errors of a block's activations say where in the block they come from."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls
from oats_vision.calibration.origin import NotFiniteError, Origin, origin_of
from oats_vision.models.structure import sharing_weights


@contextmanager
def explained(
    block: nn.Module,
    name: str,
    calls: BlockCalls,
    index: int,
    hidden: ActivationStore,
    dense: ActivationStore | None = None,
) -> Iterator[None]:
    """Where activations turn out not to be finite, run the block once more on that batch, and say where that begins.

    Args:
        block: called `name`, number `index`; its linears may be replaced meanwhile.
        hidden: its inputs. dense: those in the dense model, where they are others.

    Raises:
        NotFiniteError: what was raised, with its origin.
    """
    before = None if dense is None else sharing_weights(block)
    try:
        yield
    except NotFiniteError as problem:
        if problem.origin:
            raise
        batch = problem.batch

        def origin(module: nn.Module, states: ActivationStore) -> Origin | None:
            return origin_of(
                module,
                lambda: calls.run(module, index, batch, states[batch]),
                len(states[batch]),
                calls.masks[batch],
                name,
            )

        found, where = None, ""
        if before is not None and dense is not None and not problem.leaves:
            found = origin(before, dense)
            where = ", in the dense model"
        if found is None:
            found, where = origin(block, hidden), ""
        if found is None:
            raise
        raise problem.with_origin(found.of_sample(calls.names[batch]) + where) from None
