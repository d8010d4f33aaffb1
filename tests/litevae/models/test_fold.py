"""Tests of `LiteVAE.fold`, which makes self-modulated convolutions plain."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from litevae import LiteVAE
from litevae_kernels.nn import SelfModulatedConv2d


def options(vae: LiteVAE) -> dict[str, Any]:
    """Returns the configuration in JSON's types, without diffusers' own entries."""
    return {key: value for key, value in json.loads(vae.to_json_string()).items() if key[0] != "_"}


@pytest.fixture
def modulated(make) -> LiteVAE:
    """Returns a model whose scales and gains differ from their initial values."""
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
        exact = modulated(image).sample
        torch.testing.assert_close(folded(image).sample, exact)
        with torch.autocast("cpu", torch.bfloat16):
            # Both normalise the weights in float32. Where a kernel that computes in float32 serves, only one of them
            # may round the weights afterwards. The roundings of the images are as large, so the errors agree within
            # a factor of sqrt(2); the rest of 1.5 allows for chance.
            errors = [(model(image).sample - exact).norm() for model in (folded, modulated)]
        assert max(errors) <= 1.5 * min(errors)
        assert max(errors) <= 0.05 * exact.norm()
        for parameter in folded.parameters():
            parameter.zero_()
    # The model itself is unchanged and shares no memory with the copy.
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


@pytest.mark.parametrize("decoder_norm", ["group", "smc"])
def test_fold_of_a_self_modulated_encoder(make_variant, square_image, tmp_path, decoder_norm):
    vae = make_variant(encoder_norm="smc", decoder_norm=decoder_norm)
    folded = vae.fold()
    assert folded.config.encoder_norm == "none"
    assert folded.config.decoder_norm == {"group": "group", "smc": "none"}[decoder_norm]
    assert vae.config.encoder_norm == "smc"
    assert not any(isinstance(module, SelfModulatedConv2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(square_image).sample, vae(square_image).sample)
        folded.save_pretrained(tmp_path)
        assert torch.equal(
            LiteVAE.from_pretrained(tmp_path)(square_image).sample, folded(square_image).sample
        )


def test_fold_needs_weights_in_memory_and_at_full_width(modulated):
    from accelerate import cpu_offload

    casting = copy.deepcopy(modulated)
    casting.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float8_e4m3fn"):
        casting.fold()
    cpu_offload(modulated, execution_device="cpu")
    with pytest.raises(RuntimeError, match="fold needs all weights in memory, and some are offloaded"):
        modulated.fold()


def test_fold_does_not_reach_into_adapters(modulated):
    modulated.decoder.mid_block.resnets[0].conv1 = torch.nn.Sequential(
        modulated.decoder.mid_block.resnets[0].conv1
    )
    with pytest.raises(
        TypeError, match=r"reach decoder\.mid_block\.resnets\.0\.conv1\.0, .*before adding adapters"
    ):
        modulated.fold()


def test_a_folded_decoder_exports_to_pytorchs_own_operators(make, latent):
    vae = make(decoder_norm="smc").fold().eval()
    exported = torch.export.export(vae.decoder, (latent,), strict=True)
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in")) for name in operators), operators
    torch.testing.assert_close(exported.module()(latent), vae.decoder(latent))
