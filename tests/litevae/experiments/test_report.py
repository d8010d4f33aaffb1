import json


def test_figures_stand_beside_the_papers_under_a_heading_with_the_scale(tmp_path, report, row):
    text = report([row("A", [20.0], {"psnr": 29.5, "rfid": 0.9}), row("B", [21.0])])
    assert text.startswith("# Table 7, tiny scale, not the paper's: a title\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == [
        "| Dataset | Model | ours: PSNR ↑ | paper: PSNR ↑ | paper: rFID ↓ |",
        "| --- | --- | --- | --- | --- |",
        "| set | A | 20.00 | 29.50 | 0.90 |",
        "| set | B | 21.00 |  |  |",
    ]
    assert (
        "Trained for 100 steps of 4 crops of scikit-image's photographs, 64 pixels per side, one seed."
        in text
    )
    assert "Measured on 28 squares of a photograph that no model was trained on, 64 pixels per side" in text
    assert "12 s for this experiment" in text
    record = json.loads((tmp_path / "table07.json").read_text())
    assert record["rows"][0]["values"] == [{"psnr": 20.0}]
    assert record["rows"][0]["configurations"][0]["max_steps"] == 100
