import runpy
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "docs/draw_architecture.py"


@pytest.mark.parametrize("name", ["encoder", "training_step"])
def test_draws_a_picture(name, tmp_path):
    runpy.run_path(str(SCRIPT))[f"draw_{name}"](tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(2**20)) > 100
