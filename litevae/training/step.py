"""One training step: losses and gradients of both networks, then their updates, or none."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch._functorch.config
from accelerate import Accelerator
from torch import Tensor, nn

from litevae.discriminators import UNetDiscriminator
from litevae.losses import RECONSTRUCTION_TERMS, Loss, Objective
from litevae.models.interface import Autoencoder
from litevae.training.config import Config
from litevae.training.optimization import EMA, NetworkOptimizer

WEIGHTED = "weighted/"  # before a term's name in the log: with its weight
GRADIENT_RATIO = "gradient_ratio"  # in the log


class Autoencode(nn.Module):
    """Encoding and decoding as one forward, which is what DDP and autocast wrap."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) in [-1, 1] to its reconstruction from mean + std · noise, and to the posterior's mean
        and log-variance; these and the noise are (N, n_z, h, w)."""
        posterior = self.model.encode(image).latent_dist
        latent = posterior.mean + posterior.std * noise
        return self.model.decode(latent).sample, posterior.mean, posterior.logvar


class Discriminate(nn.Module):
    """A discriminator's training step as one forward."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The logits of both.

        In one pass where an image's logits do not depend on the others': PatchGAN normalises over the batch, and
        StyleGAN's takes its standard deviation.
        """
        if not isinstance(self.discriminator, UNetDiscriminator):
            return self.discriminator(real), self.discriminator(fake)
        heads = self.discriminator(torch.cat([real, fake]))
        of_real, of_fake = zip(*(head.split([len(real), len(fake)]) for head in heads), strict=True)
        return of_real, of_fake


@dataclass(frozen=True)
class Outcome:
    """What a step came to, the same on all processes.

    `values`: what belongs into the log. `bad`: what was not finite first, in words, else None; then nothing
    was updated, nor if `unusable`: a process's batch must not be trained on. `stop`: a process was told to stop.
    """

    values: dict[str, float]
    bad: str | None
    stop: bool
    unusable: bool


class TrainingStep:
    """Updates the autoencoder, its average, and from its start on the discriminator.

    Both networks' gradients are taken from one reconstruction and with the weights before the step, so that
    one decision, made alike on all processes, applies to both updates.

    Args:
        config: of the run.
        accelerator: prepares the networks.
        model: the autoencoder, on the accelerator's device.
        discriminator: where `objective` uses one.
        objective: on the accelerator's device.
        ema: updated with the model.
        factor: of the learning rates, by the number of steps before.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: Autoencoder,
        discriminator: nn.Module | None,
        objective: Objective,
        ema: EMA[Autoencoder] | None,
        factor: Callable[[int], float],
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.discriminator = discriminator
        self.objective = objective
        self.ema = ema
        self.accumulation = config.optimizer.accumulation
        self.max_norm = config.optimizer.max_gradient_norm or math.inf
        self.ratio_every = config.gradient_ratio_every
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler

        settings = config.optimizer
        autoencode = Autoencode(model)
        if config.compile:
            adaptive = config.loss.adversarial and config.loss.adversarial_weight == "adaptive"
            if adaptive or self.ratio_every:
                # these differentiate a graph more than once, which Inductor else saves memory by forbidding
                torch._functorch.config.donated_buffer = False
            autoencode.compile()
        self.optimizers = {
            "autoencoder": NetworkOptimizer(
                accelerator.prepare_model(autoencode),
                settings.learning_rate,
                settings.betas,
                settings.weight_decay,
                factor,
            )
        }
        if discriminator is not None:
            own = config.discriminator
            discriminate = Discriminate(discriminator)
            if config.compile:
                discriminate.compile()
            self.optimizers["discriminator"] = NetworkOptimizer(
                accelerator.prepare_model(discriminate),
                settings.learning_rate if own.learning_rate is None else own.learning_rate,
                own.betas or settings.betas,
                settings.weight_decay,
                factor,
            )

    def __call__(
        self, image: Tensor, noise: Tensor, step: int, stop: bool, unusable: bool = False
    ) -> Outcome:
        """One step on this process's share of the batch.

        Args:
            image: (N, 3, H, W) in [-1, 1].
            noise: (N, n_z, h, w), standard normal.
            step: from 1.
            stop: whether this process was told to stop.
            unusable: whether this share must not be trained on.
        """
        adversarial = self.objective.uses_discriminator(step)
        active = [self.optimizers[name] for name in ("autoencoder", "discriminator")[: 1 + adversarial]]
        gradients = None  # of the adversarial and of the reconstruction terms
        if adversarial and self.ratio_every and step % self.ratio_every == 0:
            count = sum(parameter.numel() for parameter in active[0].parameters)
            gradients = torch.zeros(2, count, device=image.device)
        # their forward passes change statistics, which a step that is skipped must not
        buffers = list(cast(nn.Module, self.discriminator).buffers()) if adversarial else []
        before = [buffer.clone() for buffer in buffers]

        losses: list[list[Loss]] = []
        parts = zip(image.chunk(self.accumulation), noise.chunk(self.accumulation), strict=True)
        for index, (images, noises) in enumerate(parts):
            with self.synchronised(active, index == self.accumulation - 1):
                losses.append(self.backward(images, noises, step, adversarial, gradients))

        own = losses[0][0]
        names = [*own.terms, *(WEIGHTED + name for name in own.weighted), "loss"]
        names += ["discriminator"] * adversarial
        # an infinite or NaN loss on one process makes the mean so, and all decide alike
        flags = torch.tensor([float(stop), float(unusable)], device=image.device)
        means = self.accelerator.reduce(torch.cat([mean_losses(losses), flags]), "mean")
        norms = [optimizer.gradient_norm(self.max_norm, self.scaler) for optimizer in active]
        ratios = means.new_empty(0) if gradients is None else self.gradient_ratio(gradients)
        # the step's one wait for a GPU
        numbers = torch.cat([torch.stack(norms), means, ratios]).tolist()
        norm_values, rest = numbers[: len(norms)], numbers[len(norms) :]
        loss_values = dict(zip(names, rest, strict=False))
        stopped, not_usable, *ratio = rest[len(names) :]
        bad = first_bad(loss_values, norm_values)
        good = bad is None and not not_usable

        rates = [optimizer.update(step, self.scaler) for optimizer in active] if good else []
        if good and self.ema is not None:
            self.ema.update(self.model)
        elif not good and buffers:
            torch._foreach_copy_(buffers, before)
        if self.scaler is not None:
            self.scaler.update()
        for optimizer in active:
            optimizer.zero_grad()

        values = {"loss": loss_values.pop("loss"), **loss_values, "gradient_norm": norm_values[0]}
        if adversarial:
            values["discriminator_gradient_norm"] = norm_values[1]
        if ratio and math.isfinite(ratio[0]):
            values[GRADIENT_RATIO] = ratio[0]
        if rates:
            values["learning_rate"] = rates[0]
        return Outcome(values, bad, stopped > 0, not_usable > 0)

    def backward(
        self, image: Tensor, noise: Tensor, step: int, adversarial: bool, gradients: Tensor | None
    ) -> list[Loss]:
        """Adds one part's gradients; returns the autoencoder's loss and the discriminator's, if any.

        Args:
            gradients: gets those of single terms added, see `add_gradients`.
        """
        ema_reconstruction = None
        with self.accelerator.autocast():
            if self.objective.needs_ema and self.ema is not None:
                with torch.no_grad():
                    ema_reconstruction = Autoencode(self.ema.model)(image, noise)[0]
            reconstruction, mean, logvar = self.optimizers["autoencoder"].network(image, noise)
            loss = self.objective.generator(
                image,
                reconstruction,
                mean,
                logvar,
                step=step,
                discriminator=self.discriminator if adversarial else None,
                last_weight=self.model.decoder.conv_out.weight,
                ema_reconstruction=ema_reconstruction,
            )
        if gradients is not None:
            self.add_gradients(loss, gradients)
        self.accelerator.backward(loss.total / self.accumulation)
        if not adversarial:
            return [loss]
        with self.accelerator.autocast():
            logits = self.optimizers["discriminator"].network(image, reconstruction.detach().float())
            of_discriminator = self.objective.discriminator(*logits)
        self.accelerator.backward(of_discriminator.total / self.accumulation)
        return [loss, of_discriminator]

    def add_gradients(self, loss: Loss, gradients: Tensor) -> None:
        """Adds the gradients of the weighted adversarial term, and of the weighted reconstruction terms' sum.

        They are scaled as `backward` scales the loss: float16 would lose the small ones. The parameters' own
        gradients and DDP's hooks are left alone.

        Args:
            gradients: (2, all parameters of the autoencoder that train).
        """
        reconstruction = [loss.parts[name] for name in RECONSTRUCTION_TERMS if name in loss.parts]
        parameters = self.optimizers["autoencoder"].parameters
        for row, term in zip(
            gradients, (loss.parts["adversarial"], torch.stack(reconstruction).sum()), strict=True
        ):
            scaled = term if self.scaler is None else self.scaler.scale(term)
            own = torch.autograd.grad(scaled, parameters, retain_graph=True, materialize_grads=True)
            row += torch.cat([gradient.flatten() for gradient in own])

    def gradient_ratio(self, gradients: Tensor) -> Tensor:
        """|∇ adversarial| / |∇ reconstruction|, as in Figure 7: (1,), the same on all processes.

        Both are gradients of the whole batch's loss, weights included, with respect to everything in the
        autoencoder that trains. The paper does not say of what. The last layer's alone, which Equation 2
        balances, would be all but constant under the adaptive weight, and Figure 7 shows the opposite.
        """
        # factors that both have cancel: the number of parts and of processes, and the loss's scale
        adversarial, reconstruction = torch.linalg.vector_norm(
            self.accelerator.reduce(gradients, "mean"), dim=1
        ).split(1)
        return adversarial / reconstruction

    @contextmanager
    def synchronised(self, active: Sequence[NetworkOptimizer], last: bool) -> Iterator[None]:
        """Processes exchange gradients in the last part's backward passes alone."""
        with ExitStack() as stack:
            if not last:
                for optimizer in active:
                    stack.enter_context(self.accelerator.no_sync(optimizer.network))
            yield


def mean_losses(losses: Sequence[Sequence[Loss]]) -> Tensor:
    """The autoencoder's terms, weighted terms and total and the discriminator's loss, means over the parts."""
    rows = []
    for own, *other in losses:
        totals = [loss.total.detach() for loss in (own, *other)]
        rows.append(torch.stack([*own.terms.values(), *own.weighted.values(), *totals]))
    return torch.stack(rows).mean(dim=0)


def first_bad(losses: dict[str, float], norms: Sequence[float]) -> str | None:
    """What is infinite or NaN, in the order of computation, or None."""
    for name, value in losses.items():
        if not math.isfinite(value):
            return f"the loss is {value}" if name == "loss" else f"the {name} loss is {value}"
    for whose, norm in zip(("gradient", "discriminator's gradient"), norms, strict=False):
        if not math.isfinite(norm):
            return f"the {whose}'s norm is {norm}, though every loss is finite"
    return None
