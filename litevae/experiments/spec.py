"""The specification of an experiment: one YAML file in `litevae/configs/experiments/` per table or figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from litevae.errors import UserError
from litevae.settings import load, shipped
from litevae.training.config import CONFIGS, Config, list_stages, load_config

Kind = Literal[
    "reconstruction",
    "regularisation",
    "complexity",
    "mmd",
    "generation",
    "latents",
    "features",
    "resolution",
    "gradients",
]
FOLDER = CONFIGS / "experiments"
# By metric: the loss that a claim to be as good allows. The paper prints 0.94 and 0.95 for one model's rFID, and 29.45
# and 29.55 dB for one model's PSNR (Tables 1 and 2): smaller differences are not meant.
MARGINS = {"rfid": 0.05, "lpips": 0.002, "psnr": 0.1, "ssim": 0.005, "fid": 0.2}


@dataclass(frozen=True)
class Scale:
    """How a published setting is scaled down.

    `size`: divisor of the image sizes. `steps`: steps kept per thousand. `settings` of training and `diffusion`
    settings of the second stage replace the experiment's. `demo`: whether to train on scikit-image's photographs
    instead of data sets that the user names. `mmd_groups`: groups of images for the MMD. `complexity_batch`: batch
    size for timing. `smoke`: whether the scale only tests that everything runs, so that its reports give neither
    figures nor verdicts.
    """

    description: str
    size: int = 1
    steps: int = 1000
    settings: tuple[str, ...] = ()
    diffusion: tuple[str, ...] = ()
    second_stage: str = "ldm-ffhq"
    demo: bool = False
    mmd_groups: int = 10
    complexity_batch: int = 32
    smoke: bool = False

    @property
    def reduced(self) -> bool:
        """Whether anything is scaled down."""
        return self.steps < 1000


# Below the paper's scale no weights are downloaded, so there is no LPIPS, and there is a discriminator only where
# the experiment is about it. Encoders keep their size.
REDUCED_SETTINGS = (
    "data.crop=native",
    "data.workers=0",
    "data.batch_size=4",
    "model.block_out_channels=[32,32,64,64]",
    "model.num_groups=16",
    "loss.lpips=0",
    "loss.adversarial=0",
    "discriminator.width=S",
    "optimizer.warmup_steps=20",
    "ema_decay=0",
    "log_every=10",
    "validate_every=50",
    "tracker=none",
)
SCALES = {
    "paper": Scale("the paper's setting", diffusion=("fid.measure=always",)),
    "small": Scale(
        "small scale, not the paper's",
        steps=12,
        settings=(
            *REDUCED_SETTINGS,
            "data.batch_size=2",
            "data.validation_count=64",
            "model.layers_per_block=2",
            # docs/experiments.md says how these were found.
            "optimizer.learning_rate=3e-4",
            "optimizer.betas=[0.9,0.99]",
            "optimizer.warmup_steps=100",
            "optimizer.schedule=cosine",
            "validate_every=400",
            "checkpoint.every=400",
        ),
        diffusion=("fid.measure=never", "precision=fp32", "max_steps=2000"),
        second_stage="small",
        mmd_groups=4,
        complexity_batch=1,
    ),
    "tiny": Scale(
        "tiny scale, not the paper's",
        size=4,
        steps=2,
        settings=(
            *REDUCED_SETTINGS,
            "data.train=demo",
            "data.validation_count=28",
            "model.layers_per_block=1",
            "checkpoint.every=0",
        ),
        diffusion=("fid.measure=never", "precision=fp32", "max_steps=600", "data.batch_size=16"),
        second_stage="small",
        demo=True,
        mmd_groups=4,
        complexity_batch=1,
        smoke=True,
    ),
}
# AutoencoderKL in diffusers has one list of widths for both sides, and only the decoder may shrink.
SD_VAE_ENCODER = "model.encoder_block_out_channels=[128,256,512,512]"


@dataclass
class RunSpec:
    """One row: a model, which is trained unless the kind of experiment needs no training."""

    example: ClassVar[str] = "{row: [Baseline]}"

    row: list[str] = field(default_factory=list)  # cells under `columns`; the last one is the row's name
    dataset: str = "imagenet"  # or ffhq, celeba-hq, deepfashion, as in the paper
    config: str = ""  # training configuration; empty for the experiment's
    model: str = ""  # a preset or sd-vae, where nothing is trained
    settings: list[str] = field(default_factory=list)  # settings that replace the configuration's
    reduced: list[str] = field(default_factory=list)  # further settings below the paper's scale
    diffusion: str = ""  # configuration of the second stage at the paper's scale; empty for the scale's
    size: int | None = None  # side in pixels to measure at; None for the last training size
    paper: dict[str, float] = field(default_factory=dict)  # published figures by metric

    @property
    def name(self) -> str:
        return self.row[-1]


@dataclass
class Claim:
    """A statement about two rows."""

    example: ClassVar[str] = "{better: SMC, than: Group Norm}"

    better: str = ""  # name of a row
    than: str = ""
    text: str = ""
    metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim"])
    among: str = ""  # first cell of the rows, where several rows have these names
    at_least: bool = False  # the claim is that `better` is as good, not that it is better
    factor: float = 1.0  # the claim is that `better` is more than this many times better
    equal_seconds: bool = False  # compare with `than` as it was after the training time of `better`
    ours: bool = False  # our claim, not the paper's


@dataclass
class Experiment:
    title: str = ""
    kind: Kind = "reconstruction"
    config: str = "imagenet-128-b"  # training configuration of the rows
    columns: list[str] = field(default_factory=lambda: ["Model"])
    metrics: list[str] = field(default_factory=lambda: ["rfid", "lpips", "psnr", "ssim"])
    sizes: list[int] = field(default_factory=list)  # sides in pixels, for the kind resolution
    settings: list[str] = field(default_factory=list)  # settings of all rows
    reduced: list[str] = field(default_factory=list)  # further settings below the paper's scale
    first_sample: int = 0  # number of the first image that a figure of generated images shows
    seeds: int = 1  # runs per row below the paper's scale; the paper does not say how many it averages
    note: str = ""  # differences from the paper, and questions that the paper leaves open
    runs: list[RunSpec] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)


def shipped_experiments() -> list[str]:
    """Returns the names of all tables and figures."""
    return shipped(FOLDER)


def load_experiment(name: str) -> Experiment:
    """Loads an experiment.

    Args:
        name: name of a shipped experiment, such as table09, or path of a YAML file.

    Raises:
        UserError: there is no such experiment, the YAML is broken, a key is unknown, a value has the wrong type,
            or rows and claims do not fit together.
    """
    experiment = load(Experiment, name, (), FOLDER)
    if not experiment.runs:
        raise UserError(f"{name}: an experiment needs runs")
    for run in experiment.runs:
        if len(run.row) != len(experiment.columns):
            raise UserError(
                f"{name}: row {run.row} must have a cell for each of columns {experiment.columns}"
            )
    for claim in experiment.claims:
        for row in (claim.better, claim.than):
            if not any(matches(run, row, claim.among) for run in experiment.runs):
                raise UserError(f"{name}: claim {claim.text!r} is about {row!r}, and no row has this name")
        without = [metric for metric in claim.metrics if claim.at_least and metric not in MARGINS]
        if without:
            raise UserError(
                f"{name}: claim {claim.text!r}: at_least needs a margin, and {without[0]} has none; "
                f"allowed: {', '.join(MARGINS)}"
            )
    return experiment


def matches(run: RunSpec, name: str, among: str) -> bool:
    return run.name == name and among in ("", run.row[0])


def training_config(
    experiment: Experiment, run: RunSpec, scale: Scale, overrides: Sequence[str] = (), seed: int = 0
) -> Config:
    """Returns the training configuration of a row at a scale.

    Args:
        experiment: the experiment.
        run: the row.
        scale: scale to train at.
        overrides: the user's settings, which are applied last.
        seed: random seed.

    Raises:
        UserError: a setting does not exist or does not fit.
    """
    name, chosen = run.config or experiment.config, [*experiment.settings, *run.settings]
    if scale.reduced:
        chosen += [*scaled_settings(load_config(name, chosen), scale), *experiment.reduced, *run.reduced]
    return load_config(name, [*chosen, f"seed={seed}", *overrides])


def scaled_settings(paper: Config, scale: Scale) -> list[str]:
    """Returns the settings that scale a published configuration down."""

    def step(published: int) -> int:
        return published * scale.steps // 1000

    stages = ",".join(
        f"{{start: {step(stage.start - 1) + 1}"
        + (f", size: {stage.size // scale.size}" if stage.size else "")
        + "}"
        for stage in paper.stages
    )
    return [
        *scale.settings,
        *([SD_VAE_ENCODER] if paper.model.kind == "sd-vae" else []),
        f"data.size={paper.data.size // scale.size}",
        f"max_steps={step(paper.max_steps)}",
        f"stages=[{stages}]",
        f"loss.adversarial_start={step(paper.loss.adversarial_start - 1) + 1}",
    ]


def measured_size(config: Config, run: RunSpec, scale: Scale) -> int:
    """Returns the side in pixels of the squares that a row is measured on."""
    return list_stages(config)[-1].size if run.size is None else run.size // scale.size


LEAST_SIZE = 32  # pixels; SSIM's window leaves little of smaller images


def measured_sizes(experiment: Experiment, scale: Scale) -> list[int]:
    """Returns the sides in pixels that models are measured at, for the kind resolution."""
    return [size // scale.size for size in experiment.sizes if size // scale.size >= LEAST_SIZE]


SECOND_STAGE = "diffusion."  # prefix of overrides for the second stage


@dataclass(frozen=True)
class Setup:
    """How an experiment is run.

    Args:
        scale: name of a scale from `SCALES`.
        output: folder for trained models and results, shared by all experiments of a scale.
        data: training images per data set, as `data.train` takes them; for the scales "small" and "paper".
        validation: images to measure on, per data set.
        overrides: settings that replace the experiment's; those of the second stage begin with "diffusion.".
        metrics: metrics instead of the experiment's; None takes psnr and ssim, which need no weights, below the
            paper's scale.
        seeds: number of seeds instead of the experiment's.
        rows: cells; only the rows that have one of them are run. All rows without cells.
    """

    scale: str
    output: Path
    data: Mapping[str, str] = field(default_factory=dict)
    validation: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    metrics: Sequence[str] | None = None
    seeds: int | None = None
    rows: Sequence[str] = ()

    @property
    def at(self) -> Scale:
        return SCALES[self.scale]

    @property
    def training_overrides(self) -> list[str]:
        return [each for each in self.overrides if not each.startswith(SECOND_STAGE)]

    @property
    def diffusion_overrides(self) -> list[str]:
        return [each.removeprefix(SECOND_STAGE) for each in self.overrides if each.startswith(SECOND_STAGE)]
