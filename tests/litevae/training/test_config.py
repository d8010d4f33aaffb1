import pytest
from omegaconf import OmegaConf

from litevae.data.pixels import PixelFormat
from litevae.errors import UserError
from litevae.training.config import (
    Config,
    Stage,
    list_stages,
    load_config,
    shipped_configs,
    with_steps,
)


def fails(*overrides, name="demo"):
    with pytest.raises(UserError) as caught:
        load_config(name, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_config_loads(name):
    assert isinstance(load_config(name), Config)


def test_overrides_replace_the_file_in_order():
    config = load_config("demo", ["max_steps=7", "data.size=16", "loss.kl=1e-3", "max_steps=8"])
    assert (config.max_steps, config.data.size, config.loss.kl) == (8, 16, 1e-3)
    assert config.model.preset == "litevae-s"
    assert load_config("demo", ["model={latent_channels: 5}"]).model.latent_channels == 5
    assert load_config("demo", ["model.block_out_channels=[16,16]"]).model.block_out_channels == [16, 16]


def test_saved_config_loads_to_the_same(tmp_path):
    config = load_config("demo", ["max_steps=7"])
    OmegaConf.save(OmegaConf.structured(config), tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("max_step", "max_steps"),
        ("loss.wavelets", "loss.wavelet"),
        ("batch_size", "data.batch_size"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("max_steps.x", "max_steps"),
        ("--max-steps", "max_steps"),
    ],
)
def test_unknown_key_names_the_nearest(key, nearest):
    message = fails(f"{key}=1")
    assert repr(key) in message
    assert f"did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_steps=abc", "max_steps must be a whole number"),
        ("max_steps=1.5", "max_steps must be a whole number"),
        ("max_steps=", "max_steps must be a whole number"),
        ("max_steps={x: 1}", "max_steps must be a whole number"),
        ("loss.kl=much", "loss.kl must be a number"),
        ("channels_last=perhaps", "channels_last must be true or false"),
        ("precision=fp8", "precision must be auto or fp32 or bf16 or fp16"),
        ("model=litevae-s", "model must be set key by key, such as model.kind=..."),
        ("model.block_out_channels=3", "model.block_out_channels must be a list"),
        ("model.block_out_channels=[1,x]", "model.block_out_channels must be a list"),
        ("loss.adversarial_loss=wgan", "loss.adversarial_loss must be hinge or logistic"),
        ("loss.adversarial_weight=0.5", "loss.adversarial_weight must be constant or adaptive"),
        ("loss.adversarial_start=soon", "loss.adversarial_start must be a whole number"),
        ("optimizer.betas=[0.5]", "optimizer.betas must be 2 values"),
        ("max_steps=[1", "max_steps must be a whole number"),
        (
            "stages=3",
            "stages must be a list such as [{start: 100001, size: 256}], each with the settings start",
        ),
        ("stages=[{begin: 3}]", "stages must be a list such as"),
        ("stages=[{start: soon}]", "stages must be a list such as"),
        ("discriminator.kind=dcgan", "discriminator.kind must be unet or patchgan or stylegan"),
        ("discriminator.betas=[1]", "discriminator.betas must be 2 values such as [0.5,0.9], each a number"),
        ("discriminator.learning_rate=fast", "discriminator.learning_rate must be a number"),
        ("tracker=comet", "tracker must be tensorboard or wandb or none"),
        ("model.kind=vqgan", "model.kind must be litevae or sd-vae or vae-small"),
    ],
)
def test_wrong_type_names_key_and_type(override, expected):
    assert expected in fails(override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_steps=0", "max_steps must be 1 or more, got 0"),
        ("loss.kl=-1", "loss.kl must be 0 or more"),
        ("loss.kl=nan", "loss.kl must be 0 or more"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate"),
        ("optimizer.betas=[0.5,1]", "optimizer.betas"),
        ("loss.lpips=inf", "loss.lpips must be 0 or more"),
        ("loss.adversarial=-0.5", "loss.adversarial must be 0 or more"),
        ("loss.adversarial_start=-1", "loss.adversarial_start must be 0 or more"),
        ("loss={l1: 0, l2: 0, wavelet: 0, gaussian: 0, adversarial: 1}", "nothing to train for"),
        ("output_dir=", "output_dir"),
        ("stages=[{start: 1, size: 32}]", "stages[0].start must be above 1, got 1"),
        ("stages=[{start: 9, size: 32}, {start: 9, size: 64}]", "stages[1].start must be above 9, got 9"),
        ("stages=[{start: 9, size: 8}]", "stages[0].size must be 16 or more"),
        ("stages=[{start: 9, size: 32, batch_size: 0}]", "stages[0].batch_size must be 1 or more, got 0"),
        (
            "stages=[{start: 9, batch_size: 100001}]",
            "stages[0].batch_size must be 100000 or less, got 100001",
        ),
        ("optimizer.accumulation=3", "optimizer.accumulation must divide the batch of 8, got 3"),
        ("discriminator.betas=[0,1]", "discriminator.betas must all be below 1, got [0.0, 1.0]"),
        ("discriminator.learning_rate=-1", "discriminator.learning_rate must be 0 or more, got -1"),
        ("discriminator.learning_rate=1e7", "discriminator.learning_rate must be 1000000.0 or less"),
        ("optimizer.learning_rate=1e7", "optimizer.learning_rate must be 1000000.0 or less"),
        ("seed=4294967296", "seed must be 4294967295 or less"),
        ("model.block_out_channels=[]", "model.block_out_channels is empty"),
        ("loss.ldl=1", "ema_decay must be above 0"),
        ("gradient_ratio_every=-1", "gradient_ratio_every must be 0 or more"),
        ("gradient_ratio_every=5", "loss.adversarial must be above 0"),
        ("ema_decay=1", "ema_decay must be below 1"),
        ("model.kind=sd-vae", "model.decoder_norm must be group for model.kind=sd-vae"),
        ("model.encoder_type=fft", "model.encoder_type must be learned or dwt or dwt-2"),
        ("model.extractor=resnet", "model.extractor must be unet or nafnet"),
        ("model.aggregator=mlp", "model.aggregator must be unet or vit"),
        ("model.encoder_norm=none", "model.encoder_norm must be group or smc"),
        ("model.finest_level=0", "model.finest_level must be 1 or more, got 0"),
        ("model.shared_extractor=maybe", "model.shared_extractor must be true or false"),
        ("model.encoder_type=dwt", "loss.kl must be 0 for model.encoder_type=dwt"),
        ("data.channels=2", "data.channels must be 1, 3 or 4, got 2"),
        ("data.channels=5", "data.channels must be 4 or less"),
        ("data.value_range=[5,1]", "data.value_range must be two numbers, the lower first"),
        ("data.value_range=[0,.inf]", "data.value_range must be two numbers, the lower first"),
        ("data.value_range=7", "data.value_range must be 2 values"),
        ("max_bad_steps=0", "max_bad_steps must be 1 or more"),
        ("checkpoint.keep=0", "checkpoint.keep must be 1 or more"),
        ("max_steps", "'max_steps' is not a setting"),
        ("=3", "is not a setting"),
        ("max_steps=${nowhere}", "nowhere"),
    ],
)
def test_invalid_value_is_refused(override, expected):
    assert expected in fails(override)


def test_unknown_config_names_the_nearest():
    assert "did you mean 'demo'?" in fails(name="dmeo")


def test_stages_follow_each_other():
    settings = [
        "max_steps=20",
        "data.size=32",
        "data.batch_size=4",
        "stages=[{start: 6, size: 48}, {start: 11, size: 64, batch_size: 2}]",
    ]
    stages = [Stage(1, 5, 32, 4, 0), Stage(6, 10, 48, 4, 20), Stage(11, 20, 64, 2, 40)]
    assert list_stages(load_config("demo", settings)) == stages
    # max_steps ends the run at any stage
    assert list_stages(load_config("demo", [*settings, "max_steps=7"])) == [stages[0], Stage(6, 7, 48, 4, 20)]
    tuned = list_stages(load_config("imagenet-b-tuned"))
    assert [(stage.last - stage.first + 1, stage.size) for stage in tuned] == [(100_000, 128), (50_000, 256)]


def test_a_stage_keeps_what_it_does_not_set():
    config = load_config(
        "demo",
        [
            "max_steps=9",
            "data.size=32",
            "data.batch_size=4",
            "stages=[{start: 3, batch_size: 8}, {start: 6, size: 48}]",
        ],
    )
    assert [(stage.size, stage.batch_size) for stage in list_stages(config)] == [(32, 4), (32, 8), (48, 8)]


@pytest.mark.parametrize(
    ("setting", "only"),
    [
        ("encoder_type=dwt", "learned"),
        ("extractor=nafnet", "unet"),
        ("shared_extractor=true", "false"),
        ("aggregator=vit", "unet"),
        ("finest_level=2", "1"),
        ("encoder_norm=smc", "group"),
    ],
)
def test_only_litevae_has_variants(setting, only):
    baseline = ["model.kind=sd-vae", "model.decoder_norm=group", "model.output_type=image"]
    load_config("demo", baseline)
    message = f"model.{setting.split('=')[0]} must be {only} for model.kind=sd-vae"
    with pytest.raises(UserError, match=message):
        load_config("demo", [*baseline, f"model.{setting}"])


def test_vit_is_trained_at_only_one_size():
    vit = ["model.aggregator=vit", "data.size=64"]
    load_config("demo", [*vit, "stages=[{start: 9, batch_size: 8}, {start: 20, size: 64}]"])
    with pytest.raises(UserError, match=r"stages\[0\]\.size must be data\.size, 64, .* got 128"):
        load_config("demo", [*vit, "stages=[{start: 9, size: 128}]"])


def test_without_a_file_there_are_the_defaults():
    assert load_config(None) == Config()
    assert load_config(None, ["model.finest_level=2"]).model.finest_level == 2


def test_a_ratio_that_is_never_measured_is_refused():
    settings = ["loss.adversarial=0.1", "loss.adversarial_start=6", "gradient_ratio_every=5"]
    with pytest.raises(
        UserError,
        match=r"gradient_ratio_every=5 never comes between loss\.adversarial_start=6 and max_steps=9",
    ):
        load_config("demo", [*settings, "max_steps=9"])
    assert load_config("demo", [*settings, "max_steps=10"]).gradient_ratio_every == 5


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["max_epochs=2"], 7),  # 20 crops in batches of 3
        (["max_epochs=0.5"], 2),
        (["max_epochs=0.001"], 1),
        # 2 steps of 3 crops; then 4 crops per step for the other 14
        (["max_epochs=2", "stages=[{start: 3, batch_size: 4}]"], 6),
        (["max_epochs=2", "stages=[{start: 30, batch_size: 4}]"], 7),
        (["max_steps=9"], 9),
    ],
)
def test_epochs_become_steps(settings, steps):
    config = load_config("demo", ["data.batch_size=3", *settings])
    resolved = with_steps(config, 10)
    assert resolved.max_steps == steps
    assert sum((s.last - s.first + 1) * s.batch_size for s in list_stages(resolved)[:-1]) < 20


def test_epochs_must_include_the_gradient_ratio_and_not_be_endless():
    ratio = ["loss.adversarial=1", "loss.adversarial_start=5", "gradient_ratio_every=5", "data.batch_size=1"]
    config = load_config("demo", ["max_epochs=1", "max_steps=1", *ratio])
    with pytest.raises(UserError, match=r"gradient_ratio_every=5 never comes .* max_steps=4"):
        with_steps(config, 4)
    with pytest.raises(UserError, match="more than 1000000000 steps"):
        with_steps(config, 10**10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["freeze_encoder=true", "freeze_decoder=true"], "must not both be true"),
        (
            ["freeze_decoder=true", "loss.adversarial=1", "loss.adversarial_weight=adaptive"],
            "adversarial_weight must be constant with freeze_decoder=true, got adaptive",
        ),
    ],
)
def test_what_is_frozen_must_leave_something_to_train(settings, message):
    with pytest.raises(UserError, match=message):
        load_config("demo", settings)


SD_VAE = ["model.kind=sd-vae", "model.decoder_norm=group", "model.output_type=image"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["data.channels=1", "loss.lpips=1"],
            "loss.lpips compares RGB images: its weight must be 0 for data.channels=1",
        ),
        (["data.channels=4", "loss.esrgan=1", "loss.repeat_channels=true"], "got data.channels=4"),
        (["loss.repeat_channels=true"], "loss.repeat_channels must be false unless data.channels=1"),
        (["data.channels=4", "loss.esrgan=1"], "must be 0 for data.channels=4"),
        (
            ["data.channels=1", "validate_metrics=[lpips]"],
            "validate_metrics: lpips compares RGB images of 8 bits",
        ),
        (["data.value_range=[0,1]", "validate_metrics=[rfid]"], "validate_metrics: rfid compares RGB images"),
        (
            [*SD_VAE, "data.value_range=[0,1]"],
            "data.value_range must be null for model.kind=sd-vae, whose config.json cannot hold it, got [0.0, 1.0]",
        ),
    ],
)
def test_images_that_losses_metrics_or_the_model_do_not_take(settings, message):
    assert message in fails(*settings)


def test_lpips_takes_grey_images_whose_channel_is_repeated():
    config = load_config("demo", ["data.channels=1", "loss.lpips=1", "loss.repeat_channels=true"])
    assert config.data.pixel_format == PixelFormat(1)
