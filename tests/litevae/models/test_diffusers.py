"""The autoencoder in diffusers' pipelines, casting and offloading."""

import copy
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.schedulers import DDIMScheduler
from torch import nn

from litevae import LiteVAE


def test_stands_in_for_autoencoder_kl():
    """The configuration has all entries of an AutoencoderKL's that image pipelines read."""
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
    assert not ours.config.force_upcast


# Settings of an AutoencoderKL that a LiteVAE does not have; docs/diffusers.md lists them.
ONLY_AUTOENCODER_KL = {
    *("out_channels", "down_block_types", "up_block_types", "act_fn", "norm_num_groups"),
    *("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
}


def test_has_the_public_names_of_autoencoder_kl():
    with torch.device("meta"):
        ours, theirs = LiteVAE(), AutoencoderKL()
    public = {name for name in dir(theirs) if not name.startswith("_")}
    assert public <= set(dir(ours))
    assert set(theirs.config) - set(ours.config) == ONLY_AUTOENCODER_KL
    page = (Path(__file__).parents[3] / "docs" / "diffusers.md").read_text()
    assert all(f"`{name}`" in page for name in ONLY_AUTOENCODER_KL)
    for name in ("encode", "decode", "forward", "tiled_encode", "tiled_decode"):
        own, other = (list(inspect.signature(getattr(model, name)).parameters) for model in (ours, theirs))
        assert own == other


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
    with pytest.raises(TypeError, match=r"float16, got torch\.float8_e4m3fn"):
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
        assert torch.equal(vae.decode(vae.encode(image).latent_dist.mode()).sample, expected)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"decoder_norm": "smc", "output_type": "wavelet"}, {"encoder_type": "dwt", "latent_channels": 12}],
    ids=str,
)
def test_replicas_of_data_parallel(make, image, options, wrapped, monkeypatch):
    """A replica's parameters are plain attributes; where there is no GPU, only their copies are made differently."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[tensor.clone() for tensor in tensors] for _ in devices],
    )
    vae = make(**options)
    if wrapped:
        vae.decoder.conv_in = nn.Sequential(vae.decoder.conv_in)
        if "encoder_type" not in options:
            vae.encoder.feature_aggregator.conv_in = nn.Sequential(vae.encoder.feature_aggregator.conv_in)
    (replica,) = replicate.replicate(vae, [0])
    assert not list(replica.parameters())
    expected = vae(image).sample
    assert torch.equal(replica(image).sample, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert replica(image).sample.dtype == torch.bfloat16


def test_processors_of_the_attention(make, latent):
    vae = make()
    with torch.no_grad():
        expected = vae.decode(latent).sample
        assert list(vae.attn_processors) == ["decoder.mid_block.attentions.0.processor"]
        vae.fuse_qkv_projections()
        assert type(next(iter(vae.attn_processors.values()))) is FusedAttnProcessor2_0
        torch.testing.assert_close(vae.decode(latent).sample, expected)
        vae.unfuse_qkv_projections()
        assert torch.equal(vae.decode(latent).sample, expected)
        vae.set_default_attn_processor()
        assert type(next(iter(vae.attn_processors.values()))) is AttnProcessor
        torch.testing.assert_close(vae.decode(latent).sample, expected)
        vae.set_attn_processor(AttnProcessor2_0())
        assert torch.equal(vae.decode(latent).sample, expected)


def test_forward_mode_with_the_processor_that_the_page_names(make, latent):
    vae, z = make().double(), latent.double()
    vae.set_attn_processor(AttnProcessor())
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=z.dtype)

    def decode(z):
        return vae.decode(z).sample

    with torch.no_grad():
        expected = (decode(z + 1e-5 * direction) - decode(z - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close(
            torch.func.jvp(decode, (z,), (direction,))[1], expected, atol=1e-6, rtol=1e-5
        )
