"""Codes read by sign, step and other staircases: local search over the units that cross a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.codes.base import CodeProblem, CodeSolver
from lightning_altmin.codes.curvature import CurvatureCodes
from lightning_altmin.engines import StageEngine, has_closed_form, stage_engine
from lightning_altmin.losses import CallableLoss, LocalLoss
from lightning_altmin.margins import MarginLoss
from lightning_altmin.nn.staircase import Staircase
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.stage import Stage

_BETWEEN = (nn.Flatten, nn.Unflatten, nn.Identity)  # what may stand between the staircase and its layer


class DiscreteCodes(CodeSolver):
    r"""For networks of `Sign`, `Heaviside` and other staircases: which side of its thresholds each unit should be on.

    With ``a = s(c)`` the values that the layer above reads, the problem of a code is one over levels: unit j costs
    what its new value does to the objective above, plus the anchor ``mu/2 (c_j' - c_j)^2`` of the way to the nearest
    code ``c_j'`` of that level. Two things are computed:

    - what every unit's crossing is worth, each alone: the rise of the objective if unit j goes one level up, or down.
      For the top code exact, from the loss of the network's output with that one value changed. For a code below,
      the value's change times the slope of the margin loss above: exact too, as long as no unit above comes to or
      leaves an end of its ramp. These make the code's `MarginLoss`, by which the layer's weights are trained and the
      code below is moved;
    - the code's move, by local search: units are ranked by what their crossing lowers the problem to first order, and
      of the sets of the best 1, 2, 4, ... units (at most ``flips``) and no unit at all, each sample takes the one that
      lowers its problem most. Sets are evaluated exactly, so the problem never rises.

    Codes read by anything else are moved by ``smooth``.

    Args:
        flips: Largest number of units that a round moves per sample, >= 0; 0 leaves codes where they are. A moved
            pattern is what the weight step of the layer above reads, and it is then trained on patterns that the layer
            below does not give yet: more flips lower the problem and have cost accuracy where it was measured.
        rounds: Rounds of the search, each from where the last one ended, >= 1.
        margin: Half-width of the ramp around each threshold, in units of the code, > 0. Units that cross are moved this
            far beyond the threshold (at most half way to the next one).
        smooth: Solver of the codes read by other activations; `CurvatureCodes` if not given.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, flips: int = 0, rounds: int = 1, margin: float = 1.0, smooth: CodeSolver | None = None) -> None:
        super().__init__()
        check_count("flips", flips, 0)
        check_count("rounds", rounds)
        check_number("margin", margin, above=0)
        if smooth is not None and not isinstance(smooth, CodeSolver):
            raise TypeError(f"smooth must be a CodeSolver, got {smooth!r}")
        self.flips, self.rounds, self.margin = flips, rounds, margin
        self.smooth = CurvatureCodes() if smooth is None else smooth
        self._readers: dict[int, StageEngine] = {}  # by code: the stage above it without its staircase

    def check(self, stages: Sequence[Stage], objective: AltMinObjective) -> None:
        """Refuse stages and objectives whose codes cannot be searched.

        Raises:
            ValueError: If there is no staircase, or one that is not the first module after a layer, has something else
                than a reshape between itself and the next layer, or leads to a layer without closed form; or if the
                objective is not the squared distance of each sample.
        """
        if len(set(map(id, stages))) < len(stages):
            raise ValueError(
                "codes=DiscreteCodes needs a layer per code, and a recurrent layer makes one per time step"
            )
        found = [any(isinstance(m, Staircase) for m in stage.modules) for stage in stages]
        if not any(found):
            raise ValueError(
                "codes=DiscreteCodes found no staircase (Sign, Heaviside, ...) in the network; use CurvatureCodes()"
            )
        if not (objective.per_sample and objective.couples_by_squares) or objective.lambda_c > 0:
            raise ValueError(
                f"codes=DiscreteCodes needs AltMinObjective with lambda_c=0, got {type(objective).__name__}"
                f"(lambda_c={objective.lambda_c:g})"
            )
        for index, stage in enumerate(stages):
            if found[index]:
                self._check_stage(stage, is_first=index == 0)
                if stage.engine.kind != "closed_form":
                    raise ValueError(
                        f"codes=DiscreteCodes needs closed forms, and stage {stage.name!r} has engine="
                        f"{stage.engine.kind!r}; use CodedNetwork(engine='auto')"
                    )
        self._readers = {
            level: stage_engine(stage.modules[1:], "closed_form")
            for level, stage in enumerate(stages[1:])
            if found[level + 1]
        }
        smooth = [stage for stage, discrete in zip(stages[1:], found[1:], strict=True) if not discrete]
        if smooth:
            self.smooth.check([stages[0], *smooth], objective)

    @staticmethod
    def _check_stage(stage: Stage, is_first: bool) -> None:
        odd = [m for m in stage.modules[1:-1] if not isinstance(m, _BETWEEN) and m not in stage.affine]
        if is_first or not isinstance(stage.modules[0], Staircase) or odd:
            raise ValueError(
                f"codes=DiscreteCodes: a staircase must stand directly between two layers, or a layer with its "
                f"normalisation and the next; stage {stage.name!r} is {[type(m).__name__ for m in stage.modules]}"
            )
        if stage.is_output and [type(m) for m in stage.affine] != [nn.Linear]:
            raise ValueError(
                f"codes=DiscreteCodes needs one Linear as output stage above a staircase, stage {stage.name!r} ends in "
                f"{[type(m).__name__ for m in stage.affine]}"
            )
        if missing := [m for m in stage.modules if not has_closed_form(m)]:
            raise ValueError(f"codes=DiscreteCodes needs closed forms; stage {stage.name!r} has {missing[0]}")
        if stage.batch_norm == "live":
            raise ValueError(
                "codes=DiscreteCodes searches sample by sample, and batch_norm='live' makes one problem of a batch; "
                "use CodedNetwork(batch_norm='fixed')"
            )

    def check_loss(self, loss: LocalLoss) -> None:
        """Refuse a loss that has no values per sample.

        Raises:
            ValueError: If it is a function that returns a mean.
        """
        if isinstance(loss, CallableLoss):
            raise ValueError(
                "codes=DiscreteCodes compares the loss of single samples, and loss is a function that returns the mean "
                "of a batch; pass a loss module with a reduction, such as nn.CrossEntropyLoss()"
            )

    def prepare(self, depth: int) -> None:
        self.smooth.prepare(depth)

    def measures(self, batch: int) -> bool:
        return self.smooth.measures(batch)

    def measured(self) -> Sequence[Tensor]:
        return self.smooth.measured()

    def learn(self, sums: Sequence[Tensor]) -> None:
        self.smooth.learn(sums)

    def solve(self, problem: CodeProblem) -> Tensor:
        reader = self._readers.get(problem.level)
        if reader is None:
            return self.smooth.solve(problem)
        search = _Search(problem, reader, self.margin)
        problem.margins = search.margin_loss()
        return search.run(self.flips, self.rounds) if self.flips > 0 else torch.zeros_like(problem.forward)

    def extra_repr(self) -> str:
        return f"flips={self.flips}, rounds={self.rounds}, margin={self.margin:g}"


class _Search:
    """The levels of one code, what crossings are worth, and better levels."""

    def __init__(self, problem: CodeProblem, reader: StageEngine, margin: float) -> None:
        self._problem, self._reader, self._margin = problem, reader, margin
        staircase = problem.above.transfer[0]
        assert isinstance(staircase, Staircase)
        self._staircase = staircase
        self._forward_level = staircase.level(problem.forward)

    def margin_loss(self) -> MarginLoss:
        """What each unit's crossing is worth at the forward levels."""
        s, level = self._staircase, self._forward_level
        up, down = self._top_rises() if self._problem.is_top else self._slope_rises()
        return MarginLoss(
            above=s.threshold(level + 1),
            below=s.threshold(level),
            up=torch.where(level < s.steps, up, 0),
            down=torch.where(level > 0, down, 0),
            margin=self._margin,
        )

    def _top_rises(self) -> tuple[Tensor, Tensor]:
        linear = self._problem.above.affine[0]
        assert isinstance(linear, nn.Linear)  # as `check` has seen
        rows = linear.weight.detach().t() * self._staircase.rise
        shape = self._problem.forward.shape
        return self._problem.loss.changes(rows).view(shape), self._problem.loss.changes(-rows).view(shape)

    def _slope_rises(self) -> tuple[Tensor, Tensor]:
        rise = self._gradient(self._forward_level) * self._staircase.rise
        return rise, -rise

    def run(self, flips: int, rounds: int) -> Tensor:
        """The move to the best levels found."""
        level = self._forward_level
        value = self._values(level)
        sizes = [2**k for k in range(int(math.log2(flips)) + 1)]
        sizes += [flips] if sizes[-1] < flips else []
        for _ in range(rounds):
            rank, direction = self._ranked(level, flips)
            start = level
            for size in sizes:
                tried = start + torch.where(rank < size, direction, 0)
                tried_value = self._values(tried)
                better = tried_value < value
                value = torch.where(better, tried_value, value)
                level = torch.where(better.view(-1, *[1] * (level.dim() - 1)), tried, level)
        return self._move(level)

    def _ranked(self, level: Tensor, flips: int) -> tuple[Tensor, Tensor]:
        """Place of each unit in the order of what its crossing lowers the problem, and which way it would go."""
        s = self._staircase
        slope = self._gradient(level) * s.rise
        price = self._price(level)
        inf = torch.full_like(slope, math.inf)
        up = torch.where(level < s.steps, slope + self._price(level + 1) - price, inf)
        down = torch.where(level > 0, self._price(level - 1) - price - slope, inf)
        change = torch.minimum(up, down).flatten(1)
        # Only the first `flips` places matter, and those only where the problem falls to first order.
        lowest, units = change.topk(min(flips, change.shape[1]), 1, largest=False)
        places = torch.arange(lowest.shape[1], dtype=change.dtype, device=change.device).expand_as(lowest)
        rank = torch.full_like(change, math.inf).scatter(1, units, torch.where(lowest < 0, places, math.inf))
        return rank.view_as(level), torch.where(up < down, 1.0, -1.0).to(level.dtype)

    def _gradient(self, level: Tensor) -> Tensor:
        """Slope of the objective above with respect to the values that its layer reads."""
        p = self._problem
        stage = self._reader.fixed(self._staircase.value(level), p.state[1:])
        output = p.forward_output if level is self._forward_level else stage.output()
        if p.target_margins is not None:
            return stage.input_gradient(p.target_margins.gradient(output))
        if p.target_move is not None:
            return stage.input_gradient((output - p.forward_output - p.target_move) * p.objective.mu)
        loss = p.loss if level is self._forward_level else p.loss.elsewhere(output)
        return stage.input_gradient(loss.total_gradient())

    def _values(self, level: Tensor) -> Tensor:
        """The problem's value at these levels, for each sample."""
        p = self._problem
        output = self._reader.fixed(self._staircase.value(level), p.state[1:]).output()
        if p.target_margins is not None:
            value = p.target_margins.values(output)
        elif p.target_move is not None:
            value = (output - p.target).square().flatten(1).sum(1) * (0.5 * p.objective.mu)
        else:
            value = p.loss.elsewhere(output).values()
        return value + self._price(level).flatten(1).sum(1)

    def _price(self, level: Tensor) -> Tensor:
        """The anchor of each unit, ``mu/2`` times the square of its way to that level."""
        return self._move(level).square() * (0.5 * self._problem.objective.mu)

    def _move(self, level: Tensor) -> Tensor:
        """From the forward code to just inside each unit's level, 0 where it is the forward level."""
        s = self._staircase
        inside = self._margin if s.steps == 1 else min(self._margin, s.gap / 2)
        upwards = s.threshold(level) + inside - self._problem.forward
        downwards = s.threshold(level + 1) - inside - self._problem.forward
        move = torch.where(level > self._forward_level, upwards, downwards)
        return torch.where(level == self._forward_level, 0, move)
