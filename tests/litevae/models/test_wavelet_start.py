import numpy as np
import pytest
import pywt
import torch

from litevae.data.pixels import PixelFormat
from litevae.models.build import with_fresh_weights
from litevae.models.config import ModelConfig

LITEVAE = {
    "preset": "litevae-s",
    "latent_channels": 12,
    "block_out_channels": [32, 32, 32, 32],
    "layers_per_block": 1,
    "num_groups": 8,
}
SD_VAE = {**LITEVAE, "kind": "sd-vae", "encoder_block_out_channels": [32, 64, 128, 256]}


@pytest.mark.parametrize("channels", [3, 1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decoder_norm": "smc"},
        {"decoder_norm": "smc", "num_groups": 16},
        {"decoder_norm": "none"},
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
    # Beside constants of 4, a signal of mean square m scales the variance by 1 + m / 16: its scale loses m / 32.
    lost = np.square(bands).mean(axis=(0, 2, 3)).max() / 32
    encoders = settings.get("kind") == "sd-vae"  # LiteVAE's encoder ends without a norm
    decoders = settings.get("decoder_norm", "group") == "group"
    latent = posterior.mean
    np.testing.assert_allclose(latent[:, :count], bands[:, :count], atol=1e-5, rtol=lost * encoders)
    assert (posterior.logvar + 8).abs().max() < 1
    block_means = torch.nn.functional.interpolate(torch.from_numpy(means / 8).float(), scale_factor=8.0)
    torch.testing.assert_close(reconstruction, block_means, atol=1e-5, rtol=lost * (encoders + decoders))


def test_a_white_image_keeps_its_scale_within_a_few_percent():
    torch.manual_seed(0)
    model = with_fresh_weights(ModelConfig(**SD_VAE), 64, wavelet=True)
    white = torch.ones(1, 3, 64, 64)
    with torch.no_grad():
        latent = model.encode(white).latent_dist.mean
        assert (latent[:, :3] - 1).abs().max() < 1 / 32
        assert (model.decode(latent).sample - 1).abs().max() < 2 / 32
        assert model.decode(torch.zeros_like(latent)).sample.abs().max() < 1e-5


@pytest.mark.parametrize("settings", [{}, SD_VAE], ids=["litevae", "sd-vae"])
def test_every_parameter_learns_within_three_steps(settings):
    torch.manual_seed(0)
    model = with_fresh_weights(ModelConfig(**{**LITEVAE, **settings}), 64, wavelet=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for _ in range(4):
        optimizer.zero_grad()
        posterior = model.encode(torch.rand(1, 3, 64, 64)).latent_dist
        (model.decode(posterior.sample()).sample.square().mean() + posterior.kl().mean()).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extractor": "nafnet"}, "U-Nets in the encoder, got NAFNet"),
        ({"aggregator": "vit"}, "U-Nets in the encoder, got ViT"),
        ({"encoder_type": "dwt"}, "an encoder with U-Nets or strided convolutions, got WaveletEncoder"),
        ({"num_groups": 16}, "4 channels or more per group in the last norm of the decoder, got 2: lower"),
        (
            {**SD_VAE, "encoder_block_out_channels": [32, 64, 64, 64]},
            "4 .* group in the last norm of the encoder .* got 2",
        ),
        (
            {**SD_VAE, "encoder_block_out_channels": [32, 32, 32, 128]},
            "48 channels or more .* encoder after its last strided convolution, got 32",
        ),
        (
            {"block_out_channels": [5, 32, 32, 32], "decoder_norm": "smc"},
            "6 channels or more .* decoder, got 5",
        ),
        ({"latent_channels": 2}, "3 latent channels or more, got 2"),
    ],
    ids=str,
)
def test_models_that_cannot_start_as_sub_bands_are_refused(settings, message):
    config = ModelConfig(**{**LITEVAE, "num_groups": 1, **settings})
    with pytest.raises(ValueError, match=f"^initialise=wavelet needs {message}"), torch.device("meta"):
        with_fresh_weights(config, 64, wavelet=True)
