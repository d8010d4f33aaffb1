import multiprocessing
import os
import re
import socket
from concurrent.futures import ProcessPoolExecutor

import pytest

from litevae.errors import UserError
from litevae.lock import LOCK, locked, locked_by_run


def try_to_lock(folder):
    try:
        with locked(folder, "litevae train"):
            return "locked"
    except UserError as error:
        return str(error)


def try_in_another_process(folder):
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(try_to_lock, folder).result()


def test_the_second_run_is_refused_and_the_first_named(tmp_path):
    with locked(tmp_path, "litevae train-diffusion"):
        answer = try_in_another_process(tmp_path)
    holder = rf"litevae train-diffusion \(process {os.getpid()} on {re.escape(socket.gethostname())}, since "
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d\)"
    rest = " is writing there: wait until it has ended, or give another folder"
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}: {holder}{date}{rest}", answer)
    assert (tmp_path / LOCK).read_text() == ""
    assert try_in_another_process(tmp_path) == "locked"


@pytest.mark.parametrize(
    "plant",
    [
        lambda lock, victim: lock.symlink_to(victim),
        lambda lock, victim: lock.hardlink_to(victim),
        lambda lock, _: os.mkfifo(lock),
    ],
    ids=["symbolic", "hard", "fifo"],
)
def test_a_planted_link_is_not_followed(tmp_path, plant):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    plant(tmp_path / "run" / LOCK, tmp_path / "victim")
    with pytest.raises(UserError, match="cannot write to"), locked_by_run(tmp_path / "run", "litevae train"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


def test_an_error_of_the_preparation_leaves_the_folder_unlocked(tmp_path):
    def prepare():
        raise UserError("no")

    with pytest.raises(UserError, match="no"), locked_by_run(tmp_path / "new", "litevae train", prepare):
        pass
    assert (tmp_path / "new" / LOCK).read_text() == ""
