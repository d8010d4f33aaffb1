import pytest

from litevae.data.bad_images import BadImages
from litevae.errors import UserError


def test_bad_images_are_listed_once(tmp_path):
    path = tmp_path / "bad_images.txt"
    bad = BadImages(path, 100, 0.03)
    bad.add([])
    assert not path.exists()
    bad.add([("a", "one"), ("b\tc\n", "two\nlines"), ("a", "one")])
    bad.add([("a", "again"), ("é\udcff", "three")])
    assert len(bad) == 3
    assert path.read_bytes() == b"a\tone\nb\\tc\\n\ttwo\\nlines\n\xc3\xa9\xff\tthree\n"
    bad.add([("b\tc\n", "again")])
    with pytest.raises(UserError) as caught:
        bad.add([("d", "four")])
    message = str(caught.value)
    assert "4 of 100 images cannot be used" in message
    assert "data.max_bad_fraction=0.03" in message
    assert str(path) in message
    assert "\n" not in message
    assert path.read_text(errors="replace").count("\n") == 4


def test_list_is_continued_by_a_resumed_run_and_by_other_processes(tmp_path):
    path = tmp_path / "bad_images.txt"
    first, second = BadImages(path, 100, 0.03), BadImages(path, 100, 0.03)
    first.add([("a", "x"), ("é\udcff", "y")])
    second.add([("a", "x"), ("b", "z")])
    assert len(second) == 3
    resumed = BadImages(path, 100, 0.03)
    assert len(resumed) == 3
    resumed.add([("a", "x"), ("b", "z"), ("é\udcff", "y")])
    assert len(path.read_bytes().splitlines()) == 3
    with pytest.raises(UserError, match="4 of 100"):
        first.add([("c", "x")])


def test_line_cut_off_by_a_full_disk_is_dropped(tmp_path):
    path = tmp_path / "bad_images.txt"
    path.write_bytes(b"a\tone\nimage/0")
    bad = BadImages(path, 100, 0.03)
    assert len(bad) == 1
    bad.add([("image/007", "two")])
    assert path.read_text() == "a\tone\nimage/007\ttwo\n"


def test_list_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"bad_images\.txt: cannot be written"):
        BadImages(tmp_path / "nowhere" / "bad_images.txt", 1, 0.5).add([("a", "x")])


def test_limit_is_a_count_of_images_not_a_rounded_product(tmp_path):
    bad = BadImages(tmp_path / "bad_images.txt", 100, 0.29)  # 0.29 x 100 is 28.999999999999996
    bad.add([(str(i), "x") for i in range(29)])
    with pytest.raises(UserError, match="30 of 100"):
        bad.add([("29", "x")])
