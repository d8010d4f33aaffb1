"""All experiments at the tiny scale, which take half an hour on two cores: pytest -m slow."""

import json

import pytest

from litevae.cli import main
from litevae.experiments.spec import load_experiment, shipped_experiments

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The output folder of all experiments, so that no model is trained twice."""
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.parametrize("name", shipped_experiments())
def test_leaves_a_table(output, name):
    assert main(["experiment", name, "-o", str(output)]) == 0
    experiment, text = load_experiment(name), (output / f"{name}.md").read_text()
    assert "tiny scale, not the paper's" in text.splitlines()[0]
    for run in experiment.runs:
        assert f"| {' | '.join(run.row)} |" in text
    assert "A smoke test" in text
    for word in ("shows", "PSNR", "paper:"):
        assert word not in text
    for row in json.loads((output / f"{name}.json").read_text())["rows"]:
        assert row["values"]
    if name.startswith("figure"):
        assert list(output.glob(f"{name}*.png"))
