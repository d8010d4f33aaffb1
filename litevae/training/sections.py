"""Sections of a training run's configuration."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from litevae.discriminators import DiscriminatorConfig
from litevae.evaluation.metrics import Metric
from litevae.settings import setting


@dataclass
class StageConfig:
    """Size and number of the crops per step from the step `start` on; the first step of a run is 1."""

    example: ClassVar[str] = "{start: 100001, size: 256}"
    start: int = setting(1, "First step of the stage; must be above that of the stage before.", minimum=1)
    size: int | None = setting(
        None, "Side of the square crops, in pixels; null keeps that of the stage before.", minimum=16
    )
    batch_size: int | None = setting(
        None,
        "Crops per step, over all processes together; null keeps the number of the stage before.",
        minimum=1,
        maximum=10**5,
    )


@dataclass
class OptimizerConfig:
    """AdamW, which is Adam without weight decay. The defaults are the paper's learning rate and betas (Appendix F)."""

    learning_rate: float = setting(1e-4, "Learning rate after the warm-up.", minimum=0, maximum=1e6)
    betas: tuple[float, float] = setting(
        (0.5, 0.9), "Decay rates of Adam's two moment estimates.", minimum=0, below=1
    )
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", minimum=0)
    decay_biases: bool = setting(
        True,
        "Apply the weight decay to biases and the scales of norms too, and not to matrices and kernels alone.",
    )
    kind: Literal["adamw", "adamw8bit"] = setting(
        "adamw", "adamw8bit keeps the moments in 8 bits; it needs bitsandbytes."
    )
    schedule: Literal["constant", "cosine"] = setting(
        "constant", "Course of the learning rate after the warm-up; cosine ends at 0."
    )
    warmup_steps: int = setting(0, "Steps in which the learning rate rises linearly to its value.", minimum=0)
    max_gradient_norm: float = setting(
        1.0, "Norm that larger gradients are clipped to; 0 turns clipping off.", minimum=0
    )
    accumulation: int = setting(
        1, "Parts that a step's batch is processed in, one after the other, to save memory.", minimum=1
    )


@dataclass
class AutoencoderOptimizerConfig(OptimizerConfig):
    """The optimizer of an autoencoder, whose two halves may learn at different rates."""

    encoder_learning_rate: float | None = setting(
        None, "Learning rate of the encoder; null for learning_rate.", minimum=0, maximum=1e6
    )
    decoder_learning_rate: float | None = setting(
        None, "Learning rate of the decoder; null for learning_rate.", minimum=0, maximum=1e6
    )


@dataclass
class LatentConfig:
    """What happens to latents in training, besides their KL divergence, to make them easier for diffusion models."""

    std: float | None = setting(
        None,
        "Fixed standard deviation of the posterior, which encode then reports for every image; null lets the encoder "
        "predict it.",
        minimum=1e-6,
        maximum=1e4,
    )
    noise: float = setting(
        0.0, "Standard deviation of noise that is added to the sampled latent before decoding.", minimum=0
    )
    noise_strength: Literal["fixed", "half_normal", "uniform"] = setting(
        "fixed",
        "Strength per image: noise itself; |N(0, 1)| times noise, as RAE (Zheng et al., 2025); or uniform up to noise, "
        "as l-DeTok (Yang et al., 2025).",
    )
    equivariance: float = setting(
        0.0,
        "Probability with which a step scales and turns the latents before decoding, and the image to compare with "
        "alike (EQ-VAE, Kouzelis et al., 2025).",
        minimum=0,
        maximum=1,
    )
    equivariance_scale: float = setting(
        0.25, "Smallest factor of that scaling; the largest is 1.", minimum=0.01, maximum=1
    )


@dataclass
class AdversaryConfig(DiscriminatorConfig):
    """The discriminator, which is trained if loss.adversarial is above 0.

    Its optimizer has the settings of the section `optimizer`, except for those given here.
    """

    learning_rate: float | None = setting(
        None, "Learning rate of the discriminator; null for optimizer.learning_rate.", minimum=0, maximum=1e6
    )
    betas: tuple[float, float] | None = setting(
        None, "Adam's betas for the discriminator; null for optimizer.betas.", minimum=0, below=1
    )
    start: int | None = setting(
        None,
        "First step in which the discriminator learns; null for loss.adversarial_start, which must not be earlier.",
        minimum=0,
    )
    lecam: float = setting(
        0.0, "Weight of LeCam regularisation (Tseng et al., 2021) in the discriminator's loss.", minimum=0
    )
    lecam_decay: float = setting(
        0.99, "Decay of LeCam's averages of the logits per step.", minimum=0, below=1
    )
    r1: float = setting(
        0.0,
        "Weight gamma of R1, gamma/2 times the squared gradient at real images, for discriminator.kind=stylegan.",
        minimum=0,
    )
    r1_every: int = setting(
        16, "R1 is computed in every such step only, as many times as strong, as in StyleGAN2.", minimum=1
    )


@dataclass
class CheckpointConfig:
    """Checkpoints are written every `every` steps and at the end, at most one per step. The last `keep` are kept."""

    every: int = setting(1000, "Steps between two checkpoints; 0 writes none at all.", minimum=0)
    keep: int = setting(2, "Number of the newest checkpoints to keep besides the best.", minimum=1)


@dataclass
class ValidatedCheckpointConfig(CheckpointConfig):
    """Checkpoints are written every `every` steps, at the end, and after each validation (`validate_every`) with
    the best `best_by` so far, at most one per step. The last `keep` and the best are kept."""

    best_by: Metric = setting(
        "psnr",
        "Metric of the validation images that the best checkpoint is chosen by, from validate_metrics.",
    )
