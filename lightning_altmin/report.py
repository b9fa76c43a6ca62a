"""``lightning-altmin report RUN_DIR...``: what runs logged, as one HTML page that needs nothing else."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lightning_altmin.run_logs import Curve, Run, read_runs

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#555555")  # told apart by most eyes
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 460, 240, 58, 28, 8, 10
_POINTS = 400  # of a curve that are drawn
_SMALLEST, _LARGEST = 1e-300, sys.float_info.max  # a range with less than the one is a point
_CODES = "codes/"  # of CodeMonitor: codes/<layer>/<quantity>
_PACKAGES = ("lightning-altmin", "torch", "lightning", "torchmetrics", "numpy")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h2 { margin-top: 2rem; border-bottom: 1px solid #8888; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { border: 1px solid #8886; padding: .15rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.matrix td { color: #000; } .matrix td:first-child { color: inherit; }
figure { display: inline-block; margin: .5rem .5rem .5rem 0; vertical-align: top; }
figcaption { font-weight: 600; } figcaption small { font-weight: 400; }
svg { max-width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
svg .grid { stroke: #8884; } svg .frame { stroke: currentColor; fill: none; }
pre { overflow: auto; background: #8882; padding: .7rem; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; }
"""


def report(folders: Sequence[str | Path]) -> str:
    """The page.

    Args:
        folders: Folders of runs, or folders that hold such; see `lightning_altmin.run_logs.read_runs`.

    Returns:
        A whole HTML document: curves of every logged value as SVG with a line per run, the diagnostics of codes with a
        line per layer, accuracy matrices, each run's settings, and the versions that made the page.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If a run's file cannot be read.
    """
    runs = read_runs(folders)
    title = "Report: " + ", ".join(run.name for run in runs)
    sections = [
        _section("Last values", _last_values(runs)),
        _section("Curves", _run_legend(runs) + "".join(_metric_charts(runs))),
        _section("Codes", "".join(_code_charts(runs))),
        _section("Accuracy matrices", "".join(_matrices(runs))),
        _section("Settings", "".join(_settings(runs))),
        _section("Versions", _versions()),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def main(arguments: Sequence[str]) -> None:
    """The command, given what follows ``report``."""
    parser = argparse.ArgumentParser("lightning-altmin report", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="a run's log folder, or a folder of such")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        page = report(given.folders)
    except (FileNotFoundError, ValueError, ImportError) as error:
        parser.error(str(error))
    try:
        given.output.write_text(page, encoding="utf-8")
    except OSError as error:
        parser.error(f"--output: {str(given.output)!r} cannot be written: {error.strerror or error}")
    print(f"wrote {given.output}")  # noqa: T201  (the command's answer)


# ---------------------------------------------------------------- sections


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>" if content else ""


def _last_values(runs: Sequence[Run]) -> str:
    names = _metric_names(runs)
    if not names:
        return ""
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = []
    for name in names:
        cells = "".join(f"<td>{_number(run.curves[name][-1][1]) if name in run.curves else '-'}</td>" for run in runs)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return f"<table><tr><th>value</th>{head}</tr>{''.join(rows)}</table>"


def _metric_charts(runs: Sequence[Run]) -> Iterable[str]:
    for name in _metric_names(runs):
        lines = {index: run.curves[name] for index, run in enumerate(runs) if name in run.curves}
        yield _chart(name, [(_colour(index), curve) for index, curve in lines.items()])


def _code_charts(runs: Sequence[Run]) -> Iterable[str]:
    """A chart per run and quantity, a line per layer."""
    for run in runs:
        quantities: dict[str, dict[str, Curve]] = {}
        for name, curve in run.curves.items():
            if name.startswith(_CODES):
                layer, _, quantity = name.removeprefix(_CODES).rpartition("/")
                quantities.setdefault(quantity, {})[layer] = curve
        if not quantities:
            continue
        layers = list(dict.fromkeys(layer for lines in quantities.values() for layer in lines))
        yield f"<h3>{escape(run.name)}</h3>" + _legend(f"layer {layer}" for layer in layers)
        for quantity, lines in quantities.items():
            yield _chart(quantity, [(_colour(layers.index(layer)), curve) for layer, curve in lines.items()])


def _matrices(runs: Sequence[Run]) -> Iterable[str]:
    for run in runs:
        for path, (head, *rows) in ((path, table or [["empty"]]) for path, table in run.matrices.items()):
            cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
            body = "".join(
                f"<tr><td>{escape(row[0])}</td>{''.join(_accuracy_cell(cell) for cell in row[1:])}</tr>" for row in rows
            )
            yield f'<h3>{escape(run.name)}: {escape(path)}</h3><table class="matrix"><tr>{cells}</tr>{body}</table>'


def _accuracy_cell(cell: str) -> str:
    try:
        share = float(cell)
    except ValueError:
        return f"<td>{escape(cell)}</td>"
    if math.isnan(share):
        return "<td>-</td>"
    return f'<td style="background:hsl(205 70% {97 - 42 * min(max(share, 0.0), 1.0):.0f}%)">{100 * share:.1f}</td>'


def _settings(runs: Sequence[Run]) -> Iterable[str]:
    for run in runs:
        if run.settings:
            name, text = escape(run.name), escape(run.settings)
            yield f"<details><summary>{name}</summary><pre>{text}</pre></details>"


def _versions() -> str:
    rows = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(number)}</td></tr>" for name, number in rows)
    return f"<p>Of the environment that made this page.</p><table>{cells}</table>"


def _metric_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.curves if not name.startswith(_CODES)))


def _run_legend(runs: Sequence[Run]) -> str:
    return _legend(run.name for run in runs) if any(run.curves for run in runs) else ""


def _legend(names: Iterable[str]) -> str:
    keys = (f'<span class="key" style="background:{_colour(i)}"></span>{escape(name)}' for i, name in enumerate(names))
    return f"<p>{''.join(keys)}</p>"


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


# ---------------------------------------------------------------- a chart


def _chart(title: str, lines: Sequence[tuple[str, Curve]]) -> str:
    """A figure with a line per curve; what is not finite is left out and counted in the caption."""
    finite = [(colour, [p for p in curve if math.isfinite(p[1])]) for colour, curve in lines]
    points = [point for _, curve in finite for point in curve]
    lost = sum(len(curve) for _, curve in lines) - len(points)
    caption = f"{escape(title)}{f' <small>({lost} values not finite)</small>' if lost else ''}"
    if not points:
        return f"<figure><figcaption>{caption}</figcaption></figure>"
    across = _Scale(min(s for s, _ in points), max(s for s, _ in points), _LEFT, _WIDTH - _RIGHT)
    up = _Scale(min(v for _, v in points), max(v for _, v in points), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<path class="grid" d="M{_LEFT} {up.at(tick):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 4}" y="{up.at(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        for tick in up.ticks()
    ]
    parts += [
        f'<text x="{across.at(tick):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{_number(tick)}</text>'
        for tick in across.ticks()
    ]
    for colour, curve in finite:
        drawn = _thinned(curve)
        path = "L".join(f"{across.at(step):.1f} {up.at(value):.1f}" for step, value in drawn)
        if len(drawn) == 1:
            step, value = drawn[0]
            parts.append(f'<circle cx="{across.at(step):.1f}" cy="{up.at(value):.1f}" r="2.5" fill="{colour}"/>')
        elif drawn:
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    frame = f'<path class="frame" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>'
    return (
        f'<figure><figcaption>{caption}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
        f'aria-label="{escape(title)} by step">{"".join(parts)}{frame}</svg></figure>'
    )


def _thinned(curve: Curve) -> Curve:
    """At most about `_POINTS` points: of each stretch its lowest and highest, so that no extreme is lost."""
    if len(curve) <= _POINTS:
        return curve
    size = math.ceil(2 * len(curve) / _POINTS)
    kept = {curve[0], curve[-1]}
    for start in range(0, len(curve), size):
        stretch = curve[start : start + size]
        kept |= {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
    return sorted(kept)


class _Scale:
    """From values to places on the page."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        margin = 0.5 * max(abs(low), 1e-9) if _quarter(low, high) < _SMALLEST else 0.0
        self.low, self.high = max(low - margin, -_LARGEST), min(high + margin, _LARGEST)
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        return self.start + _quarter(self.low, value) / _quarter(self.low, self.high) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside the range: three to six of them."""
        rough = _quarter(self.low, self.high)
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _quarter(low: float, high: float) -> float:
    """A quarter of a difference, which is a number where the difference itself is too large for one."""
    return high / 4 - low / 4


def _number(value: float) -> str:
    return f"{value:.4g}"
