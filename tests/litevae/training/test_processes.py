"""Training in several processes, which share each batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHARED = [
    "data.batch_size=4",
    "max_steps=3",
    "checkpoint.every=1",
    "checkpoint.keep=3",
    "optimizer.learning_rate=1e-4",
    "optimizer.accumulation=2",
    "loss.adversarial=0.1",
    "loss.adversarial_start=2",
    "discriminator.width=S",
]
MEASURED = ["gradient_ratio_every=1"]  # measuring changes nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def statuses(folder, tiny_settings):
    """Runs processes.py; returns the exit status by job and rank, and the output on stderr."""
    second = folder / "two" / "checkpoints" / "step-00000002"
    jobs = [
        [1, "", [*SHARED, *MEASURED, f"output_dir={folder / 'one'}"]],
        [2, "", [*SHARED, f"output_dir={folder / 'two'}"]],
        [2, "dies", ["max_steps=5", f"output_dir={folder / 'dies'}"]],
        [2, "", ["data.batch_size=3", f"output_dir={folder / 'odd'}"]],
        [2, "nan", ["max_steps=3", f"output_dir={folder / 'nan'}"]],
        [2, "term", ["max_steps=9", "checkpoint.every=100", f"output_dir={folder / 'term'}"]],
        [2, "bad", ["max_steps=9", "checkpoint.every=100", f"output_dir={folder / 'bad'}"]],
        [2, "", [*SHARED, *MEASURED, f"resume={second}", f"output_dir={folder / 'resumed'}"]],
        [2, "", ["resume=nowhere", f"output_dir={folder / 'nowhere'}"]],
    ]
    jobs = [[count, event, [*tiny_settings, *settings]] for count, event, settings in jobs]
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("processes.py"), json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,  # a hang fails the test
    )
    assert result.returncode == 0, result.stderr
    lines = [list(map(int, line.split())) for line in result.stdout.splitlines()]
    return {(job, rank): status for job, rank, status in lines}, result.stderr


def test_two_processes_train_like_one_with_the_whole_batch(statuses, folder, logged):
    codes, errors = statuses
    assert [codes[0, 0], codes[1, 0], codes[1, 1]] == [0, 0, 0], errors
    assert same_weights(folder / "two")

    one, two, resumed = (logged(folder / name) for name in ("one", "two", "resumed"))
    assert [line["step"] for line in two] == [1, 2, 3]
    assert "discriminator" in two[-1]
    ratios = [line.pop("gradient_ratio", None) for line in one]
    assert (ratios[0], len(resumed)) == (None, 1)
    assert resumed[0]["gradient_ratio"] == pytest.approx(
        ratios[2], rel=1e-3
    )  # the tolerance of the losses below
    # A few hundred operations in a row each round by 2^-24, and Adam's first steps enlarge the rounding of a
    # gradient near 0 to the learning rate.
    for line, other, tolerance in zip(one, two, (1e-5, 1e-3, 1e-3), strict=True):
        assert other == pytest.approx(line, rel=tolerance)

    # After the first step, Adam's first moment is the clipped gradient up to a factor.
    first = [
        torch.load(folder / count / "checkpoints" / "step-00000001" / "state.pt", weights_only=True)[
            "optimizers"
        ]["autoencoder"]
        for count in ("one", "two")
    ]
    for index, moments in first[0].items():
        gradient, other = moments["exp_avg"], first[1][index]["exp_avg"]
        assert (gradient - other).norm() <= 1e-4 * gradient.norm() + 1e-12


def test_a_process_that_dies_ends_the_other_with_an_error(statuses):
    codes, errors = statuses
    assert codes[2, 1] == -9
    assert codes[2, 0] > 0
    assert "job 2, rank 0" in errors


def test_a_batch_that_cannot_be_shared_evenly_is_refused(statuses):
    codes, errors = statuses
    assert (codes[3, 0], codes[3, 1]) == (1, 1)
    assert "3 cannot be shared by 2 processes" in errors


def same_weights(folder):
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]
    return all(torch.equal(tensor, ranks[1][name]) for name, tensor in ranks[0].items())


def test_a_non_finite_loss_on_one_process_is_skipped_on_both(statuses, folder, logged):
    codes, errors = statuses
    assert (codes[4, 0], codes[4, 1]) == (0, 0), errors
    assert [line.get("skipped") for line in logged(folder / "nan")] == [None, "the l1 loss is nan", None]
    assert same_weights(folder / "nan")


def test_too_many_bad_images_on_one_process_end_both_after_saving_the_steps_before(statuses, folder, logged):
    codes, errors = statuses
    assert (codes[6, 0], codes[6, 1]) == (1, 1)
    assert "job 6, rank 0: UserError('another process found too many images that cannot be used" in errors
    assert "job 6, rank 1: UserError('1 of 8 images cannot be used, more than data.max_bad_fraction" in errors
    assert [path.name for path in (folder / "bad" / "checkpoints").iterdir()] == ["step-00000002"]
    assert [line["step"] for line in logged(folder / "bad")] == [1, 2]
    assert (folder / "bad" / "bad_images.txt").read_text() == "cut.png\tcut\n"
    assert (folder / "bad" / "model" / "config.json").is_file()
    assert same_weights(folder / "bad")


def test_either_both_resume_from_the_same_checkpoint_or_neither_does(statuses, folder):
    codes, errors = statuses
    assert (codes[7, 0], codes[7, 1]) == (0, 0), errors
    for rank in (0, 1):
        whole, resumed = (torch.load(folder / name / f"rank{rank}.pt") for name in ("two", "resumed"))
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert (codes[8, 0], codes[8, 1]) == (1, 1)
    assert all(
        f"job 8, rank {rank}: UserError('resume: nowhere: no such folder')" in errors for rank in (0, 1)
    )


def test_a_signal_to_one_process_ends_both_after_the_same_step(statuses, folder):
    codes, errors = statuses
    assert (codes[5, 0], codes[5, 1]) == (0, 0), errors
    assert [path.name for path in (folder / "term" / "checkpoints").iterdir()] == ["step-00000003"]
    assert same_weights(folder / "term")
