import warnings

import numpy as np
import pytest
import torch

from litevae import LiteVAE
from litevae.models.checks import check_image, nearest_multiples, warn_of_two_scales, without_tracer_warnings


@pytest.mark.parametrize("preset", ["litevae-s", "litevae-b", "litevae-m", "litevae-l"])
def test_the_smallest_latents_depend_on_the_image(preset):
    """At one latent pixel, GroupNorm leaves nearly nothing of an image of one colour."""
    torch.manual_seed(0)
    vae = LiteVAE.from_preset(preset, block_out_channels=(32,) * 4, layers_per_block=1)
    colours = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1]])
    with torch.no_grad():
        latents = vae.encode(colours[:, :, None, None].expand(-1, -1, 16, 16)).latent_dist.mean
    assert latents.std(0).mean() > 0.1 * latents.std()
    for size in ((8, 8), (8, 16), (16, 8)):
        with pytest.raises(ValueError, match=f"multiples of 8, at least 16, got {size[0]}x{size[1]}"):
            vae.encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(("factor", "size"), [(2, 4), (4, 8), (16, 32)])
def test_the_smallest_size_is_two_latent_pixels(factor, size):
    check_image(torch.zeros(1, 3, size, size), 3, factor)
    with pytest.raises(ValueError, match=f"at least {size}, got {size}x{factor}"):
        check_image(torch.zeros(1, 3, size, factor), 3, factor)


def test_nearest_multiples_are_sizes_that_the_model_takes():
    assert [nearest_multiples(size, 8) for size in (0, 5, 17, 24, 250)] == [
        "16",
        "16",
        "16 and 24",
        "24",
        "248 and 256",
    ]


def test_two_scales_are_said():
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}
    with pytest.warns(UserWarning, match="SDXL pipelines apply both"):
        warn_of_two_scales({"scaling_factor": 0.5, **statistics})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_two_scales({"scaling_factor": 0.5, "latents_mean": None, "latents_std": None})
        warn_of_two_scales({"scaling_factor": 1.0, **statistics})


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_only_warnings_of_the_tracer_are_left_out():
    def function(x):
        warnings.warn("of the function", stacklevel=1)
        return x + 1 if x.shape[0] > 1 else x

    with pytest.warns(torch.jit.TracerWarning, match="Python boolean"):
        torch.jit.trace(function, torch.zeros(2), check_trace=False)
    with pytest.warns(UserWarning, match="of the function") as caught:
        torch.jit.trace(without_tracer_warnings(function), torch.zeros(2), check_trace=False)
    assert not any(issubclass(each.category, torch.jit.TracerWarning) for each in caught)


HOSTILE = [
    ([1], TypeError, r"must be a torch\.Tensor, \(N, C, H, W\), got a list"),
    (None, TypeError, "got a NoneType"),
    (np.zeros((1, 4, 16, 16)), TypeError, "got a ndarray"),
    (torch.zeros(4, 16), ValueError, r"must be 4-D, \(N, C, H, W\), got shape \(4, 16\)"),
    (torch.zeros(1, 7, 16, 16), ValueError, r"must have C channels, got 7 in \(1, 7, 16, 16\)"),
    (torch.zeros(1, 4, 16, 16).to_sparse(), TypeError, r"must be a dense tensor, got torch\.sparse_coo"),
    (torch.zeros(1, 4, 16, 16).to(torch.float8_e4m3fn), TypeError, "float16, got torch.float8_e4m3fn"),
    (torch.zeros(1, 4, 16, 16, dtype=torch.int32), TypeError, "got torch.int32"),
    (torch.zeros(1, 4, 0, 16), ValueError, "height and width must be .* got 0x16"),
]


@pytest.mark.parametrize("call", ["encode", "tiled_encode", "forward", "decode", "tiled_decode"])
def test_hostile_inputs_are_refused_in_one_line(make, call):
    vae = make(in_channels=4)
    name = "latent" if "decode" in call else "image"
    for value, error, message in HOSTILE:
        with pytest.raises(error, match=f"^{name} .*{message.replace('C', '4')}") as caught:
            getattr(vae, call)(value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder_norm": "smc", "output_type": "wavelet", "use_1x1_conv": True},
        {"extractor": "nafnet", "aggregator": "vit", "sample_size": 32},
        {"encoder_type": "dwt", "latent_channels": 12},
    ],
    ids=str,
)
def test_a_batch_may_be_empty(make_variant, options):
    vae = make_variant(**options)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            posterior = vae.encode(torch.zeros(0, 3, 32, 32)).latent_dist
            assert posterior.mode().shape == (0, vae.config.latent_channels, 4, 4)
            assert vae.decode(posterior.mode()).sample.shape == (0, 3, 32, 32)
            assert vae.tiled_decode(torch.zeros(0, vae.config.latent_channels, 40, 8)).sample.shape == (
                0,
                3,
                320,
                64,
            )
