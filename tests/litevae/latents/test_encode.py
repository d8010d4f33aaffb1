import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.latents import Encoding, LatentDataset, Part, merge_parts, verify
from litevae.latents.encoder import BatchedEncoder

SIZE = 32


EPS16, EPS32 = 2**-11, 2**-24  # the largest relative errors of one rounding


@pytest.mark.parametrize("kind", ["litevae", "sd-vae"])
def test_moments_are_those_of_the_posterior(
    encode, model, photographs, middle_square, tmp_path, kind, stored, readable
):
    if kind == "sd-vae":
        torch.manual_seed(0)
        blocks = {
            f"{way}_block_types": (f"{way.title()}{coder}coderBlock2D",) * 3
            for way, coder in (("down", "En"), ("up", "De"))
        }
        model = AutoencoderKL(block_out_channels=(32, 32, 32), layers_per_block=1, **blocks)
    encode(model=model)
    images = torch.cat([middle_square(path) for path in readable(photographs)]).double() / 127.5 - 1
    for name, batch in (("moments", images), ("moments_mirrored", images.flip(3))):
        with torch.no_grad():
            posterior = model.double().encode(batch).latent_dist
        expected = torch.cat([posterior.mean, posterior.logvar], 1)
        found = stored(tmp_path / "latents", name)
        assert found.dtype == torch.float16
        # one rounding to float16, and the roundings of about 40 layers in float32
        error = 500 * EPS32 * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=EPS16, atol=error)


def test_bfloat16_is_stored_exactly(encode, model, photographs, middle_square, tmp_path, stored, readable):
    encode(precision="bf16", mirror=False)
    assert model.dtype == torch.bfloat16
    expected = []
    paths = readable(photographs)
    paths.insert(
        5, None
    )  # A black square replaces the broken image, so that the batches are those of the run.
    black = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    for i in range(0, 11, 2):
        pixels = torch.cat([middle_square(path) if path else black for path in paths[i : i + 2]])
        batch = (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            posterior = model.encode(batch).latent_dist
        expected.append(torch.cat([posterior.mean, posterior.logvar], 1))
    keep = [i for i in range(11) if i != 5]
    assert torch.equal(stored(tmp_path / "latents").bfloat16(), torch.cat(expected)[keep])


def test_workers_and_batches_change_nothing_of_note(encode, model_folder, tmp_path, contents, stored):
    encode("one")
    encode("two", workers=2, model=LiteVAE.from_pretrained(model_folder))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    encode("three", batch_size=3, model=LiteVAE.from_pretrained(model_folder))
    torch.testing.assert_close(
        stored(tmp_path / "three"), stored(tmp_path / "one"), rtol=2 * EPS16, atol=1000 * EPS32
    )


def test_bad_images_leave_a_gap_that_is_recorded(encode, tmp_path):
    result = encode()
    assert (result.total, result.before, result.done, result.bad) == (11, 0, 11, 1)
    index = verify(tmp_path / "latents")
    assert [(shard.first, shard.images, shard.count) for shard in index["shards"]] == [
        (0, 4, 4),
        (4, 4, 3),
        (8, 3, 3),
    ]
    (reason,) = index["shards"][1].bad.values()
    assert index["shards"][1].bad == {"b/05.png": reason}
    assert (tmp_path / "latents" / "bad_images.txt").read_text() == f"b/05.png\t{reason}\n"
    dataset = LatentDataset(tmp_path / "latents")
    assert [dataset.name(i) for i in range(4, 7)] == ["b/04.png", "b/06.png", "b/07.png"]


def test_too_many_bad_images_stop_the_run(encode, photographs, tmp_path):
    with pytest.raises(
        UserError, match=r"1 of 11 images cannot be used, more than --max-bad-fraction=0\.05 allows"
    ):
        encode(max_bad_fraction=0.05, workers=1)
    assert encode().before == 4  # the next run keeps the complete shard
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(photographs / "b" / "05.png", bad)
    with pytest.raises(UserError, match="none of the images can be used"):
        encode("none", images=open_images(str(bad)), max_bad_fraction=1)


def test_compiles_the_encoder(encode, model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(module))
    encode(compile=True)
    assert compiled == [model.encoder]


@pytest.mark.parametrize(("at", "kept"), [(0, 2), (5, 6), (7, 8), (9, 10)])
def test_a_signal_ends_the_run_and_the_next_one_goes_on(
    encode, photographs, tmp_path, contents, at, kept, interrupting
):
    images = open_images(str(photographs))
    stopped = encode(images=interrupting(images, at))
    assert (stopped.stopped_by, stopped.before, stopped.done) == ("SIGTERM", 0, kept)
    with pytest.raises(
        UserError, match="not complete: run the same litevae encode command again to continue"
    ):
        verify(tmp_path / "latents")
    resumed = encode()
    assert (resumed.stopped_by, resumed.before, resumed.done, resumed.bad) == (None, kept, 11 - kept, 1)
    encode("whole")
    assert contents(tmp_path / "latents") == contents(tmp_path / "whole")


def test_killed_at_random_instants_the_files_are_the_same(model_folder, photographs, tmp_path, contents):
    script = Path(__file__).with_name("killed.py")
    for name, kills in (("whole", 0), ("killed", 10)):
        ended = subprocess.run(
            [sys.executable, script, model_folder, photographs, tmp_path / name, str(kills), "3"],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) >= 4
    assert len(set(lines)) >= 3  # the kills hit different stages
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    verify(tmp_path / "killed")


def test_a_full_disk_leaves_what_was_whole(encode, tmp_path, monkeypatch, contents):
    encode("whole")
    sync, writes = os.fsync, iter(range(5))  # index, its folder, a shard, its completion marker, the folder

    def full(descriptor):
        if next(writes, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        encode()
    monkeypatch.undo()
    assert not list((tmp_path / "latents").glob(".*.tmp.*"))
    assert encode().before == 4
    assert contents(tmp_path / "latents") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 30}, "multiple of 4, at least 16, got 30"), ({"size": 4}, "at least 16, got 4")],
)
def test_a_size_that_does_not_fit(encode, options, message):
    with pytest.raises(UserError, match=message):
        encode(**options)


@pytest.mark.parametrize(
    ("waited", "writing", "expected"),
    [(5, 0, "the encoder"), (15, 0, "decoding images"), (15, 20, "writing"), (5, 20, "writing")],
)
def test_the_bottleneck_is_what_is_waited_for(waited, writing, expected):
    encoding = Encoding(Path(), 1, 0, 1, 0, 100.0, 80.0, waited, writing, None)
    assert encoding.bottleneck == expected


def test_tar_shards_and_their_classes(encode, photographs, tmp_path, stored, readable):
    import webdataset

    (tmp_path / "tars").mkdir()
    paths = readable(photographs)
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / "tars" / f"{number}.tar")) as tar:
            for i in range(5 * number, 5 * number + 5):
                tar.write({"__key__": f"{i:03d}", "png": paths[i].read_bytes(), "cls": i * 7 % 12})
    encode("tar", images=open_images(str(tmp_path / "tars")))
    encode("folder", max_bad_fraction=0.1)
    tar, folder = LatentDataset(tmp_path / "tar"), LatentDataset(tmp_path / "folder")
    assert [tar.name(i) for i in (0, 9)] == ["0.tar:000.png", "1.tar:009.png"]
    assert tar.labels == [str(i) for i in sorted({i * 7 % 12 for i in range(10)})]
    assert [int(tar.labels[tar[i].label]) for i in range(10)] == [i * 7 % 12 for i in range(10)]
    assert folder.labels == ["a", "b", "c"]
    assert [folder[i].label for i in range(10)] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    # The batches differ from those of the folder, which has a bad image.
    torch.testing.assert_close(
        stored(tmp_path / "tar"), stored(tmp_path / "folder"), rtol=2 * EPS16, atol=1000 * EPS32
    )


def test_tiny_and_grey_images(encode, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (3, 7), 128).save(tmp_path / "images" / "grey.png")
    encode(images=open_images(str(tmp_path / "images")))
    dataset = LatentDataset(tmp_path / "latents")
    assert len(dataset) == 2
    assert dataset[0].label == -1
    assert torch.isfinite(dataset[1].moments).all()


def test_numeric_classes_are_in_the_order_of_their_numbers(encode, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, cls in enumerate([b"10", b"9", b"-1", b"-2"]):
            image = io.BytesIO()
            Image.new("L", (8, 8), number).save(image, "PNG")
            for name, content in ((f"{number}.png", image.getvalue()), (f"{number}.cls", cls)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    encode(images=open_images(str(tmp_path / "x.tar")))
    dataset = LatentDataset(tmp_path / "latents", mirrored=False)
    assert dataset.labels == ["-2", "9", "10"]
    assert dataset[:].label.tolist() == [2, 1, -1, 0]


@pytest.mark.parametrize("step", [None, 8, 16])
@pytest.mark.parametrize("crop", ["shorter", "area"])
def test_whole_images_are_those_of_the_model_alone(encode, model, shaped, tmp_path, whole_image, crop, step):
    """Each image is resized by Pillow and encoded by itself, in float64."""
    result = encode(
        images=open_images(str(shaped)), crop=crop, bucket_step=step, batch_size=3, max_bad_fraction=0.2
    )
    assert (result.total, result.done, result.bad) == (18, 18, 2)
    dataset = LatentDataset(tmp_path / "latents")
    model = model.double()
    for i in range(dataset.count):
        image = Image.open(shaped / dataset.name(i)).convert("RGB")
        pixels = torch.from_numpy(whole_image(image, crop, SIZE, step or 4).copy()).permute(2, 0, 1)[None]
        for number, copy in ((i, pixels), (i + dataset.count, pixels.flip(3))):
            with torch.no_grad():
                posterior = model.encode(copy.double() / 127.5 - 1).latent_dist
            expected = torch.cat([posterior.mean, posterior.logvar], 1)[0]
            # as above: one rounding to float16, and those of about 40 layers in float32
            error = 500 * EPS32 * expected.abs().max().item()
            torch.testing.assert_close(dataset[number].moments.double(), expected, rtol=EPS16, atol=error)


class TestWholeImages:
    @pytest.fixture
    def encode(self, encode, shaped):
        def run(out="latents", images=None, **options):
            images = open_images(str(shaped)) if images is None else images
            return encode(
                out, images, **{"crop": "area", "max_bad_fraction": 0.2, "shard_size": 12} | options
            )

        return run

    @pytest.mark.parametrize("batch_size", [2, 5])
    def test_interruptions_change_no_byte(self, encode, shaped, tmp_path, contents, eventful, batch_size):
        encode("whole", batch_size=batch_size)
        images, loads = open_images(str(shaped)), []

        def stop(index):  # at the first or a later image that a run loads
            loads.append(index)
            if len(loads) == 1 + stops % 6:
                os.kill(os.getpid(), signal.SIGTERM)

        before = stops = 0
        while True:
            loads.clear()
            result = encode(images=eventful(images, stop), batch_size=batch_size)
            assert result.before == before
            before += result.done
            if result.stopped_by is None:
                break
            assert 0 < result.done < 18
            stops += 1
        assert before == 18
        assert stops >= 3
        assert contents(tmp_path / "latents") == contents(tmp_path / "whole")

    def test_encoded_images_are_kept(self, encode, shaped, eventful, interrupting):
        images = open_images(str(shaped))
        stopped = encode(images=interrupting(images, 9), shard_size=18)
        assert 0 < stopped.done < 10
        loaded = []
        resumed = encode(images=eventful(images, loaded.append), shard_size=18)
        assert resumed.before == stopped.done
        assert len(loaded) == resumed.done == 18 - stopped.done

    def test_workers_change_no_byte_and_damage_is_mended(self, encode, tmp_path, contents, capsys):
        encode("whole")
        encode(workers=2)
        assert contents(tmp_path / "latents") == contents(tmp_path / "whole")
        shard = tmp_path / "latents" / "shard-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        with pytest.raises(UserError, match=r"shard-00001\.safetensors: its content is not what was written"):
            verify(tmp_path / "latents")
        assert encode().before == 12
        assert contents(tmp_path / "latents") == contents(tmp_path / "whole")

    def test_joined_ranges_are_what_one_run_writes(self, encode, tmp_path, contents):
        encode("one", shard_size=5)
        for number in range(3):
            encode(f"out/{number}", shard_size=5, part=Part(number, 3), max_bad_fraction=1)
        merge_parts([tmp_path / "out" / str(number) for number in range(3)])
        merged = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
        assert merged == contents(tmp_path / "one")

    def test_batches_of_large_images_have_fewer(self, encode, model, monkeypatch):
        sizes, encode_batch = [], BatchedEncoder.encode
        monkeypatch.setattr(
            BatchedEncoder,
            "encode",
            lambda self, pixels: [sizes.append(pixels.shape), encode_batch(self, pixels)][1],
        )
        encode(crop="shorter", batch_size=3, shard_size=18)
        assert all(count * height * width <= 3 * SIZE**2 or count == 1 for count, _, height, width in sizes)
        assert max(count for count, *_ in sizes) == 2

    def test_compiles_for_all_sizes_at_once(self, encode, monkeypatch):
        compiled = []
        monkeypatch.setattr(torch.nn.Module, "compile", lambda _, **options: compiled.append(options))
        encode(compile=True)
        encode("middle", compile=True, crop="middle")
        assert compiled == [{"dynamic": True}, {"dynamic": False}]
