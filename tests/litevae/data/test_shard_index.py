import pytest

from litevae.data.sources import open_images


@pytest.fixture
def shards(server, write_shards):
    write_shards(server.folder)
    return f"{server.url}/train-{{000..002}}.tar"


def test_headers_are_read_once_until_the_shard_changes(server, shards, assert_pictures, png, write_tar):
    open_images(shards)
    server.requests.clear()
    assert_pictures(open_images(shards + "?X-Amz-Signature=abc123"), range(12))
    assert len(server.requests) == 12  # the images alone
    write_tar(server.folder / "train-001.tar", [("x.png", png(3))])
    assert_pictures(open_images(shards), [0, 1, 2, 3, 3, 8, 9, 10, 11])


def test_a_damaged_list_is_made_anew(server, shards, tmp_path, assert_pictures):
    open_images(shards)
    for path, content in zip(
        (tmp_path / "cache" / "shards").iterdir(), ("", "[]", '{"names": ["x"]}'), strict=True
    ):
        path.write_text(content)
    assert_pictures(open_images(shards), range(12))


def test_a_list_that_cannot_be_kept_is_reported(server, shards, tmp_path, assert_pictures, capsys):
    (tmp_path / "cache").write_text("a file")
    assert_pictures(open_images(shards), range(12))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("the lists of remote shards cannot be kept here" in line for line in lines)
