"""What losses know of their targets."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def label_weights(loss: Any, output: Tensor, target: Tensor) -> Tensor:
    """Weight of each label's own class in a cross-entropy, 0 where ignored; shape of ``target``."""
    valid = target != loss.ignore_index
    if loss.weight is None:
        return valid.to(output.dtype)
    weights: Tensor = loss.weight[target.where(valid, 0)] * valid
    return weights


def check_same_shape(loss: str, output: Tensor, target: Any) -> None:
    """Refuse targets that would be broadcast.

    Raises:
        ValueError: If the shapes differ.
    """
    if not isinstance(target, Tensor) or target.shape != output.shape:
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"y has shape {got} but the network's output has {tuple(output.shape)}; {loss} needs the same shape "
            "(y.unsqueeze(1) for a single output)"
        )


def check_floats(loss: str, target: Tensor) -> None:
    """Refuse targets that are no floats.

    Raises:
        ValueError: If they are whole numbers or truth values.
    """
    if not target.is_floating_point():
        raise ValueError(f"y has dtype {target.dtype}; {loss} needs floats: y.float()")
