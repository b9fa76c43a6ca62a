"""Evaluation during a stream: what it measures, and that measuring changes nothing."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from lightning_altmin import AltMinModule, BackpropModule
from lightning_altmin.continual import (
    ContinualEvaluation,
    OnlineTaskStreamDataModule,
    PrequentialAccuracy,
    Replay,
    ReservoirBuffer,
    TaskStream,
    TaskStreamDataModule,
    metrics,
)
from lightning_altmin.weights import LocalGradient
from tests.continual.problems import backprop, blob_data, blob_stream, fit, small_network
from tests.continual.recording import SaveAt
from tests.module.interruption import assert_equal
from tests.module.problems import Record, weights
from tests.module.problems import trainer as quiet_trainer


class Snapshots(Callback):
    """The network at the end of each task."""

    only_observes = True

    def __init__(self) -> None:
        self.networks: list[nn.Module] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.networks.append(copy.deepcopy(pl_module.network))

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Any) -> None:
        self.networks.append(copy.deepcopy(pl_module.network))


def altmin() -> AltMinModule:
    return AltMinModule(small_network(), weights=LocalGradient(lambda p: torch.optim.Adam(p, lr=0.05)))


@torch.no_grad()
def accuracies(network: nn.Module, told: bool) -> list[float]:
    """Accuracy on each task, computed sample by sample."""
    row = []
    for task in blob_stream():
        right = 0
        for x, y in (task.test[i] for i in range(len(task.test))):
            logits = network.eval()(x[None])[0]
            candidates = task.classes if told else range(6)
            right += max(candidates, key=lambda c: float(logits[c])) == int(y)
        row.append(right / len(task.test))
    return row


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("make", [backprop, altmin], ids=["backprop", "altmin"])
def test_matrices_are_those_of_the_networks_at_the_end_of_each_task(online: bool, make: Any) -> None:
    """Catches rows measured before a task's last batch, mixed up with columns, or of masked outputs."""
    kind = OnlineTaskStreamDataModule if online else TaskStreamDataModule
    evaluation, snapshots = ContinualEvaluation(), Snapshots()
    fit(make(), kind(blob_stream(), batch_size=4, eval_batch_size=7), evaluation, snapshots)
    assert len(snapshots.networks) == 4
    for told, matrix in ((False, evaluation.matrix), (True, evaluation.task_incremental)):
        rows = [accuracies(network, told) for network in snapshots.networks]
        assert matrix.initial().tolist() == pytest.approx(rows[0])
        assert matrix.compute().flatten().tolist() == pytest.approx(sum(rows[1:], []))  # noqa: RUF017
    assert bool((evaluation.task_incremental.compute() >= evaluation.matrix.compute()).all())
    assert float(evaluation.task_incremental.compute().diagonal().mean()) > 0.75, "nothing was learnt"


class Dropping(BackpropModule):
    """Draws in training, has running statistics, and a submodule frozen in evaluation mode."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(
                nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.BatchNorm1d(12), nn.Linear(12, 6)
            )
        )
        self.network[4].eval()


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_evaluating_changes_nothing() -> None:
    """Catches random numbers drawn, statistics moved, or modes of submodules not put back."""
    ends = []
    for callbacks in ([], [ContinualEvaluation(every_n_batches=2), PrequentialAccuracy(1)]):
        seed_everything(1, verbose=False)
        module = Dropping()
        fit(module, blob_data(), *callbacks)
        assert not module.network[4].training
        ends.append((weights(module), torch.get_rng_state()))
    assert_equal(ends[0], ends[1])


def test_the_trajectory_has_a_row_every_n_batches() -> None:
    """Catches rows at other batches, rows counted twice at a boundary, and wrong tasks beside them."""
    evaluation = ContinualEvaluation(every_n_batches=2)
    fit(backprop(), blob_data(), evaluation)  # three batches of 16 per task
    rows, task, step = evaluation.trajectory
    assert step.tolist() == [0, 2, 3, 4, 6, 8, 9]
    assert task.tolist() == [-1, 0, 0, 1, 1, 2, 2]
    matrix = evaluation.matrix.compute()
    assert torch.equal(rows[[2, 4, 6]], matrix)
    numbers = evaluation.summary()
    assert numbers["worst_case_accuracy"] == float(metrics.worst_case_accuracy(rows, task))
    assert "forward_transfer" not in numbers


def test_forward_transfer_where_tasks_share_classes() -> None:
    """Catches it being left out where it has a meaning, or computed without the row before training."""
    evaluation = ContinualEvaluation()
    fit(BackpropModule(small_network()), TaskStreamDataModule(blob_stream(labels="local"), batch_size=16), evaluation)
    expected = metrics.forward_transfer(evaluation.matrix.compute(), evaluation.matrix.initial())
    assert evaluation.summary()["forward_transfer"] == float(expected)


def test_seen_tasks_only() -> None:
    """Catches cells above the diagonal that are 0 instead of not measured."""
    evaluation = ContinualEvaluation(tasks="seen", before_training=False)
    fit(backprop(), blob_data(), evaluation)
    above = torch.ones(3, 3).triu(1).bool()
    assert bool(evaluation.matrix.compute().isnan().eq(above).all())
    assert "forward_transfer" not in evaluation.summary()


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6, 7])
def test_matrices_survive_an_interruption(batch: int, tmp_path: Path) -> None:
    """Catches rows lost or measured twice by a run that is resumed."""
    path = tmp_path / "saved.ckpt"
    results = []
    for ckpt in (None, path):
        evaluation, prequential = ContinualEvaluation(every_n_batches=2), PrequentialAccuracy()
        saver = SaveAt("on_train_batch_end", batch if ckpt is None else -1, path)
        fit(backprop(), blob_data(replay=Replay(ReservoirBuffer(9), 4)), evaluation, prequential, saver, ckpt=ckpt)
        results.append((evaluation.state_dict(), prequential.state_dict()))
    if batch == 6:  # Lightning skipped this row's hook in the first run's checkpoint; the row itself must be there
        assert results[1][0]["row_steps"] == results[0][0]["row_steps"]
    assert_equal(results[0], results[1])


def test_prequential_accuracy_is_before_the_update_and_of_new_samples() -> None:
    """Catches testing after training, and replayed samples that count."""

    class ByHand(Callback):
        right = total = 0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            x, y = batch[0][:16], batch[1][:16]
            self.right += int((module.network(x).argmax(1) == y).sum())
            self.total += len(y)

    by_hand, prequential = ByHand(), PrequentialAccuracy(log_every_n_batches=4)
    logged = Record()
    data = blob_data(replay=Replay(ReservoirBuffer(30), 8))
    fit(backprop(), data, by_hand, prequential, logger=logged)
    assert by_hand.total == 144
    assert float(prequential.compute()) == by_hand.right / by_hand.total
    assert len(logged.values("continual/prequential_accuracy")) == 2


def test_what_is_logged_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches logs without steps, and files that do not hold the matrix."""
    evaluation, logged = ContinualEvaluation(folder=tmp_path / "out", verbose=True), Record()
    fit(backprop(), blob_data(), evaluation, logger=logged)
    matrix = evaluation.matrix.compute()
    means = [(3, float(matrix[0, 0])), (6, float(matrix[1, :2].mean())), (9, float(matrix[2].mean()))]
    assert logged.values("continual/average_accuracy") == means
    printed = capsys.readouterr().out
    assert "classes 0, 1" in printed
    assert f"{100 * float(metrics.average_accuracy(matrix)):.2f}" in printed
    with (tmp_path / "out/accuracy_matrix.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == [task.name for task in blob_stream()]
    saved = torch.tensor([[float(cell) for cell in row[1:]] for row in rows[1:]], dtype=torch.float64)
    torch.testing.assert_close(saved, matrix, atol=1e-6, rtol=0)
    for name in ("accuracy_matrix.png", "accuracy.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("stream", "expected"),
    [(blob_stream(1), 1 / 6), (blob_stream().joint(), 1 / 6), (blob_stream().first(1), 1 / 2)],
    ids=["one", "joint", "first"],
)
def test_a_stream_of_one_task(
    stream: TaskStream, expected: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that ends in an error because a matrix of one entry was taken for a scalar.

    The network always says class 0, which is one of the six classes of all tasks, and one of the first task's two; the
    test data has as many samples of each.
    """
    network = nn.Linear(8, 6)
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(torch.tensor([1.0, 0, 0, 0, 0, 0]))
    module = BackpropModule(nn.Sequential(network), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    evaluation = ContinualEvaluation(every_n_batches=1, folder=tmp_path, verbose=True)
    fit(module, TaskStreamDataModule(stream, batch_size=16), evaluation)
    assert evaluation.matrix.compute().tolist() == [[expected]]
    assert evaluation.summary()["average_accuracy"] == expected
    assert evaluation.summary()["task_incremental_accuracy"] == expected  # no other task's outputs to leave out
    assert f"  {100 * expected:.1f}\n" in capsys.readouterr().out
    assert (tmp_path / "accuracy_matrix.csv").read_text().endswith(f",{expected:.6f}\n")
    assert (tmp_path / "accuracy_matrix.png").exists()


def test_too_few_outputs_are_an_error_before_training() -> None:
    """Catches an index error from within, which would not say that the network is too narrow.

    Classes 4 and 5 of the last of three tasks need a fifth and a sixth output, and there are four.
    """
    module = BackpropModule(small_network(classes=4))
    with pytest.raises(ValueError, match=r"gives 4 outputs, but 'classes 4, 5' .*6 classes.* with 6 outputs"):
        fit(module, blob_data(), ContinualEvaluation())
    assert module.trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_bad_arguments() -> None:
    """Catches settings that cannot be meant, and a run without a stream."""
    for arguments in ({"every_n_batches": 0}, {"tasks": "some"}, {"part": "train"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            ContinualEvaluation(**arguments)
    with pytest.raises(ValueError, match="log_every_n_batches"):
        PrequentialAccuracy(0)
    with pytest.raises(ValueError, match=r"part='val'.*val_split"):
        fit(backprop(), blob_data(), ContinualEvaluation(part="val"))
    loader = torch.utils.data.DataLoader(list(blob_stream()[0].train))
    with pytest.raises(MisconfigurationException, match="needs a stream"):
        quiet_trainer(max_epochs=1, callbacks=[ContinualEvaluation()]).fit(backprop(), loader)
