import json

import datasets
import pytest
from PIL import Image

from litevae.cli import main
from litevae.data.sources import open_images
from litevae.latents import LatentDataset

SIZE = 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(model_folder, photographs, tmp_path, capsys):
    def run(*options, status=0):
        arguments = [
            "encode",
            model_folder,
            photographs,
            tmp_path / "out",
            "--max-bad-fraction",
            0.1,
            *options,
        ]
        assert main([str(argument) for argument in [*arguments, "--workers", 0, "--device", "cpu"]]) == status
        return capsys.readouterr()

    return run


def test_says_what_it_did(command, tmp_path, capsys):
    first = command("--precision", "fp32").out
    for pattern in (
        "11 images in ",
        " images/s; the encoder itself: ",
        " images/s on cpu in fp32",
        "bottleneck: ",
        f"1 image cannot be used: see {tmp_path / 'out' / 'bad_images.txt'}",
        f"{tmp_path / 'out'}: all 10 images are encoded",
    ):
        assert pattern in first
    assert "scaling_factor" not in first  # no hint, because the model has one
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["encoding"]["size"] == SIZE  # the model's sample_size
    assert str(tmp_path) not in json.dumps(index)
    again = command("--precision", "fp32").out
    assert again.splitlines()[-1] == f"{tmp_path / 'out'}: complete already, and undamaged: 10 images"
    assert "images/s" not in again
    assert main(["encode", "--verify", str(tmp_path / "out")]) == 0
    assert "10 images in 1 shard, 1 bad image left out; all files are intact" in capsys.readouterr().out


def test_a_flipped_bit_is_found(command, tmp_path, capsys):
    command()
    shard = tmp_path / "out" / "shard-00000.safetensors"
    flipped = bytearray(shard.read_bytes())
    flipped[len(flipped) // 2] ^= 8
    shard.write_bytes(flipped)
    assert main(["encode", "--verify", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"litevae: error: {shard}: its content is not what was written (SHA-256);")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "30"], "multiple of 4"),
        (["--device", "nonsense"], "--device nonsense: "),
        (["--precision", "fp8"], "'fp8' is not one of 'auto', 'bf16', 'fp32'"),
        (["--batch-size", "0"], "--batch-size"),
        (["--verify", "nowhere"], "nowhere: no such folder"),
        (["--crop", "left"], "'left' is not one of 'middle', 'shorter', 'area'"),
        (
            ["--crop", "area", "--bucket-step", "6"],
            "bucket_step must be a whole number, 4 or a multiple of it, got 6",
        ),
    ],
)
def test_mistakes_are_one_line(model_folder, photographs, tmp_path, capsys, options, message):
    arguments = ["encode", str(model_folder), str(photographs), str(tmp_path / "out"), *options]
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_whole_images(command, tmp_path, capsys):
    assert "all 10 images are encoded" in command("--crop", "shorter", "--bucket-step", 8, "--mirror").out
    dataset = LatentDataset(tmp_path / "out")
    # 40 x 60 pixels, in steps of 8 at the factor 4
    assert dataset[0].moments.shape == (8, 8, 12)
    assert all(height % 2 == width % 2 == 0 for _, height, width in dataset.items_by_shape())
    assert main(["encode", "--verify", str(tmp_path / "out")]) == 0
    assert "10 images in 1 shard" in capsys.readouterr().out
    assert (
        "was begun with crop shorter, bucket step 8, not area"
        in command("--crop", "area", "--mirror", status=2).err
    )


def test_ctrl_c(command, photographs, monkeypatch, interrupting):
    images = open_images(str(photographs))
    monkeypatch.setattr("litevae.data.sources.open_images", lambda *_: interrupting(images, 5))
    output = command("--shard-size", 4, "--batch-size", 2).out
    assert "stopped by SIGTERM; 6 of 11 images are encoded: the same command continues" in output


def test_columns_that_may_hold_the_classes_are_named(model_folder, tmp_path, capsys):
    images = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    features = datasets.Features(image=datasets.Image(), fine_label=datasets.ClassLabel(names=["a", "b"]))
    rows = datasets.Dataset.from_dict({"image": images, "fine_label": [0, 1]}, features)
    rows.save_to_disk(tmp_path / "data")
    command = ["encode", model_folder, tmp_path / "data", tmp_path / "out", "--workers", 0, "--device", "cpu"]
    assert main([str(argument) for argument in command]) == 0
    errors = capsys.readouterr().err
    assert f"{tmp_path}/data: has no column label, so the images get no labels; rename" in errors
    assert "to label (fine_label)" in errors


def test_ranges_are_encoded_and_merged(command, tmp_path, capsys, model_folder, photographs):
    out = tmp_path / "out"
    for number in range(2):
        arguments = ["encode", model_folder, photographs, out / str(number), "--range", f"{number}/2"]
        options = ["--shard-size", 4, "--max-bad-fraction", 0.2, "--workers", 0, "--device", "cpu"]
        assert main([str(argument) for argument in [*arguments, *options]]) == 0
        assert f"this is range {number}/2" in capsys.readouterr().out
    assert main(["encode", "--verify", str(out / "0")]) == 0
    assert f"{out / '0'}: range 0/2, 4 images in 1 shard" in capsys.readouterr().out
    assert main(["encode", "--merge", *map(str, sorted(out.iterdir()))]) == 0
    assert (
        f"{out}: 10 images in 3 shards, 1 bad image left out; all files are intact" in capsys.readouterr().out
    )
    assert "complete already" in command("--shard-size", "4").out
    for wrong in ("2/2", "1", "-1/2", "0/0", "1/2/3", "a/b"):
        assert "must be i/n with i from 0 to n-1" in command("--range", wrong, status=2).err
    assert main(["encode", "--merge", str(out), "--mirror"]) == 2
    assert "--merge: takes folders only, and no option '--mirror'" in capsys.readouterr().err
    assert main(["encode", "--merge"]) == 2
    assert "give the folders of all ranges" in capsys.readouterr().err
