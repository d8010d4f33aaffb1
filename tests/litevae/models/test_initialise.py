import numpy as np
import pytest
import pywt
import torch

from litevae import LiteVAE
from litevae.data.pixels import PixelFormat
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


LITEVAE = {"preset": "litevae-s", **SMALL, "block_out_channels": [32, 32, 32, 32], "num_groups": 8}
SD_VAE = {**LITEVAE, "kind": "sd-vae", "encoder_block_out_channels": [32, 64, 128, 256]}


@pytest.mark.parametrize("channels", [3, 1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decoder_norm": "smc"},
        {"decoder_norm": "smc", "num_groups": 16},
        {"output_type": "wavelet", "use_1x1_conv": True},
        {"latent_channels": 4, "shared_extractor": True},
        {"block_out_channels": [48, 48, 64, 128], "num_groups": 4},
        {"block_out_channels": [32, 32, 64, 64], "num_groups": 2},
        {"block_out_channels": [16, 16, 16, 16], "decoder_norm": "smc"},
        {"latent_channels": 24, "finest_level": 2, "encoder_norm": "smc"},
        SD_VAE,
        {
            **SD_VAE,
            "use_1x1_conv": True,
            "encoder_block_out_channels": [32, 32, 32, 128],
            "latent_channels": 4,
        },
        {**SD_VAE, "encoder_block_out_channels": [], "block_out_channels": [64, 64, 128, 128]},
        {**SD_VAE, "latent_channels": 24},
    ],
    ids=str,
)
def test_the_latent_starts_as_the_coarsest_sub_bands(settings, channels):
    torch.manual_seed(0)
    pixel_format = PixelFormat(channels=channels)
    model = with_fresh_weights(ModelConfig(**{**LITEVAE, **settings}), 64, True, pixel_format)
    image = torch.rand(1, channels, 64, 64, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        posterior = model.encode(image.float()).latent_dist
        reconstruction = model.decode(posterior.mean).sample
    means, details = pywt.wavedec2(image.numpy(), "haar", level=3)[:2]
    bands = np.concatenate([means, *details], axis=1) / 2**3  # the pyramid's scale
    count = min(4 * channels, model.config.latent_channels)
    # The norms keep a share of the signals' strength: at most 1/2 * 0.15^2 / 8, since the bands are below 0.15 here.
    norms = 0.002 if settings.get("decoder_norm") != "smc" else 0
    np.testing.assert_allclose(posterior.mean[:, :count], bands[:, :count], atol=1e-5, rtol=norms)
    assert (posterior.logvar + 8).abs().max() < 1
    block_means = torch.nn.functional.interpolate(torch.from_numpy(means / 8).float(), scale_factor=8.0)
    torch.testing.assert_close(reconstruction, block_means, atol=1e-5, rtol=2 * norms)


def test_a_group_norm_hardly_changes_the_scale_of_bright_images():
    """A white image has the largest signals."""
    torch.manual_seed(0)
    model = with_fresh_weights(ModelConfig(**SD_VAE), 64, wavelet=True)
    white = torch.ones(1, 3, 64, 64)
    with torch.no_grad():
        means = model.encode(white).latent_dist.mean[:, :3]
        assert (means - 1).abs().max() < 0.04
        assert (model.decode(means.new_zeros(1, 12, 8, 8)).sample).abs().max() < 1e-5
        assert (model.decode(model.encode(white).latent_dist.mean).sample - 1).abs().max() < 0.07


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extractor": "nafnet"}, "U-Nets in the encoder, got NAFNet"),
        ({"aggregator": "vit"}, "U-Nets in the encoder, got ViT"),
        ({"encoder_type": "dwt"}, "an encoder that learns, got WaveletEncoder"),
        ({"num_groups": 16}, "4 channels or more per group in the decoder's last norm, got 2"),
        (
            {**SD_VAE, "encoder_block_out_channels": [32, 64, 64, 64]},
            "4 .* group in the encoder's last norm, got 2",
        ),
        (
            {**SD_VAE, "encoder_block_out_channels": [32, 32, 32, 128]},
            "48 channels .* encoder, got 32",
        ),
        (
            {"block_out_channels": [5, 32, 32, 32], "decoder_norm": "smc"},
            "6 channels .* decoder, got 5",
        ),
        ({"latent_channels": 2}, "3 latent channels or more, got 2"),
    ],
    ids=str,
)
def test_models_that_cannot_start_as_sub_bands_are_refused(settings, message):
    config = ModelConfig(**{**LITEVAE, "num_groups": 1, **settings})
    with pytest.raises(ValueError, match=f"^initialise=wavelet needs {message}"), torch.device("meta"):
        with_fresh_weights(config, 64, wavelet=True)
