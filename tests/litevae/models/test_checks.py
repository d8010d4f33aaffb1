import warnings

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
