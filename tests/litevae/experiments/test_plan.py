import pytest

import litevae.experiments.trained as trained_module
from litevae.cli import main
from litevae.experiments.plan import diffusion_config
from litevae.experiments.spec import Setup, load_experiment

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "--scale huge: must be one of paper, small, tiny"),
        (
            ["--scale", "paper", "--metrics", "psnr"],
            "row 'both' needs images of imagenet: give --data imagenet=PATH",
        ),
        (["--scale", "paper", "--data", "imagenet"], "--data imagenet: write SET=PATH"),
        (
            ["--scale", "paper", "--data", "imagnet=/x"],
            "--data imagnet=...: this experiment's data sets are imagenet",
        ),
        (["--data", "imagenet=/x"], "--data and --validation are for the scales small and paper"),
        (
            ["--row", "neither"],
            "--row 'neither': no row has this cell: choose from 'both', 'without Gaussian'",
        ),
        (["--scale", "small"], "row 'both' needs images of imagenet: give --data imagenet=PATH"),
        (["--metrics", "fsim"], "unknown metric 'fsim': choose from rfid, lpips, st_lpips, psnr, ssim"),
        (
            ["--metrics", "st_lpips", "data.size=16"],
            "row 'both': st_lpips needs images of at least 21 pixels a side, got 16",
        ),
        (
            ["loss.st_lpips=1", "data.size=16"],
            "row 'both': data.size must be 21 or more for loss.st_lpips, got 16",
        ),
        (["data.sise=32"], "unknown setting 'data.sise': did you mean 'data.size'?"),
        (["data.size=36"], "row 'both': data.size must be a multiple of 8"),
        (["initialise=wavelet"], "row 'both': initialise=wavelet needs 4 channels or more per group"),
        (["seed=3"], "seed=3: the experiment sets this itself"),
        (["diffusion.max_steps=3"], "diffusion.max_steps=3: this experiment has no second stage"),
        (
            ["loss.adversarial=0.1", "max_steps=5"],
            "row 'both': max_steps=5 ends before step 201, at which the row changes",
        ),
    ],
)
def test_mistakes_end_it_before_any_training(tmp_path, own, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(trained_module, "train", lambda config: pytest.fail("trained"))
    assert main(["experiment", own, *arguments, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("table03", ["max_steps=5"], "max_steps=5: this experiment trains nothing"),
        ("figure05", ["--seeds", "3"], "--seeds 3: this experiment shows one model per row"),
        ("table06", ["--metrics", "psnr"], "--metrics: this experiment has its own metrics"),
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


@pytest.mark.parametrize(
    ("row", "batch", "rate", "sampler"),
    [(0, 42, 8.4e-5, "ddpm"), (1, 42, 8.4e-5, "ddpm"), (2, 48, 9.6e-5, "ddim"), (3, 48, 9.6e-5, "ddim")],
)
def test_each_data_set_of_table_7_has_ldms_own_settings(tmp_path, row, batch, rate, sampler):
    experiment = load_experiment("table07")
    config = diffusion_config(
        experiment, Setup("paper", tmp_path), experiment.runs[row], tmp_path, "latents", "images"
    )
    assert (config.data.batch_size, config.optimizer.learning_rate) == (batch, rate)
    assert config.noise.sampler == sampler
