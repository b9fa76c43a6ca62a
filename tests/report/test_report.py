"""The report: its numbers are those that were logged, it is one well-formed page, and a browser shows it."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_altmin.cli import main
from lightning_altmin.report import report
from lightning_altmin.run_logs import read_runs

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
ROWS = [(0, {"train_loss": 2.5}), (10, {"train_loss": 1.25, "codes/0/displacement": 0.5}), (20, {"val_acc": 0.75})]
_VOID = {"meta", "br", "hr", "img", "input", "link"}


def csv_run(folder: Path, name: str, rows: list[tuple[int, dict[str, float]]] = ROWS) -> Path:
    """A run as Lightning's CSVLogger leaves it."""
    logger = CSVLogger(str(folder), name=name, version=0)
    logger.log_hyperparams({"width": 7, "note": "<b>&"})
    for step, values in rows:
        logger.log_metrics(values, step)
    logger.save()
    return Path(logger.log_dir)


class Nesting(HTMLParser):
    """Fails on tags that are not closed in order; collects what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_what_was_logged_is_read_from_both_loggers(tmp_path: Path) -> None:
    """Catches a value of the wrong step, a column that is taken for a metric, a logger whose files are passed over."""
    logger = TensorBoardLogger(str(tmp_path), name="tb", version=0)
    for step, values in ROWS:
        logger.log_metrics(values, step)
    logger.finalize("success")
    for folder in (csv_run(tmp_path, "csv"), Path(logger.log_dir)):
        (run,) = read_runs([folder])
        assert run.curves == {
            "train_loss": [(0, 2.5), (10, 1.25)],
            "codes/0/displacement": [(10, 0.5)],
            "val_acc": [(20, 0.75)],
        }


def test_runs_below_a_folder_are_found_once_and_told_apart(tmp_path: Path) -> None:
    """Catches a run that is listed twice, and two runs under one name."""
    folders = [csv_run(tmp_path, name) for name in ("a", "b")]
    assert [run.folder for run in read_runs([tmp_path, folders[0]])] == folders
    assert [run.name for run in read_runs(folders)] == ["a/version_0", "b/version_0"]
    assert [run.name for run in read_runs(folders[:1])] == ["version_0"]


def test_the_page_is_whole_and_refers_to_nothing(tmp_path: Path) -> None:
    """Catches a page that needs the network, tags out of order, settings that are taken for markup."""
    page = report([csv_run(tmp_path, "run")])
    parser = Nesting()
    parser.feed(page)
    assert parser.open == []
    assert parser.links == []
    assert "http" not in page
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    for title in ("Last values", "Curves", "Codes", "Settings", "Versions"):
        assert f"<h2>{title}</h2>" in page
    assert "<h2>Accuracy matrices</h2>" not in page  # there is none


def test_lines_are_where_their_values_are(tmp_path: Path) -> None:
    """Catches an axis upside down, a scale of another curve, labels beside their ticks.

    train_loss goes from 2.5 at step 0 to 1.25 at step 10: the extremes of both axes, so the corners of the plot.
    """
    page = report([csv_run(tmp_path, "run")])
    (chart,) = re.findall(r"<figcaption>train_loss</figcaption>(<svg.*?</svg>)", page)
    svg = ElementTree.fromstring(chart)
    frame = next(path for path in svg.iter("path") if path.get("class") == "frame").get("d", "")
    left, top, bottom, right = (float(n) for n in re.findall(r"[\d.]+", frame))
    line = next(path for path in svg.iter("path") if path.get("stroke")).get("d", "")
    assert [float(n) for n in re.findall(r"[\d.]+", line)] == [left, top, right, bottom]
    for text in svg.iter("text"):
        if text.get("text-anchor") == "end":  # of the vertical axis
            expected = top + (2.5 - float(text.text or "")) / 1.25 * (bottom - top)
            assert float(text.get("y", "")) - 4 == pytest.approx(expected, abs=0.06)


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    """Catches a NaN that breaks the drawing, or is left out without a word."""
    page = report([csv_run(tmp_path, "run", [(0, {"loss": 1.0}), (1, {"loss": math.nan}), (2, {"loss": math.inf})])])
    assert "loss <small>(2 values not finite)</small>" in page
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page)).lower()


def test_long_curves_keep_their_extremes(tmp_path: Path) -> None:
    """Catches thinning by every n-th point, which loses the one spike that somebody looks for."""
    rows = [(step, {"loss": 100.0 if step == 1234 else 1.0 + step % 7}) for step in range(3000)]
    page = report([csv_run(tmp_path, "run", rows)])
    (line,) = re.findall(r'<path d="M([^"]*)" fill="none"', page)
    heights = [float(point.split()[1]) for point in line.split("L")]
    assert len(heights) <= 450
    assert heights.count(min(heights)) == 1  # the spike, at the top


def test_accuracy_matrices_are_shown_in_per_cent(tmp_path: Path) -> None:
    """Catches shares printed as per cent, a cell that was not measured shown as zero."""
    folder = csv_run(tmp_path, "run")
    (folder / "accuracy_matrix.csv").write_text('"after training on","a <1>","b"\n"a <1>",0.98,nan\n"b",0.5,0.25\n')
    page = report([folder])
    (table,) = re.findall(r'<table class="matrix">(.*?)</table>', page)
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", table)
    assert cells == ["after training on", "a &lt;1&gt;", "b", "a &lt;1&gt;", "98.0", "-", "b", "50.0", "25.0"]


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a subcommand that the command line does not know."""
    output = tmp_path / "out.html"
    main(["report", str(csv_run(tmp_path, "run")), "--output", str(output)])
    assert output.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "does not exist"),
        (lambda folder: folder, "no metrics.csv and no events"),
        (lambda folder: bad_file(folder), r"metrics.csv, line 2, column 'loss': 'much'"),
        (lambda folder: bad_file(folder) / "metrics.csv", "metrics.csv' is a file"),
        (
            lambda folder: bad_file(folder, b"step,loss\n0,1,2\n"),
            "metrics.csv, line 2: it has more cells than the first",
        ),
        (lambda folder: bad_file(folder, b"loss,step\n1\n"), r"metrics.csv, line 2, column 'loss': '1' with its step"),
        (lambda folder: bad_file(folder, b"step,loss\n1e999,1\n"), r"metrics.csv, line 2, column 'loss': '1' with its"),
        (lambda folder: bad_file(folder, b"step,loss\n0,\xff\n"), "metrics.csv cannot be read as UTF-8: .* 0xff"),
        (
            lambda folder: bad_file(folder, b"step,loss\n0," + b"1" * 200_000),
            "metrics.csv cannot be read as CSV: field",
        ),
        (lambda folder: bad_folder(folder, "events.out.tfevents.1"), "tfevents.1 cannot be read: Is a directory"),
        (lambda folder: bad_folder(folder, "metrics.csv"), "metrics.csv cannot be read: Is a directory"),
        (lambda folder: bad_folder(bad_file(folder, b""), "hparams.yaml"), "hparams.yaml cannot be read: Is a dir"),
        (
            lambda folder: bad_folder(bad_file(folder, b""), "accuracy_matrix.csv"),
            "matrix.csv cannot be read: Is a dir",
        ),
    ],
)
def test_what_cannot_be_read_is_said(
    make: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an empty page where a folder was mistyped, and a traceback."""
    with pytest.raises(SystemExit) as ended:
        main(["report", str(make(tmp_path))])  # type: ignore[operator]
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def bad_file(folder: Path, content: bytes = b"step,loss\n0,much\n") -> Path:
    (folder / "metrics.csv").write_bytes(content)
    return folder


def bad_folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback for a mistyped folder."""
    with pytest.raises(SystemExit) as ended:
        main(["report", str(csv_run(tmp_path, "run")), "--output", str(tmp_path / "missing" / "a.html")])
    assert ended.value.code == 2
    assert re.search(r"--output: '.*a.html' cannot be written: No such file", capsys.readouterr().err.splitlines()[-1])


def test_an_empty_matrix_is_shown_as_empty(tmp_path: Path) -> None:
    """Catches a run that ended before its first row and then has no report at all."""
    folder = csv_run(tmp_path, "run")
    (folder / "accuracy_matrix.csv").write_text("")
    assert '<table class="matrix"><tr><th>empty</th></tr></table>' in report([folder])


@pytest.mark.parametrize("values", [(1e308, -1e308), (-1.7e308, -1.7e308), (0.0, 5e-324), (1.7e308, 0.0)])
def test_extreme_values_are_drawn(values: tuple[float, float], tmp_path: Path) -> None:
    """Catches a range too large for a number, or too small to be divided by: every place is inside the picture."""
    page = report([csv_run(tmp_path, "run", [(step, {"loss": value}) for step, value in enumerate(values)])])
    (svg,) = re.findall(r"<svg.*?</svg>", page)
    assert "inf" not in svg
    assert "nan" not in svg
    (line,) = re.findall(r'<path d="M([^"]*)" fill="none"', svg)
    heights = [float(point.split()[1]) for point in line.split("L")]
    top, bottom = (float(v) for v in re.findall(r'class="frame" d="M\S+ (\d+)V(\d+)', svg)[0])
    if values[0] - values[1] > 1e-300:
        assert heights == [top, bottom]  # the highest and the lowest
    else:
        assert all(top < height < bottom for height in heights)


def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Catches a page that a real browser does not render: its document as the browser has it is compared."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no headless browser here (looked for {', '.join(BROWSERS)})")
    page = tmp_path / "report.html"
    page.write_text(report([csv_run(tmp_path, "run")]), encoding="utf-8")
    flags = [
        "--headless",
        "--disable-gpu",
        "--no-sandbox",
        "--virtual-time-budget=2000",
        f"--user-data-dir={tmp_path / 'p'}",
    ]
    shown = subprocess.run(
        [browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert shown.stdout.count("<svg") == 3  # two metrics, one quantity of codes
    assert "Last values" in shown.stdout
    picture = tmp_path / "picture.png"
    subprocess.run(
        [browser, *flags, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True
    )
    assert picture.stat().st_size > 5000  # an empty page compresses to less


def test_a_run_that_logged_codes_alone_has_no_empty_tables(tmp_path: Path) -> None:
    """Catches a table with a head and no rows, and a report that needs a metric."""
    page = report([csv_run(tmp_path, "run", [(0, {"codes/0/displacement": 0.5}), (5, {"codes/0/displacement": 0.25})])])
    parser = Nesting()
    parser.feed(page)
    assert parser.open == []
    assert "<h2>Last values</h2>" not in page
    assert page.count("<svg") == 1  # the one quantity of codes
    assert "<figcaption>displacement</figcaption>" in page


def test_a_run_that_logged_nothing_still_shows_its_settings(tmp_path: Path) -> None:
    """Catches a page of empty headings, or none at all, for a run that ended before it logged a value."""
    (tmp_path / "hparams.yaml").write_text("width: 7\n")
    page = report([bad_file(tmp_path, b"epoch,step\n0,0\n")])
    assert re.findall("<h2>(.*?)</h2>", page) == ["Settings", "Versions"]
    assert "width: 7" in page


def test_a_curve_without_a_finite_value_is_named_and_not_drawn(tmp_path: Path) -> None:
    """Catches the limits of no points at all, where a run diverged in its first step; other curves are drawn."""
    rows = [(0, {"loss": math.nan, "acc": 0.25}), (1, {"loss": -math.inf, "acc": 0.75})]
    page = report([csv_run(tmp_path, "run", rows)])
    assert "<figure><figcaption>loss <small>(2 values not finite)</small></figcaption></figure>" in page
    assert page.count("<svg") == 1
    assert "<figcaption>acc</figcaption><svg" in page


def test_one_run_under_two_paths_has_two_names(tmp_path: Path) -> None:
    """Catches two columns under one name: the parts of resolved paths can never tell a link from where it leads."""
    folder = csv_run(tmp_path, "run")
    link = tmp_path / "latest"
    link.symlink_to(folder)
    assert [run.name for run in read_runs([folder, link])] == [str(folder), str(link)]
