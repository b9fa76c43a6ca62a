"""Accuracy on every task, measured while a stream is learnt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_altmin.arguments import check_count
from lightning_altmin.continual import metrics
from lightning_altmin.continual.accuracy_matrix import TaskAccuracyMatrix, count_correct
from lightning_altmin.continual.callbacks.stream_access import (
    evaluating,
    inputs_and_labels,
    stream_data,
    trained_batches,
)
from lightning_altmin.continual.data_module import StreamDataModule
from lightning_altmin.continual.plots import plot_matrix, plot_stream
from lightning_altmin.continual.report import matrix_table, summary_table
from lightning_altmin.continual.task import Task, TaskStream


class ContinualEvaluation(Callback):
    """Tests on all tasks after each task, and fills the accuracy matrices and the trajectory.

    One pass gives two accuracies: all outputs compete (class-incremental, or domain-incremental where tasks share
    their labels), and only those of the sample's task do (task-incremental, the task being told). The module's
    ``forward`` must return one output per class; a ValueError says if there are too few. Numbers go to the loggers as
    ``continual/...``, exact also with several processes and shards of unequal size; evaluating draws nothing and
    changes nothing.

    Args:
        every_n_batches: Also evaluate after every n-th batch, for the trajectory; ``None`` for task ends only.
        before_training: Also evaluate before the first batch; forward transfer needs it.
        tasks: ``"all"`` evaluates on future tasks too, ``"seen"`` leaves their cells NaN.
        part: ``"test"``, or ``"val"`` while settings are being chosen.
        folder: Save ``accuracy_matrix.csv``, ``accuracy_matrix.png`` and ``accuracy.png`` here at the end of the run;
            ``None`` for nowhere.
        verbose: Print the matrix and the summary at the end of the run.

    Attributes:
        matrix: The class-incremental `TaskAccuracyMatrix`.
        task_incremental: The task-incremental one.

    Raises:
        ValueError: If an argument is out of range.
    """

    only_observes = True

    def __init__(
        self,
        every_n_batches: int | None = None,
        before_training: bool = True,
        tasks: Literal["all", "seen"] = "all",
        part: Literal["test", "val"] = "test",
        folder: str | Path | None = None,
        verbose: bool = False,
    ) -> None:
        if every_n_batches is not None:
            check_count("every_n_batches", every_n_batches, otherwise="None for the ends of tasks only")
        if tasks not in ("all", "seen"):
            raise ValueError(f"tasks must be 'all' or 'seen', got {tasks!r}")
        if part not in ("test", "val"):
            raise ValueError(f"part must be 'test' or 'val', got {part!r}")
        self.every_n_batches = every_n_batches
        self.before_training = before_training
        self.tasks = tasks
        self.part: Literal["test", "val"] = part
        self.folder = None if folder is None else Path(folder)
        self.verbose = verbose
        self._begin(1, None)

    def _begin(self, num_tasks: int, classes: list[tuple[int, ...]] | None) -> None:
        # Counts are summed over processes before they are added, so the metrics must not do it again.
        self.matrix = TaskAccuracyMatrix(num_tasks, sync_on_compute=False)
        self.task_incremental = TaskAccuracyMatrix(num_tasks, classes, sync_on_compute=False)
        labels = [label for group in classes or [] for label in group]
        self._shares_classes = len(set(labels)) < len(labels)
        self._rows: list[list[float]] = []
        self._row_tasks: list[int] = []
        self._row_steps: list[int] = []

    # ---------------------------------------------------------------- results

    @property
    def trajectory(self) -> tuple[Tensor, Tensor, Tensor]:
        """Class-incremental accuracy of every evaluation ``(n, T)``, its task ``(n,)`` and batches trained ``(n,)``."""
        rows = torch.tensor(self._rows, dtype=torch.float64).reshape(len(self._rows), self.matrix.num_tasks)
        return rows, torch.tensor(self._row_tasks), torch.tensor(self._row_steps)

    def summary(self) -> dict[str, float]:
        """Every number of `lightning_altmin.continual.metrics` that this run defines, by name.

        Forward transfer is left out where no two tasks share a class: it would say nothing of the method.
        """
        initial = self.matrix.initial()
        transfers = self._shares_classes and not bool(initial.isnan().any())
        numbers = metrics.summary(self.matrix.compute(), initial if transfers else None)
        numbers["task_incremental_accuracy"] = float(metrics.average_accuracy(self.task_incremental.compute()))
        if self.every_n_batches is not None:
            rows, task, _ = self.trajectory
            for function in (
                metrics.average_anytime_accuracy,
                metrics.min_accuracy,
                metrics.worst_case_accuracy,
                metrics.stability_gap,
            ):
                numbers[function.__name__] = float(function(rows, task))
        return numbers

    # ---------------------------------------------------------------- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a stream, and begin with nothing measured."""
        if stage != "fit":
            return
        data = stream_data(trainer, self)
        missing = [task.index for task in data.stream if self.part not in task.parts()]
        if missing:
            raise ValueError(f"part={self.part!r}: tasks {missing} have no such data; make the stream with val_split")
        self._begin(len(data.stream), [task.classes for task in data.stream])
        self._names = [task.name for task in data.stream]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The row before training."""
        if self.before_training and trained_batches(trainer) == 0:
            self._evaluate(trainer, pl_module, after=-1, boundary=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A row of the trajectory."""
        if self.every_n_batches is not None and trained_batches(trainer) % self.every_n_batches == 0:
            task = stream_data(trainer, self).task.index
            self._evaluate(trainer, pl_module, after=task, boundary=False)

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """A row of the matrices."""
        self._evaluate(trainer, pl_module, after=task.index, boundary=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and save what was measured."""
        if not trainer.is_global_zero:
            return
        R = self.matrix.compute()
        if self.verbose:
            title = stream_data(trainer, self).stream.name
            sys.stdout.write(f"\n{title}\n{matrix_table(R, self._names)}\n\n{summary_table(self.summary())}\n")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "accuracy_matrix.csv").write_text(_csv(R, self._names))
            plot_matrix(R, self._names).savefig(self.folder / "accuracy_matrix.png", dpi=120)
            if self._rows:
                plot_stream(*self.trajectory, self._names).savefig(self.folder / "accuracy.png", dpi=120)

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All that was measured."""
        return {
            "matrix": self.matrix.state_dict(),
            "task_incremental": self.task_incremental.state_dict(),
            "rows": [list(row) for row in self._rows],
            "row_tasks": list(self._row_tasks),
            "row_steps": list(self._row_steps),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured before."""
        self.matrix.load_state_dict(state_dict["matrix"])
        self.task_incremental.load_state_dict(state_dict["task_incremental"])
        self._rows = [list(row) for row in state_dict["rows"]]
        self._row_tasks, self._row_steps = list(state_dict["row_tasks"]), list(state_dict["row_steps"])

    # ---------------------------------------------------------------- one evaluation

    @torch.no_grad()
    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, after: int, boundary: bool) -> None:
        data, step = stream_data(trainer, self), trained_batches(trainer)
        counts = self._counts(trainer, pl_module, data, after)
        free, told, total = counts.long().cpu()
        if bool((told < free).any()):
            raise RuntimeError(f"fewer correct answers with the task told ({told}) than without ({free})")
        if boundary:
            self.matrix.add_counts(free, total, after)
            self.task_incremental.add_counts(told, total, after)
        accuracy = free.double() / total.double()
        if self._row_steps and self._row_steps[-1] == step and self._row_tasks[-1] == after:
            self._rows.pop(), self._row_tasks.pop(), self._row_steps.pop()  # the same moment, measured twice
        self._rows.append(accuracy.tolist())
        self._row_tasks.append(after)
        self._row_steps.append(step)
        self._log(trainer, accuracy, told.double() / total.double(), after)

    def _counts(self, trainer: Trainer, pl_module: LightningModule, data: StreamDataModule, after: int) -> Tensor:
        """Correct answers without and with the task told, and samples; ``(3, T)``, summed over processes."""
        counts = torch.zeros(3, len(data.stream), dtype=torch.float64, device="cpu")
        with evaluating(pl_module), isolate_rng():
            for task in data.stream:
                if self.tasks == "seen" and task.index > after:
                    continue
                for batch in data.evaluation_batches(task.index, self.part):
                    x, y = inputs_and_labels(pl_module, trainer.strategy.batch_to_device(batch))
                    with trainer.precision_plugin.forward_context():
                        logits = pl_module(x)
                    _check_outputs(logits, task, data.stream)
                    counts[0, task.index] += int(count_correct(logits, y))
                    counts[1, task.index] += int(count_correct(logits, y, task.classes))
                    counts[2, task.index] += len(y)
        if trainer.world_size == 1:
            return counts
        dtype = torch.float32 if pl_module.device.type == "mps" else torch.float64
        summed = trainer.strategy.reduce(counts.to(pl_module.device, dtype), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed

    def _log(self, trainer: Trainer, accuracy: Tensor, told: Tensor, after: int) -> None:
        row = {f"continual/accuracy/{name}": float(a) for name, a in zip(self._names, accuracy, strict=True)}
        row = {name: value for name, value in row.items() if value == value}
        if after >= 0:
            row["continual/average_accuracy"] = float(accuracy[: after + 1].mean())
            row["continual/average_task_incremental_accuracy"] = float(told[: after + 1].mean())
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _check_outputs(logits: Tensor, task: Task, stream: TaskStream) -> None:
    """Outputs for the classes of a task that is evaluated now; those of later tasks may still be added."""
    if logits.dim() == 2 and logits.shape[1] <= max(task.classes):
        raise ValueError(
            f"the network gives {logits.shape[1]} outputs, but {task.name!r} has classes {list(task.classes)}, of "
            f"{stream.num_classes} classes in the stream: make its last layer with {stream.num_classes} outputs, or "
            "the stream with labels='local' if its tasks are to share outputs"
        )


def _csv(R: Tensor, names: list[str]) -> str:
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    lines = [",".join(['"after training on"', *quoted])]
    lines += [",".join([name, *(f"{float(v):.6f}" for v in row)]) for name, row in zip(quoted, R, strict=True)]
    return "\n".join(lines) + "\n"
