import re

import pytest

from litevae.errors import UserError
from litevae.experiments.report import find
from litevae.experiments.runner import Row
from litevae.experiments.spec import load_experiment, measured_size, shipped_experiments, training_config

NAMES = [f"figure{n:02}" for n in range(2, 10)] + [f"table{n:02}" for n in range(1, 23)]


def test_every_table_and_figure_is_there():
    # Figure 1 is a diagram, Tables 23 and 24 are the presets
    assert shipped_experiments() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_valid_settings_at_both_scales(name):
    experiment = load_experiment(name)
    assert experiment.title
    for run in experiment.runs:
        assert len(run.row) == len(experiment.columns)
        if experiment.kind == "complexity":
            assert run.model
            continue
        paper, tiny = (training_config(experiment, run, scale) for scale in ("paper", "tiny"))
        assert tiny.data.size * 4 == paper.data.size
        assert measured_size(tiny, run, "tiny") * 4 == measured_size(paper, run, "paper")
        assert tiny.max_steps == paper.max_steps * 3 // 1000
        # the rows of a table differ in the same things at both scales
        assert tiny.model.latent_channels == paper.model.latent_channels
        assert tiny.model.preset == paper.model.preset
        assert [stage.start for stage in tiny.stages] == [
            (stage.start - 1) * 3 // 1000 + 1 for stage in paper.stages
        ]
        assert tiny.data.train == "demo"
        assert tiny.loss.lpips == 0 or not tiny.loss.pretrained  # needs no download


@pytest.mark.parametrize("name", NAMES)
def test_claims_name_rows(name):
    experiment = load_experiment(name)
    rows = [Row(run, []) for run in experiment.runs]
    for claim in experiment.claims:
        better, than = (find(rows, row, claim.among) for row in (claim.better, claim.than))
        assert better is not than
        assert claim.text.endswith(".")


def test_the_tuned_model_trains_on_both_sizes():
    experiment = load_experiment("table05")
    full, _, tuned = (training_config(experiment, run, "tiny") for run in experiment.runs)
    assert (full.data.size, full.stages, full.max_steps) == (64, [], 450)
    assert (tuned.data.size, tuned.stages[0].start, tuned.stages[0].size) == (32, 301, 64)


def test_overrides_come_last():
    experiment = load_experiment("table09")
    config = training_config(experiment, experiment.runs[0], "tiny", ["max_steps=7", "data.size=48"], seed=3)
    assert (config.max_steps, config.data.size, config.seed) == (7, 48, 3)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(
        UserError, match=re.escape("no configuration named 'tabel09': did you mean 'table09'?")
    ):
        load_experiment("tabel09")
    path = tmp_path / "own.yaml"
    path.write_text("title: mine\n")
    with pytest.raises(UserError, match="an experiment needs runs"):
        load_experiment(str(path))
    path.write_text("titel: mine\n")
    with pytest.raises(UserError, match="unknown setting 'titel': did you mean 'title'"):
        load_experiment(str(path))
