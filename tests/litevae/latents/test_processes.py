import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from litevae.errors import UserError
from litevae.latents import LatentDataset, verify
from litevae.latents.processes import Processes, error_message, raise_first


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ended(runs, model_folder, photographs):
    """Runs processes.py and returns the exit status and the message by job and rank."""
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
        [1, "", "whole-images", {"crop": "area"}],
        [2, "term", "whole-images-of-two", {"crop": "area"}],
        [3, "", "whole-images-of-two", {"crop": "area"}],
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
        timeout=200,  # a deadlock fails here
    )
    assert result.returncode == 0, result.stderr
    said = dict(re.findall(r"job (\d+, rank \d): (.+)", result.stderr))
    return {
        (int(job), int(rank)): (int(status), said.get(f"{job}, rank {rank}"))
        for job, rank, status in map(str.split, result.stdout.splitlines())
    }


class TestProcesses:
    """Several processes divide the shards of a run between them."""

    def test_write_the_files_that_one_writes(self, ended, runs, contents):
        assert ended[0, 0] == (0, "11 0 11 1 None")
        assert all(ended[1, rank] == (0, "status 0: []") for rank in (1, 2))
        status, said = ended[1, 0]  # only the first process prints
        assert status == 0
        assert re.match(r"status 0: \['11 images in .* on 3 x cpu in fp32', 'bottleneck: ", said)
        assert said.endswith("three: all 10 images are encoded']")
        assert contents(runs / "three") == contents(runs / "one")
        assert len(contents(runs / "one")) == 6  # three shards, the index, the bad images and the lock
        verify(runs / "three")

    def test_one_that_dies_ends_the_others_and_one_process_goes_on(self, ended, runs, contents):
        assert ended[2, 1] == (-signal.SIGKILL, None)
        assert ended[2, 0] == (
            1,
            "ProcessDied('another process of this run has died: run the same command again to continue')",
        )
        status, said = ended[3, 0]
        assert status == 0
        total, before, done, *_ = said.split()
        assert (total, int(before) + int(done)) == ("11", 11)
        assert contents(runs / "dies") == contents(runs / "one")

    def test_a_signal_to_one_ends_all_and_more_processes_go_on(self, ended, runs, contents):
        # the second process's shard, and three rounds of the first process
        assert [ended[4, rank] for rank in range(2)] == [(0, "11 0 10 1 SIGTERM")] * 2
        assert [ended[5, rank] for rank in range(3)] == [(0, "11 10 1 1 None")] * 3
        assert contents(runs / "term") == contents(runs / "one")

    def test_whole_images_are_the_same_files(self, ended, runs, contents):
        assert ended[9, 0] == (0, "11 0 11 1 None")
        assert [ended[10, rank][1].endswith(" SIGTERM") for rank in range(2)] == [True] * 2
        assert [ended[11, rank][0] for rank in range(3)] == [0] * 3
        assert contents(runs / "whole-images-of-two") == contents(runs / "whole-images")
        assert len(LatentDataset(runs / "whole-images-of-two").items_by_shape()) > 3

    def test_all_raise_the_same_error(self, ended):
        for job, message in (
            (6, "1 of 11 images cannot be used, more than --max-bad-fraction=0.05 allows"),
            (7, "size must be a multiple of 4, at least 16, got 30"),
            (8, "the processes have different models or images"),
        ):
            for rank in range(2):
                status, said = ended[job, rank]
                assert status == 1
                assert said.startswith(f"UserError('{message}")


def test_a_single_process_communicates_with_itself():
    processes = Processes()
    assert (processes.index, processes.count) == (0, 1)
    assert processes.gather("x") == ["x"]
    assert processes.add([1, 2]) == [1, 2]
    assert processes.finish() == []
    assert processes.first_does(lambda: 3) == 3

    def fail():
        raise UserError("wrong")

    with pytest.raises(UserError, match="wrong"):
        processes.first_does(fail)
    processes.close()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UserError("wrong"), UserError, "^wrong$"),
        (PermissionError("denied"), OSError, "^denied$"),
        (ZeroDivisionError("zero"), OSError, "^process 1 failed: ZeroDivisionError: zero$"),
    ],
)
def test_error_of_another_process_is_raised(error, kind, message):
    messages = [None, error_message(error), error_message(UserError("later"))]
    with pytest.raises(kind, match=message):
        raise_first(messages, None)
    with pytest.raises(KeyError):
        raise_first(messages, KeyError())
    raise_first([None, error_message(None)], None)
