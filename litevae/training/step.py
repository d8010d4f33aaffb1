"""One training step: the losses and gradients of both networks, then either both updates or none."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch._functorch.config
from accelerate import Accelerator
from torch import Tensor, nn

from litevae.losses import RECONSTRUCTION_TERMS, Loss, Objective
from litevae.models.initialise import fix_variance
from litevae.models.interface import Autoencoder, spatial_compression
from litevae.training.adversary import Adversary, Discriminate
from litevae.training.config import Config
from litevae.training.latents import Change
from litevae.training.optimization import EMA, NetworkOptimizer

WEIGHTED = "weighted/"  # prefix in the log of a term multiplied by its weight
GRADIENT_RATIO = "gradient_ratio"  # name in the log


class Autoencode(nn.Module):
    """Encoding and decoding in one forward pass, which DDP and autocast wrap.

    Args:
        model: autoencoder.
        decode: whether to decode; a loss of posteriors alone does not need it.
        learn_variance: whether the posterior's variance gets a gradient.
    """

    def __init__(self, model: Autoencoder, decode: bool = True, learn_variance: bool = True) -> None:
        super().__init__()
        self.model = model
        self.decode = decode
        self.learn_variance = learn_variance

    def forward(
        self, image: Tensor, noise: Tensor, change: Change | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Encodes images and decodes a sample of their posterior.

        Args:
            image: images (N, C, H, W) in [-1, 1].
            noise: standard normal noise (N, n_z, h, w) of the sample, mean + std · noise.
            change: change of the sample before it is decoded.

        Returns:
            The reconstruction (N, C, H, W), or None, and the posterior's mean and log-variance, both (N, n_z, h, w).
        """
        posterior = self.model.encode(image).latent_dist
        mean, logvar, std = posterior.mean, posterior.logvar, posterior.std
        if not self.learn_variance:
            logvar, std = logvar.detach(), std.detach()
        if not self.decode:
            return None, mean, logvar
        latent = mean + std * noise
        if change is not None:
            latent = change.latent(latent)
        return self.model.decode(latent).sample, mean, logvar


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step, the same on all processes.

    `values` go to the log. `non_finite` describes the first value that was not finite, if there was one. `unusable`
    says whether a process's share must not be trained on. Nothing is updated in either of these cases. `stop` says
    whether a process was asked to stop.
    """

    values: dict[str, float]
    non_finite: str | None
    stop: bool
    unusable: bool


class TrainingStep:
    """Updates the autoencoder, its average and, from its first step on, the discriminator.

    The gradients of both networks are taken from one reconstruction, with the weights before the step, so that
    one decision, which is the same on all processes, applies to both updates.

    Args:
        config: settings of the run.
        accelerator: Accelerator that prepares the networks.
        model: autoencoder on the accelerator's device.
        discriminator: discriminator, if `objective` uses one.
        objective: losses, on the accelerator's device.
        ema: average that is updated with the model.
        factor: multiplier of the learning rates as a function of the number of earlier steps.
        teacher: module that returns the mean and the log-variance that the objective compares with, if it does; it is
            not called in steps that get the moments themselves.
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
        teacher: nn.Module | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.teacher = teacher
        self.model = model
        self.discriminator = discriminator
        self.objective = objective
        self.ema = ema
        self.adversary = Adversary(config, objective)
        self.accumulation = config.optimizer.accumulation
        self.max_norm = config.optimizer.max_gradient_norm or math.inf
        self.ratio_every = config.gradient_ratio_every
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler

        settings = config.optimizer
        self.fixed_std = config.latent.std
        autoencode = Autoencode(model, objective.needs_reconstruction, self.fixed_std is None)
        if config.compile:
            adaptive = config.loss.adversarial and config.loss.adversarial_weight == "adaptive"
            if adaptive or self.ratio_every:
                # Both differentiate a graph more than once, which donated buffers do not allow.
                torch._functorch.config.donated_buffer = False
            autoencode.compile()
            if teacher is not None:
                teacher.compile()
        own_rates = [
            (part, rate)
            for rate, parts in (
                (settings.encoder_learning_rate, (model.encoder, model.quant_conv)),
                (settings.decoder_learning_rate, (model.decoder, model.post_quant_conv)),
            )
            for part in parts
            if rate is not None and part is not None
        ]
        self.optimizers = {
            "autoencoder": NetworkOptimizer(
                accelerator.prepare_model(autoencode), settings, factor, own_rates=own_rates
            )
        }
        if discriminator is not None:
            adversary = config.discriminator
            discriminate = Discriminate(discriminator)
            if config.compile:
                discriminate.compile()
            self.optimizers["discriminator"] = NetworkOptimizer(
                accelerator.prepare_model(discriminate),
                settings,
                factor,
                adversary.learning_rate,
                adversary.betas,
            )

    def __call__(
        self,
        image: Tensor,
        noise: Tensor,
        step: int,
        stop: bool,
        unusable: bool = False,
        change: Change | None = None,
        moments: Tensor | None = None,
    ) -> Outcome:
        """Performs one step on this process's share of the batch.

        Args:
            image: images (N, C, H, W) in [-1, 1].
            noise: standard normal noise (N, n_z, h, w).
            step: number of the step, from 1.
            stop: whether this process was asked to stop.
            unusable: whether this share must not be trained on.
            change: change of the latents before they are decoded.
            moments: the teacher's means and log-variances (N, 2 n_z, h, w), if they are stored.
        """
        adversarial, learning = self.objective.uses_discriminator(step), self.adversary.learns(step)
        active = [self.optimizers[name] for name in ("autoencoder", "discriminator")[: 1 + learning]]
        gradients = None  # row 0: adversarial term; row 1: reconstruction terms
        if adversarial and self.ratio_every and step % self.ratio_every == 0:
            count = sum(parameter.numel() for parameter in active[0].parameters)
            gradients = torch.zeros(2, count, device=image.device)
        # A forward pass changes the discriminator's statistics; a skipped step must not.
        buffers = list(cast(nn.Module, self.discriminator).buffers()) if learning else []
        before = [buffer.clone() for buffer in buffers]

        losses: list[list[Loss]] = []
        parts = self.accumulation
        changes = [None] * parts if change is None else change.chunk(parts)
        stored = [None] * parts if moments is None else moments.chunk(parts)
        for index, part in enumerate(
            zip(image.chunk(parts), noise.chunk(parts), changes, stored, strict=True)
        ):
            with self.synchronised(active, index == parts - 1):
                losses.append(self.backward(*part, step, gradients))

        first, *discriminating = losses[0]
        names = [*first.terms, *(WEIGHTED + name for name in first.weighted), "loss"]
        names += [name for loss in discriminating for name in loss.terms]
        statistics = self.adversary.statistics(image.device) if learning else image.new_empty(0)
        # A loss that is not finite on one process makes the mean not finite, so all processes decide alike.
        flags = torch.tensor([float(stop), float(unusable)], device=image.device)
        means = self.accelerator.reduce(torch.cat([mean_losses(losses), flags, statistics.flatten()]), "mean")
        means, statistics = means.tensor_split([len(means) - statistics.numel()])
        norms = [optimizer.clip_gradients(self.max_norm, self.scaler) for optimizer in active]
        ratios = means.new_empty(0) if gradients is None else self.gradient_ratio(gradients)
        # This is the only wait for a GPU in the step.
        numbers = torch.cat([torch.stack(norms), means, ratios]).tolist()
        norm_values, rest = numbers[: len(norms)], numbers[len(norms) :]
        loss_values = dict(zip(names, rest, strict=False))
        stop_mean, unusable_mean, *ratio = rest[len(names) :]
        non_finite = first_non_finite(loss_values, norm_values)
        updating = non_finite is None and not unusable_mean

        rates = [optimizer.update(step, self.scaler) for optimizer in active] if updating else []
        if updating:
            self.adversary.update(statistics)
            if self.fixed_std is not None:  # weight decay changes it
                fix_variance(self.model, self.fixed_std)
            if self.ema is not None:
                self.ema.update(self.model)
        elif buffers:
            torch._foreach_copy_(buffers, before)
        if self.scaler is not None:
            self.scaler.update()
        for optimizer in active:
            optimizer.zero_grad()

        values = {"loss": loss_values.pop("loss"), **loss_values, "gradient_norm": norm_values[0]}
        if learning:
            values["discriminator_gradient_norm"] = norm_values[1]
        if ratio and math.isfinite(ratio[0]):
            values[GRADIENT_RATIO] = ratio[0]
        if rates:
            values["learning_rate"] = rates[0]
        return Outcome(values, non_finite, stop_mean > 0, unusable_mean > 0)

    def backward(
        self,
        image: Tensor,
        noise: Tensor,
        change: Change | None,
        moments: Tensor | None,
        step: int,
        gradients: Tensor | None,
    ) -> list[Loss]:
        """Adds one part's gradients; returns the autoencoder's loss and the discriminator's, if there is one.

        Args:
            image: images of the part (n, C, H, W) in [-1, 1].
            noise: noise of the part (n, n_z, h, w).
            change: change of the part's latents, or None.
            moments: stored moments of the teacher (n, 2 n_z, h, w), or None.
            step: number of the step.
            gradients: tensor that `add_gradients` adds to, or None.
        """
        ema_reconstruction = None
        target: tuple[Tensor, Tensor] | None = None
        if moments is not None:
            teacher_mean, teacher_logvar = moments.chunk(2, dim=1)
            target = teacher_mean, teacher_logvar
        elif self.teacher is not None:
            target = self.teacher(image)
        with self.accelerator.autocast():
            if self.objective.needs_ema and self.ema is not None:
                with torch.no_grad():
                    ema_reconstruction = Autoencode(self.ema.model)(image, noise, change)[0]
            reconstruction, mean, logvar = self.optimizers["autoencoder"].network(image, noise, change)
            if change is not None:  # from here on, what the reconstruction is compared with
                image = change.picture(image, spatial_compression(self.model))
            loss = self.objective.generator(
                image,
                reconstruction,
                mean,
                logvar,
                step=step,
                teacher=target,
                discriminator=self.discriminator,
                last_weight=self.model.decoder.conv_out.weight,
                ema_reconstruction=ema_reconstruction,
            )
        if gradients is not None:
            self.add_gradients(loss, gradients)
        self.accelerator.backward(loss.total / self.accumulation)
        if not self.adversary.learns(step) or reconstruction is None:
            return [loss]
        with self.accelerator.autocast():
            found = self.optimizers["discriminator"].network(
                image, reconstruction.detach().float(), self.adversary.penalises(step)
            )
            discriminator_loss = self.adversary.loss(*found)
        self.accelerator.backward(discriminator_loss.total / self.accumulation)
        return [loss, discriminator_loss]

    def add_gradients(self, loss: Loss, gradients: Tensor) -> None:
        """Adds the gradients of the weighted adversarial term and of the sum of the weighted reconstruction terms.

        They are scaled like the loss in a backward pass, because float16 would lose small ones. The gradients that
        the parameters hold do not change, and DDP's hooks do not run.

        Args:
            loss: loss of the autoencoder.
            gradients: (2, number of trained parameters of the autoencoder).
        """
        reconstruction = [loss.parts[name] for name in RECONSTRUCTION_TERMS if name in loss.parts]
        parameters = self.optimizers["autoencoder"].parameters
        for row, term in zip(
            gradients, (loss.parts["adversarial"], torch.stack(reconstruction).sum()), strict=True
        ):
            scaled = term if self.scaler is None else self.scaler.scale(term)
            found = torch.autograd.grad(scaled, parameters, retain_graph=True, materialize_grads=True)
            row += torch.cat([gradient.flatten() for gradient in found])

    def gradient_ratio(self, gradients: Tensor) -> Tensor:
        """Returns |∇ adversarial| / |∇ reconstruction| as in Figure 7: (1,), the same on all processes.

        Both are gradients of the whole batch's weighted loss with respect to all trained parameters of the
        autoencoder. The paper does not name the parameters. For the last layer alone, which Equation 2 balances,
        the ratio would be nearly constant under the adaptive weight, and Figure 7 shows the opposite.
        """
        # Common factors cancel: the number of parts, the number of processes and the loss scale.
        adversarial, reconstruction = torch.linalg.vector_norm(
            self.accelerator.reduce(gradients, "mean"), dim=1
        ).split(1)
        return adversarial / reconstruction

    @contextmanager
    def synchronised(self, active: Sequence[NetworkOptimizer], last: bool) -> Iterator[None]:
        """Lets the processes exchange gradients only in the backward passes of the last part."""
        with ExitStack() as stack:
            if not last:
                for optimizer in active:
                    stack.enter_context(self.accelerator.no_sync(optimizer.network))
            yield


def mean_losses(losses: Sequence[Sequence[Loss]]) -> Tensor:
    """Averages the autoencoder's terms, weighted terms and total, and the discriminator's terms, over the parts."""
    rows = []
    for autoencoder, *others in losses:
        values = [*autoencoder.terms.values(), *autoencoder.weighted.values(), autoencoder.total.detach()]
        rows.append(torch.stack([*values, *(term for loss in others for term in loss.terms.values())]))
    return torch.stack(rows).mean(dim=0)


def first_non_finite(losses: dict[str, float], norms: Sequence[float]) -> str | None:
    """Describes the first value in the order of computation that is infinite or NaN; None if there is none."""
    for name, value in losses.items():
        if not math.isfinite(value):
            return f"the loss is {value}" if name == "loss" else f"the {name} loss is {value}"
    for name, norm in zip(("gradient", "discriminator's gradient"), norms, strict=False):
        if not math.isfinite(norm):
            return f"the {name}'s norm is {norm}, though every loss is finite"
    return None
