"""CodeMonitor against the mathematics written out for a small network."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from lightning_altmin import AltMinModule, AltMinObjective, BackpropModule, GradientCodes, LocalGradient
from lightning_altmin.callbacks import CodeMonitor
from lightning_altmin.callbacks.dead_units import alive_units
from lightning_altmin.guard import NonFiniteError
from lightning_altmin.network import CodedNetwork
from lightning_altmin.nn import ElmanRNN
from tests.callbacks.training import MemoryLogger, Probe, RandomData, module, network, sgd, trainer

MU, LAMBDA, LR, N = 0.7, 0.05, 0.4, 8
CLOSE = {"rel": 1e-12, "abs": 1e-12}


def relu_network() -> nn.Sequential:
    """Two hidden layers, named "0" and "2"."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def one_step(folder: Path, inputs: str) -> tuple[CodeMonitor, nn.Sequential, nn.Sequential, RandomData]:
    """A run of one batch; the network before and after it."""
    net, data, monitor = relu_network(), RandomData(N, N, shuffle=False), CodeMonitor(every_n_steps=1)
    model = module(
        network=net,
        objective=AltMinObjective(MU, lambda_c=LAMBDA),
        codes=GradientCodes(1, LR),
        weights=LocalGradient(sgd, inputs=inputs),
    )
    before = copy.deepcopy(net)
    trainer(folder, [monitor], max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
    return monitor, before, net, data


def affine(layer: Any, x: Tensor) -> Tensor:
    """A Linear layer, written out."""
    return x @ layer.weight.T + layer.bias


def written_out(net: nn.Sequential, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward codes c1, c2 and codes after one gradient step of rate LR / MU on J summed over samples."""
    c1 = affine(net[0], x)
    c2 = affine(net[2], c1.relu())
    error = affine(net[4], c2.relu()).softmax(1) - one_hot(y, 3)
    d2 = c2 - LR / MU * ((c2 > 0) * (error @ net[4].weight) + LAMBDA * c2.sign())
    d1 = c1 - LR / MU * ((c1 > 0) * (MU * (c2 - d2) @ net[2].weight) + LAMBDA * c1.sign())
    return c1, c2, d1, d2


@pytest.mark.parametrize("inputs", ["moved", "forward"])
@torch.no_grad()
def test_every_quantity_against_the_mathematics(tmp_path: Path, inputs: str) -> None:
    """Would catch a wrong norm, mean or sum, residuals at the wrong input or weights, or J at the moved weights."""
    with torch.enable_grad():
        monitor, net, after, data = one_step(tmp_path, inputs)
    x, y = data.train.x, data.train.y
    c1, c2, d1, d2 = written_out(net, x, y)
    below = d1 if inputs == "moved" else c1

    def objective(a: Tensor, b: Tensor) -> float:
        coupling = (a - affine(net[0], x)).square().sum() + (b - affine(net[2], a.relu())).square().sum()
        loss = cross_entropy(affine(net[4], b.relu()), y, reduction="sum")
        return float(loss + MU / 2 * coupling + LAMBDA * (a.abs().sum() + b.abs().sum())) / N

    def residuals(of: nn.Sequential) -> tuple[float, float]:
        first = (affine(of[0], x) - d1).square().sum()
        second = (affine(of[2], below.relu()) - d2).square().sum()
        return float(first) / N, float(second) / N

    assert len(monitor.history) == 1
    assert monitor.history[0] == pytest.approx(
        {
            "step": 0,
            "codes/0/displacement": float((d1 - c1).norm() / c1.norm()),
            "codes/2/displacement": float((d2 - c2).norm() / c2.norm()),
            "codes/0/residual_before": residuals(net)[0],
            "codes/2/residual_before": residuals(net)[1],
            "codes/0/residual_after": residuals(after)[0],
            "codes/2/residual_after": residuals(after)[1],
            "codes/0/dead_units": float((c1 <= 0).all(0).double().mean()),
            "codes/2/dead_units": float((c2 <= 0).all(0).double().mean()),
            "codes/objective_before": objective(c1, c2),
            "codes/objective_after": objective(d1, d2),
        },
        **CLOSE,
    )


def test_with_batch_norm_and_dropout(tmp_path: Path) -> None:
    """Would catch other masks or statistics than the batch's own.

    Without l1, J at the forward codes is the batch's loss, and the first layer's residual before the weight step is
    the squared way its code moved.
    """
    monitor, seen = CodeMonitor(every_n_steps=1), []

    def look(trainer: Any, model: AltMinModule, outputs: Any, batch: Any) -> None:
        step = outputs["step"]
        moved = [(c - f).square().sum() / len(c) for c, f in zip(step.codes, step.codes_forward, strict=True)]
        seen.append((float(step.loss), float(moved[0]), [float(r) for r in step.residuals]))

    run = trainer(tmp_path, [monitor, Probe(look)], max_epochs=1)
    run.fit(module(), datamodule=RandomData())
    assert len(monitor.history) == 6
    for row, (loss, moved, residuals) in zip(monitor.history, seen, strict=True):
        assert row["codes/objective_before"] == pytest.approx(loss, **CLOSE)
        assert row["codes/0/residual_before"] == pytest.approx(moved, **CLOSE)
        assert [row["codes/0/residual_before"], row["codes/4/residual_before"]] == pytest.approx(residuals, **CLOSE)


def test_reference_objective_is_logged_as_it_is(tmp_path: Path) -> None:
    """Would catch dividing the reference's batch mean by the batch size once more."""
    monitor, losses = CodeMonitor(every_n_steps=1), []
    probe = Probe(lambda t, m, outputs, b: losses.append(float(outputs["loss"])))
    model = module(objective=AltMinObjective.reference())
    trainer(tmp_path, [monitor, probe], max_steps=2).fit(model, datamodule=RandomData())
    assert [row["codes/objective_before"] for row in monitor.history] == pytest.approx(losses, **CLOSE)


@pytest.mark.parametrize(
    ("activation", "code", "share"),
    [
        # columns are units: dead, dead at exactly 0, alive at one sample, alive
        (nn.ReLU(), [[-1.0, 0.0, -1.0, 1.0], [-2.0, 0.0, 0.5, 2.0]], 0.5),
        (nn.ReLU(inplace=True), [[-1.0, 0.0, -1.0, 1.0], [-2.0, 0.0, 0.5, 2.0]], 0.5),
        (nn.LeakyReLU(0.1), [[-1.0, -9.0, -1.0, 1.0], [-2.0, -9.0, 0.5, 2.0]], 0.0),
        # tanh'(9) < 1e-7: saturated at both ends; 1 - tanh(1)^2 = 0.42 is alive
        (nn.Tanh(), [[9.0, -9.0, 9.0, 1.0], [9.0, 9.0, 1.0, 1.0]], 0.5),
        (nn.Hardtanh(), [[2.0, -3.0, 2.0, 0.0], [3.0, 3.0, 0.5, 0.0]], 0.5),
    ],
)
def test_dead_units(activation: nn.Module, code: list[list[float]], share: float) -> None:
    """Would catch a unit called dead at one sample, or alive although it passes no gradient on."""
    net = CodedNetwork(nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)))
    codes = torch.tensor(code)
    before = codes.clone()
    alive = alive_units(*net.stages, codes, 1e-3)
    assert alive is not None
    assert float((~alive).float().mean()) == share
    assert torch.equal(codes, before)


def test_dead_channels() -> None:
    """Would catch counting pixels of a convolution as units: a channel is alive if one pixel of one image is."""
    net = CodedNetwork(nn.Sequential(nn.Conv2d(1, 4, 1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)))
    code = -torch.ones(3, 4, 2, 2)
    code[1, 2, 0, 1] = 1.0
    alive = alive_units(*net.stages, code, 1e-3)
    assert alive is not None
    assert alive.tolist() == [False, False, True, False]


def test_no_dead_units_without_an_activation(tmp_path: Path) -> None:
    """Would catch a made-up number for a layer whose activation is unknown."""
    net, monitor = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double(), CodeMonitor(1)
    trainer(tmp_path, [monitor], max_steps=1).fit(module(network=net), datamodule=RandomData())
    assert "codes/0/displacement" in monitor.history[0]
    assert "codes/0/dead_units" not in monitor.history[0]


def test_logged_at_its_own_steps_to_every_logger(tmp_path: Path) -> None:
    """Would catch values lost because a logger writes at other steps than the monitor measures."""
    loggers, monitor = [MemoryLogger(), MemoryLogger()], CodeMonitor(every_n_steps=4)
    run = trainer(tmp_path, [monitor], logger=loggers, log_every_n_steps=5)
    run.fit(module(), datamodule=RandomData())
    assert [row["step"] for row in monitor.history] == [3, 7, 11]  # the 4th, 8th and 12th batch
    assert run.callback_metrics["codes/objective_after"] == monitor.history[-1]["codes/objective_after"]
    for logger in loggers:
        logged = [(step, values) for step, values in logger.rows if "codes/0/displacement" in values]
        assert [{"step": step, **values} for step, values in logged] == monitor.history


def test_codes_are_kept_only_when_measured(tmp_path: Path) -> None:
    """Would catch codes kept for the rest of the run, or a user's own wish undone."""
    kept: list[bool] = []
    probe = Probe(lambda t, m, outputs, b: kept.append("step" in outputs))
    model = module()
    run = trainer(tmp_path, [CodeMonitor(3), probe], max_epochs=1)
    run.fit(model, datamodule=RandomData())
    assert kept == [False, False, True] * 2
    assert not model.keep_codes
    model = module()
    model.keep_codes = True
    trainer(tmp_path, [CodeMonitor(3)], max_epochs=1).fit(model, datamodule=RandomData())
    assert model.keep_codes


def test_history_survives_a_resume(tmp_path: Path) -> None:
    """Would catch a plot that begins at the resume."""
    monitor = CodeMonitor(4)
    run = trainer(tmp_path, [monitor], max_epochs=1)
    run.fit(module(), datamodule=RandomData())
    run.save_checkpoint(tmp_path / "half.ckpt")
    resumed = CodeMonitor(4)
    trainer(tmp_path, [resumed]).fit(module(), datamodule=RandomData(), ckpt_path=tmp_path / "half.ckpt")
    assert [row["step"] for row in resumed.history] == [3, 7, 11]
    assert resumed.history[0] == monitor.history[0]


def test_another_run_begins_another_history_and_a_second_fit_goes_on(tmp_path: Path) -> None:
    """Would catch rows of an earlier run in the figure of a later one, and a longer run that forgets its beginning."""
    monitor = CodeMonitor(4)
    run = trainer(tmp_path, [monitor], max_epochs=1)
    run.fit(module(), datamodule=RandomData())
    trainer(tmp_path, [monitor], max_epochs=1).fit(model := module(), datamodule=RandomData())
    assert [row["step"] for row in monitor.history] == [3]
    monitor.load_state_dict({"history": [{"step": 1}]})
    run.fit_loop.max_epochs = 2
    run.fit(model, datamodule=RandomData())
    assert [row["step"] for row in monitor.history] == [1, 7, 11]


def test_plot(tmp_path: Path) -> None:
    """Would catch a quantity or layer missing from the figure, or lines that do not show the history."""
    pytest.importorskip("matplotlib")
    monitor = CodeMonitor(2)
    trainer(tmp_path, [monitor]).fit(module(), datamodule=RandomData())
    figure = monitor.plot()
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert set(panels) == {
        *("displacement", "residual before", "residual after", "dead units"),
        *("objective before", "objective after"),
    }
    lines = {line.get_label(): line for line in panels["displacement"].lines}
    assert set(lines) == {"0", "4"}
    assert list(lines["4"].get_xdata()) == [1, 3, 5, 7, 9, 11]
    assert list(lines["4"].get_ydata()) == [row["codes/4/displacement"] for row in monitor.history]
    figure.savefig(tmp_path / "codes.png")
    assert (tmp_path / "codes.png").stat().st_size > 0


def test_plot_without_history_or_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an empty figure, or an error that does not say what to install."""
    monitor = CodeMonitor(1)
    with pytest.raises(RuntimeError, match="measured nothing yet: train for at least every_n_steps=1"):
        monitor.plot()
    trainer(tmp_path, [monitor], max_steps=1).fit(module(), datamodule=RandomData())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install"):
        monitor.plot()


def test_refusals(tmp_path: Path) -> None:
    """Would catch a callback that fails in the middle of a run or measures nothing."""
    with pytest.raises(ValueError, match="every_n_steps must be an integer >= 1, got 0"):
        CodeMonitor(0)
    with pytest.raises(ValueError, match="dead_slope"):
        CodeMonitor(dead_slope=-1.0)
    with pytest.raises(MisconfigurationException, match="CodeMonitor needs an AltMinModule"):
        trainer(tmp_path, [CodeMonitor()]).fit(BackpropModule(network()), datamodule=RandomData())

    class Quiet(AltMinModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx)["loss"]}

    with pytest.raises(MisconfigurationException, match=r"Quiet.training_step must return"):
        trainer(tmp_path, [CodeMonitor(1)]).fit(Quiet(network()), datamodule=RandomData())


def test_steps_of_an_adaptive_stop_are_logged(tmp_path: Path) -> None:
    """Would catch a count that is not logged, or is logged where the number of steps is fixed.

    A tolerance that no step can reach takes all steps: exactly 4.
    """
    for tol, expected in ((1e-12, 4.0), (None, None)):
        monitor, data = CodeMonitor(every_n_steps=1), RandomData(N, N, shuffle=False)
        model = module(network=relu_network(), codes=GradientCodes(4, 0.01, tol=tol))
        trainer(tmp_path, [monitor], max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
        (row,) = monitor.history
        assert row.get("codes/0/steps") == expected
        assert row.get("codes/2/steps") == expected


def test_a_batch_that_is_left_out_takes_the_request_for_codes_with_it(tmp_path: Path) -> None:
    """Catches codes kept in every batch from there on because the module ended the epoch at a batch to be measured."""
    kept: list[bool] = []

    class EndsEpoch(AltMinModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 and batch_idx == 2 else None

    monitor, probe = CodeMonitor(3), Probe(lambda t, m, outputs, b: kept.append("step" in outputs))
    model = EndsEpoch(network())
    trainer(tmp_path, [monitor, probe], max_epochs=2).fit(model, datamodule=RandomData())
    assert len(kept) == 2 + 6
    assert sum(kept) == len(monitor.history) > 0
    assert not model.keep_codes


def test_a_batch_that_fails_takes_the_request_for_codes_with_it(tmp_path: Path) -> None:
    """Catches codes kept in every batch of all later runs because one batch that was to be measured has failed."""
    data, model = RandomData(N, N, shuffle=False), module(network=relu_network())
    data.train.x[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        trainer(tmp_path, [CodeMonitor(every_n_steps=1)], limit_val_batches=0).fit(model, datamodule=data)
    assert not model.keep_codes


@pytest.mark.parametrize("reads", [1, 3])
def test_a_recurrent_network(tmp_path: Path, reads: int) -> None:
    """Catches an output layer that is given the last code alone where it reads several."""
    torch.manual_seed(1)
    net = ElmanRNN(1, 4, 3, "tanh", reads).double()  # five features are five steps
    model = module(network=net, objective=AltMinObjective(MU), codes=GradientCodes(1, LR))
    data, monitor, before = RandomData(N, N, shuffle=False), CodeMonitor(every_n_steps=1), copy.deepcopy(net)
    trainer(tmp_path, [monitor], max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
    # At the forward codes there is no coupling: J is the loss.
    loss = cross_entropy(before(data.train.x.unsqueeze(2)), data.train.y).item()
    assert monitor.history[0]["codes/objective_before"] == pytest.approx(loss, **CLOSE)
    assert monitor.history[0]["codes/objective_after"] < loss
