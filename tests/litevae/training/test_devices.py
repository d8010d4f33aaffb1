"""A training step on a GPU gives the gradients of the CPU's."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from litevae.discriminators import build_discriminator
from litevae.losses import Objective
from litevae.training.build import build_model
from litevae.training.optimization import EMA
from litevae.training.step import TrainingStep

SIZE = 32
# A sum of K products in another order differs by about sqrt(K) units in the last place. The convolutions of the tiny
# model and of the discriminator sum at most 9 x 512 products.
ROUNDING = (9 * 512) ** 0.5 * torch.finfo(torch.float32).eps

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def take_step(tiny, adversarial_settings):
    """Returns a function that takes the same first step of a tiny run on a device.

    Its argument `error` is the relative error of the weights.
    """

    def take(device: str, error: float = 0.0) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = tiny(*adversarial_settings, "loss.adversarial_start=1", "optimizer.max_gradient_norm=0")
        torch.manual_seed(0)
        model = build_model(config)
        discriminator = build_discriminator(config.discriminator, SIZE)
        for network in (model, discriminator):
            for weight in network.parameters():
                weight.data *= 1 + error * torch.randn_like(weight)
        torch.manual_seed(1)
        image = torch.rand(4, 3, SIZE, SIZE) * 2 - 1
        noise = torch.randn(4, 4, SIZE // 4, SIZE // 4)
        model, discriminator, objective = (
            x.to(device) for x in (model, discriminator, Objective(config.loss))
        )
        accelerator = Accelerator(cpu=device == "cpu")
        assert accelerator.device.type == device
        step = TrainingStep(
            config, accelerator, model, discriminator, objective, EMA(model, config.ema_decay), lambda _: 1.0
        )
        outcome = step(image.to(device), noise.to(device), 1, False)
        gradients = {
            name: torch.cat([optimizer.optimizer.state[p]["exp_avg"].flatten() for p in optimizer.parameters])
            for name, optimizer in step.optimizers.items()
        }
        return outcome.values, {name: gradient.cpu() for name, gradient in gradients.items()}

    yield take
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_training_step_equals_the_cpu_s(take_step, monkeypatch, device):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    values, gradients = take_step(device)
    expected_values, expected = take_step("cpu")
    # How much roundings change the step, by rounding errors of each layer's size in its weights.
    rounded_values, rounded = take_step("cpu", ROUNDING)
    change = max(abs(rounded_values[name] / value - 1) for name, value in expected_values.items() if value)
    assert 0 < change < 1e-2  # or the comparison would prove nothing
    assert values == pytest.approx(expected_values, rel=3 * change)
    assert gradients.keys() == expected.keys() == {"autoencoder", "discriminator"}
    for name, gradient in gradients.items():
        allowed = 3 * (rounded[name] - expected[name]).norm()
        assert 0 < allowed < 5e-2 * expected[name].norm()
        assert (gradient - expected[name]).norm() <= allowed, name
