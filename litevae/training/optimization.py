"""Optimizers, the learning-rate schedule and the exponential moving average of the weights."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from litevae.errors import UserError
from litevae.training.sections import OptimizerConfig

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """An exponential moving average of a model's weights.

    The decay of update n, counted from 0, is min(decay, (1 + n) / (10 + n)), as in TensorFlow and diffusers, so that
    the first weights are soon forgotten.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Model) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averages, list[Tensor](model.parameters()), 1 - decay)
        self.updates += 1


class NetworkOptimizer:
    """A network, wrapped for training, with its optimizer.

    Args:
        network: network, as Accelerate prepared it.
        settings: settings of the optimizer.
        factor: multiplier of the learning rate as a function of the number of earlier steps.
        learning_rate: base learning rate; None takes that of `settings`.
        betas: decay rates of the moments; None takes those of `settings`.
        own_rates: parts of the network with base learning rates of their own.

    Raises:
        UserError: the optimizer is not installed.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: OptimizerConfig,
        factor: Callable[[int], float],
        learning_rate: float | None = None,
        betas: tuple[float, float] | None = None,
        own_rates: Sequence[tuple[nn.Module, float]] = (),
    ) -> None:
        self.network = network
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.learning_rate = settings.learning_rate if learning_rate is None else learning_rate
        self.factor = factor
        rates = {parameter: rate for part, rate in own_rates for parameter in part.parameters()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.parameters:
            decayed = settings.decay_biases or parameter.dim() > 1
            key = rates.get(parameter, self.learning_rate), settings.weight_decay if decayed else 0.0
            groups.setdefault(key, []).append(parameter)
        self.rates = [rate for rate, _ in groups]
        self.eight_bit = settings.kind == "adamw8bit"
        self.optimizer = make_optimizer(
            settings.kind,
            [
                {"params": parameters, "lr": rate, "weight_decay": decay}
                for (rate, decay), parameters in groups.items()
            ],
            betas or settings.betas,
        )

    def clip_gradients(self, maximum: float, scaler: torch.amp.GradScaler | None) -> Tensor:
        """Clips the gradients to the norm `maximum`; returns their norm before that."""
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters, maximum)

    def update(self, step: int, scaler: torch.amp.GradScaler | None) -> float:
        """Updates the weights in step `step`, from 1; returns the learning rate."""
        factor = self.factor(step - 1)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        if scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        return self.learning_rate * factor

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def moments(self) -> dict[int, dict[str, Tensor]]:
        """Returns the optimizer's moments, by the index of the parameter among those that are trained."""
        found = self.optimizer.state
        return {index: found[p] for index, p in enumerate(self.parameters) if p in found}

    def load_moments(self, state: dict[int, dict[str, Tensor]]) -> bool:
        """Restores the moments, but not the learning rate, the betas and the weight decay.

        Returns:
            Whether the moments fit the weights and the kind of optimizer; if not, nothing is restored.
        """
        first = "state1" if self.eight_bit else "exp_avg"
        shapes = {index: moments[first].shape for index, moments in state.items() if first in moments}
        # There are no moments before the first update.
        if state and shapes != {index: p.shape for index, p in enumerate(self.parameters)}:
            return False
        if not self.eight_bit:  # it makes parameters contiguous, and its moments have that order in memory
            # The fused optimizer reads the memory of each tensor in order and ignores the strides.
            state = {
                index: {key: match_strides(value, self.parameters[index]) for key, value in moments.items()}
                for index, moments in state.items()
            }
        content = self.optimizer.state_dict()
        # The optimizer counts the parameters group by group.
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        position = {parameter: index for index, parameter in enumerate(ordered)}
        by_group = {position[self.parameters[index]]: moments for index, moments in state.items()}
        self.optimizer.load_state_dict({"state": by_group, "param_groups": content["param_groups"]})
        return True


def make_optimizer(
    kind: str, groups: list[dict[str, Any]], betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Returns an optimizer of groups of parameters with their own learning rates and weight decays.

    Args:
        kind: "adamw" or "adamw8bit".
        groups: groups, as PyTorch's optimizers take them.
        betas: decay rates of the moments.

    Raises:
        UserError: bitsandbytes is needed and not installed, or has no kernels for the parameters' device.
    """
    if kind == "adamw":
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    device = groups[0]["params"][0].device
    if device.type == "cpu":
        raise UserError("optimizer.kind=adamw8bit needs a GPU: bitsandbytes has no such kernels for CPUs")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            'optimizer.kind=adamw8bit needs bitsandbytes: pip install "litevae[8bit]", or bitsandbytes itself'
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=betas)
    return optimizer


def match_strides(value: Tensor, parameter: Tensor) -> Tensor:
    """Returns `value` with the strides of `parameter`, if their shapes are the same."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def learning_rate_factor(config: OptimizerConfig, done: int, total: int) -> float:
    """Returns the multiplier of the learning rate after `done` of `total` steps, as in diffusers' schedules."""
    if done < config.warmup_steps:
        return done / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (done - config.warmup_steps) / max(1, total - config.warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
