from dataclasses import replace

from litevae.experiments.trained import digest, finished
from litevae.training import load_config


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
