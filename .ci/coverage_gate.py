"""Fail if lines or branches are covered less than asked: coverage's own --fail-under adds the two up.

coverage json -o coverage.json && python .ci/coverage_gate.py coverage.json 95
"""

import json
import sys
from pathlib import Path

report, wanted = Path(sys.argv[1]), float(sys.argv[2])
totals = json.loads(report.read_text(encoding="utf-8"))["totals"]
lines = 100 * totals["covered_lines"] / totals["num_statements"]
branches = 100 * totals["covered_branches"] / totals["num_branches"]
print(f"covered: {lines:.2f} % of the lines, {branches:.2f} % of the branches")  # noqa: T201
if min(lines, branches) < wanted:
    sys.exit(f"at least {wanted:g} % of each is wanted")
