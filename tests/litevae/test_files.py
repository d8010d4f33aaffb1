import hashlib
import os
import pickle

import pytest
import torch

from litevae.errors import UserError
from litevae.files import (
    explaining_weights,
    files_in,
    open_to_append,
    replacing,
    replacing_folder,
    sha256,
    sync_folder,
    weights_path,
    write,
)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")

    def write():
        with replacing(path) as temporary:
            temporary.write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == "old"


def test_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == "new"


def test_failed_flush_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write(path, b"content")
    sync_folder(tmp_path)
    assert path.read_bytes() == b"content"

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(path, b"more")
    assert caught.value.filename == str(path)


def test_a_temporary_file_never_follows_a_planted_link(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("mine")
    for name in (
        ".x.tmp.json",
        f".{'0' * 16}.tmp.json",
    ):  # the name of earlier versions, and one that is guessed
        (tmp_path / name).symlink_to(tmp_path / "victim")
    with replacing(tmp_path / "x.json") as temporary:
        temporary.write_text("new")
    monkeypatch.setattr("secrets.token_hex", lambda count: "00" * count)
    with pytest.raises(FileExistsError, match=r"x\.json"), replacing(tmp_path / "x.json"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "x.json").read_text() == "new"


def test_appending_never_follows_a_planted_link(tmp_path):
    for content in (b"a", b"b"):
        with open_to_append(tmp_path / "x") as file:
            file.write(content)
    assert (tmp_path / "x").read_bytes() == b"ab"
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(OSError, match="link"):
        open_to_append(tmp_path / "link")


class TestReplacingFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "old").touch()
        return folder

    def test_takes_the_place_of_the_old_one(self, folder):
        with replacing_folder(folder) as new:
            new.mkdir()
            (new / "new").touch()
            assert files_in(folder) == [folder / "old"]
        assert files_in(folder.parent) == [folder / "new"]
        assert list(folder.parent.iterdir()) == [folder]

    def test_a_failure_leaves_the_old_one(self, folder):
        def fail():
            with replacing_folder(folder) as new:
                new.mkdir()
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            fail()
        assert files_in(folder.parent) == [folder / "old"]
        assert list(folder.parent.iterdir()) == [folder]

    def test_an_earlier_kill_between_the_renames_is_undone(self, folder):
        folder.rename(folder.with_name(".model.old"))

        def fail():
            with replacing_folder(folder):
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            fail()
        assert files_in(folder.parent) == [folder / "old"]

    def test_planted_links_are_not_followed(self, folder, tmp_path):
        (tmp_path / "victim").mkdir()
        (tmp_path / "victim" / "file").touch()
        for name in (".model.new", f".model.{'0' * 16}.new", ".model.old"):
            (tmp_path / name).symlink_to(tmp_path / "victim")
        with replacing_folder(folder) as new:
            new.mkdir()
        assert files_in(folder) == []
        assert files_in(tmp_path / "victim") == [tmp_path / "victim" / "file"]

    def test_what_a_kill_has_left_is_removed(self, folder):
        (folder.parent / f".model.{'0' * 16}.new").mkdir()
        with replacing_folder(folder) as new:
            new.mkdir()
        assert list(folder.parent.iterdir()) == [folder]


def test_sha256_of_sorted_files(tmp_path):
    for name in ("b/2", "a", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    files = files_in(tmp_path)
    assert files == [tmp_path / "a", tmp_path / "b" / "1", tmp_path / "b" / "2"]
    assert [sha256(file) for file in files] == [
        hashlib.sha256(name).hexdigest() for name in (b"a", b"b/1", b"b/2")
    ]


class TestExplainingWeights:
    URL = "https://example.org/folder/weights.pth"

    @pytest.fixture
    def path(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
        path = weights_path(self.URL)
        assert path == tmp_path / "checkpoints" / "weights.pth"
        path.parent.mkdir()
        return path

    def fail(self, error):
        with explaining_weights(self.URL, "a network"):
            raise error

    def test_a_missing_file_is_named_with_its_address(self, path):
        with pytest.raises(UserError) as caught:
            self.fail(OSError("no\nconnection"))
        message = f"{path} is not there and cannot be downloaded (no connection): put {self.URL} there"
        assert str(caught.value) == message

    def test_a_damaged_file_is_to_be_deleted(self, path):
        path.touch()
        with pytest.raises(UserError) as caught:
            self.fail(pickle.UnpicklingError())
        assert str(caught.value) == f"{path} is not a network, or damaged (UnpicklingError): delete it"

    def test_other_errors_are_raised_as_they_are(self, path):
        with pytest.raises(ZeroDivisionError):
            self.fail(ZeroDivisionError())
