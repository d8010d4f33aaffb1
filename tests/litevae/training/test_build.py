"""The model of a run: baselines, and weights to start from."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from litevae.errors import UserError
from litevae.models.baseline import SmallEncoderVAE
from litevae.training import load_config, train
from litevae.training.build import build_model, check_run
from litevae_kernels import accelerate_vae

BASELINE = ["model.decoder_norm=group", "model.output_type=image"]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_shipped_recipes_are_those_of_the_paper(tmp_path):
    paper = {
        "imagenet-b": (100_000, 256, "litevae"),
        "imagenet-128-b": (200_000, 128, "litevae"),
        "ffhq-b": (100_000, 256, "litevae"),
        "imagenet-b-tuned": (150_000, 128, "litevae"),
        "imagenet-sd-vae": (100_000, 256, "sd-vae"),
        "imagenet-vae-small": (100_000, 256, "vae-small"),
    }
    for name, (steps, size, kind) in paper.items():
        config = load_config(name)
        assert (config.max_steps, config.data.size, config.model.kind) == (steps, size, kind)
        assert (config.data.batch_size, config.optimizer.learning_rate) == (16, 1e-4)
        assert config.optimizer.betas == (0.5, 0.9)
        assert (config.model.preset, config.output_dir) == ("litevae-b", f"runs/{name}")
    with pytest.raises(UserError, match=r"data\.train is empty"):
        train(load_config("imagenet-b", [f"output_dir={tmp_path}", "loss.lpips=0", "tracker=none"]))


@pytest.mark.parametrize(("kind", "checkpointing"), [("sd-vae", "true"), ("vae-small", "false")])
def test_baselines_train_in_the_same_loop(kind, checkpointing, tiny, tmp_path, no_pictures):
    blocks = "model.block_out_channels=[16,16,16,16]"  # as many blocks as the encoder of VAE-Small
    more = ("max_steps=2", "ema_decay=0.9", f"gradient_checkpointing={checkpointing}")
    config = tiny(f"model.kind={kind}", *BASELINE, blocks, *more)
    assert train(config).psnr > 0
    model = (AutoencoderKL if kind == "sd-vae" else SmallEncoderVAE).from_pretrained(
        tmp_path / "run" / "model"
    )
    assert model.config.latent_channels == 4
    if kind == "vae-small":
        assert parameters(model.encoder) > parameters(model.decoder)
    trained_as = [type(module) for module in build_model(config).modules()]
    accelerate_vae(model)
    assert trained_as == [type(module) for module in model.modules()]


def test_a_number_of_blocks_that_differs_from_the_small_encoders_is_one_line(tiny):
    config = tiny("model.kind=vae-small", *BASELINE, "model.block_out_channels=[16,16,16]")
    with pytest.raises(UserError) as caught:
        build_model(config)
    assert str(caught.value) == (
        "model: block_out_channels must have as many entries as the encoder's, 4, got [16, 16, 16]"
    )


class TestFineTuning:
    @pytest.fixture
    def source(self, tiny, tmp_path):
        model = build_model(tiny())
        model.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    def test_starts_from_a_model_or_a_run_or_a_checkpoint(self, source, tiny, tmp_path):
        expected = load_file(source / "diffusion_pytorch_model.safetensors")
        for name, place in (("model", source), ("run", tmp_path / "folder")):
            if name == "run":
                place.mkdir()
                source.rename(place / "model")
            loaded = build_model(tiny(f"init={place}")).state_dict()
            assert all(torch.equal(loaded[key], value) for key, value in expected.items())

    @pytest.mark.parametrize(
        ("frozen", "learning"),
        [
            ("encoder", ["decoder.conv_in.weight", "decoder.conv_out.weight"]),
            ("decoder", ["encoder.feature_aggregator.conv_out.weight"]),
        ],
    )
    def test_a_frozen_half_stays_and_the_other_learns(
        self, source, tiny, tmp_path, no_pictures, frozen, learning
    ):
        train(tiny(f"init={source}", f"freeze_{frozen}=true", "max_steps=2", "optimizer.warmup_steps=0"))
        before, after = (
            load_file(folder / "diffusion_pytorch_model.safetensors")
            for folder in (source, tmp_path / "run" / "model")
        )
        same = {name: torch.equal(before[name], after[name]) for name in before}
        assert all(same[name] for name in same if name.startswith(f"{frozen}."))
        assert not any(same[name] for name in learning)

    def test_stable_diffusions_vae_is_fine_tuned_by_its_decoder_alone(
        self, tiny_settings, tmp_path, no_pictures, monkeypatch
    ):
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.13025,
            shift_factor=0.25,
        )
        vae.save_pretrained(tmp_path / "sd" / "vae")
        before = {name: value.clone() for name, value in vae.state_dict().items()}
        validation = [each for each in tiny_settings if each.startswith("data.validation=")]
        sizes = ["block_out_channels=[16,16,16]", "layers_per_block=1", "num_groups=4"]
        small = [f"model.{each}" for each in sizes] + ["data.size=32", "data.batch_size=2", "data.workers=0"]
        short = [
            "max_steps=2",
            "optimizer.warmup_steps=0",
            "ema_decay=0",
            "tracker=none",
            "loss.pretrained=false",
        ]
        config = load_config(
            "sd-vae-decoder",
            [
                f"init=diffusers:{tmp_path / 'sd'}",
                "data.train=demo",
                *validation,
                *small,
                *short,
                "precision=fp32",
                f"output_dir={tmp_path / 'run'}",
            ],
        )
        train(config)
        tuned = AutoencoderKL.from_pretrained(tmp_path / "run" / "model")
        for name, value in tuned.state_dict().items():
            frozen = name.startswith(("encoder.", "quant_conv."))
            assert torch.equal(value, before[name]) == frozen or not name.endswith("weight"), name
        assert (tuned.config.scaling_factor, tuned.config.shift_factor) == (0.13025, 0.25)
        image = torch.rand(1, 3, 32, 32) * 2 - 1
        with torch.no_grad():  # latents that exist stay valid
            assert torch.equal(tuned.encode(image).latent_dist.mean, vae.encode(image).latent_dist.mean)

    def test_the_recipe_for_stable_diffusions_vae_needs_its_weights(self):
        config = load_config("sd-vae-decoder", ["data.train=demo"])
        with pytest.raises(
            UserError, match="init is empty, and freeze_encoder=true would keep an untrained encoder"
        ):
            check_run(config)

    @pytest.mark.parametrize("pipeline", [False, True])
    def test_decoder_of_a_diffusers_vae(self, tiny, tmp_path, pipeline):
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
        )
        vae.save_pretrained(tmp_path / "sd" / "vae" if pipeline else tmp_path / "sd")
        config = tiny(f"init_decoder={tmp_path / 'sd'}", *BASELINE, "model.use_1x1_conv=true")
        model, latent = build_model(config), torch.randn(1, 4, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(
                model.decode(latent).sample, vae.decode(latent).sample, rtol=1e-4, atol=1e-4
            )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["init=nowhere"], "nowhere: no such"),
            (["init={empty}"], "there is no config.json"),
            (["init={source}", "model.latent_channels=5"], "latent_channels is 4 there and 5 here"),
            (["init={source}", "model.output_type=image"], "output_type is 'wavelet' there and 'image' here"),
            (["init_decoder=nowhere"], "no such file"),
            (["init_decoder={source}", "model.latent_channels=5"], "another architecture"),
        ],
        ids=lambda value: str(value),
    )
    def test_weights_that_do_not_fit_are_one_line(self, source, tiny, tmp_path, settings, message):
        (tmp_path / "empty").mkdir()
        settings = [each.format(source=source, empty=tmp_path / "empty") for each in settings]
        with pytest.raises(UserError, match=message) as caught:
            build_model(tiny(*settings))
        assert "\n" not in str(caught.value)

    def test_cut_weights_are_one_line(self, source, tiny):
        path = source / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(UserError, match="cannot be read"):
            build_model(tiny(f"init={source}"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.size=100", "data.size must be a multiple of 8, at least 16, got 100"),
        ("data.size=1000000", "data.size must be a whole number from 1 to 65536, got 1000000"),
        ("stages=[{start: 9, size: 100}]", r"stages\[0\].size must be a multiple of 8, at least 16, got 100"),
        ("model.preset=litevae-x", "model: unknown preset 'litevae-x': did you mean"),
        ("data.train=", "data.train is empty"),
    ],
)
def test_what_a_run_would_refuse_is_found_without_one(setting, message):
    check_run(load_config("demo"))
    with pytest.raises(UserError, match=message):
        check_run(load_config("demo", [setting]))


@pytest.mark.parametrize(
    ("settings", "name"),
    [(["data.size=16"], "data.size"), (["stages=[{start: 9, size: 16}]"], r"stages\[0\].size")],
)
def test_images_that_are_too_small_for_a_loss_are_refused(settings, name):
    check_run(load_config("demo", settings))
    with pytest.raises(UserError, match=f"{name} must be 21 or more for loss.st_lpips, got 16"):
        check_run(load_config("demo", [*settings, "loss.st_lpips=1"]))
