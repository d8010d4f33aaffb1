import re

import numpy as np
import pytest
from PIL import Image

from litevae.cli import main


def test_command(gradient_runs, capsys):
    folder, ratios = gradient_runs
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
        (command, "r.png already exists"),
        ([*command[:-1], "r.jpg"], "must end in .png"),
        ([*command[:-1], str(folder / "x" / "r.png")], "x: no such folder"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
