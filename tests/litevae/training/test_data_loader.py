"""The data of a run: which images are shown, unreadable images, and the worker processes."""

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from litevae import LiteVAE
from litevae.errors import UserError
from litevae.training import load_config
from litevae.training.config import list_stages
from litevae.training.data_loader import TrainingData


@pytest.fixture
def folder(tmp_path):
    """A function that makes a folder of grey images; None stands for an unreadable one."""

    def make(name, *greys):
        folder = tmp_path / name
        folder.mkdir()
        for number, grey in enumerate(greys):
            path = folder / f"{number:02}.png"
            if grey is None:
                path.write_bytes(b"broken")
            else:
                Image.fromarray(np.full((40, 48, 3), grey, np.uint8)).save(path)
        return folder

    return make


def load(tmp_path, *overrides):
    config = load_config("demo", ["data.size=32", "data.crop=random", f"output_dir={tmp_path}", *overrides])
    return TrainingData(config, list_stages(config), Accelerator(cpu=True), tmp_path, resuming=False)


def test_training_images_are_shown_if_there_are_none_to_validate_on(folder, tmp_path):
    images = folder("train", *range(8))
    loaded = load(tmp_path, f"data.train={images}")
    assert loaded.validation == []
    assert [pixels[0, 0, 0] for _, pixels in loaded.shown] == [0, 2, 4, 6]


def test_unreadable_images_are_not_shown(folder, tmp_path):
    images = folder("train", None, 1, None, 3, None, 5, None, 7)  # every image to show is unreadable
    assert load(tmp_path, f"data.train={images}").shown == []


def test_unreadable_validation_images_are_named(folder, tmp_path, capsys):
    validation = folder("validation", 1, None, 3)
    loaded = load(tmp_path, f"data.train={folder('train', 1, 2)}", f"data.validation={validation}")
    assert [pixels[0, 0, 0] for _, pixels in loaded.validation] == [1, 3]
    assert f"1 of the validation images cannot be read: {validation / '01.png'}" in capsys.readouterr().err


def test_a_run_without_a_readable_validation_image_is_refused(folder, tmp_path):
    validation = folder("validation", None)
    with pytest.raises(UserError, match=r"none of the 1 images can be read; .+: .+"):
        load(tmp_path, f"data.train={folder('train', 1)}", f"data.validation={validation}")


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="SIGTERM ends workers on this system")
def test_workers_end_only_at_a_signal_of_their_parent(folder, tmp_path):
    settings = [f"data.train={folder('train', *range(8))}", "data.workers=1"]
    batches = load(tmp_path, *settings).batches(list_stages(load_config("demo"))[0], 0)
    (worker,) = multiprocessing.active_children()
    next(batches)
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    for _ in range(5):  # only two batches are prefetched
        next(batches)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_a_run_that_ends_because_of_bad_images_saves_first_and_exits(folder, tmp_path, tiny_settings):
    images, run = folder("train", *range(24), None, None, None), tmp_path / "run"
    command = "import sys; from litevae.cli import main; sys.exit(main())"
    settings = [*tiny_settings, f"data.train={images}", f"output_dir={run}", "data.batch_size=1"]
    settings += ["data.workers=1", "data.max_bad_fraction=0.1", "checkpoint.every=1000000"]
    ended = subprocess.run(
        [sys.executable, "-c", command, "train", "demo", *settings],
        capture_output=True,
        text=True,
        timeout=300,  # a worker that never ends would keep the process alive
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("3 of 27 images cannot be used") == 1
    assert "Traceback" not in ended.stderr
    LiteVAE.from_pretrained(run / "model")
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
