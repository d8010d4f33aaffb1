import os
import pickle

import pytest
from webdataset.shardlists import expand_urls

from litevae.data.paths import PackedStrings, count_names, expand_pattern, find_images, name_files
from litevae.data.sources import open_images
from litevae.errors import UserError


def test_linked_folders_are_followed_but_not_in_circles(tmp_path, png, write, names):
    write(tmp_path / "elsewhere/x.png", png(0))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/here").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "images")
    assert names(open_images(str(tmp_path / "images"))) == [str(tmp_path / "images/here/x.png")]


def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, png, write, refusal):
    write(tmp_path / "inside/x.png", png(0))
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("inside"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path / 'inside'}: cannot be read: Permission denied" in refusal(tmp_path)


def test_packed_strings_are_the_strings():
    strings = ["", "a/b.png", "ü\udcfe", ""]
    packed = PackedStrings(strings)
    assert [packed[i] for i in range(len(packed))] == strings
    assert [pickle.loads(pickle.dumps(packed))[i] for i in range(4)] == strings
    assert len(PackedStrings([])) == 0


def test_images_are_found_in_sorted_order(tmp_path, write):
    for name in ("b/2.png", "b/10.JPG", "a/x.webp", ".hidden/x.png", "b/.x.png", "b/x.txt"):
        write(tmp_path / name, b"")
    expected = [str(tmp_path / name) for name in ("a/x.webp", "b/10.JPG", "b/2.png")]
    assert list(find_images(tmp_path)) == expected


def test_pattern_lists_each_file_once_in_the_order_of_its_parts(tmp_path):
    for name in ("0.tar", "1.tar", "2.tar"):
        (tmp_path / name).touch()
    found = expand_pattern(f"{tmp_path}/{{2,0}}.tar::{tmp_path}/*.tar")
    assert found == [f"{tmp_path}/{name}.tar" for name in (2, 0, 1)]
    assert expand_pattern(f"{tmp_path}/x*.tar") == []
    with pytest.raises(UserError, match=r"3\.tar: no such file \(of .*\)"):
        expand_pattern(f"{tmp_path}/{{2..3}}.tar")


def test_several_files_have_a_short_name():
    assert name_files(["a"]) == "a"
    assert name_files(["a", "b", "c"]) == "a and 2 more"


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "x",
            "a{1..3}",
            "a{b,c{1..4}}::y",
            "{a..c}{Z..b}",
            "{{0..9}{0..9},x}y",
            "{ab}",
            "{a{1..3}b}",
            "{3..1}",
        ),
        *("a\\{1..3\\}", "{0..9..3}", "{1,2}::{3,4}", "{,a}", "{,}{,}", "{0..9..0}", "{-3..3}", "\0{1..3}"),
    ],
)
def test_names_are_counted_as_they_are_expanded(pattern):
    assert count_names(pattern) == len(expand_urls(pattern))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x-{000..999999999}.tar", "the braces stand for 1e+09 names; at most 1,000,000 are allowed"),
        ("{0..9}" * 400, "names; at most 1,000,000 are allowed"),
        ("{a..z}" * 10, "names; at most 1,000,000 are allowed"),
        ("{{0..999}{0..999}{0..999},x}y", "names; at most 1,000,000 are allowed"),
        ("{a,b}" * 100, "names; at most 1,000,000 are allowed"),
        ("{a," * 3000 + "}" * 3000, "nested more than 50 deep"),
        ("{" * 3000, "Unbalanced braces"),
    ],
    ids=lambda value: value[:12],
)
def test_a_pattern_of_too_many_names_is_refused_before_it_is_expanded(pattern, message):
    with pytest.raises(UserError) as caught:
        expand_pattern(pattern)
    assert message in str(caught.value) or message == "Unbalanced braces"


def test_a_number_of_too_many_digits_in_braces_is_refused_in_our_words():
    with pytest.raises(
        UserError, match=r"^x-\{0..9+\.\.\.9+\}.tar: has a whole number of more than 4,300 digits$"
    ):
        expand_pattern("x-{0.." + "9" * 5000 + "}.tar")
