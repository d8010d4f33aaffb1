"""Later stages are checked before a run begins, and epochs become steps."""

import json

import pytest

from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.training import load_config, train
from litevae.training.optimization import learning_rate_factor


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["discriminator.kind=patchgan", "stages=[{start: 3, size: 16}]"], "at least 24"),
        (["discriminator.kind=stylegan", "data.size=64", "stages=[{start: 3, size: 40}]"], "multiples of 16"),
    ],
)
def test_a_later_stage_that_the_discriminator_does_not_take_is_refused(tmp_path, overrides, message):
    config = load_config(
        "demo",
        [
            "data.size=32",
            "data.batch_size=2",
            "max_steps=4",
            "loss.adversarial=0.1",
            "discriminator.width=S",
            f"output_dir={tmp_path}",
            *overrides,
        ],
    )
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_by_epochs_ends_after_them(tiny, no_pictures):
    config = tiny("max_epochs=1", "max_steps=1", "optimizer.schedule=cosine")
    images = len(open_images(config.data.train))
    result = train(config)
    assert result.steps == -(-images // 2)
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    factors = [learning_rate_factor(config.optimizer, done, result.steps) for done in range(result.steps)]
    rates = [config.optimizer.learning_rate * factor for factor in factors]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    saved = load_config(str(result.output_dir / "config.yaml"))
    assert (saved.max_epochs, saved.max_steps) == (1, result.steps)
