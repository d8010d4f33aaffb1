import copy
import pickle

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from litevae import LiteVAE
from litevae_kernels import accelerate_vae, restore_vae

# The norm of the difference to diffusers' model, relative to the result: conv3x3's bound in float32.
ERROR = 2e-5


def classes(vae):
    return [type(module) for module in vae.modules()]


def sample(vae, latents=None):
    with torch.no_grad():
        if latents is None:
            latents = torch.randn(
                1, vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0)
            )
        return vae.decode(latents.to(vae.dtype)).sample


def assert_close(actual, expected, error=ERROR):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("model", ["sd", "sdxl", "sd3", "flux"])
def test_report(make_vae, model):
    vae = make_vae(model)
    report = accelerate_vae(vae)
    norms = {name for name, module in vae.named_modules() if isinstance(module, nn.GroupNorm)}
    convs = {name for name, module in vae.named_modules() if isinstance(module, nn.Conv2d)}
    fused_norms, fused_convs, additions = report.fused.values()
    # Encoder: 4 blocks and the output. Decoder: 6 blocks and the output.
    assert (len(fused_norms), len(fused_convs), len(additions)) == (22, 25, 10)
    assert {*fused_norms, *fused_convs} | set(report.left) == norms | convs
    attentions = {name for name in norms if "attentions" in name}
    assert {name for name, why in report.left.items() if why == "no activation follows"} == attentions
    assert report.left["encoder.down_blocks.0.downsamplers.0.conv"] == "has a stride of 2"
    assert report.left["decoder.up_blocks.1.resnets.0.conv_shortcut"] == "has a kernel of 1x1"
    assert ("quant_conv" in report.left) == (model in ("sd", "sdxl"))
    assert str(report).startswith("AutoencoderKL: litevae_kernels computes\n  GroupNorm with SiLU: 22\n")
    assert "\n  has a stride of 2: encoder.down_blocks.0.downsamplers.0.conv\n" in str(report)


def test_twice_is_once_and_restore_is_exact(make_vae):
    vae = make_vae()
    before, keys, expected = classes(vae), list(vae.state_dict()), sample(vae)
    addresses = [p.data_ptr() for p in vae.parameters()]
    restore_vae(vae)  # There is nothing to restore yet.
    first = accelerate_vae(vae)
    changed = classes(vae)
    assert accelerate_vae(vae) == first
    assert classes(vae) == changed != before
    for ours, theirs in zip(changed, before, strict=True):
        assert issubclass(ours, theirs)
        assert ours.__name__ == theirs.__name__
    assert list(vae.state_dict()) == keys
    assert [p.data_ptr() for p in vae.parameters()] == addresses
    assert_close(sample(vae), expected)
    restore_vae(vae)
    assert classes(vae) == before
    assert torch.equal(sample(vae), expected)


@pytest.mark.parametrize(
    "value", [None, nn.Conv2d(1, 1, 1), LiteVAE.from_preset("litevae-s", block_out_channels=(32,) * 4)]
)
@pytest.mark.parametrize("function", [accelerate_vae, restore_vae])
def test_other_models_are_refused(function, value):
    with pytest.raises(TypeError, match=rf"^vae is a {type(value).__name__}; .*AutoencoderKL"):
        function(value)


def test_derived_models_are_accepted():
    class Mine(AutoencoderKL):
        pass

    assert str(accelerate_vae(Mine())).startswith("Mine: ")


@pytest.mark.parametrize("kind", ["attention", "mish"])
def test_other_blocks_are_left(make_vae, kind):
    down, up = ("AttnDownEncoderBlock2D",) * 2, ("AttnUpDecoderBlock2D",) * 2
    attention = {"down_block_types": down, "up_block_types": up}
    config = {"attention": attention, "mish": {"act_fn": "mish"}}[kind]
    vae = make_vae(**config)
    expected, images = sample(vae), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        moments = vae.encode(images).latent_dist.parameters
    report = accelerate_vae(vae)
    assert_close(sample(vae), expected)
    with torch.no_grad():
        assert_close(vae.encode(images).latent_dist.parameters, moments)
    norms = report.fused["GroupNorm with SiLU"]
    if kind == "mish":
        assert norms == ["encoder.conv_norm_out", "decoder.conv_norm_out"]
        assert report.left["decoder.mid_block.resnets.0.norm1"] == "precedes an activation that is a Mish"
        assert len(report.fused["residual addition"]) == 10
    else:
        assert "decoder.up_blocks.0.resnets.0.norm1" in norms
        assert report.left["decoder.up_blocks.0.attentions.0.group_norm"] == "no activation follows"


def test_a_time_embedding_is_left(make_vae):
    from diffusers.models.resnet import ResnetBlock2D

    vae = make_vae()
    block = ResnetBlock2D(in_channels=64, temb_channels=8, groups=8)
    vae.decoder.mid_block.resnets[0] = block
    report = accelerate_vae(vae)
    assert type(block) is ResnetBlock2D
    assert report.left["decoder.mid_block.resnets.0.conv1"] == "its ResnetBlock2D has a time embedding"
    assert "decoder.mid_block.resnets.0" not in report.fused["residual addition"]


def test_dropout_in_training(make_vae):
    # Random numbers are drawn in the order of the elements in memory, so both models must have the same layout.
    vae = make_vae().to(memory_format=torch.channels_last)
    vae.decoder.mid_block.resnets[0].dropout.p = 0.5
    latents = torch.randn(1, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    samples = []
    for _ in range(2):
        torch.manual_seed(0)
        samples.append(sample(vae.train(), latents))
        accelerate_vae(vae)
    assert_close(samples[1], samples[0])
    assert not torch.equal(sample(vae, latents), samples[1])


class Adapter(nn.Module):
    """A layer around another one, as PEFT puts it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.more = base, copy.deepcopy(base)

    def forward(self, x):
        return self.base_layer(x) + self.more(x)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", ["adapter", "subclass", "parametrization", "hook"])
def test_changed_layers_are_called(make_vae, change, when):
    class MyConv(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    def alter(vae):
        for name in ("conv1", "conv2"):
            block = vae.decoder.up_blocks[1].resnets[0]
            conv = getattr(block, name)
            if change == "adapter":
                setattr(block, name, Adapter(conv))
            elif change == "subclass":
                conv.__class__ = MyConv
            elif change == "parametrization":
                nn.utils.parametrizations.weight_norm(conv)
            else:
                conv.register_forward_hook(lambda _, args, y: 3 * y)

    vae = make_vae()
    plain = copy.deepcopy(vae)
    alter(plain)
    steps = [alter, accelerate_vae] if when == "before" else [accelerate_vae, alter, accelerate_vae]
    reports = [step(vae) for step in steps]
    assert_close(sample(vae), sample(plain))
    name = "decoder.up_blocks.1.resnets.0"
    reasons = {"adapter": "is a Adapter", "subclass": "is a MyConv", "hook": "has hooks"}
    assert reports[-1].left[f"{name}.conv1"] == reasons.get(change, "is a ParametrizedConv2d")
    assert name not in reports[-1].fused["residual addition"]
    assert not any("base_layer" in layer for layer in reports[-1].left)
    restore_vae(vae)
    assert torch.equal(sample(vae), sample(plain))


@pytest.mark.parametrize("when", ["before", "after"])
def test_peft(make_vae, when):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["conv1", "to_q"], init_lora_weights=False)

    def adapt(vae):
        torch.manual_seed(0)
        vae.add_adapter(config)
        return vae

    vae = make_vae()
    plain = adapt(copy.deepcopy(vae))
    for step in [adapt, accelerate_vae] if when == "before" else [accelerate_vae, adapt]:
        step(vae)
    latents = torch.randn(1, 4, 16, 16)
    assert_close(sample(vae, latents), sample(plain, latents))
    gradients = []
    for model in (vae, plain):
        model.decode(latents).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lora" in name for name in gradients[0])
    for name, expected in gradients[1].items():
        assert_close(gradients[0][name], expected, 1e-3)
    vae.disable_adapters()
    restored = copy.deepcopy(vae)
    restore_vae(restored)
    assert_close(sample(vae, latents), sample(restored, latents))


def test_offloading_and_layerwise_casting(make_vae):
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    vae = make_vae()
    expected = sample(vae)
    accelerate_vae(vae)
    offloaded = cpu_offload(copy.deepcopy(vae), execution_device="cpu")
    assert offloaded.decoder.conv_in.weight.device.type == "meta"
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(offloaded.decode(latents).sample, expected)
    assert accelerate_vae(offloaded).left["decoder.conv_in"].startswith("has a forward of its own")
    restore_vae(offloaded)
    with torch.no_grad():
        assert_close(offloaded.decode(latents).sample, expected)
    add_hook_to_module(vae.decoder, ModelHook())  # It keeps the accelerated forward.
    with pytest.raises(RuntimeError, match=r"^decoder has a forward of its own; remove its offloading"):
        restore_vae(vae)
    remove_hook_from_module(vae.decoder)
    plain = make_vae()
    for model in (vae, plain):
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert vae.decoder.conv_in.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert_close(vae.decode(latents).sample, plain.decode(latents).sample)


@pytest.mark.parametrize("setting", ["slicing", "tiling", "to", "fused qkv"])
def test_settings_of_diffusers(make_vae, setting):
    vae = make_vae()
    if setting == "tiling":
        vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 16
    ours = copy.deepcopy(vae)
    accelerate_vae(ours)
    torch.manual_seed(0)
    images, latents = torch.rand(2, 3, 48, 64), torch.randn(2, 4, 24, 32)
    results = []
    for model in (ours, vae):
        if setting == "slicing":
            model.enable_slicing()
        elif setting == "tiling":
            model.enable_tiling()
        elif setting == "to":
            model.to(torch.bfloat16).to(torch.float64)
        else:
            model.fuse_qkv_projections()
        with torch.no_grad():
            moments = model.encode(images.to(model.dtype)).latent_dist.parameters
        results.append([moments, sample(model, latents)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_saved_models_are_the_same_bytes(make_vae, tmp_path):
    vae = make_vae("sdxl")
    vae.save_pretrained(tmp_path / "plain")
    accelerate_vae(vae)
    sample(vae)
    vae.save_pretrained(tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert not any(cls.__module__.startswith("litevae_kernels") for cls in classes(loaded))
    accelerate_vae(loaded)
    assert torch.equal(sample(loaded), sample(vae))


def test_copies_and_pickles(make_vae, tmp_path):
    vae = make_vae()
    accelerate_vae(vae)
    torch.save(vae, tmp_path / "vae.pt")
    loaded = torch.load(tmp_path / "vae.pt", weights_only=False)
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae)), loaded):
        assert classes(other) == classes(vae)
        assert torch.equal(sample(other), sample(vae))
        restore_vae(other)
        assert classes(other) != classes(vae)


def make_pipeline(kind, vae):
    """Makes a tiny pipeline of diffusers and the arguments of a call; prompts are random embeddings."""
    import diffusers

    torch.manual_seed(0)
    channels = vae.config.latent_channels
    arguments = {"prompt_embeds": torch.randn(1, 4, 8), "num_inference_steps": 2, "output_type": "pt"}
    arguments |= {"guidance_scale": 1.0, "height": 32, "width": 32}
    nothing = dict.fromkeys(("text_encoder", "tokenizer"))
    if kind in ("sd", "sdxl", "img2img"):
        more, scheduler = {}, DDIMScheduler(clip_sample=False, steps_offset=1)
        if kind == "sdxl":
            nothing |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
            arguments["pooled_prompt_embeds"] = torch.randn(1, 8)
            more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2}
            more["projection_class_embeddings_input_dim"] = 6 * 2 + 8
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **more,
        )
        if kind == "sdxl":
            pipeline = diffusers.StableDiffusionXLPipeline(vae, unet=unet, scheduler=scheduler, **nothing).to(
                torch.float16
            )
            arguments |= {key: x.half() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
        else:
            cls = diffusers.StableDiffusionPipeline
            if kind == "img2img":
                cls = diffusers.StableDiffusionImg2ImgPipeline
                arguments |= {"image": torch.rand(1, 3, 32, 32), "strength": 0.9}
                del arguments["height"], arguments["width"]
            nothing |= dict.fromkeys(("safety_checker", "feature_extractor"))
            pipeline = cls(vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **nothing)
    else:
        arguments["pooled_prompt_embeds"] = torch.randn(1, 8)
        sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
        sizes |= {"joint_attention_dim": 8, "pooled_projection_dim": 8}
        nothing |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        if kind == "sd3":
            nothing |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
            model = SD3Transformer2DModel(
                sample_size=16, caption_projection_dim=16, pos_embed_max_size=16, **sizes
            )
            cls = diffusers.StableDiffusion3Pipeline
        else:
            model = FluxTransformer2DModel(num_single_layers=1, axes_dims_rope=(2, 2, 4), **sizes)
            cls = diffusers.FluxPipeline
        pipeline = cls(transformer=model, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **nothing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, arguments


@pytest.mark.parametrize("kind", ["sd", "img2img", "sdxl", "sd3", "flux"])
def test_pipelines(make_vae, kind):
    pipeline, arguments = make_pipeline(kind, make_vae("sd" if kind == "img2img" else kind))
    images = []
    for _ in range(2):
        images.append(pipeline(generator=torch.Generator().manual_seed(0), **arguments).images)
        accelerate_vae(pipeline.vae)
    assert images[0].std() > 0.01
    # SDXL's pipeline converts its float16 model to float32 to decode.
    assert_close(images[1].double(), images[0].double())
