"""Print the table of ``docs/mlecs.md`` from the runs of ``configs/sweeps/mlecs.yaml``.

python tests/measure_mlecs.py runs
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

#: Metrics, each a column of every rate, and how they are headed.
METRICS = {"accuracy": "accuracy", "f1": "macro F1"}
#: Scores by row, missing rate and metric; of every seed the last and the best round.
Found = dict[tuple[str, str, str], list[dict[str, float]]]


def main(folder: str) -> None:
    """Print devices' mean and server's accuracy and macro F1 by row and rate, in percent."""
    found: Found = {}
    for path in sorted(Path(folder).glob("mlecs-*/summary.json")):
        name = re.fullmatch(r"mlecs-(.+?)(?:-rate([\d.]+))?-seed\d+", path.parent.name)
        if name is None or json.loads(path.read_text())["status"] != "completed":
            continue
        lines = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
        tests = [line["metric"] for line in lines if line["split"] == "test"]
        for metric in METRICS:
            if metric not in tests[-1]:
                continue
            scores = {"last": tests[-1][metric], "best": max(t[metric] for t in tests)}
            if tests[-1].get(f"server_{metric}") is not None:
                scores["server"] = tests[-1][f"server_{metric}"]
            found.setdefault((name[1], name[2] or "0", metric), []).append(scores)
    rates = sorted({rate for _, rate, _ in found}, key=float, reverse=True)
    columns = [(rate, metric) for rate in rates for metric in METRICS]
    heads = (f"rho = {1 - float(rate):.1f}, {METRICS[metric]}" for rate, metric in columns)
    print("| | " + " | ".join(heads) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for row in dict.fromkeys(row for row, *_ in found):
        cells = (cell(found.get((row, *column))) for column in columns)
        print(f"| {row} | " + " | ".join(cells) + " |")


def cell(scores: list[dict[str, float]] | None) -> str:
    """Return one cell: devices' last (best) round, the server's last, and how many seeds."""
    if not scores:
        return ""
    told = {key: [100 * one[key] for one in scores if key in one] for key in scores[0]}
    mean = {key: statistics.fmean(values) for key, values in told.items()}
    spread = f" ± {statistics.stdev(told['last']):.1f}" if len(scores) > 1 else ""
    server = f", server {mean['server']:.1f}" if "server" in mean else ""
    return f"{mean['last']:.1f}{spread} ({mean['best']:.1f}){server}; {len(scores)}"


if __name__ == "__main__":
    main(sys.argv[1])
