"""Settings and helpers of tiny training runs."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from skimage import data

import litevae.training.trainer as trainer_module
from litevae.errors import UserError
from litevae.training import load_config, train
from litevae.training.checkpoint import find_checkpoints
from litevae.training.teacher import as_overrides, load_teacher, teacher_settings

# A run that takes a few milliseconds per step.
TINY = [
    "initialise=random",
    "loss.l1=1",
    "loss.l2=0",
    "loss.wavelet=1",
    "loss.gaussian=0.5",
    "loss.kl=1e-4",
    "optimizer.learning_rate=2e-3",
    "data.size=32",
    "data.batch_size=2",
    "model.latent_channels=4",
    "model.block_out_channels=[16,16,16]",
    "model.layers_per_block=1",
    "model.num_groups=4",
    "precision=fp32",
    "log_every=1",
    "validate_every=1000000",
]
ADVERSARIAL = [
    "loss.adversarial=0.1",
    "loss.adversarial_start=3",
    "discriminator.kind=patchgan",
    "discriminator.width=S",
]


@pytest.fixture(scope="module", autouse=True)
def tiny_runs(one_thread):
    """All runs in this folder use one thread."""


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory):
    """Settings of a tiny run, with one small image to validate on."""
    folder = tmp_path_factory.mktemp("validation")
    Image.fromarray(data.chelsea()[100:148, 100:148]).save(folder / "cat.png")
    return [*TINY, f"data.validation={folder}"]


@pytest.fixture(scope="session")
def save_teacher():
    def save(folder, **settings):
        """Saves an AutoencoderKL with random weights."""
        torch.manual_seed(1)
        model = AutoencoderKL(
            **{
                "block_out_channels": (16, 16, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 3,
                "up_block_types": ("UpDecoderBlock2D",) * 3,
                "norm_num_groups": 4,
                "scaling_factor": 0.5,
                "shift_factor": 0.25,
                **settings,
            }
        )
        with torch.no_grad():
            model.encoder.conv_out.weight *= 10  # latents of a realistic size
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def sd(tmp_path_factory, save_teacher):
    """A pipeline's folder with a teacher like Stable Diffusion's."""
    return save_teacher(tmp_path_factory.mktemp("sd") / "vae").parent


@pytest.fixture
def distilling(tmp_path, tiny_settings):
    """A function that returns the configuration of a tiny run with a teacher."""

    def make(teacher, *overrides, name="run"):
        model = as_overrides(teacher_settings(load_teacher(str(teacher))))
        tiny = [each for each in tiny_settings if not each.startswith("loss.")]  # distill has its own
        tiny += ["data.train=demo", "data.crop=native", "data.workers=0", "tracker=none"]
        settings = [*tiny, *model, "model.preset=litevae-s", "optimizer.warmup_steps=0", "checkpoint.every=0"]
        return load_config(
            "distill", [*settings, f"teacher={teacher}", f"output_dir={tmp_path / name}", *overrides]
        )

    return make


@pytest.fixture(scope="session")
def adversarial_settings():
    return ADVERSARIAL


@pytest.fixture
def tiny(tmp_path, tiny_settings):
    """A function that returns the configuration of a tiny run in tmp_path/run."""

    def make(*overrides, name="run"):
        return load_config("demo", [*tiny_settings, f"output_dir={tmp_path / name}", *overrides])

    return make


@pytest.fixture(scope="session")
def checkpoint_names():
    def read(run):
        """Returns the sorted names in a run's folder of checkpoints."""
        return sorted(path.name for path in (run / "checkpoints").iterdir())

    return read


@pytest.fixture
def two_checkpoints(tiny, no_pictures):
    """The folder of a finished tiny run, with a checkpoint after each of its two steps."""
    config = tiny("max_steps=2", "checkpoint.every=1")
    train(config)
    return Path(config.output_dir)


@pytest.fixture(scope="session")
def training_error():
    def run(config):
        """Returns the message of a run that ends with a UserError, which is one line."""
        with pytest.raises(UserError) as caught:
            train(config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


@pytest.fixture
def no_pictures(monkeypatch):
    """Replaces the plots, which take Matplotlib seconds, with empty files."""
    for name in ("draw_curves", "draw_reconstructions"):
        monkeypatch.setattr(trainer_module, name, lambda *arguments: arguments[-1].touch())


def newest_weights(folder):
    """Returns all tensors of the newest checkpoint by file and name."""
    (*_, newest) = find_checkpoints(folder / "checkpoints")
    return {
        (path.relative_to(newest.path), name): tensor
        for path in newest.path.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.fixture
def assert_same_run(logged):
    def compare(first, second):
        assert logged(first) == logged(second)
        ours, theirs = newest_weights(first), newest_weights(second)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    return compare


@pytest.fixture
def assert_resumes(tiny, no_pictures, assert_same_run, tmp_path):
    """A function that runs six steps at once, and in two halves, and compares the two runs."""

    def run(*settings):
        settings = (*settings, "checkpoint.every=3")
        train(tiny(*settings, "max_steps=6", name="whole"))
        train(tiny(*settings, "max_steps=3"))
        train(tiny(*settings, "max_steps=6", "resume=auto"))
        assert_same_run(tmp_path / "whole", tmp_path / "run")

    return run
