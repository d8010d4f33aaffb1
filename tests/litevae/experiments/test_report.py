import json

import pytest

from litevae.experiments.report import write_report
from litevae.experiments.spec import Claim, Experiment, RunSpec, Setup
from litevae.experiments.trained import Row, Trained
from litevae.training import load_config


def trained(seconds=10.0, steps=100, history=()):
    config = load_config("demo", [f"max_steps={steps}"])
    last = history[-1] if history else {}
    return Trained(
        config, {"seconds": seconds, "steps": steps, "validation": {"history": list(history), **last}}
    )


def row(name, psnrs, paper=None, runs=None):
    runs = runs or [trained() for _ in psnrs]
    return Row(RunSpec(row=["set", name], paper=paper or {}), runs, [{"psnr": value} for value in psnrs], 28)


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
    assert (
        "Trained for 100 steps of 4 crops of scikit-image's photographs, 64 pixels a side, one seed." in text
    )
    assert "Measured on 28 squares of a photograph that no model was trained on, 64 pixels a side" in text
    assert "12 s for this experiment" in text
    record = json.loads((tmp_path / "table07.json").read_text())
    assert record["rows"][0]["values"] == [{"psnr": 20.0}]
    assert record["rows"][0]["configurations"][0]["max_steps"] == 100


@pytest.mark.parametrize(
    ("better", "than", "verdict"),
    [
        ([21.0], [20.0], "PSNR +1, shows (one seed)"),
        ([20.0], [21.0], "PSNR -1, does not show (one seed)"),
        # paired differences 1, 2, 3: mean 2, standard error 1/sqrt(3), times Student's 4.303: 2.48
        ([21.0, 22.0, 23.0], [20.0, 20.0, 20.0], "PSNR +2 ± 2.5, no difference that shows"),
        # 3, 4, 5: mean 4
        ([23.0, 24.0, 25.0], [20.0, 20.0, 20.0], "PSNR +4 ± 2.5, shows"),
        ([17.0, 16.0, 15.0], [20.0, 20.0, 20.0], "PSNR -4 ± 2.5, does not show"),
    ],
)
def test_a_claim_shows_or_not(tmp_path, better, than, verdict):
    claim = Claim(better="A", than="B", text="A helps.", metrics=["psnr"])
    text = report(tmp_path, [row("A", better), row("B", than)], [claim])
    assert f"- A helps. {verdict}.\n" in text


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        ([20.0], "PSNR +0, shows (one seed)"),
        ([19.0], "PSNR -1, does not show (one seed)"),
        ([19.0, 18.0, 17.0], "PSNR -2 ± 2.5, shows"),  # not told apart
        ([15.0, 16.0, 17.0], "PSNR -4 ± 2.5, does not show"),
    ],
)
def test_a_claim_to_be_as_good_shows_unless_it_is_worse(tmp_path, better, verdict):
    claim = Claim(better="A", than="B", text="As good.", metrics=["psnr"], at_least=True)
    text = report(tmp_path, [row("A", better), row("B", [20.0] * len(better))], [claim])
    assert f"- As good. {verdict}." in text


def test_lower_is_better_for_distances(tmp_path):
    rows = [
        Row(RunSpec(row=["A"]), [trained()], [{"sigma 25": 1.0}], 28),
        Row(RunSpec(row=["B"]), [trained()], [{"sigma 25": 3.0}], 28),
    ]
    text = report(tmp_path, rows, [Claim(better="A", than="B", text="Closer.", metrics=["sigma 25"])])
    assert "- Closer. sigma 25 -2, shows (one seed).\n" in text


def test_a_metric_that_was_not_measured_decides_nothing(tmp_path):
    claim = Claim(better="A", than="B", text="A is real.", metrics=["rfid"])
    text = report(tmp_path, [row("A", [20.0]), row("B", [19.0])], [claim])
    assert "- A is real. Not measured at this scale.\n" in text


def test_at_equal_seconds_the_slower_run_counts_as_it_was_then(tmp_path):
    history = [
        {"step": step, "psnr": 10.0 + step / 10, "ssim": 0.5, "seconds": 0.4 * step}
        for step in (25, 50, 75, 100)
    ]
    slow = trained(40.0, history=history)
    fast = trained(24.0, history=[{"step": 100, "psnr": 18.0, "ssim": 0.5, "seconds": 24.0}])
    claim = Claim(better="A", than="B", text="Sooner.", metrics=["psnr"], equal_seconds=True, ours=True)
    rows = [row("A", [18.5], runs=[fast]), row("B", [20.0], runs=[slow])]
    text = report(tmp_path, rows, [claim])
    # 18 against 15, that of step 50, after 20 of its 40 s
    assert "Not in the paper:\n\n- Sooner. PSNR +3, shows (one seed); B after 50 of its steps.\n" in text
    assert "What the paper says" not in text
    rows[0].trained[0] = trained(9.0, history=[{"step": 100, "psnr": 18.0, "seconds": 9.0}])
    assert "- Sooner. B was not validated that early.\n" in report(tmp_path, rows, [claim])
