import errno
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.latents import Settings, verify
from litevae.latents.folder import make_buckets

OTHER_RUN = """
import fcntl, sys
with open(sys.argv[1], "ab") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, int(sys.argv[2]), int(sys.argv[3]))
    print("locked", flush=True)
    sys.stdin.read()
"""


WHY_TWICE = ", because an image of 4:1 is half as high as the square of its area"


class TestLock:
    @pytest.mark.parametrize("process", [0, 1])
    def test_a_run_is_refused_until_no_process_of_another_is_left(self, encode, tmp_path, contents, process):
        encode()
        lock, before = tmp_path / "latents" / ".lock", contents(tmp_path / "latents")
        child = [sys.executable, "-c", OTHER_RUN, lock, "1", str(process)]
        with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(
                UserError, match="latents: another run is writing there: wait until it has ended"
            ):
                encode()
            other.kill()
        assert contents(tmp_path / "latents") == before
        assert encode().before == 11

    def test_a_run_keeps_others_out(self, encode, photographs, tmp_path, eventful):
        answers = {}

        def try_to_lock(index):
            if index in (0, 10):
                child = [sys.executable, "-c", OTHER_RUN, tmp_path / "latents" / ".lock", "0", "0"]
                result = subprocess.run(child, stdin=subprocess.DEVNULL, capture_output=True, text=True)
                answers[index] = result.stderr.splitlines()[-1]

        encode(images=eventful(open_images(str(photographs)), try_to_lock))
        assert set(answers) == {0, 10}
        assert all(answer.startswith("BlockingIOError") for answer in answers.values())

    @pytest.mark.parametrize(
        ("obstacle", "reason"),
        [
            (
                lambda patch: patch.setattr("fcntl.lockf", Mock(side_effect=OSError(errno.ENOLCK, "none"))),
                os.strerror(errno.ENOLCK),
            ),
            (lambda patch: patch.setitem(sys.modules, "fcntl", None), "fcntl"),  # as on Windows
        ],
    )
    def test_where_there_are_no_locks_a_line_says_so(
        self, encode, tmp_path, monkeypatch, capsys, obstacle, reason
    ):
        obstacle(monkeypatch)
        assert encode().done == 11
        line = capsys.readouterr().err.splitlines()[0]
        assert line.startswith(f"{tmp_path / 'latents'}: cannot be locked here (")
        assert reason in line
        assert line.endswith("make sure that no other run writes there")


def test_a_complete_folder_is_only_checked_and_damage_is_mended(encode, tmp_path, contents, capsys):
    encode()
    before = contents(tmp_path / "latents")
    again = encode()
    assert (again.before, again.done) == (11, 0)
    shard = tmp_path / "latents" / "shard-00001.safetensors"
    flipped = bytearray(shard.read_bytes())
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    (tmp_path / "latents" / "shard-00002.safetensors").unlink()
    mended = encode()
    errors = capsys.readouterr().err
    assert f"{shard}: its content is not what was written (SHA-256); it is encoded again" in errors
    assert "shard-00002.safetensors: is missing" in errors
    assert (mended.before, mended.done) == (4, 7)
    assert contents(tmp_path / "latents") == before


class TestOtherSettings:
    @pytest.fixture(autouse=True)
    def begun(self, encode, photographs, interrupting):
        encode(images=interrupting(open_images(str(photographs)), 5))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 48}, "size 32, not 48"),
            ({"mirror": False}, "mirror True, not False"),
            ({"precision": "bf16"}, "precision fp32, not bf16"),
            ({"shard_size": 5}, "shard size 4, not 5"),
            ({"crop": "area"}, "crop the middle square, resized by .* bicubic, not area, bucket step 4"),
        ],
    )
    def test_are_refused(self, encode, tmp_path, contents, options, message):
        before = contents(tmp_path / "latents")
        with pytest.raises(UserError, match=f"was begun with {message}: give the same, or another folder"):
            encode(**options)
        assert contents(tmp_path / "latents") == before

    def test_other_images_are_refused(self, encode, photographs, tmp_path):
        folder = shutil.copytree(photographs, tmp_path / "moved")
        encode(images=open_images(str(folder)))  # their location does not matter
        (folder / "a" / "00.png").rename(folder / "a" / "000.png")
        with pytest.raises(UserError, match="images of other names"):
            encode(images=open_images(str(folder)))
        (folder / "a" / "000.png").unlink()
        with pytest.raises(UserError, match="11 images, not 10"):
            encode(images=open_images(str(folder)))

    def test_another_encoder_is_refused_and_another_decoder_is_not(self, encode, model_folder, tmp_path):
        model = LiteVAE.from_pretrained(model_folder)
        with torch.no_grad():
            model.decoder.conv_in.weight.add_(1)
        model.register_to_config(scaling_factor=2.0)
        encode(model=model)
        assert verify(tmp_path / "latents")["latents"]["scaling_factor"] == 2.0
        model = LiteVAE.from_pretrained(model_folder)
        with torch.no_grad():
            model.encoder.feature_aggregator.conv_in.weight[0, 0, 0, 0] += 1e-3
        with pytest.raises(UserError, match="another model"):
            encode(model=model)


def test_other_buckets_are_refused(encode, tmp_path):
    encode(crop="area")
    for options, message in (
        ({"crop": "shorter"}, "crop area, bucket step 4, not shorter, bucket step 4"),
        ({"crop": "area", "bucket_step": 8}, "crop area, bucket step 4, not area, bucket step 8"),
        ({}, "crop area, bucket step 4, not the middle square, "),
    ):
        with pytest.raises(UserError, match=f"latents: was begun with {message}"):
            encode(**options)
    assert encode(crop="area", bucket_step=4).done == 0  # the default


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bucket_step": 8}, "bucket_step=8 has no effect on middle squares: choose crop shorter or area"),
        ({"crop": "left"}, "crop must be one of middle, shorter, area, got 'left'"),
        (
            {"crop": "area", "bucket_step": 6},
            "bucket_step must be a whole number, 4 or a multiple of it, got 6",
        ),
        (
            {"crop": "area", "bucket_step": 8.0},
            "bucket_step must be a whole number, 4 or a multiple of it, got 8.0",
        ),
        (
            {"crop": "area", "bucket_step": "8"},
            "bucket_step must be a whole number, 4 or a multiple of it, got '8'",
        ),
        (
            {"crop": "area", "bucket_step": True},
            "bucket_step must be a whole number, 4 or a multiple of it, got True",
        ),
        (
            {"crop": "area", "bucket_step": 0},
            "bucket_step must be a whole number, 4 or a multiple of it, got 0",
        ),
        (
            {"crop": "area", "bucket_step": -4},
            "bucket_step must be a whole number, 4 or a multiple of it, got -4",
        ),
        (
            {"crop": "area", "size": 28},
            f"size must be a multiple of 4, at least 32, got 28{WHY_TWICE}",
        ),
        ({"crop": "shorter", "size": 12}, "size must be a multiple of 4, at least 16, got 12"),
        (
            {"crop": "shorter", "size": 40, "bucket_step": 16},
            "size must be a multiple of 16, at least 16, got 40",
        ),
        (
            {"crop": "area", "size": 64, "bucket_step": 64},
            f"size must be a multiple of 64, at least 128, got 64{WHY_TWICE}",
        ),
    ],
)
def test_buckets_that_do_not_fit_are_refused(model, settings, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        make_buckets(model, Settings(**{"size": 32} | settings))


@pytest.mark.parametrize(
    ("crop", "size", "step"), [("area", 32, 4), ("area", 48, 4), ("area", 128, 64), ("shorter", 16, 8)]
)
def test_every_image_is_large_enough_for_the_model(model, crop, size, step):
    buckets = make_buckets(model, Settings(size, crop=crop, bucket_step=step))
    for ratio in range(100, 401):
        for side in (buckets.find(100, ratio), buckets.find(ratio, 100)):
            assert min(side) >= 16


def test_a_model_of_one_size_takes_only_squares():
    vit = LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), num_groups=4, sample_size=16, aggregator="vit"
    )
    assert make_buckets(vit, Settings(16)).find(30, 40) == (16, 16)
    with pytest.raises(
        UserError, match=r"crop must be middle, got area: this model takes only squares of 16$"
    ):
        make_buckets(vit, Settings(16, crop="area"))


def test_a_folder_of_something_else_is_left_alone(encode, tmp_path):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "mine.txt").touch()
    with pytest.raises(UserError, match="has files, and no encoded images: give another folder"):
        encode()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written: exists and is not a folder"):
        encode("file")
