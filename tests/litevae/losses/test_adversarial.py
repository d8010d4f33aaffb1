"""Tests of the adversarial losses and their adaptive weight against NumPy, in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from litevae.losses import adaptive_weight, discriminator_loss, generator_loss
from litevae.losses.adversarial import frozen

KINDS = ["hinge", "logistic"]
# Losses of one logit: for the generator, and for the discriminator of a real and of a generated image.
GENERATOR = {"hinge": lambda f: -f, "logistic": lambda f: np.log(1 + np.exp(-f))}
REAL = {"hinge": lambda r: np.maximum(1 - r, 0), "logistic": lambda r: np.log(1 + np.exp(-r))}
FAKE = {"hinge": lambda f: np.maximum(1 + f, 0), "logistic": lambda f: np.log(1 + np.exp(f))}


@pytest.fixture
def logits():
    """Returns logits of the image and of the reconstruction, from one head per pixel and one per image."""
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(
            3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in [(2, 1, 4, 5), (2, 1)]
        )
        for _ in ("real", "fake")
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 2])
class TestFormula:
    def test_generator(self, kind, heads, logits):
        fake = logits[1][:heads]
        expected = sum(GENERATOR[kind](head.numpy()).mean() for head in fake)
        np.testing.assert_allclose(generator_loss(fake, kind), expected, rtol=1e-12)
        assert torch.autograd.gradcheck(
            lambda *fake: generator_loss(fake, kind), [head.requires_grad_() for head in fake]
        )

    def test_discriminator(self, kind, heads, logits):
        real, fake = (each[:heads] for each in logits)
        expected = sum(
            0.5 * (REAL[kind](r.numpy()).mean() + FAKE[kind](f.numpy()).mean())
            for r, f in zip(real, fake, strict=True)
        )
        np.testing.assert_allclose(discriminator_loss(real, fake, kind), expected, rtol=1e-12)
        assert torch.autograd.gradcheck(
            lambda *both: discriminator_loss(both[:heads], both[heads:], kind),
            [head.requires_grad_() for head in (*real, *fake)],
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e4, -1e4])  # ±1: the corners of the hinge
def test_gradient_is_finite_everywhere(kind, value):
    real, fake, generated = (torch.full((2, 1), value, requires_grad=True) for _ in range(3))
    loss = discriminator_loss([real], [fake], kind) + generator_loss([generated], kind)
    loss.backward()
    assert loss.isfinite()
    assert all(tensor.grad.isfinite().all() for tensor in (real, fake, generated))


def test_number_of_heads_must_agree(logits):
    real, fake = logits
    with pytest.raises(ValueError, match="zip"):
        discriminator_loss(real, fake[:1], "hinge")


class TestAdaptiveWeight:
    """The decoder is one matrix, x̂ = W z; the losses are mean (x̂ - x)² and mean c·x̂."""

    def weight(self, x, c, scale=1.0):
        z, w = np.random.default_rng(0).normal(size=(2, 4, 4))
        decoder = torch.tensor(w, requires_grad=True)
        reconstruction = decoder @ torch.tensor(z)
        losses = (reconstruction - torch.tensor(x)).square().mean(), (torch.tensor(c) * reconstruction).mean()
        result = adaptive_weight(losses[0] * scale, losses[1], decoder)
        assert not result.requires_grad
        assert decoder.grad is None
        sum(losses).backward()  # the graph still exists
        norms = [np.linalg.norm(outer @ z.T / 16) for outer in (2 * scale * (w @ z - x), c)]
        return result, norms

    def test_is_the_ratio_of_the_gradients(self):
        x, c = np.random.default_rng(1).normal(size=(2, 4, 4))
        weight, (reconstruction, adversarial) = self.weight(x, c)
        assert weight.item() == pytest.approx(reconstruction / (adversarial + 1e-4), rel=1e-6)

    def test_is_at_most_1e4(self):
        x = np.random.default_rng(1).normal(size=(4, 4))
        weight, (reconstruction, adversarial) = self.weight(x, np.zeros((4, 4)), scale=100.0)
        assert reconstruction / (adversarial + 1e-4) > 1e4
        assert weight == 1e4

    def test_is_finite_where_nothing_has_a_gradient(self):
        decoder = torch.ones(4, requires_grad=True)
        assert adaptive_weight((decoder * 0).sum(), (decoder * 0).sum(), decoder) == 0


class TestFrozen:
    def module(self):
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        module[0].bias.requires_grad_(False)
        return module

    def test_only_the_input_gets_a_gradient(self):
        module, x = self.module(), torch.randn(2, 3, requires_grad=True)
        with frozen(module):
            y = module(x)
        y.sum().backward()  # outside the block, as in the trainer
        assert x.grad.any()
        assert all(parameter.grad is None for parameter in module.parameters())

    def test_trains_as_before_afterwards(self):
        module = self.module()
        before = [parameter.requires_grad for parameter in module.parameters()]
        with pytest.raises(RuntimeError, match="shapes"), frozen(module):
            module(torch.zeros(2, 5))
        assert [parameter.requires_grad for parameter in module.parameters()] == before
