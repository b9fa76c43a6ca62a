"""Does it pay to compute the weight gradients of equally wide layers by one batched product?

    python examples/benchmarks/equal_widths.py

Each layer's gradient is ``r^T a`` with the residuals ``r`` and inputs ``a`` of its code. Separate products read them
where they lie; a batched product needs them stacked first, or written into one tensor when made. Prints, per
depth and width, the time of the batched form over that of separate products: with the stacking, and without it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def seconds(function: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - start) / repeats


def ratios(depth: int, width: int, batch: int, rounds: int = 15) -> tuple[float, float]:
    """Batched over separate: with stacking, without; medians of paired rounds."""
    residuals = [torch.randn(batch, width) for _ in range(depth)]
    inputs = [torch.randn(batch, width) for _ in range(depth)]
    stacked = torch.stack(residuals).mT, torch.stack(inputs)

    def separate() -> list[Tensor]:
        return [r.t() @ a for r, a in zip(residuals, inputs, strict=True)]

    def batched() -> Tensor:
        return torch.stack(residuals).mT @ torch.stack(inputs)

    def in_place() -> Tensor:
        return stacked[0] @ stacked[1]

    torch.testing.assert_close(torch.stack(separate()), batched())
    repeats = max(1, int(0.02 / seconds(separate, 3)))
    found: list[tuple[float, float]] = []
    for _ in range(rounds):
        base = seconds(separate, repeats)
        found.append((seconds(batched, repeats) / base, seconds(in_place, repeats) / base))
    return statistics.median(a for a, _ in found), statistics.median(b for _, b in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| layers | width | batched, stacked first | batched, stacked already |")
    print("| --- | --- | --- | --- |")
    for depth, width in ((4, 20), (10, 20), (10, 50), (10, 100), (10, 300), (4, 1000)):
        with_stacking, without = ratios(depth, width, arguments.batch)
        print(f"| {depth} | {width} | {with_stacking:.2f} | {without:.2f} |", flush=True)


if __name__ == "__main__":
    main()
