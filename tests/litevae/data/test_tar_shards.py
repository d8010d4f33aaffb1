import os
import tarfile

import numpy as np
import pytest
import webdataset

from litevae.data.pixels import BadImage
from litevae.data.sources import open_images


def test_shards_hold_what_webdataset_reads(tmp_path, write_shards):
    write_shards(tmp_path)
    pattern = str(tmp_path / "train-{000..002}.tar")
    reader = webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png")
    source = open_images(pattern)
    for i, (key, pixels) in enumerate(reader):
        assert source.name(i) == f"{tmp_path}/train-{i // 4:03}.tar:{key}.png"
        np.testing.assert_array_equal(source.load(i), pixels)
    assert len(source) == i + 1 == 12


def test_image_of_a_sample_is_its_plain_one(tmp_path, png, write_tar, names, assert_pictures, capsys):
    members = [
        ("./a/1.mask.png", b""),
        ("./a/1.png", png(1)),
        ("./a/1.txt", b""),
        ("./a/2.txt", b""),
        ("._3.png", b""),
        ("b.c/4.left.JPG", png(4)),
        ("b.c/4.right.JPG", png(5)),
        ("readme", b""),
    ]
    write_tar(tmp_path / "x.tar", members)
    source = open_images(str(tmp_path))
    assert_pictures(source, [1, 4])
    line = (
        f"{tmp_path}/x.tar: left out: further images of the same samples (2), samples without an image (1)\n"
    )
    assert capsys.readouterr().err == line
    assert names(source) == [f"{tmp_path}/x.tar:./a/1.png", f"{tmp_path}/x.tar:b.c/4.left.JPG"]


def test_long_names_in_a_shard(tmp_path, png, write_tar, names):
    name = "é" * 300 + "/x.png"
    write_tar(tmp_path / "x.tar", [(name, png(0))])
    assert names(open_images(str(tmp_path))) == [f"{tmp_path}/x.tar:{name}"]


def test_shard_cut_off_is_refused(tmp_path, png, write_tar, refusal):
    write_tar(tmp_path / "whole.tar", [(f"{number}.png", png(number)) for number in range(5)])
    content = (tmp_path / "whole.tar").read_bytes()
    last = open_images(str(tmp_path / "whole.tar")).locations[-1]
    used = -(-int(last[1] + last[2]) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    path = tmp_path / "cut.tar"
    for cut in np.random.default_rng(0).integers(0, used, 40):
        if cut % tarfile.BLOCKSIZE:  # at a block's end, a cut may look like the end of the archive
            path.write_bytes(content[:cut])
            assert str(path) in refusal(path)
    path.write_bytes(content[:used])  # a writer that was killed leaves no end blocks
    assert len(open_images(str(path))) == 5


def test_shard_with_a_broken_header_is_refused(tmp_path, png, write_tar, refusal):
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{number}.png", png(number)) for number in range(5)])
    content = bytearray(path.read_bytes())
    offset = content.index(b"3.png")
    content[offset + 150] ^= 0xFF
    path.write_bytes(content)
    assert "not a whole .tar file: broken header" in refusal(path)


def test_shard_that_is_gone_or_shorter_gives_bad_images(tmp_path, png, write_tar):
    write_tar(tmp_path / "x.tar", [("0.png", png(0))])
    source = open_images(str(tmp_path))
    os.truncate(tmp_path / "x.tar", 600)
    with pytest.raises(BadImage, match="cannot be read"):
        source.load(0)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.load(0)


def test_labels_of_shards_are_their_cls_members(tmp_path, png, write_tar, assert_pictures):
    members = [("1.cls", b"7\n"), ("1.png", png(1)), ("2.png", png(2)), ("3.png", png(3)), ("3.CLS", b"cat")]
    write_tar(tmp_path / "s.tar", members)
    source = open_images(str(tmp_path / "s.tar"))
    assert_pictures(source, [1, 2, 3])
    assert [source.label(i) for i in range(3)] == ["7", None, "cat"]


def test_members_of_a_sample_may_be_anywhere_in_the_shard(tmp_path, png, write_tar, assert_pictures, capsys):
    members = [("0.png", png(0)), ("1.png", png(1)), ("1.cls", b"11"), ("0.cls", b"10"), ("2.cls", b"12")]
    write_tar(tmp_path / "s.tar", [*members, ("2.png", png(2))])
    source = open_images(str(tmp_path / "s.tar"))
    assert_pictures(source, [0, 1, 2])
    assert [source.label(i) for i in range(3)] == ["10", "11", "12"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [("g.png", "g.png"), ("g.png", "h.png", "g.PNG"), ("a/g.cls", "a/g.cls")])
def test_a_member_that_is_there_twice_is_refused(tmp_path, png, write_tar, refusal, names):
    write_tar(tmp_path / "s.tar", [(name, png(0)) for name in names])
    assert refusal(tmp_path / "s.tar") == f"{tmp_path}/s.tar: holds {names[-1]!r} twice"


def test_a_link_is_counted(tmp_path, png, write_tar, capsys):
    write_tar(tmp_path / "s.tar", [("0.png", png(0))])
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
    assert len(open_images(str(tmp_path / "s.tar"))) == 1
    assert "left out: links or sparse files with an image's name (1)" in capsys.readouterr().err


def test_a_long_label_is_not_read(tmp_path, png, write_tar, monkeypatch):
    write_tar(tmp_path / "s.tar", [("0.png", png(0)), ("0.cls", b"7" * 10**6)])
    source = open_images(str(tmp_path / "s.tar"))
    monkeypatch.setattr(source, "read", None)
    with pytest.raises(BadImage, match="its label must have at most 1,000 characters, got 1,000,000"):
        source.label(0)


def test_an_unknown_class_is_no_label(tmp_path, png, write_tar):
    classes = [b"-1\n", b"", b" \n", b"0"]
    members = [
        (f"{i}.{ext}", content)
        for i, cls in enumerate(classes)
        for ext, content in (("png", png(i)), ("cls", cls))
    ]
    write_tar(tmp_path / "s.tar", members)
    source = open_images(str(tmp_path / "s.tar"))
    assert [source.label(i) for i in range(4)] == [None, None, None, "0"]
