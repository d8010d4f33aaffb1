import pytest

from litevae.diffusion.config import DiffusionConfig, load_diffusion_config, shipped_diffusion_configs
from litevae.errors import UserError
from litevae.training.config import shipped_configs

GIVEN = ("model=runs/demo", "data.latents=latents")


def test_each_command_finds_its_own_kind():
    assert shipped_diffusion_configs() == ["ldm-celeba-hq", "ldm-ffhq", "small"]
    assert not set(shipped_diffusion_configs()) & set(shipped_configs())
    for name in shipped_diffusion_configs():
        assert isinstance(load_diffusion_config(name, GIVEN), DiffusionConfig)
    with pytest.raises(
        UserError,
        match=r"no configuration named 'demo': did you mean .*there are: ldm-celeba-hq, ldm-ffhq, small",
    ):
        load_diffusion_config("demo")


def test_ldm_ffhq_has_the_settings_of_ldm():
    """The settings are those of Rombach et al. (2022), Table 12, and of their configuration file."""
    celeba = load_diffusion_config("ldm-celeba-hq", GIVEN)
    assert (celeba.data.batch_size, celeba.optimizer.learning_rate) == (48, 9.6e-5)
    assert celeba.noise.sampler == "ddim"
    config = load_diffusion_config("ldm-ffhq", GIVEN)
    assert config.noise.sampler == "ddpm"
    assert celeba.unet == config.unet
    assert (config.unet.block_out_channels, config.unet.layers_per_block) == ([224, 448, 672, 896], 2)
    assert (config.data.batch_size, config.max_steps, config.optimizer.learning_rate) == (42, 635_000, 8.4e-5)
    noise = config.noise
    assert (noise.kind, noise.steps, noise.beta_start, noise.beta_end) == ("ddpm", 1000, 0.0015, 0.0195)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.train=demo"], "give one of data.latents"),
        (["data.latents="], "give one of data.latents"),
        (["model="], "model is empty"),
        (["data.size=64"], "data.size is only for data.train"),
        (["noise.kind=flow"], "noise.kind must be edm or ddpm"),
        (["noise.sigma=3"], "did you mean 'noise.sigma_m"),
        (["unet.block_out_channels=[48,96]"], "multiples of unet.num_groups=32, got"),
        (["unet.block_out_channels=[32,48]", "unet.num_groups=8"], "multiples of unet.head_channels=32"),
        (["unet.block_out_channels=[]"], "unet.block_out_channels"),
        (["unet.attention_from=4"], "unet.attention_from must be 3 or less"),
        (["noise.kind=ddpm", "sample.steps=2000"], "sample.steps must be noise.steps=1000 or less"),
        (["optimizer.accumulation=3"], "optimizer.accumulation must divide the batch of 32"),
        (["optimizer.betas=[0.9,1]"], "optimizer.betas must all be below 1, got [0.9, 1.0]"),
        (["noise.beta_start=0.5"], "noise.beta_start must be 0.0195 or less"),
        (["noise.beta_end=1"], "noise.beta_end must be 0.999 or less"),
        (["noise.sigma_min=90"], "noise.sigma_min must be 80.0 or less, got 90.0"),
        (["unet.dropout=1"], "unet.dropout must be 0.999 or less"),
        (["unet.block_out_channels=[0,64]"], "unet.block_out_channels must all be 1 or more, got [0, 64]"),
        (["data.latents=", "data.train=demo", "data.size=8"], "data.size must be 16 or more, got 8"),
        (["fid.count=1"], "fid.count must be 2 or more"),
        (["fid.measure=maybe"], "fid.measure must be auto or always or never"),
        (["ema_decay=1"], "ema_decay must be below 1"),
        (["output_dir="], "output_dir is empty"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UserError) as caught:
        load_diffusion_config("small", [*GIVEN, *settings])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
