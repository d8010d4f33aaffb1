import pytest

from litevae.experiments.report import write_report
from litevae.experiments.spec import Experiment, RunSpec, Setup
from litevae.experiments.trained import Row, Trained
from litevae.training import load_config

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


@pytest.fixture(scope="session")
def own_text():
    """An experiment of two rows, as YAML."""
    return OWN


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return str(path)


@pytest.fixture
def no_pictures(monkeypatch):
    """Saves a run the seconds that Matplotlib takes."""
    for name in ("draw_curves", "draw_reconstructions"):
        monkeypatch.setattr(f"litevae.training.trainer.{name}", lambda *arguments: arguments[-1].touch())


def make_trained(seconds=10.0, steps=100, history=(), others=0.0):
    config = load_config("demo", [f"max_steps={steps}"])
    last = history[-1] if history else {}
    return Trained(
        config,
        {"seconds": seconds, "steps": steps, "validation": {"history": list(history), **last}},
        others,
    )


def make_row(name, psnrs, paper=None, runs=None):
    runs = runs or [make_trained() for _ in psnrs]
    return Row(RunSpec(row=["set", name], paper=paper or {}), runs, [{"psnr": value} for value in psnrs], 28)


def make_report(tmp_path, rows, claims=(), scale="small", **settings):
    experiment = Experiment(title="a title", columns=["Dataset", "Model"], claims=list(claims), **settings)
    path = write_report(
        "table07", experiment, Setup(scale, tmp_path, {"imagenet": "photographs/train"}), rows, [], 12.0
    )
    return path.read_text()


@pytest.fixture
def trained():
    """A function that makes up a complete training run."""
    return make_trained


@pytest.fixture
def row():
    """A function that makes up a measured row."""
    return make_row


@pytest.fixture
def report(tmp_path):
    """A function that writes the report of made-up rows and returns its text."""
    return lambda *arguments, **settings: make_report(tmp_path, *arguments, **settings)
