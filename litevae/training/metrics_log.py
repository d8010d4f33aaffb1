"""The log of a training run: metrics.jsonl, the tracker and the speed."""

import json
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator

from litevae.files import open_to_append, parse_json, replacing
from litevae.training.step import GRADIENT_RATIO, WEIGHTED


class MetricsLog:
    """Writes metrics.jsonl and the tracker, with the speed since the previous line.

    Args:
        path: path of metrics.jsonl, which is rewritten with `lines`.
        lines: lines of the run so far; new lines are appended.
        accelerator: Accelerator with the trackers, which the main process writes to.
    """

    def __init__(self, path: Path, lines: list[dict[str, Any]], accelerator: Accelerator) -> None:
        self.path, self.lines, self.accelerator = path, lines, accelerator

    def __enter__(self) -> Self:
        self.file = None
        if self.accelerator.is_main_process:
            with replacing(self.path) as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
            self.file = open_to_append(self.path)
        self.images, self.wait_seconds, self.seconds = 0, 0.0, 0.0
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def restart(self) -> None:
        """Leaves out the time since the last step, because validating and saving are not training."""
        self.last = time.perf_counter()

    def count(self, images: int, wait_seconds: float) -> None:
        """Counts a step on `images` images of all processes, which waited `wait_seconds` for its data."""
        self.images, self.wait_seconds = self.images + images, self.wait_seconds + wait_seconds
        self.seconds += time.perf_counter() - self.last

    def write(self, step: int, values: dict[str, float], skipped: int) -> dict[str, Any]:
        """Writes a line with `values`, the number of steps `skipped` so far and the speed; returns the line."""
        speed = {
            "images_per_second": self.images / self.seconds,
            "data_wait": min(self.wait_seconds / self.seconds, 1.0),  # as a fraction of the time
        }
        self.images, self.wait_seconds, self.seconds = 0, 0.0, 0.0
        return self.append({"step": step, **values, "skipped_steps": skipped, **speed})

    def write_skipped(self, step: int, reason: str, skipped: int) -> None:
        """Writes a line about a step that was skipped for `reason`."""
        self.append({"step": step, "skipped": reason, "skipped_steps": skipped})

    def append(self, line: dict[str, Any]) -> dict[str, Any]:
        self.lines.append(line)
        if self.file is not None:
            self.file.write((json.dumps(line) + "\n").encode())
            self.file.flush()
            numbers = {name: value for name, value in line.items() if isinstance(value, float)}
            self.accelerator.log(numbers, step=line["step"])
        return line


def read_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl up to `step`, or an empty list if there is no such file."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = parse_json(text)
            if line["step"] <= step:
                lines.append(line)
        except (ValueError, TypeError, KeyError, IndexError):  # a killed run may have cut its last line
            break
    return lines


def format_progress(line: dict[str, Any]) -> str:
    """Formats a log line for the progress bar."""
    norms = ("gradient_norm", "discriminator_gradient_norm", GRADIENT_RATIO)
    omitted = ("step", *norms, "learning_rate", "skipped_steps")
    speed = f"{line['images_per_second']:.0f} images/s, {line['data_wait']:.0%} waiting for data"
    losses = [
        f"{name} {value:.3g}"
        for name, value in line.items()
        if name not in (*omitted, "images_per_second", "data_wait") and not name.startswith(WEIGHTED)
    ]
    return ", ".join([*losses, speed])


def estimate_end(done: int, total: int, seconds: float) -> str:
    """Returns the time at which the last step will end, for the progress bar.

    Args:
        done: number of steps since the start of this process, at least 1.
        total: number of steps from the start of this process to the end.
        seconds: seconds since the start, with the time for validating and saving.
    """
    remaining = timedelta(seconds=seconds / done * (total - done))
    return f"ends {datetime.now() + remaining:%Y-%m-%d %H:%M}"
