"""The discriminator's part of a step: its start, the ramp of its weight, LeCam and R1."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from litevae.discriminators import DiscriminatorConfig, StyleGANDiscriminator, build_discriminator
from litevae.errors import UserError
from litevae.losses import Objective, gradient_penalty
from litevae.training import train
from litevae.training.adversary import Adversary, Discriminate
from litevae.training.build import build_model
from litevae.training.config import check_training_config
from litevae.training.step import TrainingStep

BATCH, SIZE = 4, 32


def images(seed=1, count=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIZE, SIZE, generator=generator) * 2 - 1


@pytest.mark.parametrize("kind", ["unet", "patchgan", "stylegan"])
def test_logits_of_real_images_do_not_depend_on_generated_ones(kind):
    torch.manual_seed(0)
    discriminator = build_discriminator(DiscriminatorConfig(kind, "S"), SIZE)
    if kind == "unet":
        discriminator.eval()  # in training mode a second pass continues the power iteration
    real, fake = images(1), images(2, BATCH // 2) / 4
    with torch.no_grad():
        expected = [discriminator(each) for each in (real, fake)]
        actual = Discriminate(discriminator)(real, fake)
    torch.testing.assert_close(actual, (*expected, None))


def lines_of(config):
    train(config)
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_discriminator_learns_before_it_counts_and_its_weight_rises(
    tiny, adversarial_settings, no_pictures
):
    lines = lines_of(
        tiny(*adversarial_settings, "discriminator.start=2", "loss.adversarial_ramp=2", "max_steps=5")
    )
    assert ["discriminator" in line for line in lines] == [False, True, True, True, True]
    assert ["adversarial" in line for line in lines] == [False, False, True, True, True]
    weights = [line["weighted/adversarial"] / line["adversarial"] for line in lines[2:]]
    assert weights == pytest.approx([0.05, 0.1, 0.1], rel=1e-5)


def test_while_it_only_learns_the_autoencoder_is_trained_as_without_it(
    tiny, adversarial_settings, no_pictures
):
    def losses(name, *settings):
        return [line["loss"] for line in lines_of(tiny("max_steps=3", *settings, name=name))]

    adversarial = [*adversarial_settings, "loss.adversarial_start=9", "discriminator.start=1"]
    assert losses("with", *adversarial) == losses("later", *adversarial_settings, "loss.adversarial_start=9")


def test_terms_are_weighted_and_r1_makes_up_for_the_steps_without_it(tiny, adversarial_settings):
    parts = 2
    config = tiny(
        *adversarial_settings,
        "loss.adversarial_start=1",
        "discriminator.kind=stylegan",
        "discriminator.lecam=0.5",
        "discriminator.r1=3",
        "discriminator.r1_every=2",
        "optimizer.max_gradient_norm=0",
        f"optimizer.accumulation={parts}",
    )
    torch.manual_seed(0)
    model, discriminator = build_model(config), StyleGANDiscriminator(SIZE, 1)
    discriminator.linear2.weight.data.neg_()  # Images get higher logits than reconstructions, or LeCam's term is 0.
    step = TrainingStep(
        config, Accelerator(cpu=True), model, discriminator, Objective(config.loss), None, lambda _: 0.0
    )
    noise = torch.randn(BATCH, 4, SIZE // 4, SIZE // 4)
    first = step(images(), noise, 1, False).values
    assert first["lecam"] == 0
    assert "r1" not in first
    averages = step.adversary.lecam.averages.clone()
    # The learning rate is 0, so the second step sees the same networks.
    found, captured = step(images(), noise, 2, False).values, {}
    assert found["discriminator"] == pytest.approx(first["discriminator"], rel=1e-4)
    penalties = [gradient_penalty(discriminator, part) for part in images().chunk(parts)]
    assert found["r1"] == pytest.approx(torch.stack(penalties).mean().item(), rel=1e-4)
    assert found["lecam"] > 0
    torch.testing.assert_close(step.adversary.lecam.averages, averages, rtol=1e-4, atol=1e-5)

    adversary = Adversary(config, Objective(config.loss))
    real, fake = (torch.tensor([[0.5], [2.0]]), torch.tensor([[-0.5], [0.25]]))
    loss = adversary.loss([real], [fake], torch.tensor(7.0))
    captured |= {name: term.item() for name, term in loss.weighted.items()}
    # Hinge: ½ (mean relu(1 - r) + mean relu(1 + f)); γ/2 times 2 for every other step.
    assert captured == pytest.approx({"discriminator": 0.5 * (0.25 + 0.875), "lecam": 0.0, "r1": 3 * 7.0})
    assert loss.total.item() == pytest.approx(sum(captured.values()))


def test_a_skipped_step_leaves_the_averages_as_they_are(tiny, adversarial_settings):
    config = tiny(*adversarial_settings, "loss.adversarial_start=1", "discriminator.lecam=1")
    torch.manual_seed(0)
    model, discriminator = build_model(config), build_discriminator(config.discriminator, SIZE)
    step = TrainingStep(
        config, Accelerator(cpu=True), model, discriminator, Objective(config.loss), None, lambda _: 1.0
    )
    noise = torch.randn(BATCH, 4, SIZE // 4, SIZE // 4)
    step(images(), noise, 1, False)
    averages = step.adversary.lecam.averages.clone()
    assert step(images() * torch.nan, noise, 2, False).non_finite
    assert torch.equal(step.adversary.lecam.averages, averages)
    step(images(3), noise, 3, False)
    assert not torch.equal(step.adversary.lecam.averages, averages)


def test_a_resumed_run_has_the_same_averages_and_losses(adversarial_settings, assert_resumes):
    assert_resumes(
        *adversarial_settings, "discriminator.start=1", "discriminator.lecam=0.1", "loss.adversarial_ramp=4"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["loss.adversarial_start=5", "discriminator.start=6"],
            r"discriminator\.start must be loss\.adversarial_start=5 or less, got 6",
        ),
        (["discriminator.r1=1"], r"discriminator\.r1 must be 0 for discriminator\.kind=unet, got 1\.0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        check_training_config(tiny("loss.adversarial=0.1", *settings))
