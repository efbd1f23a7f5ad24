"""What blocks of transformers return."""

from typing import Any

from torch import Tensor


def first_output(output: Any) -> Tensor:
    """The hidden states among what a block (or its attention) returns: itself, or the first of a tuple or list."""
    hidden_states: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden_states


def with_hidden_states(output: Any, hidden: Tensor) -> Any:
    """What a block returned, with other hidden states."""
    if isinstance(output, (tuple, list)):
        return type(output)([hidden, *output[1:]])
    return hidden
