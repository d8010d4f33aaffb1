import re

import pytest

from litevae.cli import main


def test_preset(litevae):
    output = litevae("info", "litevae-b")
    assert re.search(r"encoder +6,753,252 +37\.84\n", output)
    assert re.search(r"decoder +49,490,179 ", output)
    assert "latent: 4 x 32 x 32, for an image of 3 x 256 x 256" in output


@pytest.mark.parametrize(
    ("settings", "parameters", "latent"),
    [
        ("aggregator=vit", 1_002_580, "4 x 8 x 8"),
        ("encoder_type=dwt,latent_channels=12", 0, "12 x 8 x 8"),
        ("block_out_channels=[16,32],num_groups=8", 515_828, "4 x 32 x 32"),
    ],
)
def test_settings_after_a_preset(litevae, settings, parameters, latent):
    output = litevae("info", f"litevae-s,{settings}", "--size", 64)
    assert re.search(rf"encoder +{parameters:,} ", output)
    assert f"latent: {latent}, for an image of 3 x 64 x 64" in output


def test_folder(litevae, model):
    assert "latent: 12 x 8 x 8, for an image of 3 x 64 x 64" in litevae("info", model, "--size", 64)


def test_sd_vae_has_the_published_size(capsys):
    assert main(["info", "sd-vae"]) == 0
    # 34,163,592 parameters, and 72 of the 1x1 convolution.
    assert re.search(r"encoder +34,163,664 +136\.36\n", capsys.readouterr().out)
