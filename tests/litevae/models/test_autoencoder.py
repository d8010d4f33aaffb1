import copy
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import pywt
import torch

from litevae import LiteVAE
from litevae.models.layers import NoConv2d, ResBlock
from litevae_kernels import use_backend

VARIANTS = [{}, {"decoder_norm": "smc", "output_type": "wavelet"}]


def options(vae: LiteVAE) -> dict[str, Any]:
    """Returns the configuration in JSON's types, without diffusers' own entries."""
    return {key: value for key, value in json.loads(vae.to_json_string()).items() if key[0] != "_"}


def mode(vae: LiteVAE, image: torch.Tensor) -> torch.Tensor:
    return vae.encode(image).latent_dist.mode()


# Outputs


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
    vae = make().train()  # training mode is deterministic too
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
    assert type(make().post_quant_conv) is NoConv2d


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
        "README.md",
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
            "image height and width must be multiples of 8, at least 16, got 250x256; "
            "nearest heights: 248 and 256, widths: 256",
        ),
        (torch.zeros(1, 3, 8, 5), ValueError, "got 8x5; nearest heights: 16, widths: 16"),
        (torch.zeros(1, 3, 0, 17), ValueError, "got 0x17; nearest heights: 16, widths: 16 and 24"),
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
        (torch.zeros(1, 4, 4, 4).long(), TypeError, "float32, bfloat16 or float16, got torch.int64"),
        (torch.zeros(1, 4, 4, 4).bool(), TypeError, "float32, bfloat16 or float16, got torch.bool"),
        (torch.zeros(1, 4, 4, 4, device="meta"), ValueError, "latent must be on the model's device cpu"),
    ],
    ids=["channels", "dimensions", "long", "bool", "device"],
)
def test_wrong_latents(make, z, error, message):
    with pytest.raises(error, match=message) as raised:
        make().decode(z)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use_1x1_conv", [False, True])
def test_images_and_latents_of_every_dtype_are_converted_to_the_models(
    make, image, latent, use_1x1_conv, dtype
):
    vae = make(use_1x1_conv=use_1x1_conv).bfloat16()
    with torch.no_grad():
        encoded = mode(vae, image.to(dtype))  # the wavelet transform rounds only its result
        assert encoded.dtype == torch.bfloat16
        torch.testing.assert_close(encoded, mode(vae, image.bfloat16()), atol=0.05, rtol=0.05)
        decoded = vae.decode(latent.to(dtype)).sample
        assert decoded.dtype == torch.bfloat16
        assert torch.equal(decoded, vae.decode(latent.to(dtype).bfloat16()).sample)


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


# Slicing


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
    assert set(runs.values()) == {2}  # every ResBlock of encoder and decoder was recomputed
    assert saved_checkpointed < 0.5 * saved
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    vae.disable_gradient_checkpointing()
    assert gradients()[1] == saved


def test_checkpointed_blocks_run_again_on_the_forced_backend(make, image):
    """The thread of the backward pass does not matter: on a GPU it is one of autograd's own."""
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
    # Another thread may sum in another order.
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_autocast(make, image, changes):
    vae = make(**changes)
    expected = vae(image).sample
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(image).latent_dist
        sample = vae.decode(posterior.sample().float()).sample  # autocast also accepts a float32 latent
        actual = vae(image).sample
    assert posterior.mean.dtype == sample.dtype == actual.dtype == torch.bfloat16
    # With bfloat16 weights too, there are the same roundings and more.
    in_bfloat16 = copy.deepcopy(vae).bfloat16()(image).sample
    assert (actual - expected).norm() < 2 * (in_bfloat16 - expected).norm()
    assert (in_bfloat16 - expected).norm() < 0.2 * expected.norm()
    actual.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in vae.decoder.parameters())
