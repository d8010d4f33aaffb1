import copy
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.schedulers import DDIMScheduler
from torch import nn
from torch._dynamo.testing import CompileCounter

from litevae import LiteVAE
from litevae.models.autoencoder import blend, tile_starts
from litevae.models.layers import Attention, ResBlock
from litevae_kernels import use_backend
from litevae_kernels.nn import GroupNormSiLU, SelfModulatedConv2d

VARIANTS = [{}, {"decoder_norm": "smc", "output_type": "wavelet"}]


@pytest.fixture
def make(tiny_config):
    """A tiny LiteVAE with the given options, always of the same weights."""

    def make(**options) -> LiteVAE:
        torch.manual_seed(0)
        return LiteVAE(**{**tiny_config, **options})

    return make


@pytest.fixture
def make_small(make):
    """As `make`, with fewer layers to trace, and nothing compiled before."""
    torch._dynamo.reset()
    return partial(make, extractor_multipliers=(1,), aggregator_multipliers=(1,))


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def latent() -> torch.Tensor:
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2))


def options(vae: LiteVAE) -> dict[str, Any]:
    """The configuration without diffusers' own entries, as JSON has it."""
    return {key: value for key, value in json.loads(vae.to_json_string()).items() if key[0] != "_"}


def mode(vae: LiteVAE, image: torch.Tensor) -> torch.Tensor:
    return vae.encode(image).latent_dist.mode()


# What it returns
def test_shapes_without_memory(tiny_config):
    with torch.device("meta"):
        vae = LiteVAE(**tiny_config)
        latent = mode(vae, torch.zeros(1, 3, 64, 48))
        assert latent.shape == (1, 4, 8, 6)
        assert vae.decode(latent).sample.shape == (1, 3, 64, 48)


@pytest.mark.parametrize("decoder_norm", ["group", "smc"])
@pytest.mark.parametrize("output_type", ["image", "wavelet"])
@pytest.mark.parametrize("use_1x1_conv", [False, True])
def test_shapes(make, image, decoder_norm, output_type, use_1x1_conv):
    vae = make(
        decoder_norm=decoder_norm, output_type=output_type, use_1x1_conv=use_1x1_conv, latent_channels=6
    )
    posterior = vae.encode(image).latent_dist
    assert posterior.mean.shape == posterior.logvar.shape == (2, 6, 4, 6)
    assert vae.decode(posterior.mean).sample.shape == image.shape
    assert vae(image).sample.shape == image.shape


def test_tuples(make, image, latent):
    vae = make()
    assert torch.equal(vae.encode(image, return_dict=False)[0].mean, vae.encode(image).latent_dist.mean)
    assert torch.equal(vae.decode(latent, return_dict=False)[0], vae.decode(latent).sample)
    assert torch.equal(vae(image, return_dict=False)[0], vae(image).sample)


def test_forward_decodes_the_mode(make, image):
    vae = make().train()  # there is nothing random in training mode either
    assert torch.equal(vae(image).sample, vae.decode(mode(vae, image)).sample)
    assert torch.equal(vae(image).sample, vae(image).sample)


def test_a_sample_follows_its_generator(make, image):
    vae = make()

    def sample(seed):
        return vae(image, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert not torch.equal(sample(0), vae(image).sample)


def test_1x1_convolutions_stand_at_both_ends_of_the_latent(make, image, latent):
    vae = make(use_1x1_conv=True)
    assert vae.quant_conv.weight.shape == (8, 8, 1, 1)
    assert vae.post_quant_conv.weight.shape == (4, 4, 1, 1)
    torch.testing.assert_close(
        vae.encode(image).latent_dist.parameters, vae.quant_conv(vae.encoder(image)), atol=0, rtol=0
    )
    torch.testing.assert_close(
        vae.decode(latent).sample, vae.decoder(vae.post_quant_conv(latent)), atol=0, rtol=0
    )
    assert make().quant_conv is None
    assert make().post_quant_conv is None


def test_wavelet_decoders_image_is_the_inverse_transform_of_its_doubled_output(make, latent):
    vae = make(output_type="wavelet")
    with torch.no_grad():
        coefficients = vae.decoder(latent)
        image = vae.decode(latent).sample
    assert coefficients.shape == (2, 12, 16, 24)
    low, *high = np.split(2 * coefficients.double().numpy(), 4, axis=1)
    expected = pywt.idwt2((low, tuple(high)), "haar")
    np.testing.assert_allclose(image.numpy(), expected, atol=1e-6, rtol=1e-6)


def test_wavelet_decoder_is_the_image_decoder_without_its_last_upsampler(make):
    image_keys, wavelet_keys = (set(make(output_type=t).state_dict()) for t in ("image", "wavelet"))
    assert {key.rsplit(".", 1)[0] for key in image_keys - wavelet_keys} == {
        "decoder.up_blocks.2.upsamplers.0.conv"
    }
    assert wavelet_keys < image_keys


def test_number_of_blocks_sets_the_downscaling(make, image):
    vae = make(block_out_channels=(8, 8, 16))
    assert mode(vae, image).shape == (2, 4, 8, 12)
    assert vae(image).sample.shape == image.shape


# Construction and storage


def test_defaults_are_litevae_b():
    with torch.device("meta"):
        assert options(LiteVAE()) == options(LiteVAE.from_preset("litevae-b"))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_round_trip_through_a_folder(make, image, tmp_path, changes):
    vae = make(scaling_factor=0.7, shift_factor=0.1, use_1x1_conv=True, **changes)
    vae.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    loaded = LiteVAE.from_pretrained(tmp_path)
    assert options(loaded) == options(vae)
    assert loaded.config.scaling_factor == 0.7
    assert loaded.config.shift_factor == 0.1
    state = loaded.state_dict()
    assert all(torch.equal(state.pop(key), value) for key, value in vae.state_dict().items())
    assert not state
    with torch.no_grad():
        assert torch.equal(loaded(image).sample, vae(image).sample)


def test_loads_in_half_precision_and_takes_float32_images(make, image, tmp_path):
    make().save_pretrained(tmp_path)
    vae = LiteVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    with torch.no_grad():
        z = mode(vae, image)
        assert z.dtype == torch.bfloat16
        assert vae.decode(z).sample.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_norm": "batch"}, "decoder_norm must be one of 'group', 'smc', 'none', got 'batch'"),
        ({"output_type": "latent"}, "output_type must be one of 'image', 'wavelet', got 'latent'"),
        ({"block_out_channels": (8,)}, r"block_out_channels must have at least two entries, got \(8,\)"),
        ({"num_groups": 5}, "divisible by num_groups"),
    ],
)
def test_wrong_configuration(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


# Wrong inputs


@pytest.mark.parametrize("call", ["encode", "forward"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(1, 3, 250, 256),
            ValueError,
            "image height and width must be multiples of 8, got 250x256; "
            "nearest heights: 248 and 256, widths: 256",
        ),
        (torch.zeros(1, 3, 8, 5), ValueError, "got 8x5; nearest heights: 8, widths: 8"),
        (torch.zeros(1, 3, 0, 17), ValueError, "got 0x17; nearest heights: 8, widths: 16 and 24"),
        (torch.zeros(1, 4, 16, 16), ValueError, r"image must have 3 channels, got 4 in \(1, 4, 16, 16\)"),
        (torch.zeros(3, 16, 16), ValueError, r"image must be 4-D, \(N, 3, H, W\), got shape \(3, 16, 16\)"),
        (
            torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
            TypeError,
            r"image must be floating point in \[-1, 1\], got torch.uint8; convert bytes with image.float",
        ),
        (torch.zeros(1, 3, 16, 16, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (
            torch.zeros(1, 3, 16, 16, device="meta"),
            ValueError,
            "image must be on the model's device cpu, got meta",
        ),
    ],
    ids=["height", "small", "empty", "channels", "dimensions", "uint8", "bool", "complex", "device"],
)
def test_wrong_images(make, call, x, error, message):
    with pytest.raises(error, match=message) as raised:
        getattr(make(), call)(x)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        (torch.zeros(1, 3, 4, 4), ValueError, r"latent must have 4 channels, got 3 in \(1, 3, 4, 4\)"),
        (torch.zeros(4, 4, 4), ValueError, r"latent must be 4-D, \(N, 4, H, W\), got shape \(4, 4, 4\)"),
        (torch.zeros(1, 4, 4, 4).half(), TypeError, "model's dtype torch.float32, got torch.float16"),
        (torch.zeros(1, 4, 4, 4).long(), TypeError, "model's dtype torch.float32, got torch.int64"),
        (torch.zeros(1, 4, 4, 4, device="meta"), ValueError, "latent must be on the model's device cpu"),
    ],
    ids=["channels", "dimensions", "half", "long", "device"],
)
def test_wrong_latents(make, z, error, message):
    with pytest.raises(error, match=message) as raised:
        make().decode(z)
    assert "\n" not in str(raised.value)


def test_channels_in_messages_are_the_models(make):
    with pytest.raises(ValueError, match="image must have 1 channels, got 3"):
        make(in_channels=1).encode(torch.zeros(1, 3, 16, 16))


def test_encodes_without_a_decoder_and_the_other_way_round(make, image, latent):
    vae = make()
    z, decoded = mode(vae, image), vae.decode(latent).sample
    encoder, decoder = copy.deepcopy(vae), vae
    del encoder.decoder, decoder.encoder
    assert torch.equal(mode(encoder, image), z)
    assert torch.equal(decoder.decode(latent).sample, decoded)


# Slicing and tiling


def test_slicing_equals_not_slicing(make, image, latent):
    vae = make()
    sizes = []
    vae.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    whole = mode(vae, image), vae.decode(latent).sample
    vae.enable_slicing()
    sliced = mode(vae, image), vae.decode(latent).sample
    torch.testing.assert_close(sliced, whole, atol=1e-5, rtol=1e-5)
    assert sizes == [2, 2, 1, 1, 1, 1]
    vae.disable_slicing()
    mode(vae, image)
    assert sizes[-1] == 2


def localised(vae: LiteVAE) -> LiteVAE:
    """The same model without what looks at the whole image: statistics of norms, and attention."""
    for module in vae.modules():
        for name, child in module.named_children():
            if isinstance(child, GroupNormSiLU):
                setattr(module, name, nn.SiLU())
            elif isinstance(child, Attention):
                setattr(module, name, nn.Identity())
    return vae


def pointwise(vae: LiteVAE) -> LiteVAE:
    """A model in which each latent pixel and its 8x8 pixels of the image know of no other."""
    for module in localised(vae).modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            centre = module.weight.data[:, :, 1, 1].clone()
            module.weight.data.zero_()[:, :, 1, 1] = 3 * centre  # keeps the signal's scale
    return vae


@pytest.mark.parametrize("output_type", ["image", "wavelet"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("size", [(64, 128), (72, 40), (24, 168), (200, 16)])
def test_tiles_of_a_pointwise_model_join_to_the_whole(make, output_type, overlap, size):
    """Every pixel has to come from its own place, whatever the tiles."""
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
    vae.enable_tiling()  # tiles of 256, the sample size
    assert torch.equal(mode(vae, image), whole[0])
    assert torch.equal(vae.decode(latent).sample, whole[1])


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_seams(make, part):
    """Away from the edges of tiles, the tiled result is the whole one's; at them, blending hides the edge."""
    vae = localised(make())
    tile, reach = 64, 16  # in latent pixels; nothing farther than `reach` has an effect worth 1e-5
    vae.tile_sample_min_size, vae.tile_latent_min_size = 8 * tile, tile

    def relative_error(width, overlap, starts):
        """Of the tiled result, by column; `starts` are where the tiles should lie."""
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
    assert abutting.abs().max() > 0.1  # there is something to hide
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
    assert 0 < fade[0] < 0.25 < fade[1] < 0.75 < fade[2] < 1  # flatter than a line at the ends


# Training


@pytest.mark.parametrize("decoder_norm", ["group", "smc"])
def test_gradient_checkpointing_gives_the_same_gradients_for_less_memory(make, image, decoder_norm):
    vae = make(decoder_norm=decoder_norm)
    assert not vae.is_gradient_checkpointing

    def gradients():
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        vae.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = vae(image).sample.square().mean()
        loss.backward()
        return [parameter.grad.clone() for parameter in vae.parameters()], saved

    expected, saved = gradients()
    vae.enable_gradient_checkpointing()
    assert vae.is_gradient_checkpointing
    runs = {name: 0 for name, module in vae.named_modules() if isinstance(module, ResBlock)}

    def count(name):
        runs[name] += 1

    for name in runs:
        vae.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: count(name))
    actual, saved_checkpointed = gradients()
    assert set(runs.values()) == {2}  # every ResBlock of encoder and decoder ran again
    assert saved_checkpointed < 0.5 * saved
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    vae.disable_gradient_checkpointing()
    assert gradients()[1] == saved


def test_checkpointed_blocks_run_again_on_the_forced_backend(make, image):
    """Whatever thread the backward pass is in: a GPU's is one of autograd's own."""
    vae = make()
    vae.enable_gradient_checkpointing()
    gradients = []
    for elsewhere in (False, True):
        vae.zero_grad()
        with use_backend("reference"):
            loss = vae(image).sample.square().mean()
            if not elsewhere:
                loss.backward()
        if elsewhere:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        gradients.append([parameter.grad.clone() for parameter in vae.parameters()])
    # another thread may sum in another order
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_autocast(make, image, changes):
    vae = make(**changes)
    expected = vae(image).sample
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(image).latent_dist
        sample = vae.decode(posterior.sample().float()).sample  # a float32 latent is welcome here
        actual = vae(image).sample
    assert posterior.mean.dtype == sample.dtype == actual.dtype == torch.bfloat16
    # weights in bfloat16 too: the same roundings and more
    in_bfloat16 = copy.deepcopy(vae).bfloat16()(image).sample
    assert (actual - expected).norm() < 2 * (in_bfloat16 - expected).norm()
    assert (in_bfloat16 - expected).norm() < 0.2 * expected.norm()
    actual.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in vae.decoder.parameters())


# Folding


@pytest.fixture
def modulated(make) -> LiteVAE:
    """A model whose self-modulated convolutions are not at their start."""
    vae = make(decoder_norm="smc", output_type="wavelet", scaling_factor=0.7)
    for layer in vae.modules():
        if isinstance(layer, SelfModulatedConv2d):
            nn.init.uniform_(layer.scale, 0.5, 2)
            nn.init.uniform_(layer.gain, 0.5, 1)
    return vae


def test_fold_makes_plain_convolutions_of_equal_outputs(modulated, image):
    before = {key: value.clone() for key, value in modulated.state_dict().items()}
    modulated.enable_tiling()
    folded = modulated.train().fold()
    assert folded.config.decoder_norm == "none"
    assert folded.config.scaling_factor == 0.7
    assert folded.use_tiling
    assert folded.training
    assert not any(isinstance(module, SelfModulatedConv2d) for module in folded.modules())
    assert {key.rsplit(".", 1)[1] for key in before.keys() - folded.state_dict().keys()} == {"scale", "gain"}
    with torch.no_grad():
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                # the same weights: normalised in float32, and rounded after that
                torch.testing.assert_close(folded(image).sample, modulated(image).sample)
        for parameter in folded.parameters():
            parameter.zero_()
    # the model itself is as it was, and shares nothing with the copy
    assert modulated.config.decoder_norm == "smc"
    after = modulated.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fold_stores_the_weights_in_their_dtype(modulated, image, dtype):
    vae = modulated.to(dtype)
    folded = vae.fold()
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}
    with torch.no_grad():
        torch.testing.assert_close(folded(image).sample, vae(image).sample)


def test_a_folded_model_is_saved_loaded_and_folded_again(modulated, image, tmp_path):
    folded = modulated.fold()
    folded.save_pretrained(tmp_path)
    loaded = LiteVAE.from_pretrained(tmp_path)
    assert options(loaded) == options(folded) == options(modulated) | {"decoder_norm": "none"}
    with torch.no_grad():
        expected = folded(image).sample
        assert torch.equal(loaded(image).sample, expected)
        assert torch.equal(folded.fold()(image).sample, expected)


def test_fold_of_a_model_without_self_modulation_is_a_copy(make, image):
    vae = make()
    folded = vae.fold()
    assert options(folded) == options(vae)
    assert torch.equal(folded(image).sample, vae(image).sample)
    assert not {p.data_ptr() for p in folded.parameters()} & {p.data_ptr() for p in vae.parameters()}


def test_fold_without_an_encoder(modulated, latent):
    expected = modulated.decode(latent).sample
    del modulated.encoder
    torch.testing.assert_close(modulated.fold().decode(latent).sample, expected)


def test_fold_needs_weights_in_memory_and_at_full_width(modulated):
    from accelerate import cpu_offload

    casting = copy.deepcopy(modulated)
    casting.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float8_e4m3fn"):
        casting.fold()
    cpu_offload(modulated, execution_device="cpu")
    with pytest.raises(RuntimeError, match="fold needs all weights in memory, and some are offloaded"):
        modulated.fold()


def test_a_folded_decoder_exports_to_pytorchs_own_operators(make, latent):
    vae = make(decoder_norm="smc").fold().eval()
    exported = torch.export.export(vae.decoder, (latent,), strict=True)
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in")) for name in operators), operators
    torch.testing.assert_close(exported.module()(latent), vae.decoder(latent))


# torch.compile


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_encode_and_decode_compile_whole_for_all_batch_sizes(make_small, changes):
    vae = make_small(**changes)
    encode_graphs, decode_graphs = CompileCounter(), CompileCounter()
    encode = torch.compile(lambda x: mode(vae, x), fullgraph=True, backend=encode_graphs)
    decode = torch.compile(lambda z: vae.decode(z).sample, fullgraph=True, backend=decode_graphs)
    with torch.no_grad():
        for batch in (2, 3, 5, 7):
            image = torch.randn(batch, 3, 16, 24)
            z = encode(image)
            assert torch.equal(z, mode(vae, image))
            assert torch.equal(decode(z), vae.decode(z).sample)
    # one with the first size as a constant, one with it as a variable
    assert encode_graphs.frame_count == decode_graphs.frame_count == 2


def test_checks_allow_dynamic_image_sizes(make_small):
    vae = make_small()
    graphs = CompileCounter()
    compiled = torch.compile(lambda x: vae(x).sample, fullgraph=True, backend=graphs, dynamic=True)
    with torch.no_grad():
        for size in [(2, 3, 16, 24), (3, 3, 32, 16), (5, 3, 40, 48)]:
            assert compiled(torch.randn(size)).shape == size
    assert graphs.frame_count == 1


def test_training_step_compiles_whole_under_autocast(make_small, image):
    vae = make_small()

    def loss(image):
        with torch.autocast("cpu", torch.bfloat16):
            return vae(image).sample.float().square().mean()

    loss(image).backward()
    expected = [parameter.grad.clone() for parameter in vae.parameters()]
    vae.zero_grad()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(image).backward()
    for parameter, gradient in zip(vae.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-3, rtol=5e-2)


# diffusers


def test_stands_in_for_autoencoder_kl():
    """Whatever image pipelines read from the configuration of an AutoencoderKL is there."""
    with torch.device("meta"):
        ours = LiteVAE()
        theirs = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4)
    needed = {
        "in_channels",
        "latent_channels",
        "block_out_channels",
        "scaling_factor",
        "shift_factor",
        "sample_size",
        "force_upcast",
    }
    assert needed <= set(theirs.config)
    assert needed <= set(ours.config)
    assert len(ours.config.block_out_channels) == 4
    assert not ours.config.force_upcast  # pipelines would look for a post_quant_conv's dtype


def test_runs_in_a_pipeline(make, tmp_path):
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=1000,
    )
    vae = make(scaling_factor=0.5)
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler(num_train_timesteps=10))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, vae=vae)
    assert loaded.vae is vae
    assert LiteVAE.from_pretrained(tmp_path, subfolder="vae").config.scaling_factor == 0.5


@pytest.mark.parametrize("decoder_norm", ["group", "smc"])
def test_layerwise_casting(make, image, decoder_norm):
    vae = make(decoder_norm=decoder_norm)
    rounded = copy.deepcopy(vae)
    for name, module in rounded.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "norm" not in name:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert vae.encoder.feature_aggregator.conv_in.weight.dtype == torch.float8_e4m3fn
    assert vae.decoder.conv_in.weight.dtype == torch.float8_e4m3fn
    with torch.no_grad():
        assert torch.equal(vae(image).sample, rounded(image).sample)
    with pytest.raises(TypeError, match=r"dtype torch\.float32, got torch\.float8_e4m3fn"):
        vae.decode(torch.zeros(1, 4, 4, 4).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("decoder_norm", ["group", "smc"])
def test_weights_that_are_offloaded_between_layers(make, image, decoder_norm):
    from accelerate import cpu_offload

    vae = make(decoder_norm=decoder_norm)
    with torch.no_grad():
        expected = vae(image).sample
        cpu_offload(vae, execution_device="cpu")
        assert vae.decoder.conv_in.weight.device.type == "meta"
        assert torch.equal(vae(image).sample, expected)
        assert torch.equal(vae.decode(mode(vae, image)).sample, expected)
