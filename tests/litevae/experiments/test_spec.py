import re
from pathlib import Path

import pytest
import torch

from litevae.errors import UserError
from litevae.experiments.spec import (
    SCALES,
    load_experiment,
    measured_size,
    measured_sizes,
    shipped_experiments,
    training_config,
)
from litevae.experiments.trained import digest
from litevae.models.build import with_fresh_weights

NAMES = ["initialise", "kl", "shared-resolutions"]
NAMES += [f"figure{n:02}" for n in range(2, 10)] + [f"table{n:02}" for n in range(1, 23)]


def test_every_table_and_figure_is_there():
    # Figure 1 is a diagram; Tables 23 and 24 define the presets. The other three are not tables of the paper.
    assert shipped_experiments() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_valid_settings_at_all_scales(name):
    experiment = load_experiment(name)
    assert experiment.title
    for run in experiment.runs:
        if experiment.kind == "complexity":
            assert run.model
            continue
        paper, tiny = (training_config(experiment, run, SCALES[scale]) for scale in ("paper", "tiny"))
        assert tiny.data.size * 4 == paper.data.size
        assert measured_size(tiny, run, SCALES["tiny"]) * 4 == measured_size(paper, run, SCALES["paper"])
        assert tiny.max_steps == paper.max_steps * 2 // 1000
        # The rows of a table differ in the same settings at both scales.
        for key in ("kind", "preset", "latent_channels", "decoder_norm", "encoder_type", "extractor"):
            assert getattr(tiny.model, key) == getattr(paper.model, key)
        assert [stage.start for stage in tiny.stages] == [
            (stage.start - 1) * 2 // 1000 + 1 for stage in paper.stages
        ]
        assert tiny.data.train == "demo"
        assert tiny.loss.lpips == 0 or not tiny.loss.pretrained  # no download is needed


@pytest.mark.parametrize("name", [name for name in NAMES if name != "kl"])
def test_all_models_train_with_ldms_kl_weight_and_a_discriminator_from_mid_run(name):
    experiment = load_experiment(name)
    for run in experiment.runs if experiment.kind != "complexity" else []:
        config = training_config(experiment, run, SCALES["paper"])
        factor = 2 ** (len(config.model.block_out_channels) - 1)
        learned = config.model.encoder_type == "learned"
        expected = 1e-6 * config.model.latent_channels / (3 * factor**2) * learned
        assert config.loss.kl == pytest.approx(expected, rel=1e-3)
        middle = (
            100_001 if config.max_steps == 150_000 else config.max_steps // 2 + 1
        )  # Table 5's second stage
        assert config.loss.adversarial_start == middle


def test_resolutions_are_those_at_which_ssim_means_something():
    assert measured_sizes(load_experiment("figure05"), SCALES["tiny"]) == [32, 64, 128]
    assert measured_sizes(load_experiment("figure05"), SCALES["paper"]) == [64, 128, 256, 512]


def test_no_two_figures_show_the_same_generated_images():
    shown = []
    for name in NAMES:
        experiment = load_experiment(name)
        if experiment.kind == "generation" and "fid" not in experiment.metrics:
            models = [training_config(experiment, run, SCALES["tiny"]) for run in experiment.runs]
            shown += [(experiment.first_sample, digest(model, Path())) for model in models]
    assert len(shown) == len(set(shown)) == 2  # Figures 6 and 9


def test_figures_five_and_eight_claim_all_metrics():
    for name in ("figure05", "figure08"):
        experiment = load_experiment(name)
        (claim,) = experiment.claims
        assert claim.metrics == [f"worst {metric} degradation (%)" for metric in experiment.metrics]


@pytest.mark.parametrize("row", ["VAE", "LiteVAE-S", "LiteVAE-B", "VAE-Small"])
def test_encoders_are_whole_at_the_tiny_scale(row):
    experiment = load_experiment("table02")
    run = next(run for run in experiment.runs if run.name == row)
    counts = []
    for scale in ("paper", "tiny"):
        config = training_config(experiment, run, SCALES[scale])
        with torch.device("meta"):
            model = with_fresh_weights(config.model, config.data.size)
        counts.append(sum(p.numel() for p in model.encoder.parameters()))
    assert counts[0] == counts[1]
    assert counts[0] == pytest.approx(run.paper["parameters (M)"] * 1e6, rel=0.011)


def test_the_tuned_model_trains_on_both_sizes():
    experiment = load_experiment("table05")
    full, _, tuned = (training_config(experiment, run, SCALES["tiny"]) for run in experiment.runs)
    assert (full.data.size, full.stages, full.max_steps) == (64, [], 300)
    assert (tuned.data.size, tuned.stages[0].start, tuned.stages[0].size) == (32, 201, 64)


def test_overrides_come_last():
    experiment = load_experiment("table09")
    overrides = ["max_steps=7", "data.size=48"]
    config = training_config(experiment, experiment.runs[0], SCALES["tiny"], overrides, seed=3)
    assert (config.max_steps, config.data.size, config.seed) == (7, 48, 3)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(
        UserError, match=re.escape("no configuration named 'tabel09': did you mean 'table09'?")
    ):
        load_experiment("tabel09")
    path = tmp_path / "own.yaml"
    for text, message in (
        ("title: mine", "an experiment needs runs"),
        ("titel: mine", "unknown setting 'titel': did you mean 'title'"),
        ("runs: [{row: [A, B]}]", "row ['A', 'B'] must have a cell for each of columns ['Model']"),
        (
            "{runs: [{row: [A]}], claims: [{better: A, than: B, text: It helps.}]}",
            "claim 'It helps.' is about 'B', and no row has this name",
        ),
        (
            "{runs: [{row: [A]}], claims: [{better: A, than: A, text: Same., metrics: [GMACs], at_least: true}]}",
            "claim 'Same.': at_least needs a margin, and GMACs has none; allowed: rfid, lpips, psnr, ssim, fid",
        ),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=re.escape(message)):
            load_experiment(str(path))
