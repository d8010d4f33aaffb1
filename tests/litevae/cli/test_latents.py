import json

import pytest
from PIL import Image

from litevae.cli import main
from litevae.data.sources import open_images
from litevae.evaluation.latent_space import collect_latents, distance_from_gaussian

SIZE = 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tiny_folder, squares, tmp_path, capsys):
    command = [
        "latents",
        tiny_folder,
        squares,
        "-o",
        tmp_path / "out",
        "--workers",
        0,
        "--size",
        SIZE,
    ]

    def run(*arguments, status=0):
        assert main([str(argument) for argument in (*command, *arguments)]) == status
        return capsys.readouterr()

    return run


def test_result(run, tmp_path, tiny_model, squares):
    output = run("--groups", 4).out
    record = json.loads((tmp_path / "out" / "latents.json").read_text())
    latents = collect_latents(tiny_model, open_images(str(squares)), SIZE, workers=0)
    expected = distance_from_gaussian(latents, groups=4)
    assert [d["sigma"] for d in record["squared_mmd"]] == [25, 50, 100, 250, 500]
    assert [d["scaled_sigma"] for d in record["squared_mmd"]] == [d.sigma for d in expected]
    assert [d["mean"] for d in record["squared_mmd"]] == pytest.approx([d.mean for d in expected], rel=1e-6)
    assert record["count"] == 8
    assert f"   50{1000 * expected[1].mean:9.2f} ± {1000 * expected[1].half_width:.2f}\n" in output
    with Image.open(tmp_path / "out" / "latents.png") as picture:
        assert picture.width > 1000  # three columns
    with Image.open(tmp_path / "out" / "distances.png") as picture:
        assert picture.size == (1200, 480)

    assert "latents.json already exists" in run(status=2).err
    assert run("--groups", 4, "--overwrite").out == output


def test_too_few_images_are_one_line(run, tmp_path):
    error = run(status=2).err.splitlines()[-1]
    assert "8 images cannot be shared among 10 groups" in error
    assert not (tmp_path / "out").exists()
