import json
import shutil

import pytest

from litevae import LiteVAE
from litevae.errors import UserError
from litevae.latents import LatentDataset, Part, merge_parts, verify


@pytest.fixture
def ranges(encode, model_folder, tmp_path):
    """Encodes the photographs' three shards in ranges."""

    def run(count=2):
        for number in range(count):
            model = LiteVAE.from_pretrained(model_folder)
            encode(f"out/{number}", part=Part(number, count), model=model, max_bad_fraction=0.3)
        return [tmp_path / "out" / str(number) for number in range(count)]

    return run


@pytest.mark.parametrize("count", [1, 2, 5])
def test_joined_ranges_are_what_one_run_writes(encode, ranges, tmp_path, contents, count):
    encode("one")
    parts = ranges(count)
    assert sum(len(verify(part, part=True)["shards"]) for part in parts) == 3
    for _ in range(2):  # the second call has the files of the first beside the ranges
        folder, index = merge_parts(sorted((tmp_path / "out").iterdir(), reverse=True))
        assert folder == tmp_path / "out"
        assert index == verify(folder)
    for part in parts:
        shutil.rmtree(part)
    assert {name: text for name, text in contents(tmp_path / "out").items() if name != ".lock"} == {
        name: text for name, text in contents(tmp_path / "one").items() if name != ".lock"
    }
    assert len(LatentDataset(tmp_path / "out")) == 20
    assert encode("out").done == 0


def test_shards_are_copied_where_there_are_no_links(ranges, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    parts = ranges()
    monkeypatch.setattr("os.link", refuse)
    merge_parts(parts)
    for part in parts:
        shutil.rmtree(part)
    assert len(verify(tmp_path / "out")["shards"]) == 3


def test_a_range_continues_and_counts_its_own_images(encode, tmp_path):
    first = encode("out/0", part=Part(0, 2))
    assert (first.total, first.done, first.bad) == (4, 4, 0)
    second = encode("out/1", part=Part(1, 2), max_bad_fraction=0.15)
    assert (second.total, second.done, second.bad) == (7, 7, 1)
    (tmp_path / "out" / "1" / "shard-00001.safetensors").unlink()
    again = encode("out/1", part=Part(1, 2), max_bad_fraction=0.15)
    assert (again.total, again.before, again.done) == (7, 3, 4)
    with pytest.raises(UserError, match="was begun with range 1/2, not range 0/2"):
        encode("out/1", part=Part(0, 2))
    with pytest.raises(UserError, match="was begun with range 1/2, not all images"):
        encode("out/1")
    with pytest.raises(UserError, match="holds range 1/2 only: join the ranges with litevae encode --merge"):
        LatentDataset(tmp_path / "out" / "1")


def test_ranges_that_do_not_make_up_the_whole_are_refused(encode, ranges, tmp_path):
    def refusal(*folders):
        with pytest.raises(UserError) as caught:
            merge_parts([tmp_path / folder for folder in folders])
        assert not (tmp_path / "out" / "index.json").exists()
        return str(caught.value)

    ranges()
    encode("out/again", part=Part(0, 2))
    encode("out/whole")
    encode("out/third", part=Part(2, 3))
    encode("elsewhere/1", part=Part(1, 2), max_bad_fraction=0.3)
    encode("out/size", part=Part(1, 2), size=64, max_bad_fraction=0.3)
    assert "the ranges 1/2 are missing" in refusal("out/0")
    assert "the ranges 0/2 are given twice" in refusal("out/0", "out/1", "out/again")
    assert "out/whole: holds all images" in refusal("out/0", "out/whole")
    assert "out/third: holds range 2/3, and " in refusal("out/0", "out/third")
    assert "encoding is not the same" in refusal("out/0", "out/size")
    assert "elsewhere/1: is not in " in refusal("out/0", "elsewhere/1")
    assert "no such folder" in refusal("out/0", "out/none")
    assert "give the folders of all ranges" in refusal()
    shard = tmp_path / "out" / "1" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert "its content is not what was written" in refusal("out/0", "out/1")


def test_other_latents_in_the_folder_are_kept(encode, ranges, tmp_path, contents):
    encode("out", size=64)
    parts = ranges()
    before = (tmp_path / "out" / "index.json").read_bytes()
    with pytest.raises(UserError, match="out: holds other encoded images"):
        merge_parts(parts)
    assert (tmp_path / "out" / "index.json").read_bytes() == before


def test_a_range_of_another_type_is_refused(encode, tmp_path):
    encode("out", part=Part(0, 2))
    path = tmp_path / "out" / "index.json"
    index = json.loads(path.read_text())
    for part in ([1], [1, 1], [-1, 2], ["0", 2], 3, [0, 2**70], True):
        path.write_text(json.dumps(index | {"part": part}))
        with pytest.raises(UserError, match="part must be two whole numbers, the first below the second"):
            verify(tmp_path / "out", part=True)
    path.write_text(json.dumps(index | {"encoding": index["encoding"] | {"shard_size": 0}}))
    with pytest.raises(UserError, match="shard_size must be a whole number from 1, got 0"):
        verify(tmp_path / "out", part=True)
