"""A LiteVAE in diffusers' own pipelines: its normalisation, half precision, and saved pipelines."""

import json

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from litevae import LiteVAE
from litevae.latents.statistics import LatentStatistics, store_scale
from litevae.models.baseline import SmallEncoderVAE


def unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 4,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 8),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            **options,
        }
    )


def pipeline(kind: str, vae: LiteVAE, image_to_image: bool = False) -> DiffusionPipeline:
    """Returns a small pipeline without text encoders."""
    torch.manual_seed(0)
    texts = {"text_encoder": None, "tokenizer": None}
    if kind == "sd":
        cls = StableDiffusionImg2ImgPipeline if image_to_image else StableDiffusionPipeline
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = cls(
            vae=vae, unet=unet(), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), **texts, **rest
        )
    elif kind == "sdxl":
        cls = StableDiffusionXLImg2ImgPipeline if image_to_image else StableDiffusionXLPipeline
        conditions = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 * 6 + 16,
        }
        texts |= {"text_encoder_2": None, "tokenizer_2": None}
        pipe = cls(vae=vae, unet=unet(**conditions), scheduler=EulerDiscreteScheduler(), **texts)
    elif kind == "sd3":
        cls = StableDiffusion3Img2ImgPipeline if image_to_image else StableDiffusion3Pipeline
        texts |= {f"{name}_{i}": None for name in ("text_encoder", "tokenizer") for i in (2, 3)}
        transformer = SD3Transformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
        )
        pipe = cls(vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **texts)
    else:
        cls = FluxImg2ImgPipeline if image_to_image else FluxPipeline
        texts |= {"text_encoder_2": None, "tokenizer_2": None}
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        )
        pipe = cls(vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **texts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: DiffusionPipeline, kind: str, image: torch.Tensor | None = None, **options) -> torch.Tensor:
    """Runs one step, from noise or from an image (N, 3, 32, 32) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    dtype = (pipe.transformer if kind in ("sd3", "flux") else pipe.unet).dtype
    texts = {
        "prompt_embeds": torch.randn(1, 7, 16, generator=generator).to(dtype),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=generator).to(dtype),
    }
    if kind == "sd":
        del texts["pooled_prompt_embeds"]
    size = {"height": 32, "width": 32}
    if image is not None:
        options |= {"image": image, "strength": 0.5}
        size = size if kind in ("sd3", "flux") else {}
    if kind != "flux":
        options["guidance_scale"] = 1.0
    return pipe(**texts, **size, num_inference_steps=2, generator=generator, **options).images


@pytest.fixture
def scaled(make, tmp_path) -> LiteVAE:
    """A model whose scale `litevae scale` has stored, over the two that its configuration held before."""
    old = {"latents_mean": [5.0] * 4, "latents_std": [9.0] * 4, "shift_factor": 3.0}
    make(scaling_factor=2.0, **old).save_pretrained(tmp_path)
    store_scale(tmp_path / "config.json", LatentStatistics((1.0, 2, 3, 4), (2.0, 3, 4, 5), 0.25, 10))
    return LiteVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_every_pipeline_applies_the_stored_scale_alone(scaled, kind, monkeypatch):
    decoded, encoded = [], []
    decode, encode = scaled.decode, scaled.encode
    monkeypatch.setattr(scaled, "decode", lambda z, *args, **kw: decoded.append(z) or decode(z, *args, **kw))
    monkeypatch.setattr(
        scaled, "encode", lambda x, *args, **kw: encoded.append(encode(x, *args, **kw)) or encoded[-1]
    )

    pipe = pipeline(kind, scaled)
    latents = run(pipe, kind, output_type="latent")
    run(pipe, kind, output_type="pt")
    if kind == "flux":
        latents = pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor)
    torch.testing.assert_close(decoded[-1], latents / 0.25)

    pipe = pipeline(kind, scaled, image_to_image=True)
    added = []
    noise = "scale_noise" if kind in ("sd3", "flux") else "add_noise"
    original = getattr(pipe.scheduler, noise)
    monkeypatch.setattr(pipe.scheduler, noise, lambda x, *args: added.append(x) or original(x, *args))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    run(pipe, kind, image, output_type="pt")
    posterior = encoded[-1].latent_dist
    sample = (added[0] / 0.25 - posterior.mean) / posterior.std
    assert (
        sample.abs().max() < 6
    )  # a sample of the posterior, whose generator each pipeline uses in its own way
    assert (sample.std() - 1).abs() < 0.5


@pytest.mark.parametrize("force_upcast", [False, True])
@pytest.mark.parametrize("image_to_image", [False, True])
def test_sdxl_in_half_precision(make, image_to_image, force_upcast):
    vae = make(force_upcast=force_upcast)
    pipe = pipeline("sdxl", vae, image_to_image).to(torch.float16)
    dtypes = []
    vae.decoder.conv_in.register_forward_hook(lambda _, args, out: dtypes.append(out.dtype))
    image = torch.rand(1, 3, 32, 32, dtype=torch.float16) if image_to_image else None
    images = run(pipe, "sdxl", image, output_type="pt")
    assert images.shape == (1, 3, 32, 32)
    assert images.isfinite().all()
    assert dtypes == [torch.float32 if force_upcast else torch.float16]
    assert vae.dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*scaling_factor.*:FutureWarning")
@pytest.mark.parametrize("use_1x1_conv", [False, True])
def test_upscaling_in_half_precision(make, use_1x1_conv):
    pipe = StableDiffusionUpscalePipeline(
        vae=make(force_upcast=True, use_1x1_conv=use_1x1_conv),
        unet=unet(in_channels=7, num_class_embeds=400),
        text_encoder=None,
        tokenizer=None,
        low_res_scheduler=DDPMScheduler(),
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1),
    ).to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    texts = {
        name: torch.zeros(1, 7, 16, dtype=torch.float16)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    images = pipe(image=torch.rand(1, 3, 8, 8), **texts, num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("small", [False, True])
def test_a_saved_pipeline_names_a_module_that_is_imported(make, tmp_path, small):
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
    )
    baseline = {"block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    vae = SmallEncoderVAE((32, 32), **baseline) if small else make()
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False, steps_offset=1)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["litevae", "SmallEncoderVAE" if small else "LiteVAE"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is type(vae)
    assert all(torch.equal(loaded.vae.state_dict()[name], x) for name, x in vae.state_dict().items())


def test_diffusers_has_the_class():
    assert diffusers.LiteVAE is LiteVAE
