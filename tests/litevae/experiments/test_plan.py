import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from skimage import data

import litevae.experiments.plan as runner_module
from litevae.cli import main
from litevae.experiments.demo_images import squares_folder
from litevae.experiments.run import run_experiment
from litevae.experiments.spec import Setup
from litevae.experiments.trained import Stopped, digest, finished
from litevae.training import load_config
from litevae.training.trainer import TrainingResult

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
    cut = runner_module.cut
    monkeypatch.setattr(runner_module, "cut", lambda image, size: cut(image, size)[:5])  # is quicker
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
    assert measured["count"] == record["rows"][0]["images"] == 5
    for name in ("psnr", "ssim"):
        assert values[0][name] == pytest.approx(measured["metrics"][name], abs=1e-9)

    # nothing is trained twice, not by another experiment either
    monkeypatch.setattr(runner_module, "train", lambda config: pytest.fail("trained again"))
    (tmp_path / "another.yaml").write_text(OWN.replace("Losses", "Rows"))
    assert main(["experiment", str(tmp_path / "another.yaml"), "max_steps=2", "-o", str(out)]) == 0


def test_a_signal_stops_it_and_nothing_is_reported(tmp_path, own, monkeypatch, capsys):
    monkeypatch.setattr(
        runner_module,
        "train",
        lambda config: TrainingResult(tmp_path, 1, 1.0, None, None, stopped_by="SIGINT"),
    )
    with pytest.raises(Stopped):
        run_experiment(own, Setup("tiny", tmp_path / "out"))
    assert main(["experiment", own, "-o", str(tmp_path / "out")]) == 0
    assert "stopped by SIGINT: the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "out" / "own.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "--scale huge: must be one of paper, medium, tiny"),
        (
            ["--scale", "paper", "--metrics", "psnr"],
            "row 'both' needs images of imagenet: give --data imagenet=PATH",
        ),
        (["--scale", "paper", "--data", "imagenet"], "--data imagenet: write SET=PATH"),
        (
            ["--scale", "paper", "--data", "imagnet=/x"],
            "--data imagnet=...: this experiment's data sets are imagenet",
        ),
        (["--data", "imagenet=/x"], "--data and --validation are for --scale paper"),
        (["--metrics", "fsim"], "unknown metric 'fsim': choose from rfid, lpips, psnr, ssim"),
        (["data.sise=32"], "unknown setting 'data.sise': did you mean 'data.size'?"),
        (["data.size=36"], "row 'both': size must be a multiple of 8"),
        (["seed=3"], "seed=3: the experiment sets this itself"),
        (["diffusion.max_steps=3"], "diffusion.max_steps=3: this experiment has no second stage"),
        (
            ["loss.adversarial=0.1", "max_steps=5"],
            "row 'both': max_steps=5 ends before step 101, at which the row changes",
        ),
    ],
)
def test_mistakes_end_it_before_any_training(tmp_path, own, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(runner_module, "train", lambda config: pytest.fail("trained"))
    assert main(["experiment", own, *arguments, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("table03", ["max_steps=5"], "max_steps=5: this experiment trains nothing"),
        ("figure05", ["--seeds", "3"], "--seeds 3: this experiment shows one model a row"),
        ("table06", ["--metrics", "psnr"], "--metrics: this experiment has its own"),
        ("table05", ["max_steps=150"], "row '128-tuned': max_steps=150 ends before step 201"),
        (
            "table13",
            ["diffusion.noise.kind=ddmp"],
            "diffusion.noise.kind=ddmp: noise.kind must be edm or ddpm",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, capsys, name, arguments, message):
    assert main(["experiment", name, *arguments, "-o", str(tmp_path)]) == 2
    assert message.removeprefix("diffusion.") in capsys.readouterr().err


def test_a_run_that_stopped_is_not_taken_for_finished(tmp_path):
    path = tmp_path / "metrics.json"
    assert finished(str(tmp_path)) is None
    path.write_text('{"complete": false, "steps": 2, "skipped_steps": 3}')
    assert finished(str(tmp_path)) is None
    path.write_text('{"complete": true, "steps": 2}')
    assert finished(str(tmp_path))["steps"] == 2


def test_runs_are_shared_by_what_decides_their_outcome(tmp_path):
    config = load_config("demo")
    same = replace(config, output_dir="elsewhere", tracker="wandb", data=replace(config.data, workers=7))
    assert digest(config) == digest(same)
    for other in ("seed=1", "loss.kl=0.1", "model.latent_channels=4", "validate_every=3"):
        assert digest(load_config("demo", [other])) != digest(config)


def test_squares_are_cut_from_the_photographs_and_not_resized(tmp_path):
    folder = squares_folder(tmp_path, held_out=True, size=100)
    files = sorted(folder.iterdir())
    rows = [np.concatenate([np.asarray(Image.open(f)) for f in files[i : i + 4]], axis=1) for i in (0, 4, 8)]
    assert np.array_equal(np.concatenate(rows), data.chelsea()[:300, :400])
    others = list(squares_folder(tmp_path, held_out=False, size=64).iterdir())
    assert 200 < len(others) <= 256
    assert not any(file.name.startswith("chelsea") for file in others)
