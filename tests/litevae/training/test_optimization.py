"""The average of the weights, the optimizer and the learning-rate schedule."""

import io
import sys

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import nn

from litevae.errors import UserError
from litevae.training.optimization import EMA, NetworkOptimizer, learning_rate_factor
from litevae.training.sections import OptimizerConfig


def settings(**changes):
    return OptimizerConfig(**{"learning_rate": 0.1, "betas": (0.9, 0.99), **changes})


def test_ema_equals_the_average_of_diffusers():
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    ours, theirs = EMA(model, 0.7), EMAModel(model.parameters(), decay=0.7)
    for index in range(40):
        if index:  # the first update of diffusers' average copies the weights
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += torch.randn_like(parameter)
        ours.update(model)
        theirs.step(model.parameters())
    for mine, other in zip(ours.model.parameters(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(mine, other)
        assert not mine.requires_grad


def test_optimizer_continues_from_moments_in_another_memory_format():
    def make():
        torch.manual_seed(0)
        network = nn.Conv2d(4, 5, 3).to(memory_format=torch.channels_last)
        return NetworkOptimizer(network, settings(weight_decay=0.01), lambda _: 1.0)

    def update(optimizer, seed):
        images = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.network(images).square().sum().backward()
        optimizer.update(seed, None)
        optimizer.optimizer.zero_grad()

    first, second = make(), make()
    update(first, 1)
    second.network.load_state_dict(first.network.state_dict())
    state = {
        index: {key: value.clone(memory_format=torch.contiguous_format) for key, value in moments.items()}
        for index, moments in first.optimizer.state_dict()["state"].items()
    }
    assert second.load_moments(state)
    for each in (first, second):
        update(each, 2)
    assert all(map(torch.equal, first.parameters, second.parameters))


def test_moments_of_other_weights_are_refused():
    first, second = (NetworkOptimizer(nn.Linear(3, n), settings(), lambda _: 1.0) for n in (2, 4))
    first.network(torch.ones(1, 3)).sum().backward()
    first.update(1, None)
    assert not second.load_moments(first.moments())
    assert second.moments() == {}
    assert second.load_moments({})  # as in a checkpoint from before the first update


def test_update_sets_the_learning_rate_of_its_step():
    optimizer = NetworkOptimizer(nn.Linear(3, 2), settings(), lambda done: done / 4)
    before = optimizer.network.weight.clone()
    optimizer.network(torch.ones(1, 3)).sum().backward()
    assert optimizer.update(1, None) == 0.0
    assert torch.equal(optimizer.network.weight, before)
    assert optimizer.update(3, None) == 0.05
    # With a constant gradient, each step of Adam has the length of the learning rate.
    torch.testing.assert_close(optimizer.network.weight, before - 0.05)


def test_gradient_norm_is_the_norm_before_clipping():
    optimizer = NetworkOptimizer(nn.Linear(1, 1, bias=False), settings(), lambda _: 1.0)
    optimizer.network.weight.grad = torch.full((1, 1), -8.0)
    assert optimizer.clip_gradients(2.0, None) == 8.0
    torch.testing.assert_close(optimizer.network.weight.grad, torch.full((1, 1), -2.0))
    optimizer.zero_grad()
    assert optimizer.network.weight.grad is None


@pytest.mark.parametrize("warmup", [0, 3])
def test_cosine_schedule_equals_that_of_diffusers(warmup):
    config = OptimizerConfig(schedule="cosine", warmup_steps=warmup)
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(sgd, warmup, 20)
    for done in range(20):
        assert learning_rate_factor(config, done, 20) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        sgd.step()
        schedule.step()
    assert learning_rate_factor(config, 20, 20) == 0.0


def test_constant_schedule_rises_linearly_to_1():
    config = OptimizerConfig(warmup_steps=4)
    assert [learning_rate_factor(config, done, 6) for done in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_parts_with_their_own_rates_and_undecayed_biases_are_those_of_pytorchs_groups():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 3))

    ours, theirs = make(), make()
    config = settings(weight_decay=0.5, decay_biases=False)
    optimizer = NetworkOptimizer(ours, config, lambda done: 1 / (1 + done), own_rates=[(ours[2], 0.02)])
    first, norm, last = theirs
    reference = torch.optim.AdamW(
        [
            {"params": [first.weight], "lr": 0.1, "weight_decay": 0.5},
            {"params": [first.bias, norm.weight, norm.bias], "lr": 0.1, "weight_decay": 0.0},
            {"params": [last.weight], "lr": 0.02, "weight_decay": 0.5},
            {"params": [last.bias], "lr": 0.02, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(reference, lambda done: 1 / (1 + done))
    images = torch.randn(2, 3, 8, 8)
    for step in range(1, 4):
        for network in (ours, theirs):
            network(images).square().mean().backward()
        assert optimizer.update(step, None) == pytest.approx(0.1 / step)
        reference.step()
        schedule.step()
        optimizer.zero_grad()
        reference.zero_grad()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other)


def test_moments_belong_to_their_weights_whatever_the_groups():
    def make(**changes):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        return NetworkOptimizer(network, settings(**changes), lambda _: 1.0)

    first, second = make(), make(decay_biases=False, weight_decay=0.1)
    first.network(torch.randn(2, 3)).sum().backward()
    first.update(1, None)
    assert second.load_moments(first.moments())
    for index, moments in first.moments().items():
        for name, value in moments.items():
            assert torch.equal(second.moments()[index][name], value)


def test_8_bits_need_bitsandbytes_and_a_gpu(monkeypatch):
    with pytest.raises(UserError, match="adamw8bit needs a GPU"):
        NetworkOptimizer(nn.Linear(3, 2), settings(kind="adamw8bit"), lambda _: 1.0)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=r'needs bitsandbytes: pip install "litevae\[8bit\]"'),
    ):
        NetworkOptimizer(nn.Linear(3, 2), settings(kind="adamw8bit"), lambda _: 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_8_bit_moments_continue_to_the_same_bits():
    pytest.importorskip("bitsandbytes")

    def make():
        torch.manual_seed(0)
        network = nn.Conv2d(32, 32, 3, device="cuda").to(memory_format=torch.channels_last)
        return NetworkOptimizer(network, settings(kind="adamw8bit", weight_decay=0.1), lambda _: 0.1)

    def update(optimizer, step):
        generator = torch.Generator("cuda").manual_seed(step)
        images = torch.randn(2, 32, 8, 8, device="cuda", generator=generator)
        optimizer.network(images).square().mean().backward()
        optimizer.update(step, None)
        optimizer.zero_grad()

    first, second = make(), make()
    for step in (1, 2):
        update(first, step)
    assert first.moments()[0]["state1"].dtype == torch.uint8
    buffer = io.BytesIO()
    torch.save(first.moments(), buffer)
    buffer.seek(0)
    second.network.load_state_dict(first.network.state_dict())
    assert second.load_moments(torch.load(buffer, map_location="cpu", weights_only=True))
    for each in (first, second):
        update(each, 3)
    assert all(map(torch.equal, first.parameters, second.parameters))
    full = NetworkOptimizer(nn.Conv2d(32, 32, 3, device="cuda"), settings(), lambda _: 1.0)
    assert not full.load_moments(first.moments())
