"""MLP: its layers, its size, its shapes, its names and its errors."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_altmin.nn import MLP


def kinds(network: nn.Sequential) -> list[type[nn.Module]]:
    """Return the class of each layer, in order."""
    return [type(layer) for layer in network]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"hidden": [5]}, [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]),
        ({"hidden": []}, [nn.Flatten, nn.Linear]),
        ({"hidden": [5], "flatten": False}, [nn.Linear, nn.ReLU, nn.Linear]),
        (
            {"hidden": [5], "batch_norm": True, "dropout": 0.5, "activation": "tanh"},
            [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.Tanh, nn.Dropout, nn.Linear],
        ),
    ],
)
def test_layers_in_order(arguments: dict[str, Any], expected: list[type[nn.Module]]) -> None:
    """Would catch a normalisation that does not directly follow its Linear, or a layer nobody asked for."""
    assert kinds(MLP(in_features=4, out_features=3, **arguments)) == expected


@given(
    in_features=st.integers(1, 12),
    hidden=st.lists(st.integers(1, 9), max_size=4),
    out_features=st.integers(1, 6),
    batch_norm=st.booleans(),
    bias=st.booleans(),
)
def test_parameter_count_and_output_shape(
    in_features: int, hidden: list[int], out_features: int, batch_norm: bool, bias: bool
) -> None:
    """Would catch a width wired to the wrong neighbour, a missing or doubled layer, and a bias that is not dropped."""
    network = MLP(in_features, hidden, out_features, batch_norm=batch_norm, bias=bias)
    widths = [in_features, *hidden, out_features]
    weights = sum(width_in * width_out for width_in, width_out in itertools.pairwise(widths))
    biases = sum(widths[1:]) if bias else 0
    scales_and_shifts = 2 * sum(hidden) if batch_norm else 0
    assert sum(p.numel() for p in network.parameters()) == weights + biases + scales_and_shifts
    assert network(torch.zeros(2, in_features)).shape == (2, out_features)


def test_state_dict_keys_are_plain_sequential_indices() -> None:
    """Would catch wrapped or renamed layers, whose checkpoints an ordinary nn.Sequential could not read."""
    network = MLP(4, [5, 6], 3, batch_norm=True)
    twin = nn.Sequential(
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    twin.load_state_dict(network.state_dict())
    x = torch.randn(7, 4)
    assert torch.equal(network(x), twin(x))


def test_is_the_chain_of_its_formulas() -> None:
    """Would catch an activation after the output layer or a missing one between the layers."""
    network = MLP(2, [3], 2).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    first, last = network[1], network[3]
    by_hand = (x @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(network(x), by_hand, rtol=0, atol=1e-14)


def test_flattens_images() -> None:
    """Would catch image batches that need a reshape by the user, although the issue's MLPs are fed images."""
    assert MLP(3 * 4 * 4, [5], 2)(torch.zeros(6, 3, 4, 4)).shape == (6, 2)


@pytest.mark.parametrize("activation", ["torch.nn.ReLU6", nn.ReLU6])
def test_activation_by_class_path_or_class(activation: Any) -> None:
    """Would catch an activation that can only be one of the short names, and one shared between layers."""
    network = MLP(4, [5, 5], 3, activation=activation)
    assert isinstance(network[2], nn.ReLU6)
    assert isinstance(network[4], nn.ReLU6)
    assert network[2] is not network[4]


def test_each_layer_trains_its_own_activation() -> None:
    """Would catch one PReLU shared by all hidden layers, which then have a common parameter."""
    network = MLP(4, [5, 5], 3, activation="torch.nn.PReLU")
    slopes = [layer.weight for layer in network if isinstance(layer, nn.PReLU)]
    assert len({id(slope) for slope in slopes}) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"in_features": 0}, ValueError, r"in_features .* >= 1, got 0"),
        ({"in_features": 2.0}, ValueError, r"in_features must be an integer >= 1, got 2\.0"),
        ({"out_features": True}, ValueError, r"out_features must be an integer >= 1, got True"),
        ({"hidden": [5, -1]}, ValueError, r"hidden\[1\] .* got -1"),
        ({"hidden": 5}, TypeError, r"hidden must be a list of integers .* got 5"),
        ({"hidden": "55"}, TypeError, r"hidden must be a list of integers .* got '55'"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, ValueError, r"dropout must lie in \[0, 1\), got -0\.1"),
        ({"dropout": float("nan")}, ValueError, r"dropout must lie in \[0, 1\), got nan"),
        ({"dropout": "0.1"}, ValueError, r"dropout must lie in \[0, 1\), got '0\.1' of type str"),
        ({"dropout": False}, ValueError, r"dropout must lie in \[0, 1\), got False"),
        ({"activation": "rleu"}, ValueError, r"activation 'rleu' is unknown; give one of .*relu"),
        ({"activation": "torch.nn.Rleu"}, ValueError, r"'torch\.nn\.Rleu' is not the path of a class .*Rleu"),
        ({"activation": "no_such_package.ReLU"}, ValueError, r"'no_such_package\.ReLU' .* No module named"),
        ({"activation": ".ReLU"}, ValueError, r"'\.ReLU' is not the path of a class"),
        ({"activation": "torch.relu"}, TypeError, r"subclass of torch\.nn\.Module, got 'torch\.relu'"),
        ({"activation": nn.ReLU()}, TypeError, r"pass the class ReLU itself"),
        ({"activation": "torch.nn.Threshold"}, TypeError, r"'torch\.nn\.Threshold' cannot be built without arguments"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Would catch a bad argument that passes, or that fails inside torch without a word about which argument it was."""
    arguments = {"in_features": 4, "hidden": [5], "out_features": 3} | change
    with pytest.raises(error, match=message):
        MLP(**arguments)
