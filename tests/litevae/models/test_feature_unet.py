import pytest
import torch

from litevae.models.feature_unet import FeatureUNet


def test_aggregator_has_the_papers_size():
    """Table 20: a U-Net aggregator of LiteVAE-B has 1.69 M parameters."""
    unet = FeatureUNet(36, 8, channels=32, multipliers=(1, 2, 3), num_groups=32)
    assert f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f}" == "1.69"


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 16)])
def test_keeps_the_size_of_its_input(size):
    unet = FeatureUNet(6, 5, channels=4, multipliers=(1, 3), num_groups=2)
    assert unet(torch.randn(2, 6, *size)).shape == (2, 5, *size)


def test_two_blocks_per_level_and_direction_and_two_in_the_middle():
    unet = FeatureUNet(6, 5, channels=4, multipliers=(1, 2, 4), num_groups=2)
    down = [block.conv1.out_channels for block in unet.encoder_blocks]
    up = [(block.conv1.in_channels, block.conv1.out_channels) for block in unet.decoder_blocks]
    assert down == [4, 4, 8, 8, 16, 16]
    assert up == [(16 + 16, 16), (16 + 16, 16), (16 + 8, 8), (8 + 8, 8), (8 + 4, 4), (4 + 4, 4)]
    assert [block.conv1.out_channels for block in unet.mid_block.resnets] == [16, 16]


def test_every_parameter_gets_a_gradient():
    unet = FeatureUNet(6, 5, channels=4, multipliers=(1, 2), num_groups=2)
    unet(torch.randn(2, 6, 4, 4)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in unet.parameters())
