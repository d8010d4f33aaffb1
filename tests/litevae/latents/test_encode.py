import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from litevae import LiteVAE
from litevae.cli import main
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.latents import Encoding, LatentDataset, verify
from litevae.latents.encoder import choose_precision
from litevae.latents.share import times_of_all

SIZE = 32
EPS16, EPS32 = 2**-11, 2**-24  # the largest relative error of one rounding


def stored(folder, name="moments"):
    return torch.cat([load_file(path)[name] for path in sorted(folder.glob("*.safetensors"))])


def readable(photographs):
    return [path for path in sorted(photographs.glob("*/*.png")) if path.name != "05.png"]


@pytest.mark.parametrize("kind", ["litevae", "sd-vae"])
def test_moments_are_those_of_the_posterior(encode, model, photographs, middle_square, tmp_path, kind):
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
        # one rounding to float16, and float32's in some 40 layers
        error = 500 * EPS32 * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=EPS16, atol=error)


def test_bfloat16_is_stored_exactly(encode, model, photographs, middle_square, tmp_path):
    encode(precision="bf16", mirror=False)
    assert model.dtype == torch.bfloat16
    expected = []
    paths = readable(photographs)
    paths.insert(5, None)  # black in place of the broken one, in batches and shards as they were encoded
    black = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    for i in range(0, 11, 2):
        pixels = torch.cat([middle_square(path) if path else black for path in paths[i : i + 2]])
        batch = (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            posterior = model.encode(batch).latent_dist
        expected.append(torch.cat([posterior.mean, posterior.logvar], 1))
    keep = [i for i in range(11) if i != 5]
    assert torch.equal(stored(tmp_path / "latents").bfloat16(), torch.cat(expected)[keep])


def test_workers_and_batches_change_nothing_of_note(encode, model_folder, tmp_path, contents):
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
    assert encode().before == 4  # what was whole by then serves the next run
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(photographs / "b" / "05.png", bad)
    with pytest.raises(UserError, match="none of the images can be read"):
        encode("none", images=open_images(str(bad)), max_bad_fraction=1)


def test_compiles_the_encoder(encode, model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(module))
    encode(compile=True)
    assert compiled == [model.encoder]


class Eventful:
    """Images with which something happens when they are loaded."""

    def __init__(self, images, event):
        self.images, self.event = images, event

    def __len__(self):
        return len(self.images)

    def __getattr__(self, name):
        return getattr(self.images, name)

    def load(self, index):
        self.event(index)
        return self.images.load(index)


def interrupting(images, at):
    """Images of which one brings a signal with it."""
    return Eventful(images, lambda index: index == at and os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize(("at", "kept"), [(0, 2), (5, 6), (7, 8), (9, 10)])
def test_a_signal_ends_the_run_and_the_next_one_goes_on(encode, photographs, tmp_path, contents, at, kept):
    images = open_images(str(photographs))
    stopped = encode(images=interrupting(images, at))
    assert (stopped.stopped_by, stopped.before, stopped.done) == ("SIGTERM", 0, kept)
    with pytest.raises(UserError, match="not complete: the litevae encode command that began it goes on"):
        verify(tmp_path / "latents")
    resumed = encode()
    assert (resumed.stopped_by, resumed.before, resumed.done, resumed.bad) == (None, kept, 11 - kept, 1)
    encode("whole")
    assert contents(tmp_path / "latents") == contents(tmp_path / "whole")


class TestUnfinishedShard:
    @pytest.fixture
    def file(self, encode, photographs, tmp_path):
        """Of the second shard's first half, in which an image is bad."""
        encode(images=interrupting(open_images(str(photographs)), 5))
        return tmp_path / "latents" / ".shard-00001.unfinished"

    def test_is_gone_on_with(self, file, encode, photographs, tmp_path, contents):
        loaded = []
        encode(images=Eventful(open_images(str(photographs)), loaded.append))
        assert loaded == [6, 7, 8, 9, 10]
        encode("whole")
        assert contents(tmp_path / "latents") == contents(tmp_path / "whole")

    def test_is_stopped_twice(self, file, encode, photographs, tmp_path, contents):
        encode("whole", shard_size=11)
        for at in (2, 7):
            encode("twice", shard_size=11, images=interrupting(open_images(str(photographs)), at))
        encode("twice", shard_size=11)
        assert contents(tmp_path / "twice") == contents(tmp_path / "whole")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[:-1],
            lambda content: b"",
            lambda content: content[:3000] + bytes([content[3000] ^ 1]) + content[3001:],
        ],
    )
    def test_damage_is_found(self, file, encode, tmp_path, contents, capsys, damage):
        file.write_bytes(damage(file.read_bytes()))
        assert encode().before == 4
        assert (
            f"{file}: its content is not what was written (SHA-256); its images are encoded again"
            in capsys.readouterr().err
        )
        encode("whole")
        assert contents(tmp_path / "latents") == contents(tmp_path / "whole")

    def test_anothers_is_not_used(self, file, encode, model_folder, photographs, tmp_path, contents, capsys):
        model = LiteVAE.from_pretrained(model_folder)
        with torch.no_grad():
            model.encoder.feature_aggregator.conv_in.weight[0, 0, 0, 0] += 1e-3
        encode("other", model=model, images=interrupting(open_images(str(photographs)), 5))
        shutil.copy(tmp_path / "other" / file.name, file)
        assert encode().before == 4
        assert "was left by a run with another --batch-size, or of something else" in capsys.readouterr().err
        encode("whole")
        assert contents(tmp_path / "latents") == contents(tmp_path / "whole")

    def test_of_other_batches_is_not_used(self, file, encode, tmp_path, contents, capsys):
        shutil.copytree(tmp_path / "latents", tmp_path / "again")
        (tmp_path / "again" / file.name).unlink()
        encode(batch_size=3)
        assert "another --batch-size" in capsys.readouterr().err
        encode("again", batch_size=3)
        assert contents(tmp_path / "latents") == contents(tmp_path / "again")


OTHER_RUN = """
import fcntl, sys
with open(sys.argv[1], "ab") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, int(sys.argv[2]), int(sys.argv[3]))
    print("locked", flush=True)
    sys.stdin.read()
"""


class TestLock:
    @pytest.mark.parametrize("process", [0, 1])
    def test_a_run_is_refused_until_no_process_of_another_is_left(self, encode, tmp_path, contents, process):
        encode()
        lock, before = tmp_path / "latents" / ".lock", contents(tmp_path / "latents")
        child = [sys.executable, "-c", OTHER_RUN, lock, "1", str(process)]
        with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(
                UserError, match="latents: another litevae encode is writing there: wait until it has ended"
            ):
                encode()
            other.kill()
        assert contents(tmp_path / "latents") == before
        assert encode().before == 11

    def test_a_run_keeps_others_out(self, encode, photographs, tmp_path):
        answers = {}

        def try_to_lock(index):
            if index in (0, 10):
                child = [sys.executable, "-c", OTHER_RUN, tmp_path / "latents" / ".lock", "0", "0"]
                result = subprocess.run(child, stdin=subprocess.DEVNULL, capture_output=True, text=True)
                answers[index] = result.stderr.splitlines()[-1]

        encode(images=Eventful(open_images(str(photographs)), try_to_lock))
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
        assert line.endswith("see that no other run writes there")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ended(runs, model_folder, photographs):
    """Runs processes.py; the exit status and the last words by job and rank."""
    jobs = [
        [1, "", "one", {}],
        [3, "command", "three", {}],
        [2, "dies", "dies", {}],
        [1, "", "dies", {}],
        [2, "term", "term", {}],
        [3, "", "term", {}],
        [2, "", "bad", {"max_bad_fraction": 0.05}],
        [2, "", "size", {"size": 30}],
        [2, "other", "other", {}],
    ]
    jobs = [[count, event, str(runs / name), settings] for count, event, name, settings in jobs]
    result = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("processes.py"),
            model_folder,
            photographs,
            json.dumps(jobs),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,  # a hang fails here
    )
    assert result.returncode == 0, result.stderr
    said = dict(re.findall(r"job (\d, rank \d): (.+)", result.stderr))
    return {
        (int(job), int(rank)): (int(status), said.get(f"{job}, rank {rank}"))
        for job, rank, status in map(str.split, result.stdout.splitlines())
    }


class TestProcesses:
    """Several processes share a run."""

    def test_write_the_files_that_one_writes(self, ended, runs, contents):
        assert ended[0, 0] == (0, "11 0 11 1 None")
        assert all(ended[1, rank] == (0, "status 0: []") for rank in (1, 2))
        status, said = ended[1, 0]  # the first one speaks for all
        assert status == 0
        assert re.match(r"status 0: \['11 images in .* on 3 x cpu', 'bottleneck: ", said)
        assert said.endswith("three: all 10 images are encoded']")
        assert contents(runs / "three") == contents(runs / "one")
        assert len(contents(runs / "one")) == 6  # three shards, the index, the bad images and the lock
        verify(runs / "three")

    def test_one_that_dies_ends_the_others_and_one_process_goes_on(self, ended, runs, contents):
        assert ended[2, 1] == (-signal.SIGKILL, None)
        assert ended[2, 0] == (
            1,
            "ProcessDied('another process of this run has died: the same command goes on')",
        )
        status, said = ended[3, 0]
        assert status == 0
        total, before, done, *_ = said.split()
        assert (total, int(before) + int(done)) == ("11", 11)
        assert contents(runs / "dies") == contents(runs / "one")

    def test_a_signal_to_one_ends_all_and_more_processes_go_on(self, ended, runs, contents):
        # the second one's shard; of the first one's shards, three rounds
        assert [ended[4, rank] for rank in range(2)] == [(0, "11 0 10 1 SIGTERM")] * 2
        assert [ended[5, rank] for rank in range(3)] == [(0, "11 10 1 1 None")] * 3
        assert contents(runs / "term") == contents(runs / "one")

    def test_mistakes_are_told_alike_by_all(self, ended):
        for job, message in (
            (6, "1 of 11 images cannot be used, more than --max-bad-fraction=0.05 allows"),
            (7, "size must be a multiple of 4 of at least 8, got 30"),
            (8, "the processes have different models or images"),
        ):
            for rank in range(2):
                status, said = ended[job, rank]
                assert status == 1
                assert said.startswith(f"UserError('{message}")


def test_processes_without_images_do_not_count_in_the_times():
    assert times_of_all([(4.0, 3.0, 1.0, 0.0), (0.0, 0.0, 0.0, 0.0), (2.0, 1.0, 0.5, 0.5)]) == [
        4,
        2,
        0.75,
        0.25,
    ]
    assert times_of_all([(0.0, 0.0, 0.0, 0.0)] * 2) == [0] * 4


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
    assert len(set(lines)) >= 3  # stages
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    verify(tmp_path / "killed")


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
    def begun(self, encode, photographs):
        encode(images=interrupting(open_images(str(photographs)), 5))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 48}, "size 32, not 48"),
            ({"mirror": False}, "mirror True, not False"),
            ({"precision": "bf16"}, "precision fp32, not bf16"),
            ({"shard_size": 5}, "shard size 4, not 5"),
        ],
    )
    def test_are_refused(self, encode, tmp_path, contents, options, message):
        before = contents(tmp_path / "latents")
        with pytest.raises(UserError, match=f"was begun with {message}: give the same, or another folder"):
            encode(**options)
        assert contents(tmp_path / "latents") == before

    def test_other_images_are_refused(self, encode, photographs, tmp_path):
        folder = shutil.copytree(photographs, tmp_path / "moved")
        encode(images=open_images(str(folder)))  # the same wherever they are
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


def test_what_is_not_finite_is_named(encode, model, tmp_path):
    with torch.no_grad():
        model.encoder.feature_aggregator.conv_out.bias[0] = 1e5
    with pytest.raises(UserError, match=r"a/00\.png: its latent is not finite, or beyond float16's 65504$"):
        encode()
    with pytest.raises(UserError, match="65504: try --precision fp32"):
        encode("bf16", precision="bf16")
    assert not list(tmp_path.glob("*/shard*"))


def test_a_full_disk_leaves_what_was_whole(encode, tmp_path, monkeypatch, contents):
    encode("whole")
    sync, writes = os.fsync, iter(range(5))  # index, its folder, a shard, its note, the folder

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
    [({"size": 30}, "multiple of 4 of at least 8, got 30"), ({"size": 4}, "at least 8, got 4")],
)
def test_a_size_that_does_not_fit(encode, options, message):
    with pytest.raises(UserError, match=message):
        encode(**options)


def test_a_folder_of_something_else_is_left_alone(encode, tmp_path):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "mine.txt").touch()
    with pytest.raises(UserError, match="has files, and no encoded images: give another folder"):
        encode()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written: File exists"):
        encode("file")


@pytest.mark.parametrize(
    ("waited", "writing", "expected"),
    [(5, 0, "the encoder"), (15, 0, "decoding images"), (15, 20, "writing"), (5, 20, "writing")],
)
def test_the_bottleneck_is_what_is_waited_for(waited, writing, expected):
    encoding = Encoding(Path(), 1, 0, 1, 0, 100.0, 80.0, waited, writing, None)
    assert encoding.bottleneck == expected


def test_bfloat16_is_chosen_where_the_processor_multiplies_it(monkeypatch):
    for flags, expected in (
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx2": True}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert choose_precision(torch.device("cpu")) == expected
    assert choose_precision(torch.device("meta")) == "fp32"


class TestCommand:
    @pytest.fixture
    def command(self, model_folder, photographs, tmp_path, capsys):
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
            assert (
                main([str(argument) for argument in [*arguments, "--workers", 0, "--device", "cpu"]])
                == status
            )
            return capsys.readouterr()

        return run

    def test_says_what_it_did(self, command, tmp_path, capsys):
        first = command("--precision", "fp32").out
        for pattern in (
            "11 images in ",
            " images/s; the encoder itself: ",
            "bottleneck: ",
            f"1 image cannot be read: {tmp_path / 'out' / 'bad_images.txt'} lists them",
            f"{tmp_path / 'out'}: all 10 images are encoded",
        ):
            assert pattern in first
        assert "scaling_factor" not in first  # it is set
        index = json.loads((tmp_path / "out" / "index.json").read_text())
        assert index["encoding"]["size"] == SIZE  # the model's
        assert str(tmp_path) not in json.dumps(index)
        again = command("--precision", "fp32").out
        assert again.splitlines()[-1] == f"{tmp_path / 'out'}: complete already, and undamaged: 10 images"
        assert "images/s" not in again
        assert main(["encode", "--verify", str(tmp_path / "out")]) == 0
        assert "10 images in 1 shard, 1 bad image left out; all as it was written" in capsys.readouterr().out

    def test_a_flipped_bit_is_found(self, command, tmp_path, capsys):
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
        ],
    )
    def test_mistakes_are_one_line(self, model_folder, photographs, tmp_path, capsys, options, message):
        arguments = ["encode", str(model_folder), str(photographs), str(tmp_path / "out"), *options]
        assert main(arguments) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1

    def test_ctrl_c(self, command, photographs, monkeypatch):
        images = open_images(str(photographs))
        monkeypatch.setattr("litevae.data.sources.open_images", lambda _: interrupting(images, 5))
        output = command("--shard-size", 4, "--batch-size", 2).out
        assert "stopped by SIGTERM; 6 of 11 images are encoded: the same command goes on" in output


def test_tar_shards_and_their_classes(encode, photographs, tmp_path):
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
    # the batches are others than the folder's, in which there is a gap
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
