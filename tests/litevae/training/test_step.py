"""One training step: its gradients, when it is skipped, and gradient accumulation."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from litevae.discriminators import build_discriminator
from litevae.losses import Objective
from litevae.training.build import build_model
from litevae.training.metrics_log import format_progress
from litevae.training.optimization import EMA
from litevae.training.step import Autoencode, TrainingStep

BATCH, SIZE = 4, 32


@pytest.fixture
def make(tiny, adversarial_settings):
    """A function that makes the same `TrainingStep` of a tiny run with a PatchGAN discriminator each time."""

    def make(*overrides, scaler=None):
        config = tiny(
            *adversarial_settings,
            "loss.adversarial_start=1",
            "ema_decay=0.9",
            "optimizer.max_gradient_norm=0",
            *overrides,
        )
        torch.manual_seed(0)
        model = build_model(config)
        discriminator = build_discriminator(config.discriminator, SIZE)
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scaler
        ema = EMA(model, config.ema_decay)
        return TrainingStep(
            config, accelerator, model, discriminator, Objective(config.loss), ema, lambda _: 1.0
        )

    return make


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator) * 2 - 1
    return image, torch.randn(BATCH, 4, SIZE // 4, SIZE // 4, generator=generator)


def snapshot(step):
    """Copies everything that a step can change, except for the random state."""
    return copy.deepcopy(
        {
            "model": step.model.state_dict(),
            "ema": step.ema.model.state_dict(),
            "discriminator": step.discriminator.state_dict(),
            "updates": {"ema": torch.tensor(step.ema.updates)},
            **{
                f"{name} {i}": moments
                for name, optimizer in step.optimizers.items()
                for i, moments in optimizer.optimizer.state_dict()["state"].items()
            },
        }
    )


def changed(before, after):
    return {
        part
        for part in after
        if part not in before
        or any(not torch.equal(value, before[part][name]) for name, value in after[part].items())
    }


def gradients(step, name):
    """Returns the gradients of the first step, from Adam's first moment."""
    optimizer = step.optimizers[name]
    beta = optimizer.optimizer.param_groups[0]["betas"][0]
    return [optimizer.optimizer.state[p]["exp_avg"] / (1 - beta) for p in optimizer.parameters]


def relative_errors(values, expected):
    return [
        ((a - b).norm() / b.norm()).item() for a, b in zip(values, expected, strict=True) if b.norm() > 1e-12
    ]


def test_each_network_gets_the_gradients_of_its_own_loss(make):
    step, reference = make(), make()
    image, noise = inputs()
    step(image, noise, 1, False)

    reconstruction, mean, logvar = Autoencode(reference.model)(image, noise)
    loss = reference.objective.generator(
        image, reconstruction, mean, logvar, step=1, discriminator=reference.discriminator
    )
    own = torch.autograd.grad(loss.total, list(reference.model.parameters()))
    fake = reconstruction.detach()
    logits = reference.discriminator(image), reference.discriminator(fake)
    discriminator_loss = reference.objective.discriminator(*logits)
    others = torch.autograd.grad(discriminator_loss.total, list(reference.discriminator.parameters()))
    for name, expected in (("autoencoder", own), ("discriminator", others)):
        for value, other in zip(gradients(step, name), expected, strict=True):
            torch.testing.assert_close(value, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["litevae", "sd-vae"])
def test_gradient_checkpointing_changes_no_gradient(make, kind):
    """Equation 2 and the gradient ratio differentiate the same graph more than once."""
    settings = ["loss.adversarial_weight=adaptive", "gradient_ratio_every=1", f"model.kind={kind}"]
    if kind == "sd-vae":
        settings += ["model.decoder_norm=group", "model.output_type=image"]
    plain, saving = make(*settings), make(*settings, "gradient_checkpointing=true")
    assert saving.model.is_gradient_checkpointing
    assert not plain.model.is_gradient_checkpointing
    first, second = (step(*inputs(), 1, False).values for step in (plain, saving))
    assert second == pytest.approx(first, rel=1e-5)
    for ours, other in zip(gradients(saving, "autoencoder"), gradients(plain, "autoencoder"), strict=True):
        torch.testing.assert_close(ours, other)


def test_encoder_and_decoder_have_learning_rates_apart(make):
    step = make("optimizer.encoder_learning_rate=0", "optimizer.decoder_learning_rate=1e-3")
    before = snapshot(step)["model"]
    step(*inputs(), 1, False)
    same = {name: torch.equal(value, before[name]) for name, value in step.model.state_dict().items()}
    assert all(equal for name, equal in same.items() if name.startswith("encoder."))
    assert not any(same[f"decoder.{name}.weight"] for name in ("conv_in", "conv_out"))


def test_fused_updates_equal_those_of_the_unfused_optimizer(make):
    """On a CPU, only the fused AdamW ignores the strides of weights, gradients and moments."""
    steps = [make("discriminator.kind=unet") for _ in range(2)]
    for step in steps:
        step.model.to(memory_format=torch.channels_last)
        step.discriminator.to(memory_format=torch.channels_last)
    for optimizer in steps[1].optimizers.values():
        optimizer.optimizer.param_groups[0]["fused"] = False
    image, noise = inputs()
    for step in steps:
        step(image.contiguous(memory_format=torch.channels_last), noise, 1, False)
    for name, optimizer in steps[0].optimizers.items():
        for ours, other in zip(optimizer.parameters, steps[1].optimizers[name].parameters, strict=True):
            torch.testing.assert_close(ours, other)


def test_a_finite_step_changes_everything(make):
    step = make()
    before = snapshot(step)
    outcome = step(*inputs(), 1, False)
    assert (outcome.non_finite, outcome.stop) == (None, False)
    assert {"model", "ema", "discriminator", "updates"} <= changed(before, snapshot(step))
    assert {"discriminator", "discriminator_gradient_norm", "adversarial"} <= outcome.values.keys()


def test_a_share_that_must_not_be_trained_on_changes_nothing(make):
    step = make()
    step(*inputs(), 1, False)
    before = snapshot(step)
    outcome = step(*inputs(2), 2, False, unusable=True)
    assert (outcome.non_finite, outcome.unusable) == (None, True)
    assert changed(before, snapshot(step)) == set()


@pytest.mark.parametrize("source", ["image", "autoencoder's gradient", "discriminator's gradient"])
def test_a_step_that_is_not_finite_changes_nothing(make, source):
    step = make()
    image, noise = inputs()
    step(image, noise, 1, False)  # so that there are moments
    before, handles = snapshot(step), []
    if source == "image":
        bad_image = image.clone()
        bad_image[0, 0, 0, 0] = torch.nan
    else:
        bad_image = image
        network = step.model if source.startswith("auto") else step.discriminator
        handles.append(next(network.parameters()).register_hook(lambda g: g * torch.inf))
    outcome = step(bad_image, noise, 2, False)
    reasons = {
        "image": "the l1 loss is nan",
        "autoencoder's gradient": "the gradient's norm is",
        "discriminator's gradient": "the discriminator's gradient's norm is",
    }
    assert outcome.non_finite is not None
    assert outcome.non_finite.startswith(reasons[source])
    assert changed(before, snapshot(step)) == set()
    for handle in handles:
        handle.remove()
    assert step(image, noise, 3, False).non_finite is None
    assert "model" in changed(before, snapshot(step))


def test_accumulated_gradients_equal_those_of_the_whole_batch(make):
    # PatchGAN would normalise over each part.
    unet = "discriminator.kind=unet"
    whole, parts = make(unet), make(unet, "optimizer.accumulation=2")
    values = [step(*inputs(), 1, False).values for step in (whole, parts)]
    for name, optimizer in whole.optimizers.items():
        # A few hundred operations in a row each round by 2^-24.
        assert max(relative_errors(gradients(parts, name), gradients(whole, name))) < 1e-4, optimizer
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_weighted_terms_equal_those_of_the_objective(make):
    """Weighted terms are means over the parts; the adaptive weight differs between parts."""
    settings = ["discriminator.kind=unet", "loss.adversarial_weight=adaptive"]
    step, reference = make(*settings, "optimizer.accumulation=2"), make(*settings)
    image, noise = inputs()
    values = step(image, noise, 1, False).values

    expected = []
    for part, part_noise in zip(image.chunk(2), noise.chunk(2), strict=True):
        reconstruction, mean, logvar = Autoencode(reference.model)(part, part_noise)
        loss = reference.objective.generator(
            part,
            reconstruction,
            mean,
            logvar,
            step=1,
            discriminator=reference.discriminator,
            last_weight=reference.model.decoder.conv_out.weight,
        )
        (
            reference.discriminator(part),
            reference.discriminator(reconstruction.detach()),
        )  # steps of the spectral norm
        expected.append({f"weighted/{name}": term.item() for name, term in loss.weighted.items()})
    means = {name: (expected[0][name] + expected[1][name]) / 2 for name in expected[0]}
    assert "weighted/adversarial" in means
    found = {name: value for name, value in values.items() if name.startswith("weighted/")}
    assert found == pytest.approx(means, rel=1e-5)
    assert values["loss"] == pytest.approx(sum(found.values()), rel=1e-5)


class TestGradientRatio:
    @pytest.mark.parametrize(("kind", "frozen"), [("constant", "false"), ("adaptive", "true")])
    def test_equals_that_of_two_backward_passes_in_float64(self, make, kind, frozen):
        """The ratio is that of the whole batch, which is processed in two parts."""
        settings = ["loss.l2=0.3", "loss.wavelet=0", "loss.gaussian=0", "loss.kl=0.01"]
        settings += [f"loss.adversarial_weight={kind}", f"freeze_encoder={frozen}", "gradient_ratio_every=1"]
        step = make(*settings, "optimizer.accumulation=2")
        model, discriminator = copy.deepcopy(step.model).double(), copy.deepcopy(step.discriminator).double()
        image, noise = inputs()
        found = step(image, noise, 1, False).values["gradient_ratio"]

        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(name.startswith("decoder") for name in trained) == (frozen == "true")
        sums = {"adversarial": 0, "reconstruction": 0}
        for x, e in zip(image.double().chunk(2), noise.double().chunk(2), strict=True):
            gradients = {}
            for term in ("reconstruction", "adversarial"):
                posterior = model.encode(x).latent_dist
                y = model.decode(posterior.mean + posterior.std * e).sample
                if term == "reconstruction":
                    loss = (x - y).abs().mean() + 0.3 * (x - y).square().mean()
                else:
                    loss = -0.1 * torch.stack([logits.mean() for logits in discriminator(y)]).sum()
                model.zero_grad()
                loss.backward()
                gradients[term] = {name: p.grad.clone() for name, p in trained.items()}
            if kind == "adaptive":
                last = {term: values["decoder.conv_out.weight"] for term, values in gradients.items()}
                # The adversarial loss without its weight, as in Equation 2.
                weight = last["reconstruction"].norm() / (last["adversarial"].norm() / 0.1 + 1e-4)
                gradients["adversarial"] = {
                    name: weight * value for name, value in gradients["adversarial"].items()
                }
            for term, values in gradients.items():
                sums[term] = sums[term] + torch.cat([value.flatten() for value in values.values()])
        expected = (sums["adversarial"].norm() / sums["reconstruction"].norm()).item()
        # A few hundred operations in a row each round by 2^-24.
        assert found == pytest.approx(expected, rel=1e-4)

    def test_changes_nothing(self, make):
        measured, plain = (
            make("gradient_ratio_every=2", "optimizer.accumulation=2"),
            make("optimizer.accumulation=2"),
        )
        for index in (1, 2, 3):
            values, others = (step(*inputs(index), index, False).values for step in (measured, plain))
            assert ("gradient_ratio" in values) == (index == 2)
            values.pop("gradient_ratio", None)
            assert values == others
        assert changed(snapshot(measured), snapshot(plain)) == set()

    def test_is_not_measured_before_the_discriminator_takes_part(self, make):
        step = make("gradient_ratio_every=1", "loss.adversarial_start=2")
        assert "gradient_ratio" not in step(*inputs(), 1, False).values
        assert step(*inputs(), 2, False).values["gradient_ratio"] > 0

    def test_is_left_out_of_the_values_if_it_is_infinite(self, make):
        step = make("gradient_ratio_every=1")
        with torch.no_grad():  # the output of a grey decoder does not depend on its inputs
            step.model.decoder.conv_out.weight.zero_()
            step.model.decoder.conv_out.bias.zero_()
        image, noise = inputs()
        outcome = step(torch.zeros_like(image), noise, 1, False)
        assert outcome.non_finite is None
        assert "gradient_ratio" not in outcome.values


def test_progress_bar_shows_the_unweighted_losses_of_a_step(make):
    values = make("gradient_ratio_every=1")(*inputs(), 1, False).values
    line = {"step": 1, **values, "skipped_steps": 0, "images_per_second": 1.0, "data_wait": 0.0}
    shown = [part.split()[0] for part in format_progress(line).split(", ")][:-2]
    assert shown == ["loss", "l1", "wavelet", "gaussian", "kl", "adversarial", "discriminator"]


class TestLossScaling:
    def test_gradients_are_unscaled_exactly(self, make):
        scaled, plain = make(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16)), make()
        assert scaled(*inputs(), 1, False) == plain(*inputs(), 1, False)
        first, second = snapshot(scaled), snapshot(plain)
        assert changed(first, second) == set()

    def test_the_scale_cancels_in_the_ratio_of_gradients(self, make):
        every = "gradient_ratio_every=1"
        scaled, plain = make(every, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16)), make(every)
        values = [step(*inputs(), 1, False).values for step in (scaled, plain)]
        assert values[0]["gradient_ratio"] == values[1]["gradient_ratio"]

    def test_overflow_skips_the_step_and_lowers_the_scale(self, make):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        step = make(scaler=scaler)
        before = snapshot(step)
        outcome = step(*inputs(), 1, False)
        assert outcome.non_finite is not None
        assert "gradient's norm is" in outcome.non_finite
        assert changed(before, snapshot(step)) == set()
        assert scaler.get_scale() == 2.0**126
        scaler.update(2.0**10)
        assert step(*inputs(), 2, False).non_finite is None


EVERYTHING = [
    f"loss.{name}=0.1"
    for name in ("l1", "l2", "lpips", "st_lpips", "esrgan", "wavelet", "gaussian", "ldl", "kl")
]


@pytest.mark.parametrize(
    "settings",
    [
        ["discriminator.kind=unet", "loss.adversarial_weight=adaptive", *EVERYTHING],
        ["discriminator.kind=patchgan", "loss.adversarial_loss=logistic", *EVERYTHING],
        ["discriminator.kind=stylegan", "discriminator.learning_rate=1e-3", "discriminator.betas=[0,0.99]"],
    ],
    ids=lambda settings: settings[0],
)
def test_every_loss_and_discriminator_trains(make, settings):
    step = make(*settings, "loss.pretrained=false", "channels_last=true")
    outcomes = [step(*inputs(seed), seed, False) for seed in (1, 2)]
    assert [outcome.non_finite for outcome in outcomes] == [None] * 2
    assert len(outcomes[0].values) == 2 * len(step.objective.weights) + 5
    assert step.optimizers["discriminator"].optimizer.param_groups[0]["betas"] == (
        (0.0, 0.99) if "stylegan" in settings[0] else (0.9, 0.99)
    )


def test_compiled_step_equals_the_eager_one(make, monkeypatch):
    original = nn.Module.compile
    # The inductor backend takes minutes; the model's own tests use it.
    monkeypatch.setattr(nn.Module, "compile", lambda module: original(module, backend="aot_eager"))
    adaptive = "loss.adversarial_weight=adaptive"  # it differentiates the graph three times
    # They start at the second step, because the first backward pass is compiled to be run once.
    settings = [adaptive, "loss.adversarial_start=2", "gradient_ratio_every=2"]
    eager, compiled = make(*settings), make(*settings, "compile=true")
    for index in (1, 2):
        values = compiled(*inputs(index), index, False).values
        assert values == pytest.approx(eager(*inputs(index), index, False).values, rel=1e-4)
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()
