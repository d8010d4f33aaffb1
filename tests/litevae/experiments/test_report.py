import json
from pathlib import Path

import pytest

from litevae.experiments.report import write_report
from litevae.experiments.runner import Row, Setup, Trained
from litevae.experiments.spec import Claim, Experiment, RunSpec
from litevae.training import load_config


def trained(seconds=10.0, steps=100, history=()):
    config = load_config("demo", [f"max_steps={steps}"])
    return Trained(config, {"seconds": seconds, "steps": steps, "validation": {"history": list(history)}})


def row(name, psnrs, paper=None, runs=None):
    runs = runs or [trained() for _ in psnrs]
    return Row(RunSpec(row=["set", name], paper=paper or {}), runs, [{"psnr": value} for value in psnrs])


def report(tmp_path, rows, claims=(), **settings):
    experiment = Experiment(title="a title", columns=["Dataset", "Model"], claims=list(claims), **settings)
    path = write_report("table07", experiment, Setup("tiny", tmp_path), rows, [], 12.0)
    return path.read_text()


def test_figures_stand_beside_the_papers_under_a_heading_with_the_scale(tmp_path):
    text = report(tmp_path, [row("A", [20.0], {"psnr": 29.5, "rfid": 0.9}), row("B", [21.0])])
    assert text.startswith("# Table 7, tiny scale, not the paper's: a title\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == [
        "| Dataset | Model | ours: PSNR ↑ | paper: PSNR ↑ | paper: rFID ↓ |",
        "| --- | --- | --- | --- | --- |",
        "| set | A | 20.00 | 29.50 | 0.90 |",
        "| set | B | 21.00 |  |  |",
    ]
    assert "100 steps" in text
    assert "12 s" in text
    record = json.loads((tmp_path / "table07.json").read_text())
    assert record["rows"][0]["values"] == [{"psnr": 20.0}]
    assert record["rows"][0]["configurations"][0]["max_steps"] == 100


@pytest.mark.parametrize(
    ("better", "than", "verdict"),
    [
        ([21.0], [20.0], "PSNR +1, shows (one seed)"),
        ([20.0], [21.0], "PSNR -1, does not show (one seed)"),
        # paired differences 1, 2, 3: mean 2, standard error 1/sqrt(3)
        ([21.0, 22.0, 23.0], [20.0, 20.0, 20.0], "PSNR +2 ± 0.58, shows"),
        ([19.0, 18.0, 17.0], [20.0, 20.0, 20.0], "PSNR -2 ± 0.58, does not show"),
        # 1, 2, -3: mean 0
        ([21.0, 22.0, 17.0], [20.0, 20.0, 20.0], "PSNR +0 ± 1.5, no difference that shows"),
    ],
)
def test_a_claim_shows_or_not(tmp_path, better, than, verdict):
    claim = Claim(better="A", than="B", text="A helps.", metrics=["psnr"])
    text = report(tmp_path, [row("A", better), row("B", than)], [claim])
    assert f"- A helps. {verdict}.\n" in text


def test_lower_is_better_for_distances(tmp_path):
    rows = [
        Row(RunSpec(row=["A"]), [trained()], [{"sigma 25": 1.0}]),
        Row(RunSpec(row=["B"]), [trained()], [{"sigma 25": 3.0}]),
    ]
    text = report(tmp_path, rows, [Claim(better="A", than="B", text="Closer.", metrics=["sigma 25"])])
    assert "- Closer. sigma 25 -2, shows (one seed).\n" in text


def test_a_metric_that_was_not_measured_decides_nothing(tmp_path):
    claim = Claim(better="A", than="B", text="A is real.", metrics=["rfid"])
    text = report(tmp_path, [row("A", [20.0]), row("B", [19.0])], [claim])
    assert "- A is real. Not measured at this scale.\n" in text


def test_at_equal_seconds_the_slower_run_counts_as_it_was_then(tmp_path):
    history = [{"step": step, "psnr": 10.0 + step / 10, "ssim": 0.5} for step in (25, 50, 75, 100)]
    slow, fast = trained(40.0, history=history), trained(24.0)  # 24 of its 40 s: 60 of its 100 steps
    claim = Claim(better="A", than="B", text="Sooner.", metrics=["psnr"], equal_seconds=True)
    text = report(tmp_path, [row("A", [18.0], runs=[fast]), row("B", [20.0], runs=[slow])], [claim])
    assert "- Sooner. PSNR +3, shows (one seed).\n" in text  # 18 against 15, that of step 50
    assert Path(tmp_path / "table07.md").exists()
