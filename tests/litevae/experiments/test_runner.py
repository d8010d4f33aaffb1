import json

import numpy as np
import pytest
from PIL import Image
from skimage import data

import litevae.experiments.runner as runner_module
from litevae.cli import main
from litevae.experiments.run import run_experiment
from litevae.experiments.runner import Setup, Stopped, squares_folder
from litevae.training.trainer import Result

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = """
title: the test's own
config: imagenet-128-b
columns: [Losses]
settings: [model.preset=litevae-s]
runs:
  - row: [both]
    paper: {psnr: 29.73}
  - row: [without Gaussian]
    settings: [loss.gaussian=0]
claims:
  - {better: both, than: without Gaussian, text: It helps.}
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return str(path)


@pytest.fixture
def no_pictures(monkeypatch):
    """Spares a run the seconds that Matplotlib takes."""
    for name in ("draw_curves", "draw_reconstructions"):
        monkeypatch.setattr(f"litevae.training.trainer.{name}", lambda *arguments: arguments[-1].touch())


@pytest.mark.usefixtures("no_pictures")
def test_an_experiment_trains_measures_and_reports(tmp_path, own, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["experiment", own, "max_steps=2", "-o", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (out / "own.md").read_text() in printed
    record = json.loads((out / "own.json").read_text())
    assert record["overrides"] == ["max_steps=2"]
    values = [row["values"][0] for row in record["rows"]]
    assert all(set(each) == {"psnr", "ssim", "seconds"} for each in values)
    # as litevae eval measures the run's model on the same squares
    (run,) = {c["output_dir"] for c in record["rows"][0]["configurations"]}
    evaluation = tmp_path / "eval.json"
    squares = out / "images" / "held-out-32"
    options = ["--size", "32", "--metrics", "psnr,ssim", "--workers", "0", "-o", str(evaluation)]
    assert main(["eval", run, str(squares), *options]) == 0
    measured = json.loads(evaluation.read_text())
    assert measured["count"] == (300 // 32) * (451 // 32)
    for name in ("psnr", "ssim"):
        assert values[0][name] == pytest.approx(measured["metrics"][name], abs=1e-9)

    # nothing is trained twice, not by another experiment either
    monkeypatch.setattr(runner_module, "train", lambda config: pytest.fail("trained again"))
    (tmp_path / "another.yaml").write_text(OWN.replace("Losses", "Rows"))
    assert main(["experiment", str(tmp_path / "another.yaml"), "max_steps=2", "-o", str(out)]) == 0


def test_a_signal_stops_it_and_nothing_is_reported(tmp_path, own, monkeypatch, capsys):
    monkeypatch.setattr(
        runner_module, "train", lambda config: Result(tmp_path, 1, 1.0, None, None, stopped_by="SIGINT")
    )
    with pytest.raises(Stopped):
        run_experiment(own, Setup("tiny", tmp_path / "out"))
    assert main(["experiment", own, "-o", str(tmp_path / "out")]) == 0
    assert "stopped by SIGINT; the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "out" / "own.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "--scale huge: must be tiny or paper"),
        (
            ["--scale", "paper", "--metrics", "psnr"],
            "row 'both' needs images of imagenet: give --data imagenet=PATH",
        ),
        (["--scale", "paper", "--data", "imagenet"], "--data imagenet: write SET=PATH"),
        (["--metrics", "fsim"], "there is no metric 'fsim', only rfid, lpips, psnr, ssim"),
        (["data.sise=32"], "unknown setting 'data.sise': did you mean 'data.size'?"),
    ],
)
def test_mistakes_end_it_before_any_training(tmp_path, own, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(runner_module, "train", lambda config: pytest.fail("trained"))
    assert main(["experiment", own, *arguments, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_squares_are_cut_from_the_photographs_and_not_resized(tmp_path):
    folder = squares_folder(tmp_path, held_out=True, size=100)
    files = sorted(folder.iterdir())
    rows = [np.concatenate([np.asarray(Image.open(f)) for f in files[i : i + 4]], axis=1) for i in (0, 4, 8)]
    assert np.array_equal(np.concatenate(rows), data.chelsea()[:300, :400])
    others = list(squares_folder(tmp_path, held_out=False, size=64).iterdir())
    assert 200 < len(others) <= 256
    assert not any(file.name.startswith("chelsea") for file in others)
