"""The report of an experiment in Markdown and JSON, with the paper's figures beside ours."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import fmean

from litevae.environment import device_name, versions
from litevae.evaluation.yardsticks import BELOW, for_json
from litevae.experiments.spec import Experiment, Setup, measured_size, measured_sizes
from litevae.experiments.trained import Row
from litevae.experiments.verdict import confidence, error_bar, heading_of, join_words, number, verdicts
from litevae.files import replacing
from litevae.losses import RECONSTRUCTION_TERMS
from litevae.training.config import list_stages


def write_report(
    name: str,
    experiment: Experiment,
    setup: Setup,
    rows: Sequence[Row],
    pictures: Sequence[Path],
    seconds: float,
) -> Path:
    """Writes NAME.md and NAME.json into `setup.output` and returns the former's path.

    Args:
        name: name of the experiment.
        experiment: its specification.
        setup: the way it was run.
        rows: its rows, measured.
        pictures: PNG files in the same folder to show.
        seconds: time that the experiment took, without the runs that it shares with earlier ones.
    """
    path = setup.output / f"{name}.md"
    changed = ", changed by hand" if setup.overrides else ""
    body = [
        description(experiment, setup, rows),
        table(experiment, rows),
        *yardsticks(experiment, rows),
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
        *verdicts(experiment, rows),
        experiment.note,
    ]
    text = [
        f"# {heading(name)}, {setup.at.description}{changed}: {experiment.title}",
        *(smoke_test(experiment, setup, rows) if setup.at.smoke else body),
        f"{device_name()}; {versions()}; {date.today()}; {seconds:.0f} s for this experiment, without the models that "
        f"earlier experiments had trained.{trained_by(rows)}",
    ]
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(part.strip() for part in text if part) + "\n", encoding="utf-8")
    record = {
        "experiment": name,
        "scale": setup.scale,
        "overrides": list(setup.overrides),
        "only": list(setup.rows),
        "title": experiment.title,
        "rows": [
            {
                "row": row.spec.row,
                "paper": row.spec.paper,
                "values": row.values,
                "yardsticks": for_json(row.yardsticks),
                "others": [trained.others for trained in row.trained],
                "versions": [trained.record.get("versions") for trained in row.trained],
                "images": row.count,
                "configurations": [asdict(trained.config) for trained in row.trained],
            }
            for row in rows
        ],
        "machine": device_name(),
        "versions": versions(),
        "date": str(date.today()),
        "seconds": round(seconds, 1),
    }
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def trained_by(rows: Sequence[Row]) -> str:
    """Returns a sentence about the versions that trained the models, if not all of them are those that run now."""
    used = {trained.record.get("versions", "unknown versions") for row in rows for trained in row.trained}
    return "" if used <= {versions()} else f" Models were trained by {'; '.join(sorted(used))}."


def heading(name: str) -> str:
    """Returns the title of a table or figure: "Table 9" for "table09"."""
    name = Path(name).stem
    word, number = name.rstrip("0123456789"), name[len(name.rstrip("0123456789")) :]
    return f"{word.capitalize()} {int(number)}" if number else name


def description(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> str:
    """Describes the training data, the length of the training and the measurement."""
    if experiment.kind == "complexity":
        return (
            f"Encoders, batch {setup.at.complexity_batch}, 256 x 256 pixels, float32, eager, channels_last. ± is half "
            "the width of a 95% confidence interval over repeated measurements."
        )
    configs = [trained.config for row in rows for trained in row.trained]
    steps = join_words({config.max_steps for config in configs})
    batch = join_words({config.data.batch_size for config in configs})
    sides = join_words({stage.size for config in configs for stage in list_stages(config)})
    images = join_words({training_images(setup, row) for row in rows})
    seeds = max(len(row.trained) for row in rows)
    text = (
        f"Trained for {steps} steps of {batch} crops of {images}, {sides} pixels per side"
        + (f", with {seeds} seeds (mean ± half the 95% confidence interval)" if seeds > 1 else ", one seed")
        + f". {trained_with(rows)} {measurement(experiment, setup, rows)}"
    )
    if experiment.kind in ("mmd", "regularisation"):
        text += " ± of the distances is over groups of images instead of seeds."
    if not all(trained.alone for row in rows for trained in row.trained):
        text += " Some runs did not have the machine to themselves, so their seconds say little."
    if setup.at.reduced:
        what = "The images, the decoder" if setup.at.size > 1 else "The data sets, the decoder"
        text += (
            f" The encoders are the paper's. {what} and the number of steps are much smaller: the paper's figures"
            " stand beside ours to show what the experiment is about, not for comparison. Rows that differ only in"
            f" {'the data set, or in ' if setup.at.demo else ''}something that this scale leaves out show the same run."
        )
        own = [
            ("all rows", experiment.reduced),
            *((", ".join(row.spec.row), row.spec.reduced) for row in rows),
        ]
        chosen = [f"{' '.join(settings)} ({name})" for name, settings in own if settings]
        text += f" Set by this experiment below the paper's scale: {'; '.join(chosen)}." if chosen else ""
    if setup.rows:
        text += f" Only rows with {join_words(set(setup.rows))}."
    if setup.overrides:
        text += f" Changed by hand: {', '.join(setup.overrides)}."
    return text


def training_images(setup: Setup, row: Row) -> str:
    """Returns what the images are called that a row's model was trained on."""
    if setup.at.demo:
        return "scikit-image's photographs"
    return setup.data[row.spec.dataset] if setup.at.reduced else row.spec.dataset


def trained_with(rows: Sequence[Row]) -> str:
    """Describes the settings of all rows that matter for the result."""
    configs = [(trained.config, trained.record) for row in rows for trained in row.trained]
    weights = []
    for name in (*RECONSTRUCTION_TERMS, "kl", "adversarial"):
        values = {getattr(config.loss, name) for config, _ in configs}
        if values != {0}:
            weights.append(f"{name} {join_words({f'{value:g}' for value in values})}")
    precisions = join_words({record.get("precision", config.precision) for config, record in configs})
    rates = join_words(
        {f"{config.optimizer.learning_rate:g} ({config.optimizer.schedule})" for config, _ in configs}
    )
    return (
        f"Weights of the losses: {', '.join(weights)}. Precision {precisions}; crops: "
        f"{join_words({config.data.crop for config, _ in configs})}; EMA decay "
        f"{join_words({f'{config.ema_decay:g}' for config, _ in configs})}; learning rate {rates}, "
        f"{join_words({config.optimizer.warmup_steps for config, _ in configs})} steps of warm-up."
    )


def smoke_test(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> list[str]:
    """Returns the report of a scale that only tests that everything runs: that it did, and how long it took."""
    lines = [[*experiment.columns, "steps", "seconds"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        steps = join_words({trained.config.max_steps for trained in row.trained}) if row.trained else ""
        seconds = sum(trained.seconds for trained in row.trained)
        lines.append([*row.spec.row, steps, f"{seconds:.0f}" if row.trained else ""])
    return [
        "A smoke test: every model of this experiment was trained, measured and drawn without an error. It says "
        "nothing about the models.",
        markdown(lines),
        f"Only rows with {join_words(set(setup.rows))}." if setup.rows else "",
        f"Changed by hand: {', '.join(setup.overrides)}." if setup.overrides else "",
    ]


def measurement(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> str:
    if experiment.kind == "gradients":
        return "Measured during training."
    counts = join_words({row.count for row in rows})
    if experiment.kind == "resolution":
        sizes = join_words(set(measured_sizes(experiment, setup.at)))
    else:
        sizes = join_words({measured_size(row.trained[0].config, row.spec, setup.at) for row in rows})
    if experiment.kind == "generation":
        return f"The second stage learns {counts} latents, of images {sizes} pixels wide, and their mirror images."
    whose = "held-out images"
    if setup.at.demo:
        whose = "squares of a photograph that no model was trained on"
    elif setup.at.reduced:
        whose = "squares of held-out images, not resized"
        if experiment.kind == "resolution":
            whose = (
                f"squares of held-out images, shrunk from {max(measured_sizes(experiment, setup.at))} pixels"
            )
    return f"Measured on {counts} {whose}, {sizes} pixels per side, 8 bits, " + (
        "samples of the posterior." if experiment.kind == "mmd" else "mode of the posterior."
    )


def table(experiment: Experiment, rows: Sequence[Row]) -> str:
    """Returns the Markdown table: the experiment's columns, our figures, the paper's figures."""
    ours = columns(values for row in rows for values in row.values)
    paper = columns(row.spec.paper for row in rows)
    head = [
        *experiment.columns,
        *(f"ours: {heading_of(key)}" for key in ours),
        *(f"paper: {heading_of(key)}" for key in paper),
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [mean_and_interval([v for v in row.values if key in v], key) for key in ours]
        cells = [
            f"{cell}, {BELOW}" if below(row, key) else cell for key, cell in zip(ours, cells, strict=True)
        ]
        published = [mean_and_interval([row.spec.paper] * (key in row.spec.paper), key) for key in paper]
        lines.append([*row.spec.row, *cells, *published])
    return markdown(lines)


def below(row: Row, key: str) -> bool:
    """Returns whether `key` names a PSNR, and the row's mean of it is below the Haar yardstick."""
    values = [value[key] for value in row.values if key in value]
    *_, haar = [{}, *row.yardsticks.values()]
    return key.startswith("psnr") and key in haar and bool(values) and fmean(values) < haar[key]


def yardsticks(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """Returns a heading and a table of the yardsticks, with one line for all rows that share their values."""
    shared: dict[tuple[str, tuple[tuple[str, float], ...]], list[str]] = {}
    for row in rows:
        for label, values in row.yardsticks.items():
            shared.setdefault((label, tuple(values.items())), []).append(", ".join(row.spec.row))
    if not shared:
        return []
    metrics = list(dict.fromkeys(name for _, values in shared for name, _ in values))
    lines = [["Yardstick", *(heading_of(name) for name in metrics), "for"]]
    lines.append(["---"] * len(lines[0]))
    for (label, pairs), names in shared.items():
        found = dict(pairs)
        cells = [number(found[name], name) if name in found else "" for name in metrics]
        lines.append([label, *cells, "all rows" if len(names) == len(rows) else "; ".join(names)])
    return ["Reconstructions without any learning, measured on the same pixels:", markdown(lines)]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; the second of its lines separates the heading."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(measured: Iterable[Mapping[str, float]]) -> list[str]:
    """Returns the names of all values but the error bars, which share the cell of their value."""
    names = dict.fromkeys(name for values in measured for name in values)
    return [name for name in names if not name.startswith(error_bar(""))]


def mean_and_interval(measured: Sequence[Mapping[str, float]], key: str) -> str:
    """Returns the mean of a value over seeds, with its own error bars, or else those over the seeds."""
    if not measured:
        return ""
    values = [each[key] for each in measured]
    mean = number(fmean(values), key)
    if (bar := error_bar(key)) in measured[0]:
        return f"{mean} ± {number(fmean(each[bar] for each in measured), key)}"
    return f"{mean} ± {number(confidence(values), key)}" if len(values) > 1 else mean
