"""Later stages are checked before a run begins."""

import pytest

from litevae.errors import UserError
from litevae.training import load_config, train


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
