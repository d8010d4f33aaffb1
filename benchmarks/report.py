"""``python -m benchmarks.report``: ``results/*.json`` as ``results/REPORT.md`` with plots, and the README's table of
one line per machine."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.plots import HEADLINE, Row, best_of_each, draw_all, images_per_second, model_of
from benchmarks.session import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- python -m benchmarks.report writes from here -->", "<!-- to here -->"

INTRODUCTION = """Made by `python -m benchmarks.report` from the JSON files beside it. Rivals run in turn on inputs
larger than the caches; figures are medians over the rounds, ratios medians of the ratios within a round. "x copy"
is against copying as many bytes as the operator has to read and write. A bar is what "x ours" has to reach, and
is set in the benchmark; whether it was reached follows from the figure beside it. Only the curves' smallest sizes
fit into the caches.

For whole models GB/s counts what their convolutions and matrix products read and write, each on its own, as if
norms, activations and additions cost no traffic; "% of matrix" and "% of copy" are shares of what a large matrix
product of the same dtype and a large copy reach in the same rounds. "x best rival" is images/s over those of the
fastest rival of the same run, and "memory" the share of that rival's peak; behind them is the goal.

More than 100% of matrix is no mistake: multiply-accumulates are counted as in a direct convolution, and Winograd's
algorithm needs less than half of its multiplications. That is ours in bf16; where oneDNN's convolutions reach more
than 100%, the product is slower than they are.

Peak memory is what a call needs beyond its inputs, results included, and beyond what is there before it: weights (and
a trainer's optimizer states; its gradients are made anew in each step) are not in it. On a GPU it is the allocator's
peak, and what a CUDA graph holds on to. On a CPU it is how far the process grows, with the buffers that libraries
allocate for themselves. For that one call, which is not timed, the C library maps each large block on its own; in the
timed calls, which keep freed memory, gaps between blocks add 10 to 80% to it, differently each time.

`litevae encode` is timed from its first batch on, as the command itself reports it. The encoder alone, on the same
batches, is to take 0.9 of that time at least: the command's images/s are then within 10% of the encoder's own."""
README_MODELS = ("SD-VAE", "LiteVAE-B", "LiteVAE-S")
PYRAMID = "haar_pyramid forward, fp32, 32x3x256x256"
# Lines of the README's table whose figures were written down by hand in November 2026, without a results file.
# Delete a line once the JSON of such a machine is committed.
NOTED = (
    [
        "Intel Xeon with AVX-512 and no BF16, torch 2.14, 2026-11",
        "2x3x256x256, fp32, compiled (S: eager)",
        "0.79",
        "2.76",
        "9.7",
        "3.5x",
        "2.2x",
        "written down by hand, no JSON",
    ],
)
# The subjects beside the encoders that the report's summary compares with their fastest rivals.
ALSO = (
    "decoders",
    "litevae encode",
    "training step, bf16 autocast, no discriminator, LPIPS",
    "training step, bf16 autocast, U-Net discriminator, LPIPS",
    "haar_pyramid forward, fp32, 32x3x256x256",
    "haar_pyramid backward, fp32, 32x3x256x256",
    "group_norm_silu forward, bf16 channels_last, all",
    "group_norm_silu forward and backward, bf16 channels_last, all",
    "conv3x3 with bias and residual, inference, bf16 channels_last, 4x96x96x128x128",
    "conv3x3 forward and backward, bf16 autocast, channels_last, 4x96x96x128x128",
    "self_modulated_conv2d inference, bf16 channels_last, 3x3 on 2x512x64x64",
    "self_modulated_conv2d forward and backward, bf16 autocast, 3x3 on 2x512x64x64",
)
# how the names begin of what is no rival
NO_RIVAL = ("litevae", "LiteVAE", "GroupNorm, ", "SMC", "folded", "copy", "matrix product")
COLUMNS = (
    "provider",
    "ms, median (10% to 90%)",
    "images/s",
    "GMAC",
    "% of matrix",
    "GB/s",
    "% of copy",
    "x copy",
)
COLUMNS += ("x ours", "bar", "x best rival", "memory", "peak MB")


def number(value: Any, form: str = "", scale: float = 1.0) -> str:
    """Three digits unless told; empty where there is none, or a row is from before there was such a figure."""
    if value is None:
        return ""
    return f"{value * scale:{form or ('.0f' if value * scale >= 100 else '.3g')}}"


def cells(row: Row) -> list[str]:
    get = row.get
    goal = get("goal") or {}
    speed = images_per_second(row) if get("images") else None
    wanted = goal.get("images_per_second")
    return [
        row["provider"],
        f"{number(row['median_ms'])} ({number(row['p10_ms'])} to {number(row['p90_ms'])})",
        number(speed) + verdict(wanted, speed is not None and wanted is not None and speed >= wanted),
        number(get("macs"), scale=1e-9),
        number(get("matrix_share"), ".0f", 100),
        number(row["gigabytes_per_second"]),
        number(get("copy_share"), ".0f", 100),
        number(row["times_copy"], ".2f"),
        number(row["times_ours"], ".2f"),
        verdict(get("bar"), row["times_ours"] >= (get("bar") or 0)).strip(),
        met(get("speedup"), goal.get("speedup"), at_least=True),
        met(get("memory_share"), goal.get("memory_share"), at_least=False),
        number(row["peak_memory"], scale=1e-6),
    ]


def verdict(bar: float | None, reached: bool) -> str:
    return "" if bar is None else f" {bar:.3g}: {'reached' if reached else 'missed'}"


def met(value: float | None, goal: float | None, *, at_least: bool) -> str:
    """A ratio, and its goal if there is one."""
    if value is None:
        return ""
    return (
        f"{value:.2f}"
        + (";" if goal else "")
        + verdict(goal, goal is not None and (value >= goal) == at_least)
    )


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table, without the columns that no line fills."""
    used = [i for i in range(len(header)) if any(line[i] for line in lines)]
    table = [[row[i] for i in used] for row in (header, ["---"] * len(header), *lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def table(rows: list[Row]) -> str:
    """One subject's providers, fastest first."""
    return markdown(list(COLUMNS), [cells(row) for row in sorted(rows, key=lambda row: row["median_ms"])])


def by_subject(rows: list[Row]) -> dict[str, list[Row]]:
    subjects: dict[str, list[Row]] = {}
    for row in rows:
        subjects.setdefault(row["subject"], []).append(row)
    return subjects


def stamp(row: Row) -> str:
    return f"torch {row['torch']}, {row['threads']} threads, {row['date']}"


def report() -> str:
    """All devices and subjects as Markdown; draws the plots."""
    parts = ["# Benchmarks", INTRODUCTION]
    for path, data in machines():
        parts.append(f"## {data['device']}")
        for title, plot in draw_all(data["device"], data["results"], RESULTS, path.stem).items():
            parts.append(f"![{title}]({plot.name})")
        if summary := also(data["results"]):
            parts.append(f"### Against the fastest rivals\n\n{summary}")
        # the headline first, grids and curves last
        subjects = by_subject(data["results"])
        for subject in sorted(subjects, key=order(subjects)):
            parts.append(f"### {subject}\n\n{stamp(subjects[subject][0])}\n\n{table(subjects[subject])}")
    return "\n\n".join(parts) + "\n"


def order(subjects: dict[str, list[Row]]) -> Any:
    def place(subject: str) -> int:
        late = subject.startswith(("grid", "sizes")) or bool(subjects[subject][0].get("chart"))
        return 0 if subject.startswith(HEADLINE) else 2 if late else 1

    return place


def machines() -> list[tuple[Path, dict[str, Any]]]:
    return [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]


def speeds() -> str:
    """The README's table: a row per machine, with the encoders at their best and the Haar pyramid."""
    header = ["machine", "encoders run as"]
    header += [f"{model}, images/s" for model in README_MODELS]
    header += ["B over the SD-VAE", "pyramid over compiled slicing", "source"]
    return markdown(header, [*(line for line in map(measured, machines()) if line), *NOTED])


def measured(machine: tuple[Path, dict[str, Any]]) -> list[str] | None:
    """One machine's line of `speeds`; None where the encoders were not measured."""
    path, data = machine
    rows = [row for row in data["results"] if row["subject"].startswith(HEADLINE)]
    best = {model_of(row): row for row in best_of_each(rows)}
    if any(model not in best for model in README_MODELS):
        return None
    b = best["LiteVAE-B"]
    shape = b["subject"].removeprefix(f"{HEADLINE}, ")
    slicing = [
        row["times_ours"]
        for row in data["results"]
        if row["subject"] == PYRAMID and row["provider"] == "slicing, torch.compile"
    ]
    return [
        f"{data['device']}, torch {b['torch']}, {b['date']}",
        f"{shape}, {b['provider'].split(', ', 1)[1]}",
        *(number(images_per_second(best[model])) for model in README_MODELS),
        f"{b['speedup']:.1f}x",
        f"{slicing[0]:.1f}x" if slicing else "",
        f"[JSON](benchmarks/results/{path.name})",
    ]


def also(rows: list[Row]) -> str:
    """A table of `ALSO`: each subject in our default form against its fastest rival.

    `litevae encode` has none, and stands beside its own encoder.
    """
    lines = []
    subjects = by_subject(rows)
    for subject in (subject for start in ALSO for subject in subjects if subject.startswith(start)):
        group = subjects[subject]
        rivals = [row for row in group if not row["provider"].startswith(NO_RIVAL)]
        if not rivals:
            continue
        own = next(row for row in group if row["times_ours"] == 1)
        rival = min(rivals, key=lambda row: float(row["median_ms"]))
        lines.append(
            [
                subject,
                own["provider"],
                f"**{number(own['median_ms'])}**",
                rival["provider"],
                number(rival["median_ms"]),
                f"{rival['times_ours']:.2f}x",
            ]
        )
    return markdown(["", "ours", "ms", "fastest rival", "ms", "of ours"], lines) if lines else ""


def write_readme() -> None:
    text = README.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{README}: the lines {BEGIN} and {END} are missing")
    README.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{speeds()}\n\n{END}", text))


if __name__ == "__main__":
    (RESULTS / "REPORT.md").write_text(report())
    write_readme()
    print(RESULTS / "REPORT.md")
