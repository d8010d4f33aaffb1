"""Optimizers, the learning-rate schedule and the exponential moving average of the weights."""

import copy
import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from litevae.training.config import OptimizerConfig

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
        learning_rate: base learning rate.
        betas: decay rates of AdamW's moments.
        weight_decay: weight decay of AdamW.
        factor: multiplier of the learning rate as a function of the number of earlier steps.
    """

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        factor: Callable[[int], float],
    ) -> None:
        self.network = network
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.learning_rate = learning_rate
        self.factor = factor
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )

    def clip_gradients(self, maximum: float, scaler: torch.amp.GradScaler | None) -> Tensor:
        """Clips the gradients to the norm `maximum`; returns their norm before that."""
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters, maximum)

    def update(self, step: int, scaler: torch.amp.GradScaler | None) -> float:
        """Updates the weights in step `step`, from 1; returns the learning rate."""
        rate = self.learning_rate * self.factor(step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        return rate

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def moments(self) -> dict[int, dict[str, Tensor]]:
        """Returns the optimizer's moments, by the index of the parameter."""
        state: dict[int, dict[str, Tensor]] = self.optimizer.state_dict()["state"]
        return state

    def load_moments(self, state: dict[int, dict[str, Tensor]]) -> bool:
        """Restores the moments, but not the learning rate, the betas and the weight decay.

        Returns:
            Whether the moments fit the weights; if not, nothing is restored.
        """
        shapes = {index: moments["exp_avg"].shape for index, moments in state.items()}
        # There are no moments before the first update.
        if shapes and shapes != {index: p.shape for index, p in enumerate(self.parameters)}:
            return False
        # The fused optimizer reads the memory of each tensor in order and ignores the strides.
        state = {
            index: {key: match_strides(value, self.parameters[index]) for key, value in moments.items()}
            for index, moments in state.items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        return True


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
