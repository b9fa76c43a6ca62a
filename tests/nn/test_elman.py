"""The Elman network beside torch's own, and sequences aligned at their ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence

from lightning_altmin.nn import ElmanRNN, aligned, elman


def twin(network: ElmanRNN, activation: str) -> nn.RNN:
    """The RNN of torch with the same weights."""
    rnn = nn.RNN(network.in_features, network.hidden, nonlinearity=activation, batch_first=True).double()
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(network.cell.weight[:, : network.in_features])
        rnn.weight_hh_l0.copy_(network.cell.weight[:, network.in_features :])
        rnn.bias_ih_l0.copy_(network.cell.bias)
        rnn.bias_hh_l0.zero_()
    return rnn


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_computes_what_torchs_rnn_computes(activation: str) -> None:
    """Catches a wrong part of the weight, a step too many, padding that is read, or the wrong last step."""
    torch.manual_seed(0)
    network = ElmanRNN(3, 5, 2, activation).double()
    rnn = twin(network, activation)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(network(x), network.head(rnn(x)[1][0]))
    packed = pack_sequence([x[0], x[1, :1], x[2, :4]], enforce_sorted=False)
    expected = network.head(rnn(packed)[1][0])
    torch.testing.assert_close(network(packed), expected)
    torch.testing.assert_close(network(aligned(packed)), expected)


def test_images_are_read_row_by_row_or_pixel_by_pixel() -> None:
    """Catches columns taken for rows."""
    torch.manual_seed(0)
    image = torch.randn(2, 1, 4, 3)
    rows, pixels = ElmanRNN(3, 5, 2), ElmanRNN(1, 5, 2)
    assert torch.equal(rows(image), rows(image.reshape(2, 4, 3)))
    assert torch.equal(pixels(image), pixels(image.reshape(2, 12, 1)))
    inputs, begun = rows.steps(image)
    assert torch.equal(inputs[1, 2], image[1, 0, 2])
    assert begun.flatten().tolist() == [0, 1, 1, 1]


def test_an_unset_unit_keeps_what_it_holds() -> None:
    """Catches an initial matrix that shrinks or mixes what it carries, a bias that drifts, inputs that saturate."""
    cell = ElmanRNN(3, 16, 2).cell
    assert torch.equal(cell.weight[:, 3:], torch.eye(16))
    assert not cell.bias.any()
    assert 0.04 < float(cell.weight.detach()[:, :3].abs().max()) <= 0.3 / 4


def test_aligned_by_hand() -> None:
    """Catches sequences shifted by one, marks on the wrong side, and padding that is not zero."""
    padded = torch.tensor([[[1.0], [2.0], [9.0]], [[3.0], [4.0], [5.0]]])
    expected = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.0, 2.0]], [[1.0, 3.0], [1.0, 4.0], [1.0, 5.0]]])
    sequences = [padded[0, :2], padded[1]]
    for found in (
        aligned(padded, [2, 3]),
        aligned(padded, torch.tensor([2, 3])),
        aligned(sequences),
        aligned(pack_sequence(sequences, enforce_sorted=False)),
    ):
        assert torch.equal(found, expected)
    inputs, begun = ElmanRNN(1, 2, 2).steps(expected)
    assert torch.equal(inputs, expected[..., 1:])
    assert begun.squeeze(2).tolist() == [[0, 0, 1], [0, 1, 1]]


X = torch.randn(2, 3, 1)


@pytest.mark.parametrize(
    ("sequences", "lengths", "message"),
    [
        (X, None, "come with lengths"),
        ([], None, "one sequence at least"),
        (X[0], [1, 1, 1], "shape .batch, time, features."),
        (X, [1], "2 whole numbers from 1 to 3"),
        (X, [0, 3], "2 whole numbers from 1 to 3"),
        (X, [1, 4], "2 whole numbers from 1 to 3"),
        (X, torch.tensor([1.0, 3.0]), r"2 whole numbers .*got dtype torch.float32: lengths.long\(\)"),
        (X, ["a", "b"], "2 whole numbers from 1 to 3.*got .'a', 'b'."),
        (X, [[1, 2]], r"2 whole numbers from 1 to 3.*got shape \(1, 2\)"),
        (X[:0], torch.zeros(0, dtype=torch.long), r"holds no steps: it has shape \(0, 3, 1\)"),
        (X[:, :0], [1, 1], r"holds no steps: it has shape \(2, 0, 1\)"),
        ([X[0], X[0, :, 0]], None, r"got \(3, 1\) at 0 and \(3,\) at 1"),
        (list(X), [3, 3], "know theirs"),
        (pack_sequence(list(X)), [3, 3], "know theirs"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(sequences: Any, lengths: Any, message: str) -> None:
    """Catches padding trained as data, and an empty sequence."""
    with pytest.raises(ValueError, match=message):
        aligned(sequences, lengths)


def test_small_integers_are_lengths() -> None:
    """Catches a difference taken in the lengths' own type, which wraps around below zero in uint8."""
    torch.testing.assert_close(aligned(X, torch.tensor([1, 3], dtype=torch.uint8)), aligned(X, [1, 3]))


def test_lengths_on_a_device_are_not_looked_at() -> None:
    """Catches a wait for the device in every batch: a tensor on "meta" has no values, so a look at one is an error."""
    assert aligned(X.to("meta"), torch.tensor([1, 3], device="meta")).shape == (2, 3, 2)


def test_unseen_lengths_that_do_not_fit_make_nan_of_their_sequences_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an index out of a kernel's bounds, a bad batch that trains, and good sequences lost with a bad one.

    Whether a length is on the CPU is what is replaced here: the way is the same on a device.
    """
    x = torch.randn(5, 3, 1)
    expected = aligned(x[1:4], [1, 2, 3])
    monkeypatch.setattr(elman, "_is_seen", lambda length: False)
    found = aligned(x, torch.tensor([0, 1, 2, 3, 4]))
    torch.testing.assert_close(found[1:4], expected)
    assert bool(found[[0, 4], :, 1:].isnan().all())


@pytest.mark.parametrize(
    "x", [torch.randn(2, 7), torch.randn(3), torch.randn(2, 0, 3), torch.randn(0, 5, 3), torch.randn(2, 5, 2)]
)
def test_inputs_that_are_no_steps_are_refused(x: Tensor) -> None:
    """Catches features of two steps read as one."""
    with pytest.raises(ValueError, match="sequences of 3 numbers a step"):
        ElmanRNN(3, 4, 2)(x)


def test_a_number_too_many_is_not_taken_for_a_mark() -> None:
    """Catches data of another width read as marks of lengths."""
    padded = pad_sequence([torch.ones(2, 4), torch.ones(3, 4)], batch_first=True)  # padding behind
    for x in (torch.randn(2, 5, 4), padded):
        with pytest.raises(ValueError, match="does not mark where each sequence begins"):
            ElmanRNN(3, 4, 2)(x)


@pytest.mark.parametrize(
    ("arguments", "error"), [((0, 4, 2), ValueError), ((3, 4.0, 2), ValueError), ((3, 4, 2, "sine"), ValueError)]
)
def test_bad_sizes_are_refused(arguments: Any, error: type[Exception]) -> None:
    """Catches an error that comes from deep inside torch."""
    with pytest.raises(error):
        ElmanRNN(*arguments)
