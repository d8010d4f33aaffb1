"""Generated config.json of every kind of model."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from litevae import LiteVAE
from litevae.models.baseline import SmallEncoderVAE

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def build(kind):
    if kind == "LiteVAE":
        return LiteVAE.from_preset(
            "litevae-s", block_out_channels=(16, 16), layers_per_block=1, num_groups=4, sample_size=32
        )
    if kind == "AutoencoderKL":
        return AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=4, sample_size=32, **BLOCKS)
    return SmallEncoderVAE((32, 32), block_out_channels=(16, 16), norm_num_groups=4, sample_size=32)


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "long"])
@pytest.mark.parametrize("kind", ["LiteVAE", "AutoencoderKL", "SmallEncoderVAE"])
def test_any_config(explore, command, broken_json, tmp_path, one_thread, kind, long):
    torch.manual_seed(0)
    build(kind).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"

    def check(content):
        config.write_bytes(content)
        command("info", "model", "--size", "32")

    explore(broken_json(json.loads(config.read_text())), check, 25, long)
