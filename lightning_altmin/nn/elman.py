"""The Elman network: a recurrent layer that is read at its last steps, and sequences of different lengths for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_altmin.arguments import check_count
from lightning_altmin.nn.activation import activation_class


class StepInput(nn.Module):
    """What a recurrent step reads: its input, and the activation of the code one step before.

    Args:
        activation: The activation, elementwise.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, code: Tensor, x: Tensor, begun: Tensor) -> Tensor:
        """``[x, begun * s(code)]``, shape ``(..., in_features + hidden)``.

        Args:
            code: Code one step before, shape ``(..., hidden)``.
            x: The step's input, shape ``(..., in_features)``.
            begun: 1 where the sequence has a step before this one, else 0; broadcast against ``(..., 1)``.
        """
        return torch.cat([x, self.activation(code) * begun], -1)


class ElmanRNN(nn.Module):
    r"""An Elman network over sequences, with one output per sequence, from the last step or the last ``reads`` steps.

    .. math::
        c_t = W_x x_t + W_h s(c_{t-1}) + b, \qquad \text{output} = W_o [s(c_{T-reads+1}), \dots, s(c_T)] + b_o

    and no :math:`W_h` term in the first step. Takes inputs ``(batch, time, in_features)``, or of any shape
    ``(batch, ...)`` that holds a multiple of ``in_features`` numbers per sample: a grey image of 28 x 28 pixels is
    28 steps of 28 rows, or with ``in_features=1`` 784 steps. Sequences of different lengths come as `aligned` makes
    them. Returns ``(batch, out_features)``, logits.

    Args:
        in_features: Numbers per step, >= 1.
        hidden: Units, >= 1.
        out_features: Width of the output, >= 1.
        activation: A name, a class path or a class, as for `MLP`.
        reads: How many steps the output layer reads, the last ones, >= 1. With more than one, all sequences must have
            one length, of at least as many steps.

    ``W_x`` and ``W_h`` are the parts of ``cell.weight``, shape ``(hidden, in_features + hidden)``. ``W_h`` begins as
    the identity and ``b`` as zero, so that a unit keeps what it holds (Le, Jaitly and Hinton 2015, arXiv 1504.00941);
    ``W_x`` is uniform within ``0.3 / sqrt(hidden)``, less than that of ``torch.nn.RNN``, so that no unit saturates.

    Raises:
        TypeError: If ``activation`` is neither a name nor a class that needs no arguments.
        ValueError: If a size is not an integer >= 1 or the activation is unknown.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        activation: str | type[nn.Module] = "tanh",
        reads: int = 1,
    ) -> None:
        super().__init__()
        check_count("reads", reads)
        check_count("in_features", in_features)
        check_count("hidden", hidden)
        check_count("out_features", out_features)
        self.in_features, self.hidden, self.reads = in_features, hidden, reads
        self.step_input = StepInput(activation_class(activation)())
        self.cell = nn.Linear(in_features + hidden, hidden)
        self.head = nn.Linear(reads * hidden, out_features)
        with torch.no_grad():
            self.cell.weight.uniform_(-0.3 * hidden**-0.5, 0.3 * hidden**-0.5)
            self.cell.weight[:, in_features:] = torch.eye(hidden)
            self.cell.bias.zero_()

    @property
    def activation(self) -> nn.Module:
        """The activation ``s``."""
        return self.step_input.activation

    def steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input of every step, ``(batch, time, in_features)``, and where a step came before, ``(.., time, 1)``.

        Raises:
            ValueError: If ``x`` does not hold whole steps, or marks that `aligned` has not made, or does not have the
                steps that are read.
        """
        if x.dim() == 3 and x.shape[2] == self.in_features + 1:
            if self.reads > 1:
                raise ValueError(
                    f"x holds sequences of different lengths, and the output layer reads {self.reads} steps of each: "
                    "use ElmanRNN(reads=1) for them"
                )
            return x[..., 1:], nn.functional.pad(self._marks(x), (0, 0, 1, -1))
        if x.dim() < 2 or x.numel() == 0 or x[0].numel() % self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, not a batch of sequences of {self.in_features} numbers a step; "
                "lightning_altmin.nn.aligned(sequences, lengths) makes one of sequences with different lengths"
            )
        inputs = x.reshape(x.shape[0], -1, self.in_features)
        if inputs.shape[1] < self.reads:
            raise ValueError(f"x has sequences of {inputs.shape[1]} steps, fewer than reads={self.reads}")
        begun = inputs.new_ones(1, inputs.shape[1], 1)
        begun[:, 0] = 0
        return inputs, begun

    @staticmethod
    def _marks(x: Tensor) -> Tensor:
        marks = x[..., :1]
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would stall the device
            whole = ((marks == 0) | (marks == 1)).all() and (marks[:, 1:] >= marks[:, :-1]).all() and marks[:, -1].all()
            if not whole:
                raise ValueError(
                    "x has one number more per step than in_features, and it does not mark where each sequence begins: "
                    "make it with lightning_altmin.nn.aligned(sequences, lengths)"
                )
        return marks

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        """The outputs, shape ``(batch, out_features)``."""
        inputs, begun = self.steps(aligned(x) if isinstance(x, PackedSequence) else x)
        w_x, w_h = self.cell.weight[:, : self.in_features], self.cell.weight[:, self.in_features :]
        driven = nn.functional.linear(inputs, w_x, self.cell.bias)  # all steps at once
        codes = [driven[:, 0]]
        for t in range(1, driven.shape[1]):
            code = torch.addmm(driven[:, t], self.activation(codes[-1]) * begun[:, t], w_h.t())
            codes = [*codes, code][-self.reads :]  # without gradients, those before need not be held
        output: Tensor = self.head(self.activation(self.read(codes)))
        return output

    def read(self, values: Sequence[Tensor]) -> Tensor:
        """Of one tensor ``(batch, hidden)`` per step those that the output layer reads, side by side."""
        return values[-1] if self.reads == 1 else torch.cat(tuple(values[-self.reads :]), 1)


def aligned(
    sequences: Tensor | PackedSequence | Sequence[Tensor], lengths: Tensor | Sequence[int] | None = None
) -> Tensor:
    """Sequences of different lengths as one batch for `ElmanRNN`, each ending at the last step.

    Args:
        sequences: A padded batch ``(batch, time, features)`` with the padding behind, a ``PackedSequence``, or a list
            of tensors ``(time, features)``.
        lengths: Steps of each sequence in a padded batch, from 1 to ``time``.

    Returns:
        Shape ``(batch, time, 1 + features)``: the first number of a step is 1 from the sequence's first step on and 0
        before, where the others are 0 as well.

    Raises:
        ValueError: If ``lengths`` is missing, not wanted, or does not fit.

    Lengths on an accelerator are not looked at, which would wait for it: sequences that they do not fit become NaN
    there, so that a batch with one is a bad batch in training.
    """
    if isinstance(sequences, PackedSequence):
        _refuse_lengths(lengths)
        sequences, lengths = pad_packed_sequence(sequences, batch_first=True)
    elif not isinstance(sequences, Tensor):
        _refuse_lengths(lengths)
        sequences = list(sequences)
        _check_list(sequences)
        lengths = [len(sequence) for sequence in sequences]
        sequences = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    if lengths is None or sequences.dim() != 3:
        raise ValueError(
            f"a padded batch must have shape (batch, time, features) and come with lengths, got shape "
            f"{tuple(sequences.shape)} and lengths={lengths}"
        )
    given, time = checked_lengths(lengths, sequences), sequences.shape[1]
    length = given.to(sequences.device, torch.long).clamp(1, time)
    source = torch.arange(time, device=sequences.device) - (time - length).unsqueeze(1)  # of each step, before shifting
    marks = (source >= 0).unsqueeze(2)
    shifted = sequences.gather(1, source.clamp_min(0).unsqueeze(2).expand_as(sequences))
    values = torch.where(marks, shifted, 0)
    if not _is_seen(given):
        values = values.where((given == length)[:, None, None], torch.nan)
    return torch.cat([marks.to(sequences.dtype), values], 2)


def checked_lengths(lengths: object, sequences: Tensor) -> Tensor:
    """The lengths of a padded batch as a tensor; their values are looked at if they are on the CPU.

    Raises:
        ValueError: If there is no sequence, or the lengths do not fit the sequences.
    """
    batch, time, _ = sequences.shape
    if batch == 0 or time == 0:
        raise ValueError(f"the batch holds no steps: it has shape {tuple(sequences.shape)}")
    wanted = f"lengths must be {batch} whole numbers from 1 to {time}, one per sequence"
    try:
        length = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{wanted}, got {lengths!r}") from error
    if length.is_floating_point() or length.is_complex() or length.dtype == torch.bool:
        raise ValueError(f"{wanted}, got dtype {length.dtype}: lengths.long() makes integers")
    if length.shape != (batch,):
        raise ValueError(f"{wanted}, got shape {tuple(length.shape)}")
    if _is_seen(length) and (int(length.min()) < 1 or int(length.max()) > time):
        raise ValueError(f"{wanted}, got {lengths}")
    return length


def _is_seen(length: Tensor) -> bool:
    return length.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_list(sequences: list[Tensor]) -> None:
    if not sequences:
        raise ValueError("sequences is an empty list: a batch holds one sequence at least")
    for index, sequence in enumerate(sequences):
        if not isinstance(sequence, Tensor) or sequence.dim() != 2 or sequence.shape[1] != sequences[0].shape[1]:
            shapes = [tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in (sequences[0], sequence)]
            raise ValueError(
                "sequences must be tensors (time, features) with the same features each, got "
                f"{shapes[0]} at 0 and {shapes[1]} at {index}"
            )


def _refuse_lengths(lengths: object) -> None:
    if lengths is not None:
        raise ValueError("lengths belong to a padded batch; packed sequences and lists know theirs")
