"""Links that others have planted in a shared folder: no command writes to what they lead to."""

import pytest
from PIL import Image
from skimage import data

from litevae.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = [
    "max_steps=2",
    "validate_every=1",
    "checkpoint.every=2",
    "data.size=32",
    "data.batch_size=1",
    "data.workers=0",
    "model.block_out_channels=[16,16,16]",
    "model.layers_per_block=1",
    "model.num_groups=4",
    "tracker=none",
]
MEASURE = ["--size", "32", "--workers", "0"]


@pytest.fixture
def planted(tmp_path):
    """Plants links to a file and to a folder; returns a function that checks that both are as before."""
    victim, folder = tmp_path / "victim", tmp_path / "victims"
    victim.write_text("mine")
    folder.mkdir()
    (folder / "mine").write_text("mine")

    def plant(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(folder if name.endswith((".new", ".old")) else victim)

        def check():
            assert victim.read_text() == (folder / "mine").read_text() == "mine"
            assert [path.name for path in folder.iterdir()] == ["mine"]

        return check

    return plant


def run(status, *arguments):
    assert main([str(argument) for argument in arguments]) == status


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(data.chelsea()[:32, 40 * i : 40 * i + 32]).save(folder / f"{i}.png")
    return folder


def test_train(tmp_path, images, planted):
    names = [".config.tmp.yaml", ".metrics.tmp.jsonl", ".metrics.tmp.json", "metrics.jsonl", "metrics.json"]
    names += [
        ".reconstructions.tmp.png",
        ".curves.tmp.png",
        "bad_images.txt",
        "config.yaml",
        ".model.new",
        ".model.old",
    ]
    names += [
        "validation/.step-00000001.tmp.png",
        "validation/step-00000002.png",
        "checkpoints/.step-00000002.new",
    ]
    check = planted(*(f"run/{name}" for name in names))
    (images / "bad.png").write_text("no image")
    sources = [f"data.train={images}", f"data.validation={images}", "data.max_bad_fraction=0.5"]
    run(0, "train", "demo", *TRAIN, *sources, f"output_dir={tmp_path / 'run'}")
    check()
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert not (tmp_path / "run" / "bad_images.txt").is_symlink()


def test_scale(tiny_folder, images, planted):
    check = planted("model/.config.tmp.json")
    run(0, "scale", tiny_folder, images, *MEASURE)
    check()


def test_reconstruct(tiny_folder, tmp_path, images, planted):
    check = planted("out/.0.tmp.png", "out/0.png")
    run(0, "reconstruct", tiny_folder, images / "0.png", "-o", tmp_path / "out", "--overwrite")
    check()
    assert not (tmp_path / "out" / "0.png").is_symlink()


def test_eval(tiny_folder, tmp_path, images, planted):
    check = planted(".eval.tmp.json", ".eval.json.tmp.partial", "eval.json")
    command = ["eval", tiny_folder, images, *MEASURE, "--metrics", "psnr", "-o", tmp_path / "eval.json"]
    run(0, *command, "--overwrite")
    check()


def test_encode(tiny_folder, tmp_path, images, planted):
    command = [
        "encode",
        tiny_folder,
        images,
        tmp_path / "out",
        "--size",
        32,
        "--workers",
        0,
        "--device",
        "cpu",
    ]
    check = planted("out/.index.tmp.json", "out/bad_images.txt")
    run(2, *command)
    check()
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (images / "bad.png").write_text("no image")
    run(0, *command, "--max-bad-fraction", 0.5)
    for name in ("bad_images.txt", "shard-00000.safetensors"):
        (tmp_path / "out" / name).unlink()
    names = [
        ".shard-00000.tmp.safetensors",
        "..shard-00000.tmp.json",
        "..shard-00000.tmp.unfinished",
        "bad_images.txt",
    ]
    check = planted(*(f"out/{name}" for name in names))
    run(0, *command, "--max-bad-fraction", 0.5)
    check()
    assert not (tmp_path / "out" / "bad_images.txt").is_symlink()
