"""Turns ``results/*.json`` into ``results/REPORT.md``: ``python -m benchmarks.report``."""

import json

from benchmarks.harness import RESULTS

INTRODUCTION = """Made by `python -m benchmarks.report` from the JSON files beside it. Rivals run in turn on inputs
larger than the caches; figures are medians over the rounds, ratios medians of the ratios within a round. "x copy"
is against copying as many bytes as the operator has to read and write. A bar is what "x ours" has to reach, and
is set in the benchmark; whether it was reached follows from the figure beside it. Peak memory is what a call needs
beyond its inputs, results included."""
COLUMNS = (
    "| provider | ms, median (10% to 90%) | GB/s | x copy | x ours | bar | peak MB |\n"
    "|---|---|---|---|---|---|---|"
)


def table(rows: list[dict[str, object]]) -> str:
    """One subject's providers, fastest first."""
    lines = [COLUMNS]
    for row in sorted(rows, key=lambda row: float(str(row["median_ms"]))):
        cells = [
            str(row["provider"]),
            f"{row['median_ms']:.3g} ({row['p10_ms']:.3g} to {row['p90_ms']:.3g})",
            "" if row["gigabytes_per_second"] is None else f"{row['gigabytes_per_second']:.3g}",
            "" if row["times_copy"] is None else f"{row['times_copy']:.2f}",
            f"{row['times_ours']:.2f}",
            verdict(row),
            "" if row["peak_memory"] is None else f"{float(str(row['peak_memory'])) / 1e6:.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(row: dict[str, object]) -> str:
    """Whether a provider's time is as many times ours as it was to be."""
    bar = row.get("bar")  # rows from before there were bars have none
    if bar is None:
        return ""
    return f"{bar:.3g}: {'reached' if float(str(row['times_ours'])) >= float(str(bar)) else 'missed'}"


def report() -> str:
    """All devices and subjects as Markdown."""
    parts = ["# Benchmarks", INTRODUCTION]
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        parts.append(f"## {data['device']}")
        subjects: dict[str, list[dict[str, object]]] = {}
        for row in data["results"]:
            subjects.setdefault(row["subject"], []).append(row)
        for subject, rows in subjects.items():
            first = rows[0]
            parts.append(
                f"### {subject}\n\ntorch {first['torch']}, {first['threads']} threads, {first['date']}"
            )
            parts.append(table(rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (RESULTS / "REPORT.md").write_text(report())
    print(RESULTS / "REPORT.md")
