import json

import numpy as np
import pytest
from PIL import Image

import litevae.experiments.demo_images as demo_images_module
import litevae.experiments.trained as trained_module
from litevae.cli import main
from litevae.errors import UserError
from litevae.experiments.run import run_experiment
from litevae.experiments.spec import Setup
from litevae.experiments.trained import Stopped
from litevae.training.trainer import TrainingResult

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("no_pictures", "stand_in_networks")
def test_an_experiment_trains_measures_and_reports(tmp_path, own, own_text, capsys, monkeypatch):
    out = tmp_path / "out"
    cut = demo_images_module.cut
    monkeypatch.setattr(demo_images_module, "cut", lambda image, size: cut(image, size)[:5])
    names = ["rfid", "lpips", "st_lpips", "psnr", "ssim"]
    command = ["experiment", own, "max_steps=2", "-o", str(out), "--metrics", ",".join(names)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (out / "own.md").read_text() in printed
    record = json.loads((out / "own.json").read_text())
    assert record["overrides"] == ["max_steps=2"]
    values = [row["values"][0] for row in record["rows"]]
    assert all(set(each) == {*names, "seconds"} for each in values)
    # `litevae eval` measures the same on the run's model and the same squares
    (run,) = {c["output_dir"] for c in record["rows"][0]["configurations"]}
    evaluation = tmp_path / "eval.json"
    squares = out / "images" / "held-out-32"
    options = [
        "--size",
        "32",
        "--metrics",
        ",".join(names),
        "--workers",
        "0",
        "--precision",
        "fp32",
        "-o",
        str(evaluation),
    ]
    assert main(["eval", run, str(squares), *options]) == 0
    measured = json.loads(evaluation.read_text())
    assert measured["count"] == record["rows"][0]["images"] == 5
    for name in names:
        assert values[0][name] == pytest.approx(measured["metrics"][name], abs=1e-9)

    # nothing is trained twice, not even by another experiment
    monkeypatch.setattr(trained_module, "train", lambda config, replace: pytest.fail("trained again"))
    (tmp_path / "another.yaml").write_text(own_text.replace("Losses", "Rows"))
    assert main(["experiment", str(tmp_path / "another.yaml"), "max_steps=2", "-o", str(out)]) == 0


def test_a_signal_stops_it_and_nothing_is_reported(tmp_path, own, monkeypatch, capsys):
    monkeypatch.setattr(
        trained_module,
        "train",
        lambda config, replace: TrainingResult(tmp_path, 1, 1.0, None, None, stopped_by="SIGINT"),
    )
    with pytest.raises(Stopped):
        run_experiment(own, Setup("tiny", tmp_path / "out"))
    assert main(["experiment", own, "-o", str(tmp_path / "out")]) == 0
    assert "stopped by SIGINT: the same command continues" in capsys.readouterr().out
    assert not (tmp_path / "out" / "own.md").exists()


@pytest.mark.usefixtures("no_pictures")
def test_the_small_scale_trains_and_measures_on_folders_without_resizing(tmp_path, own, capsys):
    random = np.random.default_rng(0)
    folders = [tmp_path / name for name in ("train", "held-out")]
    for folder in folders:
        folder.mkdir()
        for number in range(3):
            pixels = random.integers(0, 256, (40, 33 + number, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    out = tmp_path / "out"
    options = [f"--data=imagenet={folders[0]}", f"--validation=imagenet={folders[1]}", "--row=both"]
    command = ["experiment", own, "--scale=small", *options, "max_steps=1", "data.size=32", "-o", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"Trained for 1 steps of 2 crops of {folders[0]}, 32 pixels per side" in printed
    assert "Only rows with both." in printed
    assert "Measured on 3 squares of held-out images, not resized, 32 pixels per side" in printed
    assert "It helps." not in printed  # a claim about a row that was left out
    (squares,) = (out / "images").iterdir()
    for number, file in enumerate(sorted(squares.iterdir())):
        whole = np.asarray(Image.open(folders[1] / f"{number}.png"))
        assert np.array_equal(np.asarray(Image.open(file)), whole[:32, :32])


def test_held_out_squares_are_spread_over_images_and_renewed_with_them(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    folder = tmp_path / "held-out"
    folder.mkdir()
    pixels = random.integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    monkeypatch.setattr(demo_images_module, "SQUARES", 2)
    first = demo_images_module.cut_held_out(tmp_path, str(folder), 32)
    found = [np.asarray(Image.open(file)) for file in sorted(first.iterdir())]
    for square, expected in zip(found, (pixels[:32, 32:], pixels[32:, 32:]), strict=True):
        assert np.array_equal(square, expected)
    Image.fromarray(255 - pixels).save(folder / "a.png")
    demo_images_module.cut_held_out.cache_clear()
    assert demo_images_module.cut_held_out(tmp_path, str(folder), 32) != first

    (folder / "b.png").write_bytes(b"no image")
    demo_images_module.cut_held_out.cache_clear()
    with pytest.raises(UserError, match=r"b\.png: "):
        demo_images_module.cut_held_out(tmp_path, str(folder), 32)


def test_rows_that_are_measured_at_a_larger_size_need_images_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trained_module, "train", lambda config, replace: pytest.fail("trained"))
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")
    options = [
        f"--data=imagenet={tmp_path}",
        f"--validation=imagenet={tmp_path}",
        "-o",
        str(tmp_path / "out"),
    ]
    for name in ("figure04", "shared-resolutions"):
        assert main(["experiment", name, "--scale=small", *options]) == 2
        assert "squares of 512 pixels are larger than the images of" in capsys.readouterr().err
