"""Tests of the objective against its terms."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from litevae.errors import UserError
from litevae.losses import (
    TERMS,
    LossConfig,
    Objective,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    kl_loss,
    l1_loss,
    l2_loss,
    ldl_loss,
    teacher_kl_loss,
)

ONLY_L1 = {"wavelet": 0, "gaussian": 0, "kl": 0}
TEACHER_WEIGHTS = {"teacher_kl": 0.5, "teacher_mean": 1.0, "teacher_logvar": 0.25}
SIZE = 24


class Discriminator(nn.Module):
    """A discriminator with two heads, like the U-Net."""

    def __init__(self):
        super().__init__()
        self.pixel = nn.Conv2d(3, 1, 3, padding=1)
        self.image = nn.Linear(3, 1)

    def forward(self, image):
        return self.pixel(image), self.image(image.mean((2, 3)))


@pytest.fixture
def inputs(pair):
    """Returns image, reconstruction, mean and log-variance."""
    return [tensor.float() for shape in [(2, 3, SIZE, SIZE), (2, 4, 2, 2)] for tensor in pair(shape)]


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    return Discriminator()


def test_total_is_the_weighted_sum_of_unweighted_terms(inputs):
    config = LossConfig(l1=1.0, l2=0.75, kl=0.25, wavelet=2.0, gaussian=0.5, ldl=3.0)
    image, reconstruction, mean, logvar = inputs
    ema = image + 0.9 * (reconstruction - image)
    loss = Objective(config).generator(*inputs, step=0, ema_reconstruction=ema)
    assert list(loss.terms) == list(loss.weighted) == ["l1", "l2", "wavelet", "gaussian", "ldl", "kl"]
    torch.testing.assert_close(loss.terms["l1"], l1_loss(image, reconstruction))
    torch.testing.assert_close(loss.terms["l2"], l2_loss(image, reconstruction))
    torch.testing.assert_close(loss.terms["kl"], kl_loss(mean, logvar))
    torch.testing.assert_close(loss.terms["ldl"], ldl_loss(image, reconstruction, ema))
    for name, term in loss.terms.items():
        torch.testing.assert_close(loss.weighted[name], getattr(config, name) * term)
    torch.testing.assert_close(loss.total, sum(loss.weighted.values()))


def test_term_of_weight_zero_is_left_out(inputs, monkeypatch):
    monkeypatch.setattr("litevae.losses.objective.LPIPS", None)  # the network is not built
    objective = Objective(LossConfig(**ONLY_L1))
    assert list(objective.generator(*inputs, step=0).terms) == ["l1"]
    assert (objective.needs_ema, objective.uses_discriminator(10**6)) == (False, False)


def test_gradient_reaches_reconstruction_and_posterior(inputs):
    image, *rest = inputs
    rest = [tensor.requires_grad_() for tensor in rest]
    loss = Objective(LossConfig()).generator(image, *rest, step=0)
    loss.total.backward()
    assert all(tensor.grad.isfinite().all() and tensor.grad.any() for tensor in rest)
    assert not any(term.requires_grad for term in (*loss.terms.values(), *loss.weighted.values()))


class TestPerceptualTerms:
    @pytest.mark.parametrize("name", ["lpips", "st_lpips", "esrgan"])
    def test_of_grey_images_are_those_of_their_rgb_images(self, name):
        config = LossConfig(l1=0, wavelet=0, gaussian=0, kl=0, pretrained=False, **{name: 1.0})
        grey = [torch.rand(2, 1, 32, 32) * 2 - 1 for _ in range(2)]
        moments = [torch.zeros(2, 4, 4, 4)] * 2
        found = Objective(replace(config, repeat_channels=True)).generator(*grey, *moments, step=1)
        rgb = [torch.cat([image] * 3, dim=1) for image in grey]
        torch.testing.assert_close(found.total, Objective(config).generator(*rgb, *moments, step=1).total)

    @pytest.fixture
    def objective(self):
        return Objective(LossConfig(lpips=1.0, st_lpips=0.7, esrgan=0.5, pretrained=False))

    def test_are_those_of_their_modules(self, objective, inputs):
        image, reconstruction, *_ = inputs
        loss = objective.generator(*inputs, step=0)
        for name in ("lpips", "st_lpips", "esrgan"):
            assert loss.terms[name] == objective.networks[name](image, reconstruction)

    def test_networks_are_no_part_of_a_checkpoint(self, objective):
        assert not objective.state_dict()
        assert not list(objective.parameters())
        objective.load_state_dict({})

    def test_missing_weights_name_the_setting(self, monkeypatch):
        def missing(_):
            raise UserError("weights.pth is not there")

        monkeypatch.setattr("litevae.losses.objective.ESRGANLoss", missing)
        with pytest.raises(UserError, match=r"loss\.esrgan: weights\.pth is not there"):
            Objective(LossConfig(esrgan=1.0))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_equals_the_cpu_on_a_gpu(self, inputs, discriminator, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        config = LossConfig(**dict.fromkeys(TERMS, 1.0), pretrained=False)
        losses = []
        for device in ("cpu", "cuda"):
            moved = [tensor.to(device, memory_format=torch.channels_last) for tensor in inputs]
            losses.append(
                Objective(config)
                .to(device)
                .generator(
                    *moved,
                    step=0,
                    discriminator=discriminator.to(device),
                    ema_reconstruction=moved[0] + 0.9 * (moved[1] - moved[0]),
                )
            )
        for name, term in losses[0].terms.items():
            torch.testing.assert_close(losses[1].terms[name].cpu(), term, rtol=1e-4, atol=1e-6)


class TestAdversarial:
    def config(self, **settings):
        return LossConfig(**{**ONLY_L1, "adversarial": 0.5, "adversarial_start": 3, **settings})

    @pytest.mark.parametrize("kind", ["hinge", "logistic"])
    def test_is_added_from_its_start_on(self, kind, inputs, discriminator):
        objective = Objective(self.config(adversarial_loss=kind))
        assert [objective.uses_discriminator(step) for step in (0, 2, 3, 4)] == [False, False, True, True]
        before = objective.generator(*inputs, step=2, discriminator=discriminator)
        after = objective.generator(*inputs, step=3, discriminator=discriminator)
        assert list(before.terms) == ["l1"]
        assert list(after.terms) == ["l1", "adversarial"]
        expected = generator_loss(discriminator(inputs[1]), kind)
        torch.testing.assert_close(after.terms["adversarial"], expected)
        torch.testing.assert_close(after.total, before.total + 0.5 * expected)

    def test_discriminator_takes_no_gradient_in_the_generator_step(self, inputs, discriminator):
        objective = Objective(self.config(l1=1e-12))
        reconstruction = inputs[1].requires_grad_()
        loss = objective.generator(*inputs, step=3, discriminator=discriminator)
        loss.total.backward()
        assert reconstruction.grad.abs().mean() > 1e-6
        assert all(parameter.grad is None for parameter in discriminator.parameters())
        assert all(parameter.requires_grad for parameter in discriminator.parameters())

    @pytest.mark.parametrize("kind", ["hinge", "logistic"])
    def test_discriminator_step(self, kind, inputs, discriminator):
        objective = Objective(self.config(adversarial_loss=kind))
        logits = [discriminator(image.detach()) for image in inputs[:2]]
        loss = objective.discriminator(*logits)
        loss.total.backward()
        expected = discriminator_loss(*logits, kind)
        torch.testing.assert_close(loss.total, expected)
        assert loss.terms == loss.weighted == {"discriminator": loss.total.detach()}
        assert discriminator.pixel.weight.grad.any()
        assert discriminator.image.weight.grad.any()

    def test_adaptive_weight_balances_the_weighted_reconstruction_terms(self, inputs, discriminator):
        config = self.config(adversarial_weight="adaptive", l1=3.0, l2=2.0, kl=100.0)
        decoder = nn.Conv2d(4, 3, 3, padding=1)
        image, _, mean, logvar = inputs

        def decode():
            return decoder(nn.functional.interpolate(mean, size=SIZE))

        loss = Objective(config).generator(
            image,
            decode(),
            mean,
            logvar,
            step=3,
            discriminator=discriminator,
            last_weight=decoder.weight,
        )
        x = decode()
        ratio = adaptive_weight(
            3 * l1_loss(image, x) + 2 * l2_loss(image, x),
            generator_loss(discriminator(x), "hinge"),
            decoder.weight,
        )
        torch.testing.assert_close(loss.weighted["adversarial"], 0.5 * ratio * loss.terms["adversarial"])
        loss.total.backward()
        gradient = torch.autograd.grad(
            3 * l1_loss(image, x)
            + 2 * l2_loss(image, x)
            + 0.5 * ratio * generator_loss(discriminator(x), "hinge"),
            decoder.weight,
        )[0]
        torch.testing.assert_close(decoder.weight.grad, gradient)

    def test_distributed_discriminator_trains_on_after_a_generator_step(self, inputs, discriminator):
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(discriminator)
            objective = Objective(self.config())
            image, reconstruction = inputs[0], inputs[1].requires_grad_()
            for _ in range(2):
                objective.generator(*inputs, step=3, discriminator=wrapped).total.backward()
                assert all(parameter.grad is None for parameter in discriminator.parameters())
                logits = [head.chunk(2) for head in wrapped(torch.cat([image, reconstruction.detach()]))]
                objective.discriminator(*zip(*logits, strict=True)).total.backward()
                assert discriminator.pixel.weight.grad.any()
                assert discriminator.image.weight.grad.any()
                discriminator.zero_grad()
        finally:
            torch.distributed.destroy_process_group()

    def test_what_is_missing_is_named(self, inputs, discriminator):
        objective = Objective(self.config(adversarial_weight="adaptive", ldl=1.0))
        assert objective.needs_ema
        image = inputs[0]
        with pytest.raises(ValueError, match="need ema_reconstruction"):
            objective.generator(*inputs, step=0)
        with pytest.raises(ValueError, match="need discriminator"):
            objective.generator(*inputs, step=3, ema_reconstruction=image)
        with pytest.raises(ValueError, match="need last_weight"):
            objective.generator(*inputs, step=3, ema_reconstruction=image, discriminator=discriminator)

    def test_logits_without_heads_are_refused(self, inputs):
        objective = Objective(self.config())
        with pytest.raises(TypeError, match="tuple"):
            objective.generator(*inputs, step=3, discriminator=nn.Conv2d(3, 1, 1))
        with pytest.raises(TypeError, match="tuple"):
            objective.discriminator(torch.zeros(2, 1), torch.zeros(2, 1))


def test_is_float32_under_autocast(inputs, discriminator):
    objective = Objective(LossConfig(adversarial=0.5, adversarial_loss="logistic"))
    half = [tensor.bfloat16() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(half[1].float())
        loss = objective.generator(*half, step=0, discriminator=discriminator)
        own = objective.discriminator(logits, logits)
    assert logits[0].dtype == torch.bfloat16  # the discriminator runs under autocast
    logits = [head.float() for head in logits]
    assert loss.terms["adversarial"] == generator_loss(logits, "logistic")
    assert own.total == discriminator_loss(logits, logits, "logistic")
    expected = Objective(LossConfig()).generator(*(tensor.float() for tensor in half), step=0)
    assert {name: loss.terms[name] for name in expected.terms} == expected.terms
    assert loss.total.dtype == own.total.dtype == torch.float32


def test_compiles_as_one_graph(inputs):
    objective = Objective(LossConfig(l2=1.0))
    compiled = torch.compile(objective.generator, fullgraph=True, backend="eager")
    expected = objective.generator(*inputs, step=1)
    torch.testing.assert_close(compiled(*inputs, step=1).total, expected.total)


def test_needs_a_reconstruction_term():
    with pytest.raises(ValueError, match="l1, l2, lpips"):
        Objective(LossConfig(**{**ONLY_L1, "l1": 0, "kl": 1}))


class TestTeacher:
    def test_compares_posteriors_without_a_reconstruction(self, inputs):
        image, _, mean, logvar = inputs
        objective = Objective(LossConfig(**{**ONLY_L1, "l1": 0}, **TEACHER_WEIGHTS))
        assert not objective.needs_reconstruction
        target = mean + 1, logvar - 2
        loss = objective.generator(image, None, mean, logvar, step=0, teacher=target)
        expected = {
            "teacher_kl": teacher_kl_loss(mean, logvar, *target),
            "teacher_mean": torch.tensor(1.0),
            "teacher_logvar": torch.tensor(2.0),
        }
        torch.testing.assert_close(loss.terms, expected)
        torch.testing.assert_close(
            loss.total, sum(TEACHER_WEIGHTS[name] * term for name, term in expected.items())
        )

    def test_inputs_that_are_missing_are_named(self, inputs):
        image, reconstruction, mean, logvar = inputs
        objective = Objective(LossConfig(**TEACHER_WEIGHTS))
        assert objective.needs_reconstruction
        with pytest.raises(ValueError, match="need teacher, got None"):
            objective.generator(image, reconstruction, mean, logvar, step=0)
        with pytest.raises(ValueError, match="need reconstruction, got None"):
            objective.generator(image, None, mean, logvar, step=0, teacher=(mean, logvar))
