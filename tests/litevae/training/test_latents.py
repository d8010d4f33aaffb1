"""Changes of latents in training: EQ-VAE's, noise, and a fixed variance."""

import math

import pytest
import torch
from accelerate import Accelerator
from torchvision.transforms.functional import InterpolationMode, resize, rotate

from litevae.discriminators import StyleGANDiscriminator
from litevae.errors import UserError
from litevae.losses import LossConfig, Objective, least_side
from litevae.models.loading import load_model
from litevae.training.build import build_model
from litevae.training.latents import Change, draw_change, sides_to_draw
from litevae.training.sections import LatentConfig
from litevae.training.step import Autoencode, TrainingStep

LIKE = torch.zeros(4, 2, 6, 6)


def draw(config, count=1, index=0, seed=0, like=LIKE):
    torch.manual_seed(seed)
    return draw_change(config, like, count, index, [2, 3, 4, 6])


def test_a_change_is_torchvisions_resizing_and_rotation_of_latent_and_image_alike():
    torch.manual_seed(0)
    latent, image = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 32, 32)
    for turns in range(4):
        change = Change(side=6, turns=turns)
        for given, found, side in (
            (latent, change.latent(latent), 6),
            (image, change.picture(image, 4), 24),
        ):
            expected = rotate(
                resize(given, [side, side], InterpolationMode.BILINEAR, antialias=True), 90.0 * turns
            )
            torch.testing.assert_close(found, expected)
    assert Change().latent(latent) is latent


def test_probability_scale_and_turns_of_the_draws():
    config = LatentConfig(equivariance=0.25)
    changes = [draw(config, seed=seed) for seed in range(400)]
    changed = [change for change in changes if change.side is not None]
    assert 60 < len(changed) < 140  # 100 expected, standard deviation 8.7
    assert {change.side for change in changed} == {2, 3, 4, 6}
    assert {change.turns for change in changed} == {0, 1, 2, 3}
    assert all(change.turns == 0 for change in changes if change.side is None)


@pytest.mark.parametrize(
    ("strength", "moments"),
    # Second and fourth moments of strength · N(0, 1), whose own second and fourth moments are 1 and 3.
    [("fixed", (1, 3)), ("half_normal", (1, 9)), ("uniform", (1 / 3, 3 / 5))],
)
def test_noise_has_the_moments_of_its_strength(strength, moments):
    config = LatentConfig(noise=0.5, noise_strength=strength)
    noise = draw(config, like=torch.zeros(40_000, 1, 2, 2)).noise / 0.5
    for order, expected in zip((2, 4), moments, strict=True):
        assert (noise**order).mean().item() == pytest.approx(expected, rel=0.05)
    if strength == "fixed":
        return
    spread = noise.square().mean((1, 2, 3))
    assert spread.std() > 0.4 * spread.mean()  # the strength is drawn once per image


def test_processes_draw_the_change_of_the_whole_batch():
    config = LatentConfig(noise=1.0, noise_strength="uniform", equivariance=0.5)
    whole = draw(config, seed=3)
    parts = [draw(config, 2, index, seed=3, like=LIKE[:2]) for index in range(2)]
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert {(part.side, part.turns) for part in parts} == {(whole.side, whole.turns)}
    assert torch.equal(torch.cat([part.noise for part in whole.chunk(2)]), whole.noise)


def test_nothing_is_drawn_if_all_is_off():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert draw_change(LatentConfig(), LIKE, 1, 0, [6]) == Change()
    assert torch.equal(torch.get_rng_state(), before)


def test_sides_suit_the_losses_and_the_discriminator():
    assert sides_to_draw(8, 8, 0.25, None) == [2, 3, 4, 5, 6, 7, 8]
    assert sides_to_draw(8, 4, 0.25, None) == [4, 5, 6, 7, 8]  # 16 pixels at least
    assert sides_to_draw(8, 4, 0.25, None, least_side(LossConfig(st_lpips=1.0))) == [6, 7, 8]
    assert sides_to_draw(16, 8, 0.25, StyleGANDiscriminator(128, 1)) == [
        4,
        8,
        12,
        16,
    ]  # multiples of 32 pixels


def test_the_step_compares_the_decoded_change_with_the_changed_image(tiny):
    config = tiny("latent.equivariance=1", "loss.wavelet=0", "loss.gaussian=0", "loss.kl=0")
    torch.manual_seed(0)
    model = build_model(config)
    step = TrainingStep(
        config, Accelerator(cpu=True), model, None, Objective(config.loss), None, lambda _: 0.0
    )
    image, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    change = Change(0.5 * torch.randn(2, 4, 8, 8), 6, 1)
    with torch.no_grad():
        posterior = model.encode(image).latent_dist
        latent = posterior.mean + posterior.std * noise + change.noise
        small = resize(latent, [6, 6], InterpolationMode.BILINEAR, antialias=True)
        decoded = model.decode(small.transpose(2, 3).flip(2)).sample  # a quarter turn to the left
    target = resize(image, [24, 24], InterpolationMode.BILINEAR, antialias=True).transpose(2, 3).flip(2)
    found = step(image, noise, 1, False, change=change).values["l1"]
    assert found == pytest.approx((decoded - target).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", [[], ["model.use_1x1_conv=true"], ["model.kind=sd-vae"]], ids=str)
def test_a_fixed_variance_is_what_encode_reports_before_and_after_training(tiny, kind):
    baseline = (
        ["model.decoder_norm=group", "model.output_type=image"] if kind == ["model.kind=sd-vae"] else []
    )
    config = tiny(
        *kind, *baseline, "latent.std=0.3", "optimizer.weight_decay=10", "loss.kl=0.1", "ema_decay=0.9"
    )
    torch.manual_seed(0)
    model = build_model(config)
    step = TrainingStep(
        config, Accelerator(cpu=True), model, None, Objective(config.loss), None, lambda _: 1.0
    )
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    before = model.encode(image).latent_dist
    noise = torch.randn_like(before.mean)
    _, mean, logvar = Autoencode(model, learn_variance=False)(image, noise)
    assert mean.requires_grad
    assert not logvar.requires_grad
    values = step(image, noise, 1, False).values
    expected = 0.5 * (before.mean.square() + 0.09 - 1 - math.log(0.09)).mean().item()
    assert values["kl"] == pytest.approx(expected, rel=1e-5)
    after = model.encode(image).latent_dist
    torch.testing.assert_close(after.logvar, torch.full_like(after.logvar, 2 * math.log(0.3)))
    assert not torch.equal(before.mean, after.mean)


def test_a_run_with_all_of_them_resumes_to_the_same_bits(adversarial_settings, assert_resumes, tmp_path):
    assert_resumes(
        *adversarial_settings,
        "latent.std=0.1",
        "latent.noise=0.2",
        "latent.noise_strength=half_normal",
        "latent.equivariance=0.7",
        "optimizer.accumulation=2",
        "ema_decay=0.9",
        "loss.ldl=1",
    )
    model = load_model(tmp_path / "run")
    logvar = model.encode(torch.zeros(1, 3, 32, 32)).latent_dist.logvar
    torch.testing.assert_close(logvar, torch.full_like(logvar, 2 * math.log(0.1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["freeze_encoder=true"], "freeze_encoder must be false with latent.std"),
        (["model.encoder_type=dwt", "loss.kl=0"], "model.encoder_type must be learned with latent.std"),
        (["teacher=sd", "loss.teacher_kl=1"], "teacher must be empty with latent.std"),
    ],
)
def test_a_fixed_variance_needs_an_encoder_that_is_trained(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        tiny("latent.std=1", *settings)
