from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from litevae import LiteVAE
from litevae.data.pixels import PixelFormat
from litevae.errors import UserError
from litevae.models.interface import (
    check_size,
    encode_pixels,
    fixed_size,
    pixel_format,
    shared_pixel_format,
    spatial_compression,
)


@pytest.fixture
def baseline() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    )


@pytest.fixture
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=generator)


def test_spatial_compression_is_the_ratio_of_image_and_latent(make, baseline):
    for model in (make(), make(block_out_channels=(8, 16)), baseline):
        latent = model.encode(torch.zeros(1, 3, 32, 64)).latent_dist.mean
        factor = spatial_compression(model)
        assert latent.shape[2:] == (32 // factor, 64 // factor)


def test_only_a_vit_fixes_the_size(make, baseline):
    assert fixed_size(make(aggregator="vit", sample_size=32)) == 32
    assert fixed_size(make()) is None
    assert fixed_size(baseline) is None


class TestCheckSize:
    def test_accepts_what_the_model_encodes(self, make, baseline):
        check_size(make(), 16)
        check_size(make(), 40)
        check_size(make(aggregator="vit", sample_size=32), 32)
        check_size(make(block_out_channels=(8, 8)), 18)
        check_size(baseline, 20)

    @pytest.mark.parametrize(
        ("options", "size", "message"),
        [
            ({}, 36, "size must be a multiple of 8, at least 16, got 36"),
            ({}, 8, "size must be a multiple of 8, at least 16, got 8"),
            ({}, 0, "at least 16, got 0"),
            ({"block_out_channels": (8, 8)}, 14, "size must be a multiple of 2, at least 16, got 14"),
            ({"block_out_channels": (8,) * 5}, 16, "size must be a multiple of 16, at least 32, got 16"),
            (
                {"aggregator": "vit", "sample_size": 32},
                64,
                "size must be 32, the only size this model takes, got 64",
            ),
            ({"in_channels": 2}, 32, "the model's channels must be 1, 3 or 4, got 2"),
        ],
        ids=str,
    )
    def test_refuses_other_sizes_and_channels(self, make, options, size, message):
        with pytest.raises(UserError, match=message):
            check_size(make(**options), size)

    def test_names_the_setting(self, make):
        with pytest.raises(UserError, match=r"data\.size must be a multiple of 8"):
            check_size(make(), 36, "data.size")


class TestEncodePixels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["litevae", "baseline"])
    def test_is_the_posterior_of_the_scaled_image(self, make, baseline, pixels, kind, dtype):
        model = (make() if kind == "litevae" else baseline).to(dtype)
        image = (pixels.double() / 127.5 - 1).to(torch.float32 if kind == "litevae" else dtype)
        with torch.no_grad():
            actual = encode_pixels(model, pixels)
            expected = model.encode(image).latent_dist
        assert actual.mean.dtype == dtype
        # the scaling itself is rounded to float32
        torch.testing.assert_close(actual.parameters, expected.parameters, atol=1e-5, rtol=1e-4)

    def test_wrong_size_is_one_line(self, make):
        with pytest.raises(UserError, match="multiples of 8, at least 16, got 12x16") as caught:
            encode_pixels(make(), torch.zeros(1, 3, 12, 16, dtype=torch.uint8))
        assert "\n" not in str(caught.value)


class TestPixelFormat:
    def test_is_that_of_the_configuration(self, make, baseline, tmp_path):
        assert pixel_format(baseline) == pixel_format(make()) == PixelFormat()
        model = make(in_channels=4, value_range=[-1000, 3000])
        model.save_pretrained(tmp_path)
        assert pixel_format(LiteVAE.from_pretrained(tmp_path)) == PixelFormat(4, (-1000, 3000))

    def test_of_two_channels_does_not_exist(self, make):
        with pytest.raises(UserError, match="the model's channels must be 1, 3 or 4, got 2"):
            pixel_format(make(in_channels=2))

    def test_of_a_broken_range_does_not_exist(self, baseline):
        broken = SimpleNamespace(config=SimpleNamespace(in_channels=1, get={"value_range": [5, 1]}.get))
        with pytest.raises(UserError, match=r"the model's value_range must be two numbers.*got \[5, 1\]"):
            pixel_format(broken)

    @pytest.mark.parametrize(
        "value", [[1, 0], [0], [0, 1, 2], "01", [0, "1"], [0, True], [0, float("nan")], 5]
    )
    def test_ranges_that_there_are_not(self, make, value):
        with pytest.raises(ValueError, match="value_range must be null or two numbers, the lower first, got"):
            make(value_range=value)

    def test_models_of_other_images_cannot_be_compared(self, make):
        models = {"a": make(), "b": make(in_channels=1)}
        assert shared_pixel_format({"a": make(), "b": make()}) == PixelFormat()
        with pytest.raises(UserError, match="a takes RGB of 8 bits, and b takes grey of 8 bits"):
            shared_pixel_format(models)


def test_pixels_of_other_channels_are_refused(make, baseline, pixels):
    for model in (make(), baseline):
        with pytest.raises(UserError, match="the model takes images of 3 channels, got 1"):
            encode_pixels(model, pixels[:, :1])
    with pytest.raises(UserError, match="the model takes images of 1 channel, got 3"):
        encode_pixels(make(in_channels=1), pixels)


def test_levels_that_are_not_rounded_are_encoded_as_they_are(make, pixels):
    levels = pixels + torch.rand(pixels.shape, generator=torch.Generator().manual_seed(1)) / 2
    model = make()
    with torch.no_grad():
        expected = model.encode(levels / 127.5 - 1).latent_dist.mean
        assert torch.equal(encode_pixels(model, levels).mean, expected)
