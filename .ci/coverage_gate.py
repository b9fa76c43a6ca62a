"""Fail if lines or branches alone are covered less than asked: coverage's own --fail-under adds the two up.

coverage json -o coverage.json && python .ci/coverage_gate.py coverage.json LINES BRANCHES
"""

import json
import sys
from pathlib import Path

report, wanted = Path(sys.argv[1]), {"lines": float(sys.argv[2]), "branches": float(sys.argv[3])}
totals = json.loads(report.read_text(encoding="utf-8"))["totals"]
covered = {
    "lines": 100 * totals["covered_lines"] / totals["num_statements"],
    "branches": 100 * totals["covered_branches"] / totals["num_branches"],
}
for kind, share in covered.items():
    print(f"{share:.2f} % of the {kind} are covered, {wanted[kind]:g} % are wanted")  # noqa: T201
sys.exit(any(share < wanted[kind] for kind, share in covered.items()))
