"""Distillation: an encoder that learns a teacher's latents."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from skimage import data

from litevae import LiteVAE
from litevae.errors import UserError
from litevae.files import sha256
from litevae.training import load_config, train
from litevae.training.build import build_model, check_run
from litevae.training.teacher import Teacher, load_teacher

WEIGHTS = "diffusion_pytorch_model.safetensors"
CHANNELS = {"scaling_factor": 1.0, "latents_mean": [0.0, 1, 2, 3], "latents_std": [1.0, 2, 3, 4]}


def test_the_encoder_learns_the_teachers_posterior(sd, distilling, logged, no_pictures, tmp_path):
    pixels = data.chelsea()[100:132, 100:132]
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "cat.png")
    images = [f"data.train={tmp_path / 'images'}", "data.flip=false"]  # the same crop at each step
    optimizer = ["optimizer.warmup_steps=10", "optimizer.learning_rate=5e-4", "ema_decay=0"]
    config = distilling(sd, "max_steps=80", *images, *optimizer)
    result = train(config)
    lines = logged(result.output_dir)
    terms = {"teacher_kl", "teacher_mean", "teacher_logvar"}
    assert {name for name in lines[0] if name.startswith("weighted/")} == {
        f"weighted/{name}" for name in terms
    }
    for name in ("loss", *terms):
        assert lines[-1][name] < 0.7 * lines[0][name]
    # The values in the log are those of the models, computed by diffusers.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2) / 127.5 - 1
    models = [AutoencoderKL.from_pretrained(sd / "vae"), LiteVAE.from_pretrained(result.output_dir / "model")]
    with torch.no_grad():
        target, own = (model.encode(image).latent_dist for model in models)
    assert (own.mean - target.mean).abs().mean() == pytest.approx(lines[-1]["teacher_mean"], rel=0.2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
        {"use_post_quant_conv": False, "force_upcast": False, "shift_factor": None, **CHANNELS},
    ],
    ids=["sd", "flux", "mixed"],
)
def test_the_decoder_and_the_scale_are_the_teachers(
    settings, distilling, tmp_path, no_pictures, save_teacher
):
    folder = save_teacher(tmp_path / "teacher", **settings)
    # The average and weight decay, which would change trained weights, leave the frozen ones alone.
    config = distilling(folder, "max_steps=2", "ema_decay=0.9", "optimizer.weight_decay=0.1", "loss.l1=1")
    model = LiteVAE.from_pretrained(train(config).output_dir / "model")
    teacher = AutoencoderKL.from_pretrained(folder)
    theirs, own = teacher.state_dict(), model.state_dict()
    taken = [name for name in theirs if name.startswith(("decoder.", "post_quant_conv."))]
    assert all(torch.equal(own[name], theirs[name]) for name in taken)
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"):
        assert model.config[name] == teacher.config[name]
    latent = torch.randn(1, model.config.latent_channels, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            model.decode(latent).sample, teacher.decode(latent).sample, rtol=1e-4, atol=1e-4
        )


def test_it_is_the_vae_of_an_image_to_image_pipeline_and_says_of_which(sd, distilling, no_pictures):
    folder = train(distilling(sd, "max_steps=1")).output_dir / "model"
    card = (folder / "README.md").read_text()
    assert f"the posterior of the AutoencoderKL in {(sd / 'vae').as_posix()}, with\n" in card
    assert f"`{WEIGHTS}`, SHA-256 `{sha256(sd / 'vae' / WEIGHTS)}`" in card
    assert "scaling_factor 0.5, shift_factor 0.25" in card
    model = LiteVAE.from_pretrained(folder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)

    def edit(vae):
        pipe = StableDiffusionImg2ImgPipeline(
            vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts
        )
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, 3, 32, 32, generator=generator)
        options = {"prompt_embeds": torch.zeros(1, 7, 16), "guidance_scale": 1.0, "output_type": "pt"}
        return pipe(image=image, strength=0.5, num_inference_steps=2, generator=generator, **options).images

    # With the teacher's encoder the pipelines agree: the decoder and the scale are the teacher's.
    teacher = AutoencoderKL.from_pretrained(sd / "vae")
    mixed = copy.deepcopy(model)
    mixed.encoder, mixed.quant_conv = teacher.encoder, teacher.quant_conv
    torch.testing.assert_close(edit(mixed), edit(teacher), rtol=1e-3, atol=1e-3)
    images = edit(model)
    assert images.shape == (1, 3, 32, 32)
    assert images.isfinite().all()


class TestResuming:
    def test_gives_the_same_bits(self, sd, distilling, tmp_path, assert_same_run, no_pictures):
        options = ("checkpoint.every=2", "ema_decay=0.9", "optimizer.schedule=constant")
        train(distilling(sd, *options, "max_steps=4", name="whole"))
        half = distilling(sd, *options, "max_steps=4", name="half")
        half.max_steps = 2
        train(half)
        train(distilling(sd, *options, "max_steps=4", "resume=auto", name="half"))
        assert_same_run(tmp_path / "whole", tmp_path / "half")

    def test_refuses_another_teacher(self, sd, distilling, tmp_path, no_pictures, save_teacher):
        train(distilling(sd, "checkpoint.every=1", "max_steps=1"))
        other = save_teacher(tmp_path / "other")
        model = AutoencoderKL.from_pretrained(other)
        with torch.no_grad():
            model.encoder.conv_in.bias += 1
        model.save_pretrained(other)
        with pytest.raises(UserError, match="trained with another teacher, or with none"):
            train(distilling(other, "max_steps=2", "resume=auto"))


def test_the_teacher_runs_in_float32_under_autocast(sd):
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    teacher = Teacher(str(sd))
    expected = teacher(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = teacher(image)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(moment.requires_grad for moment in found)


def test_a_litevae_teaches_a_smaller_one(model_folder, distilling, no_pictures):
    config = distilling(model_folder, "max_steps=1")
    model = LiteVAE.from_pretrained(train(config).output_dir / "model")
    theirs, own = load_file(model_folder / WEIGHTS), model.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own if name.startswith("decoder."))
    assert (model.config.scaling_factor, model.config.shift_factor) == (0.5, 0.25)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["loss.teacher_kl=0", "loss.teacher_mean=0", "loss.teacher_logvar=0"], "teacher needs a loss"),
            (["init_decoder=x"], "init_decoder must be empty with a teacher, got x"),
            (["freeze_encoder=true"], "freeze_encoder must be false with a teacher, got true"),
            (["model.kind=vae-small"], "model.kind must be litevae with a teacher, got vae-small"),
            (["loss.adversarial=1"], "loss.adversarial needs a reconstruction loss beside it"),
            (
                ["loss.adversarial=1", "loss.l1=1", "loss.adversarial_weight=adaptive"],
                "loss.adversarial_weight must be constant with a teacher, got adaptive",
            ),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_settings_that_do_not_go_with_a_teacher(self, settings, message):
        with pytest.raises(UserError, match=message):
            load_config("distill", ["teacher=somewhere", "data.train=demo", *settings])

    def test_a_loss_without_a_teacher(self):
        message = "teacher is empty, and loss.teacher_kl compares with it"
        with pytest.raises(UserError, match=message):
            check_run(load_config("distill", ["data.train=demo"]))

    def test_another_decoder_names_the_settings_that_are_needed(self, sd, distilling):
        config = distilling(sd, "model.latent_channels=5", "model.use_1x1_conv=false")
        with pytest.raises(UserError) as caught:
            build_model(config, Teacher(str(sd)))
        assert str(caught.value).endswith("needs model.latent_channels=4 model.use_1x1_conv=true")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"act_fn": "relu"}, "act_fn must be silu"),
            ({"mid_block_add_attention": False}, "mid_block_add_attention must be true"),
            ({"in_channels": 2, "out_channels": 2}, "the model's channels must be 1, 3 or 4, got 2"),
            ({"in_channels": 4}, "the model takes 4 channels and makes 3"),
        ],
        ids=str,
    )
    def test_a_decoder_that_litevae_does_not_have(self, settings, message, tmp_path, save_teacher):
        folder = save_teacher(tmp_path / "teacher", **settings)
        with pytest.raises(UserError, match=f"^teacher: .*{message}"):
            load_teacher(str(folder))

    def test_no_folder(self):
        with pytest.raises(UserError, match=r"^teacher: nowhere: no such folder"):
            load_teacher("nowhere")
