import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch

from litevae.errors import UserError
from litevae.files import (
    can_be_path,
    explaining_weights,
    files_in,
    make_folder,
    open_regular,
    open_to_append,
    read_json,
    replacing,
    replacing_folder,
    sha256,
    sync_folder,
    weights_path,
    why_missing,
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


def special_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    return [tmp_path / "fifo", tmp_path / "link", Path("/dev/zero")]


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "linked").symlink_to("file")
    with open_regular(tmp_path / "linked") as file:
        assert file.read() == b"content"
    for path in special_files(tmp_path):
        for read in (open_regular, sha256, read_json):
            with pytest.raises(OSError, match="not a regular file"):
                read(path)


def test_weights_that_are_no_regular_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    os.mkfifo(tmp_path / "checkpoints" / "x.pth")
    with pytest.raises(UserError, match="not a regular file"), explaining_weights("https://a/x.pth", "x"):
        torch.load(tmp_path / "checkpoints" / "x.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, "nested more than 32 deep"),
        (b'{"a": ' * 40 + b"1" + b"}" * 40, "nested more than 32 deep"),
        (b"[" + b"1," * 6_000_000 + b"1]", "more than 5,000,000 values"),
        (b"9" * 5000, "digits"),
        (b"\xff", "decode"),
        (b"{", "Expecting"),
    ],
    ids=["lists", "few lists", "mappings", "values", "digits", "bytes", "end"],
)
def test_json_is_bounded(tmp_path, content, reason):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_json(tmp_path / "x.json")


def test_json_of_limited_size_is_read(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1, {"b": null}]}')
    assert read_json(tmp_path / "x.json") == {"a": [1, {"b": None}]}
    with pytest.raises(ValueError, match="longer than 9 bytes"):
        read_json(tmp_path / "x.json", longest=9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a/b", True), ("", True), ("\udcff", True), ("a\n", True), ("a\0", False), ("\ud800", False)],
)
def test_texts_that_the_system_takes_as_paths(tmp_path, text, expected):
    assert can_be_path(text) is expected
    if not expected:
        with pytest.raises(ValueError, match=r"null|surrogates"):
            os.stat(tmp_path / text)


def test_a_folder_that_cannot_be_made(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(OSError, match=f"exists and is not a folder: .*{name}"):
            make_folder(tmp_path / name)
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file" / "b")


def test_why_nothing_is_at_a_path(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for name, kind, reason in (
        ("nowhere", "file", "no such file"),
        ("file/x", "folder", "no such folder"),
        ("file", "folder", "not a folder"),
        ("fifo", "file", "not a regular file"),
        ("loop", "file", "Too many levels of symbolic links"),
        ("n" * 5000, "folder", "File name too long"),
        ("a\0b", "file", "no such file"),
    ):
        assert why_missing(tmp_path / name, kind) == reason
    for address in ("https://host/x", "S3://bucket/x", Path("hf://user/name")):
        assert (
            why_missing(address, "folder") == "an address, not a local folder: download it and give its path"
        )
