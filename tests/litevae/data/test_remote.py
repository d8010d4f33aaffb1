import errno
import io
import pickle
import socket

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from litevae.data import remote
from litevae.data.crops import CropSettings, TrainingCrops, collate
from litevae.data.pixels import BadImage
from litevae.data.remote import RemoteError, RemoteFile, read_part, redact, redact_pattern
from litevae.data.sources import open_images

SECRETS = ("user", "pass", "word", "X-Amz", "abc123")


@pytest.fixture
def shards(server, write_shards):
    write_shards(server.folder)
    return f"{server.url}/train-{{000..002}}.tar"


def test_shards_are_those_on_the_local_disk(server, shards, assert_pictures, names):
    source, local = open_images(shards), open_images(str(server.folder))
    assert_pictures(source, range(12))
    assert_pictures(pickle.loads(pickle.dumps(source)), range(12))
    assert names(source)[5] == f"{server.url}/train-001.tar:sample00005.png"
    for i in range(12):
        assert (source.key(i), source.label(i)) == (local.key(i), local.label(i))
    both = open_images(f"{server.url}/train-001.tar::{server.folder}/train-000.tar")
    assert_pictures(both, [4, 5, 6, 7, 0, 1, 2, 3])


@pytest.mark.parametrize("failures", [[503, 503], ["cut"], [429, "cut", 500]])
def test_a_request_is_repeated(server, shards, assert_pictures, failures):
    server.failures.extend(failures)
    source = open_images(shards)
    assert not server.failures
    server.requests.clear()
    server.failures.extend(failures)
    assert_pictures(source, range(12))
    assert len(server.requests) == 12 + len(failures)


def test_a_missing_file_is_not_asked_for_again(server, refusal):
    message = refusal(f"{server.url}/nothing.tar")
    assert message == f"{server.url}/nothing.tar: no such file"
    assert len(server.requests) == 1  # besides that for the headers alone


def test_all_failing_shards_are_listed(server, shards, refusal):
    server.broken = {"train-000.tar": 503, "train-002.tar": 403}
    message = refusal(shards)
    assert message.startswith("2 of 3 shards cannot be used: ")
    assert (
        f"{server.url}/train-000.tar: the server answers 503 (Service Unavailable), in 4 attempts" in message
    )
    assert f"{server.url}/train-002.tar: the server answers 403 (Forbidden)" in message


def test_a_shard_that_fails_later_is_listed(server, shards):
    source = open_images(shards)
    server.broken = {"train-001.tar": 503}
    crops = TrainingCrops(source, CropSettings(8, "random", True, 0.5), seed=0, length=12)
    bad = collate([crops[i] for i in range(12)]).bad
    assert {name for name, _ in bad} == {source.name(i) for i in range(4, 8)}
    assert {reason for _, reason in bad} == {
        "cannot be read: the server answers 503 (Service Unavailable), in 4 attempts"
    }


def test_a_truncated_shard_is_refused(server, shards, refusal):
    file = server.folder / "train-001.tar"
    file.write_bytes(file.read_bytes()[:3000])
    assert "train-001.tar: not a whole .tar file" in refusal(shards)


def test_crops_are_those_of_local_files_in_any_process(server, shards):
    settings = CropSettings(8, "random", True, 0.0)
    remote_crops = TrainingCrops(open_images(shards), settings, seed=3, length=30)
    local_crops = TrainingCrops(open_images(str(server.folder)), settings, seed=3, length=30)
    loader = DataLoader(remote_crops, 5, collate_fn=collate, num_workers=2)
    found = torch.cat([batch.images for batch in loader])
    assert torch.equal(found, collate([local_crops[i] for i in range(30)]).images)


@pytest.mark.parametrize(
    "path",
    [
        "pipe:cat x.tar",
        "PIPE:cat x.tar",
        "x.tar::pipe:curl https://user:pass@host/{a",
        "ssh://user:pass@host/x.tar",
        "simplecache://x.tar",
        "file:///x.tar",
    ],
)
def test_commands_and_other_protocols_are_refused(refusal, path):
    message = refusal(path)
    assert "is refused" in message
    assert ("pipe" in path.lower()) == ("pipe: is refused, because it would run a command" in message)
    assert not any(secret in message for secret in SECRETS)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub")])
def test_a_missing_package_is_named(refusal, monkeypatch, scheme, package):
    monkeypatch.setattr(remote, "find_spec", lambda _: None)
    message = refusal(f"{scheme}://bucket/x.tar")
    assert f"{scheme}://bucket/x.tar: reading this needs the package {package}" in message
    assert f"pip install 'litevae[{'gcs' if scheme == 'gs' else 'remote'}]'" in message


def test_messages_hold_no_secrets(server, shards, refusal):
    host = server.url.removeprefix("http://")
    query = "?X-Amz-Signature=abc123"
    for path in (f"http://user:pass@{host}/none.tar{query}", f"http://user:pass/word@{host}/none.tar{query}"):
        assert not any(secret in refusal(path) for secret in SECRETS)
    server.broken = {"train-000.tar": 500}
    assert not any(secret in refusal(f"http://user:pass@{host}/train-000.tar{query}") for secret in SECRETS)
    source = open_images(f"http://user:pass@{host}/train-001.tar{query}")
    assert not any(secret in source.name(0) + source.key(0) for secret in SECRETS)
    for braces in ("{0..99999999}", "{a", "{" * 60 + "}" * 60):
        message = refusal(f"http://user:pass@{host}/{braces}.tar{query}")
        assert not any(secret in message for secret in SECRETS)


def test_redaction():
    assert redact("https://user:pa/ss@word@host/a.tar?sig=1#x") == "https://host/a.tar"
    assert redact("https://token@host/a@2.tar") == "https://host/a@2.tar"
    assert redact("hf://datasets/name/set@refs/a.tar") == "hf://datasets/name/set@refs/a.tar"
    assert redact_pattern("/a/b?.tar::https://u:p@h/{0..1}.tar?s::pipe:x") == (
        "/a/b?.tar::https://h/{0..1}.tar::pipe:"
    )
    error = OSError(errno.EIO, "Cannot connect to https://user:pass@host/a.tar?X-Amz=abc123 now")
    assert not any(secret in remote.describe(error).replace("OSError", "") for secret in SECRETS)
    assert "https://host/a.tar now" in remote.describe(error)


def test_a_server_that_is_not_there(refusal, monkeypatch):
    pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/x.tar"
    message = refusal(address)
    assert message.startswith(f"{address}: Client")
    assert message.endswith("in 2 attempts")


def test_a_file_object_reads_what_the_file_holds(server):
    content = np.random.default_rng(0).bytes(10_000)
    (server.folder / "x").write_bytes(content)
    file, given = io.BufferedReader(RemoteFile(f"{server.url}/x", len(content)), 1000), io.BytesIO(content)
    for offset, whence, size in [(0, 0, 10), (-500, 2, 900), (700, 0, 5000), (100, 1, 0), (20_000, 0, 5)]:
        assert file.seek(offset, whence) == given.seek(offset, whence)
        assert file.read(size) == given.read(size)
    with pytest.raises(RemoteError, match=r"the connection ended after 5 of 9 bytes, in 4 attempts"):
        read_part(f"{server.url}/x", 9995, 9)


def test_files_in_s3(tmp_path, monkeypatch, write_shards, assert_pictures, refusal):
    pytest.importorskip("s3fs", reason="the extra `remote` is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    boto3 = pytest.importorskip("boto3", reason="moto is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("LITEVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        (tmp_path / "local").mkdir()
        write_shards(tmp_path / "local")
        for file in sorted((tmp_path / "local").iterdir()):
            client.upload_file(str(file), "images", f"set/{file.name}")
        for path in ("train-{000..002}.tar", "*.tar", "", "train-00[0-2].tar"):
            assert_pictures(open_images(f"s3://images/set/{path}"), range(12))
        assert refusal("s3://images/set/x.tar") == "s3://images/set/x.tar: no such file"
        assert "no file matches" in refusal("s3://images/none-*.tar")
        assert "s3://nobody/x.tar: no such file" in refusal("s3://nobody/x.tar")
    finally:
        server.stop()


def test_a_server_without_parts_is_refused(server, shards, refusal, monkeypatch):
    handler = server.RequestHandlerClass
    monkeypatch.setattr(handler, "parse_request", without_range(handler.parse_request))
    source = open_images(f"{server.url}/train-000.tar")  # smaller than the first request
    with pytest.raises(BadImage, match=r"does not serve parts of files \(HTTP range requests\)"):
        source.load(0)


def without_range(parse_request):
    def parse(self):
        parsed = parse_request(self)
        if parsed:
            del self.headers["Range"]
        return parsed

    return parse
