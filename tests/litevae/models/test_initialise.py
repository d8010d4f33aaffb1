import pytest
import torch

from litevae import LiteVAE
from litevae.models.build import with_fresh_weights
from litevae.models.config import ModelConfig
from litevae.models.initialise import (
    convolutions_outside_branches,
    initialise,
    mix_orthogonally,
)

SMALL = {
    "latent_channels": 12,
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "num_groups": 16,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_type": "wavelet"},
        {"decoder_norm": "smc"},
        {"use_1x1_conv": True},
        {"extractor": "nafnet"},
        {"aggregator": "vit", "sample_size": 64},
        {"shared_extractor": True, "finest_level": 2, "encoder_norm": "smc"},
    ],
    ids=str,
)
def test_encoder_starts_linear_at_the_scale_of_its_input(options):
    torch.manual_seed(0)
    model = LiteVAE.from_preset("litevae-s", **SMALL, **options)
    initialise(model)
    # The image is smooth, so that the coarse sub-bands contain all of it.
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, size=64, mode="bilinear")
    with torch.no_grad():
        posterior = model.encode(image).latent_dist
        half = model.encode(image / 2).latent_dist
        reconstruction = model.decode(posterior.mean).sample
    torch.testing.assert_close(half.mean, posterior.mean / 2)
    assert 0.1 < posterior.mean.std() / image.std() < 10
    assert (posterior.logvar + 8).abs().max() < 2
    assert 0.01 < reconstruction.std() < 10


@pytest.mark.parametrize(
    "options",
    [{}, {"extractor": "nafnet", "aggregator": "vit", "sample_size": 32}, {"encoder_norm": "smc"}],
    ids=str,
)
def test_every_parameter_learns_within_two_steps(options):
    torch.manual_seed(0)
    model = LiteVAE.from_preset("litevae-s", **SMALL, **options)
    initialise(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        posterior = model.encode(torch.rand(1, 3, 32, 32)).latent_dist
        (model.decode(posterior.sample()).sample.square().mean() + posterior.kl().mean()).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("use_1x1_conv", [True, False])
def test_the_baselines_start_alike(use_1x1_conv):
    torch.manual_seed(0)
    config = ModelConfig(
        kind="sd-vae",
        block_out_channels=[32, 32, 32],
        encoder_block_out_channels=[32, 64, 64],
        layers_per_block=1,
        num_groups=16,
        use_1x1_conv=use_1x1_conv,
    )
    model = with_fresh_weights(config, 32)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    before = model.encoder.conv_in(image)
    torch.testing.assert_close(
        model.encoder.down_blocks[0].resnets[0](before, None), before
    )  # the branch is zero
    with torch.no_grad():
        posterior = model.encode(image).latent_dist
        assert (posterior.logvar + 8).abs().max() < 2
        assert 0.01 < model.decode(posterior.mean).sample.std() < 10


def test_the_baselines_encoder_loses_only_what_its_channels_cannot_hold():
    """64 channels hold the 4 x 4 x 3 values of a block, but not the blocks of 8 x 8 pixels."""
    torch.manual_seed(0)
    config = ModelConfig(
        kind="sd-vae",
        block_out_channels=[32, 32, 32],
        encoder_block_out_channels=[32, 64, 64],
        layers_per_block=1,
        num_groups=16,
    )
    encoder = with_fresh_weights(config, 32).encoder
    first = convolutions_outside_branches(encoder)[:4]  # image, half, wider, quarter
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    values = image
    for conv in first:
        values = conv(torch.nn.functional.pad(values, (0, 1, 0, 1)) if conv.stride == (2, 2) else values)
    assert values.shape == (1, 64, 8, 8)
    # One position depends on its own 4 x 4 pixels, by a map of full rank.
    rows = [torch.autograd.grad(values[0, c, 3, 5], image, retain_graph=True)[0] for c in range(64)]
    jacobian = torch.stack(rows)[:, 0]
    own = jacobian[:, :, 12:16, 20:24].flatten(1)
    assert jacobian.count_nonzero() == own.count_nonzero()
    assert torch.linalg.matrix_rank(own) == 48


@pytest.mark.parametrize(("channels", "stride", "padding"), [((6, 4), 1, 1), ((4, 6), 1, 1), ((8, 8), 2, 0)])
def test_convolutions_outside_branches_are_delta_orthogonal(channels, stride, padding):
    conv = torch.nn.Conv2d(*channels, 3, stride, padding)
    with torch.no_grad():
        mix_orthogonally(conv)
    inputs = channels[0] * stride**2
    window = conv.weight[:, :, padding : padding + stride, padding : padding + stride].flatten(1)
    singular = torch.linalg.svdvals(window.double())
    assert conv.weight.count_nonzero() == window.count_nonzero()
    expected = max(1, channels[1] / inputs) ** 0.5
    torch.testing.assert_close(singular, torch.full_like(singular, expected), atol=1e-6, rtol=0)


def test_encoder_without_parameters():
    torch.manual_seed(0)
    model = LiteVAE.from_preset("litevae-s", **SMALL, encoder_type="dwt")
    initialise(model)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    assert 0.01 < model(image).sample.std() < 10
