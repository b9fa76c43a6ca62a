"""All phases of a batch as one compiled function, from the batch to the gradients."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_altmin.step import Step

if TYPE_CHECKING:
    from lightning_altmin.altmin import AltMin


_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class CompiledBatch:
    """Encode, code step and gradients in one graph; optimizer, guard and checks of the batch stay outside.

    ``mu``, code rates and curvatures are tensors, learning rates belong to the optimizer: schedules do not recompile.
    A graph is made for each shape of a batch, and with `CurvatureCodes` another for the batches that measure.

    Args:
        core: The model.
        mode: ``True`` or a mode of ``torch.compile``.

    Raises:
        ValueError: If the model has a part that only autograd can differentiate, or several weight steps per batch.
    """

    def __init__(self, core: AltMin, mode: bool | str) -> None:
        if mode is not True and mode not in _MODES:
            raise ValueError(f"compile must be False, True or one of {_MODES}, got {mode!r}")
        if core.weights.steps > 1:
            raise ValueError(f"compile={mode!r} takes one weight step per batch, weights.steps is {core.weights.steps}")
        if not core.weights.traceable:
            raise ValueError(
                f"compile={mode!r} cannot hold what {type(core.weights).__name__} keeps from batch to batch; use "
                "compile=False"
            )
        self._core, self._mode = core, mode
        self.check_stages()
        for stage in core.coded.stages:
            stage.engine.suit_compiler()
        self._output_shapes: dict[torch.Size, torch.Size] = {}
        self._function: Any = None

    def check_stages(self) -> None:
        """Refuse stages that cannot be part of the graph.

        Raises:
            ValueError: Naming the stage and the reason.
        """
        for stage in self._core.coded.stages:
            if stage.engine.kind != "closed_form":
                raise ValueError(
                    f"compile={self._mode!r} needs closed forms, but stage {stage.name!r} uses the {stage.engine.kind} "
                    "engine (core.explain() shows them all); use compile=False"
                )
            if stage.mixes_processes:
                raise ValueError(
                    f"compile={self._mode!r} makes one graph of a batch, which cannot wait for other processes as the "
                    f"synchronised BatchNorm of stage {stage.name!r} must; use compile=False or sync_batch_norm=False "
                    "(Trainer(sync_batchnorm=False))"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {"_core": self._core, "_mode": self._mode, "_output_shapes": {}, "_function": None}

    def __call__(self, x: Tensor, y: Any, keep_codes: bool, measures: bool) -> Step:
        """As `AltMin.run_encode`, with the other phases' results in the step.

        Raises:
            ValueError: If the batch does not fit, or the model cannot be traced as one graph.
            RuntimeError: If there is no C++ compiler.
        """
        self._check(x, y)
        if self._function is None:
            self._function = self._compile(x.device)
        try:
            step: Step = self._function(x, y, keep_codes, measures)
        except torch._dynamo.exc.Unsupported as error:
            raise ValueError(
                f"compile={self._mode!r} cannot trace this model as one graph; use compile=False. The reason: {error}"
            ) from error
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                f"compile={self._mode!r} makes a graph for each shape of a batch, and torch.compile allows "
                f"{torch._dynamo.config.recompile_limit}; the batch at hand has shape {tuple(x.shape)}. Use batches of "
                "one shape (drop_last=True), raise torch._dynamo.config.recompile_limit, or use compile=False"
            ) from error
        return step

    def _compile(self, device: torch.device) -> Any:
        if device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler
            from torch._inductor.exc import InvalidCxxCompiler

            try:
                get_cpp_compiler()
            except InvalidCxxCompiler as error:
                raise RuntimeError(
                    f"compile={self._mode!r} needs a C++ compiler on the CPU and found none: install g++ or clang, "
                    "or name one in the environment variable CXX; or use compile=False"
                ) from error
        # A code object of its own: torch.compile counts recompilations per code object; models must not share them.
        whole_batch = FunctionType(_whole_batch.__code__.replace(), globals())
        options = {} if self._mode is True else torch._inductor.list_mode_options(str(self._mode))
        if device.type == "cpu":  # poolings between convolutions of few channels: channels last cost them half again
            options["layout_optimization"] = False
        # Static shapes: the last, smaller batch gets a graph of its own.
        compiled: Any = torch.compile(whole_batch, fullgraph=True, dynamic=False, options=options)
        return functools.partial(compiled, self._core)

    def _check(self, x: Tensor, y: Any) -> None:
        """Refuse what the eager phases refuse, before a compiled kernel reads out of bounds."""
        shape = self._output_shapes.get(x.shape[1:])
        if shape is None:
            shape = self._output_shapes[x.shape[1:]] = self._core.coded.encode_as_evaluated(x[:1]).output.shape[1:]
        self._core.local_loss.check(x.new_empty((x.shape[0], *shape), device="meta"), y)


def _whole_batch(core: AltMin, x: Tensor, y: Any, keep_codes: bool, measures: bool) -> Step:
    step = core.run_encode(x, y, keep_codes, measures)
    core.solve_codes(step)
    if step.solved is None:  # else the code step has done it on its way
        step.solved = core.differentiate(step)
    return step
