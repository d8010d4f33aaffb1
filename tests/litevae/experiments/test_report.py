import json

from litevae.environment import versions
from litevae.experiments.spec import Claim


def test_figures_stand_beside_the_papers_under_a_heading_with_the_scale(tmp_path, report, row):
    text = report([row("A", [20.0], {"psnr": 29.5, "rfid": 0.9}), row("B", [21.0])])
    assert text.startswith("# Table 7, small scale, not the paper's: a title\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == [
        "| Dataset | Model | ours: PSNR ↑ | paper: PSNR ↑ | paper: rFID ↓ |",
        "| --- | --- | --- | --- | --- |",
        "| set | A | 20.00 | 29.50 | 0.90 |",
        "| set | B | 21.00 |  |  |",
    ]
    assert "Trained for 100 steps of 8 crops of photographs/train, 64 pixels per side, one seed." in text
    assert "Measured on 28 squares of held-out images, not resized, 64 pixels per side" in text
    assert "12 s for this experiment" in text
    record = json.loads((tmp_path / "table07.json").read_text())
    assert record["rows"][0]["values"] == [{"psnr": 20.0}]
    assert record["rows"][0]["configurations"][0]["max_steps"] == 100


def test_the_settings_that_matter_are_stated(report, row):
    text = report([row("A", [20.0, 22.0])])
    assert "with 2 seeds (mean ± half the 95% confidence interval)" in text
    assert "Weights of the losses: l2 10, kl 1e-06. Precision auto; crops: native; " in text
    assert "EMA decay 0; learning rate 0.0005 (cosine), 10 steps of warm-up." in text
    # Standard deviation sqrt(2), standard error 1, Student's t 12.706.
    assert "| set | A | 21.00 ± 12.71 |" in text


def test_settings_that_the_experiment_itself_chooses_below_the_papers_scale_are_stated(report, row):
    rows = [row("A", [20.0]), row("A", [21.0]), row("B", [22.0])]
    rows[1].spec.row[0] = "other"
    rows[0].spec.reduced, rows[1].spec.reduced = ["seed=1"], ["seed=2", "max_steps=3"]
    expected = (
        "Set by this experiment below the paper's scale: data.flip=false (all rows); seed=1 (set, A); "
        "seed=2 max_steps=3 (other, A)."
    )
    assert expected in report(rows, reduced=["data.flip=false"])
    assert "Set by this experiment" not in report([row("B", [22.0])])


def test_the_versions_that_trained_the_models_are_stated_if_they_are_others(tmp_path, report, row):
    trained = row("A", [20.0, 21.0])
    for run in trained.trained:
        run.record["versions"] = versions()
    assert "Models were trained by" not in report([trained])
    trained.trained[1].record["versions"] = "litevae 0.0.1, torch 2.11"
    assert f" Models were trained by litevae 0.0.1, torch 2.11; {versions()}.\n" in report([trained])
    record = json.loads((tmp_path / "table07.json").read_text())
    assert record["rows"][0]["versions"] == [versions(), "litevae 0.0.1, torch 2.11"]


def test_an_error_bar_stands_beside_its_value(report, row):
    measured = row("A", [0.0, 0.0], {"sigma 25": 8.67, "± at 25": 0.1})
    measured.values = [{"sigma 25": 4.0, "± at 25": 1.0}, {"sigma 25": 6.0, "± at 25": 2.0}]
    text = report([measured], kind="mmd")
    assert "| Dataset | Model | ours: sigma 25 | paper: sigma 25 |" in text
    assert "| set | A | 5 ± 1.5 | 8.67 ± 0.1 |" in text
    assert "± of the distances is over groups of images instead of seeds." in text


def test_yardsticks_stand_below_the_table_and_mark_the_rows_below_the_last(report, row):
    rows = [row("A", [20.0, 21.0]), row("B", [25.0]), row("C", [18.0])]
    low = {"mean colour": {"psnr": 15.0}, "3 Haar coefficients per 8x8 block": {"psnr": 19.0}}
    high = {"mean colour": {"psnr": 15.0}, "12 Haar coefficients per 8x8 block": {"psnr": 22.0}}
    for each, yardsticks in zip(rows, (high, high, low), strict=True):
        each.yardsticks = yardsticks
    lines = [line for line in report(rows).splitlines() if line.startswith("|")]
    assert lines[2].startswith("| set | A | 20.50 ± 6.35, below the Haar yardstick |")
    assert lines[3:5] == ["| set | B | 25.00 |", "| set | C | 18.00, below the Haar yardstick |"]
    assert lines[5:] == [
        "| Yardstick | PSNR ↑ | for |",
        "| --- | --- | --- |",
        "| mean colour | 15.00 | all rows |",
        "| 12 Haar coefficients per 8x8 block | 22.00 | set, A; set, B |",
        "| 3 Haar coefficients per 8x8 block | 19.00 | set, C |",
    ]


def test_a_smoke_test_says_only_that_it_ran_and_how_long_it_took(report, row):
    claim = Claim(better="A", than="B", text="A helps.", metrics=["psnr"])
    text = report([row("A", [33.25, 34.25]), row("B", [32.0, 32.0])], [claim], scale="tiny", note="A note.")
    for absent in ("shows", "PSNR", "33", "A helps", "A note"):
        assert absent not in text.partition("; litevae")[0]
    assert "| set | A | 100 | 20 |" in text
    assert "| Dataset | Model | steps | seconds |" in text
    assert "12 s for this experiment" in text
