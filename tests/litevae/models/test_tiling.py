import numpy as np
import pytest
import torch
from torch import nn

from litevae import LiteVAE
from litevae.models.layers import Attention
from litevae.models.tiling import blend, tile_starts
from litevae_kernels.nn import GroupNormSiLU


def mode(vae: LiteVAE, image: torch.Tensor) -> torch.Tensor:
    return vae.encode(image).latent_dist.mode()


def localised(vae: LiteVAE) -> LiteVAE:
    """Removes the layers that depend on the whole image: the norms and the attention."""
    for module in vae.modules():
        for name, child in module.named_children():
            if isinstance(child, GroupNormSiLU):
                setattr(module, name, nn.SiLU())
            elif isinstance(child, Attention):
                setattr(module, name, nn.Identity())
    return vae


def pointwise(vae: LiteVAE) -> LiteVAE:
    """Makes each latent pixel depend only on its own 8x8 pixels of the image, and the other way round."""
    for module in localised(vae).modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            centre = module.weight.data[:, :, 1, 1].clone()
            module.weight.data.zero_()[:, :, 1, 1] = 3 * centre  # preserves the signal's scale
    return vae


@pytest.mark.parametrize("output_type", ["image", "wavelet"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("size", [(64, 128), (72, 40), (24, 168), (200, 16)])
def test_tiles_of_a_pointwise_model_join_to_the_whole(make, output_type, overlap, size):
    """With any tiles, every pixel must come from its own position."""
    vae = pointwise(make(output_type=output_type, use_1x1_conv=True))
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = vae.encode(image).latent_dist.parameters
        decoded = vae.decode(whole[:, :4]).sample
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 4
        vae.tile_overlap_factor = overlap
        tiles = []
        vae.encoder.register_forward_pre_hook(lambda _, args: tiles.append(args[0].shape[-2:]))
        tiled = vae.encode(image).latent_dist.parameters
        torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.decode(whole[:, :4]).sample, decoded, atol=1e-5, rtol=1e-5)
    assert set(tiles) == {(min(size[0], 32), min(size[1], 32))}
    assert len(tiles) > 1


def test_tiling_leaves_small_images_alone(make, image, latent):
    vae = make()
    whole = mode(vae, image), vae.decode(latent).sample
    vae.enable_tiling()  # a tile has the sample size, 256
    assert torch.equal(mode(vae, image), whole[0])
    assert torch.equal(vae.decode(latent).sample, whole[1])


def test_tiles_of_one_latent_pixel_are_refused_as_such_images_are(make, image):
    vae = make()
    vae.enable_tiling()
    vae.tile_sample_min_size = 15
    with pytest.raises(ValueError, match=r"^tile_sample_min_size must be at least 16, got 15$"):
        vae.encode(image)
    vae.tile_sample_min_size = 16
    assert vae.encode(image).latent_dist.mean.isfinite().all()


def test_tiles_for_one_call(make):
    """As in an AutoencoderKL, `tiled_encode` and `tiled_decode` do not need `enable_tiling`."""
    vae = make(sample_size=32)
    image = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        tiled = vae.tiled_encode(image).latent_dist.mean
        decoded = vae.tiled_decode(tiled, return_dict=False)[0]
        assert not vae.use_tiling
        assert not torch.equal(tiled, vae.encode(image).latent_dist.mean)
        vae.enable_tiling()
        assert torch.equal(tiled, vae.encode(image).latent_dist.mean)
        assert torch.equal(decoded, vae.decode(tiled).sample)
        assert torch.equal(tiled, vae.tiled_encode(image).latent_dist.mean)
        assert vae.use_tiling


def test_wavelet_encoder_by_tiles_is_the_same(make_variant, square_image):
    vae = make_variant(encoder_type="dwt", latent_channels=12)
    whole = vae.encode(square_image).latent_dist.parameters
    vae.enable_tiling()
    vae.tile_sample_min_size = 16
    assert torch.equal(vae.encode(square_image).latent_dist.parameters, whole)


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_seams(make, part):
    """The tiled result equals the untiled one away from the tiles' edges, which blending hides."""
    vae = localised(make())
    tile, reach = 64, 16  # in latent pixels; effects beyond `reach` are below 1e-5
    vae.tile_sample_min_size, vae.tile_latent_min_size = 8 * tile, tile

    def relative_error(width, overlap, starts):
        """Returns the tiled result's relative error; `starts` are the expected positions of the tiles."""
        generator = torch.Generator().manual_seed(4)
        vae.tile_overlap_factor = overlap
        assert tile_starts(width, tile, int(tile * overlap)) == starts
        if part == "encode":
            image = torch.randn(1, 3, 16, 8 * width, generator=generator)
        else:
            z = torch.randn(1, 4, 2, width, generator=generator)
        results = []
        for switch in (vae.disable_tiling, vae.enable_tiling):
            switch()
            with torch.no_grad():
                results.append(
                    vae.encode(image).latent_dist.parameters if part == "encode" else vae.decode(z).sample
                )
        whole, tiled = results
        return (tiled - whole) / whole.std()

    def jump(error):
        return error.diff(dim=-1).abs().max()

    abutting = relative_error(128, 0.0, [0, 64])
    blended = relative_error(160, 0.25, [0, 48, 96])
    columns = torch.arange(blended.shape[-1]) * 160 // blended.shape[-1]
    far = torch.stack([(columns - edge).abs() > reach for edge in (48, 64, 96, 112)]).all(0)
    assert far.float().mean() > 0.3
    assert blended[..., far].abs().max() < 1e-5
    assert abutting.abs().max() > 0.1  # the edges are visible
    assert blended.abs().max() < 0.1 * abutting.abs().max()
    assert jump(blended) < 0.1 * jump(abutting)


@pytest.mark.parametrize(("size", "tile", "overlap"), [(100, 32, 8), (33, 32, 8), (64, 32, 0), (9, 4, 3)])
def test_tiles_cover_with_at_least_the_overlap_and_no_more_of_them_than_needed(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + tile == size
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= tile - overlap).all()
    assert tile + (len(starts) - 2) * (tile - overlap) < size


def test_one_tile_where_one_is_enough():
    assert tile_starts(32, 32, 8) == tile_starts(5, 32, 8) == [0]


@pytest.mark.parametrize("dim", [2, 3])
def test_blend_fades_smoothly_and_evenly(dim):
    shape = [1, 1, 3, 3]
    shape[dim] = 6
    joined = blend([torch.zeros(shape), torch.ones(shape)], [0, 3], dim).movedim(dim, 0)[:, 0, 0, 0]
    assert torch.equal(joined[[0, 1, 2, 6, 7, 8]], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    fade = joined[3:6]
    torch.testing.assert_close(fade + fade.flip(0), torch.ones(3))
    assert 0 < fade[0] < 0.25 < fade[1] < 0.75 < fade[2] < 1  # flatter than a straight line at the ends
