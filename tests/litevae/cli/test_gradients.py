import json
import re

import numpy as np
import pytest
from PIL import Image

from litevae.cli import main


@pytest.fixture
def runs(tmp_path):
    """Logs in the trainer's format, with the ratio on some of the lines."""
    ratios = {"constant": [0.5, 0.4, 0.2, 0.1], "adaptive": [100.0, 0.01, 3.0]}
    for name, values in ratios.items():
        (tmp_path / name).mkdir()
        lines = [{"step": 1, "loss": 1.0}, {"step": 2, "skipped": "the loss is nan", "skipped_steps": 1}]
        lines += [{"step": 10 * i, "gradient_ratio": value} for i, value in enumerate(values, start=1)]
        lines += [{"step": 99, "gradient_ratio": 0.0}]  # cannot be drawn on a logarithmic scale
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"step": 100, "gradi')  # the run was killed
    return tmp_path, ratios


def test_command(runs, capsys):
    folder, ratios = runs
    command = ["gradients", str(folder / "constant"), str(folder / "adaptive"), "-o", str(folder / "r.png")]
    assert main(command) == 0
    output = capsys.readouterr().out
    for name, values in ratios.items():
        (line,) = re.findall(rf"^{name} .*$", output, re.MULTILINE)
        low, median, high = np.percentile(values, [5, 50, 95])
        expected = [len(values), median, low, high, high / low]
        assert [float(part) for part in line.split()[1:]] == pytest.approx(expected, rel=5e-3)
    with Image.open(folder / "r.png") as picture:
        assert picture.size == (960, 540)
    for arguments, message in (
        (command, "r.png exists already"),
        ([*command[:-1], "r.jpg"], "must end in .png"),
        ([*command[:-1], str(folder / "x" / "r.png")], "x: no such folder"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
