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

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def take_step(tiny, adversarial_settings):
    """Returns a function that takes the same first step of a tiny run on a device."""

    def take(device: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = tiny(*adversarial_settings, "loss.adversarial_start=1", "optimizer.max_gradient_norm=0")
        torch.manual_seed(0)
        model = build_model(config)
        discriminator = build_discriminator(config.discriminator, SIZE)
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
    assert values == pytest.approx(expected_values, rel=1e-3)
    assert gradients.keys() == expected.keys() == {"autoencoder", "discriminator"}
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-3 * expected[name].norm(), name
