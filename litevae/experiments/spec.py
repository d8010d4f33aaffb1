"""What an experiment consists of: one YAML file in `litevae/configs/experiments/` for each table or figure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from litevae.errors import UserError
from litevae.settings import load, shipped
from litevae.training.config import CONFIGS, Config, list_stages, load_config

Kind = Literal[
    "reconstruction", "complexity", "mmd", "generation", "latents", "features", "resolution", "gradients"
]
Scale = Literal["tiny", "paper"]
FOLDER = CONFIGS / "experiments"

# What "tiny" makes of a published setting: sizes, steps and the decoder shrink, the encoders stay whole. No
# weights are downloaded, so there is no LPIPS; a discriminator comes only where the experiment is about it.
TINY_SIZE = 4  # times smaller
TINY_STEPS = 1000, 3  # 300 for 100,000
TINY_KL = 1e-4  # 0.01 would leave little to reconstruct from after so few steps
TINY_SETTINGS = (
    "data.train=demo",
    "data.crop=native",
    "data.batch_size=4",
    "data.workers=0",
    "data.validation_count=28",
    "model.block_out_channels=[32,32,64,64]",
    "model.layers_per_block=1",
    "model.num_groups=16",
    "loss.lpips=0",
    "loss.adversarial=0",
    "optimizer.learning_rate=3e-4",
    "optimizer.warmup_steps=20",
    "ema_decay=0",
    "discriminator.width=S",
    "log_every=10",
    "validate_every=50",
    "checkpoint.every=0",
    "tracker=none",
)
# diffusers' AutoencoderKL has one list of widths for both sides, and only the decoder is to shrink
TINY_SD_VAE = ("model.encoder_block_out_channels=[128,256,512,512]",)


@dataclass
class RunSpec:
    """One row: a model, trained unless the experiment's kind needs no training."""

    example: ClassVar[str] = "{row: [Baseline]}"

    row: list[str] = field(default_factory=list)  # its cells under `columns`, the last of which is its name
    dataset: str = "imagenet"  # ffhq, celeba-hq or deepfashion where the paper has these
    config: str = ""  # training configuration, if not the experiment's
    model: str = ""  # where nothing is trained: a preset, or sd-vae
    settings: list[str] = field(default_factory=list)  # that replace the configuration's
    tiny: list[str] = field(default_factory=list)  # more of them, at the tiny scale
    size: int | None = None  # side in pixels measured at, if not the one it was trained at last
    diffusion: list[str] = field(default_factory=list)  # settings of the second stage
    paper: dict[str, float] = field(default_factory=dict)  # the published figures, by metric

    @property
    def name(self) -> str:
        return self.row[-1]


@dataclass
class Claim:
    """What the paper says of two rows."""

    example: ClassVar[str] = "{better: SMC, than: Group Norm}"

    better: str = ""  # a row's name
    than: str = ""
    text: str = ""
    metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim"])
    among: str = ""  # where several rows have these names: what the first column says
    equal_seconds: bool = False  # `than` as it was after the seconds that `better` took


@dataclass
class Experiment:
    title: str = ""
    kind: Kind = "reconstruction"
    config: str = "imagenet-128-b"  # training configuration of the rows
    columns: list[str] = field(default_factory=lambda: ["Model"])
    metrics: list[str] = field(default_factory=lambda: ["rfid", "lpips", "psnr", "ssim"])
    sizes: list[int] = field(default_factory=list)  # sides in pixels, for kind resolution and complexity
    settings: list[str] = field(default_factory=list)  # of all rows
    tiny: list[str] = field(default_factory=list)  # more of them, at the tiny scale
    seeds: int = 1  # runs of each row at the tiny scale; the paper does not say how many it averages
    note: str = ""  # where this differs from the paper, and what the paper leaves open
    runs: list[RunSpec] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)


def load_experiment(name: str) -> Experiment:
    """The experiment `name`, such as table09, or the path of a YAML file.

    Raises:
        UserError: no such experiment, broken YAML, an unknown key or a value of the wrong type.
    """
    experiment = load(Experiment, name, (), FOLDER)
    if not experiment.runs or not all(run.row for run in experiment.runs):
        raise UserError(f"{name}: an experiment needs runs, and each of them a row")
    return experiment


def shipped_experiments() -> list[str]:
    """Names of all tables and figures."""
    return shipped(FOLDER)


def training_config(
    experiment: Experiment, run: RunSpec, scale: Scale, overrides: Sequence[str] = (), seed: int = 0
) -> Config:
    """The training configuration of a row at a scale.

    Args:
        overrides: the user's, which come last.

    Raises:
        UserError: settings that do not exist or do not fit.
    """
    name, chosen = run.config or experiment.config, [*experiment.settings, *run.settings]
    if scale == "tiny":
        chosen += [*tiny_settings(load_config(name, chosen)), *experiment.tiny, *run.tiny]
    return load_config(name, [*chosen, f"seed={seed}", *overrides])


def tiny_settings(paper: Config) -> list[str]:
    """The settings that turn a published configuration into its tiny one."""
    stages = ",".join(
        f"{{start: {tiny_step(stage.start - 1) + 1}"
        + (f", size: {stage.size // TINY_SIZE}" if stage.size else "")
        + "}"
        for stage in paper.stages
    )
    return [
        *TINY_SETTINGS,
        *TINY_SD_VAE * (paper.model.kind == "sd-vae"),
        f"data.size={paper.data.size // TINY_SIZE}",
        f"max_steps={tiny_step(paper.max_steps)}",
        f"loss.kl={min(paper.loss.kl, TINY_KL)}",
        f"stages=[{stages}]",
        f"loss.adversarial_start={tiny_step(paper.loss.adversarial_start - 1) + 1}",
    ]


def tiny_step(step: int) -> int:
    published, tiny = TINY_STEPS
    return step * tiny // published


def measured_size(config: Config, run: RunSpec, scale: Scale) -> int:
    """The side in pixels of the squares that a row is measured on."""
    if run.size is not None:
        return run.size // (TINY_SIZE if scale == "tiny" else 1)
    return list_stages(config)[-1].size
