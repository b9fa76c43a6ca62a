"""What a further iteration on LeNet's first code is made of: its two convolutions, and everything around them.

    python examples/benchmarks/convolution_parts.py --threads 2

Milliseconds, the lowest tenth of 200 runs, batch 128.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_altmin.engines import stage_engine


def milliseconds(function: Callable[[], Any], runs: int = 200) -> float:
    times = []
    for _ in range(runs + 5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[5:])[runs // 10]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    convolution = nn.Conv2d(6, 16, 5)
    engine = stage_engine([nn.ReLU(), nn.MaxPool2d(2), convolution])
    code, target = torch.randn(128, 6, 24, 24), torch.randn(128, 16, 8, 8)
    output, state = engine.encode(code)
    move = engine.fixed(code, state).input_gradient(target) * -0.05
    pooled = torch.randn(128, 6, 12, 12)

    def iteration() -> torch.Tensor:
        stage = engine.fixed(code, state, move)
        return stage.input_gradient(stage.residual(output, target))

    parts: dict[str, Callable[[], Any]] = {
        "one iteration": iteration,
        "its convolution": lambda: nn.functional.conv2d(pooled, convolution.weight),
        "its transposed convolution": lambda: nn.functional.conv_transpose2d(target, convolution.weight),
        "difference of two pooled images": lambda: torch.sub(pooled, pooled),
        "the same, one of them every second entry of rows and columns": lambda: torch.sub(pooled, code[..., ::2, ::2]),
    }
    for name, part in parts.items():
        print(f"{name}: {milliseconds(part):.3f} ms")


if __name__ == "__main__":
    main()
