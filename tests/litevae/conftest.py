import json
import math
import os
import runpy
import signal
import sys
import threading
import zlib
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from skimage import data

from litevae.data import remote
from litevae_kernels import backend

SIZE = 32
SPEED = {"images_per_second", "data_wait"}  # values of a log that differ from run to run


def _none():
    return False  # not a mock, which the compiler could not trace


@contextmanager
def hide_gpus():
    """Hides GPUs from code that asks PyTorch for one, in this process and in its children."""
    if not torch.accelerator.is_available():
        yield
        return
    torch.cuda.device_count()  # before the driver reads CUDA_VISIBLE_DEVICES, which it does once
    with (
        mock.patch.object(torch.cuda, "is_available", _none),
        mock.patch.object(torch.accelerator, "is_available", _none),
        mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""),
    ):
        backend._find_why_no_cuda.cache_clear()
        yield
    backend._find_why_no_cuda.cache_clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Runs the tests of this folder on the CPU, fixtures included, unless they are marked `gpu`."""
    if Path(__file__).parent not in item.path.parents or item.get_closest_marker("gpu"):
        return (yield)
    with hide_gpus():
        return (yield)


@pytest.fixture
def hidden_gpus():
    return hide_gpus


@pytest.fixture(scope="module")
def one_thread():
    """Limits PyTorch to one thread; on a busy machine, several would slow tiny runs down a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpu_multiplies(monkeypatch):
    """Returns a function that sets the half precisions ("bf16", "fp16") that the CPU seems to multiply.

    The kernels and layers still compute as this CPU does.
    """

    def set_precisions(*names):
        served = ("fp32", *names)
        monkeypatch.setattr("litevae.environment.multiplies", lambda precision, device: precision in served)

    return set_precisions


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Saves a tiny untrained model."""
    from litevae import LiteVAE  # slow to import

    torch.manual_seed(0)
    model = LiteVAE.from_preset(
        "litevae-s",
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Writes 11 images to three folders. The sixth one is broken; the others are larger than a crop."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(11):
        path = folder / "abc"[i // 4] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        if i == 5:
            path.write_text("no image")
        else:
            Image.fromarray(data.chelsea()[9 * i : 9 * i + 40 + i, 20 * i : 20 * i + 60 - i]).save(path)
    return folder


@pytest.fixture(autouse=True)
def own_precision():
    """Makes every Accelerator take its own precision; otherwise it keeps that of an earlier run in the process."""
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def st_lpips_package():
    """Returns the network of the package stlpips-pytorch, without two modules that it imports and does not use."""
    with pytest.MonkeyPatch.context() as patch:
        for unused in ("IPython", "torchsummary"):
            patch.setitem(sys.modules, unused, mock.Mock())
        from stlpips_pytorch.stlpips import LPIPS as Network
    return Network(net="alex", variant="shift_tolerant", verbose=False).requires_grad_(False)


class Colours(torch.nn.Module):
    """Features that are easy to compute: the mean of each colour."""

    num_features = 3

    def forward(self, images):
        return images.double().mean((2, 3))


@pytest.fixture
def stand_in_networks(monkeypatch):
    """Replaces the networks of rFID and LPIPS, whose weights are downloaded, and returns the features of rFID."""
    from litevae.evaluation import evaluate, fid, metrics, validation  # slow to import
    from litevae.losses import LPIPS

    lpips = LPIPS(pretrained=False)
    monkeypatch.setattr(metrics, "LPIPS", lambda: lpips)
    make_fid = fid.make_fid
    for module in (evaluate, validation):
        monkeypatch.setattr(module, "make_fid", lambda features: make_fid(features or Colours()))
    return Colours()


@pytest.fixture(scope="session")
def broken_images(tmp_path_factory):
    """Writes two files that are no images; a message about all of them must name the first one and say why."""
    folder = tmp_path_factory.mktemp("broken")
    for name in "ab":
        (folder / f"{name}.png").write_text("no image")
    return (
        folder,
        f"none of the 2 images can be read; {folder / 'a.png'}: not an image, or of an unsupported format",
    )


@pytest.fixture(scope="session")
def whole_image():
    """Resizes an RGB image as --crop shorter and area do, with Pillow alone: (H, W, 3) uint8."""

    def load(image, crop, size, step):
        width, height = image.size
        scale = size / min(image.size) if crop == "shorter" else size / math.sqrt(width * height)
        # a side that is a whole number of steps may be a rounding error below it
        width, height = (int(scale * side / step + 1e-9) * step for side in image.size)
        taken = min(image.width / width, image.height / height)  # pixels of the image per pixel of the result
        left, top = (image.width - taken * width) / 2, (image.height - taken * height) / 2
        box = (left, top, left + taken * width, top + taken * height)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))

    return load


class EventfulImages:
    """Images that call `event(index)` whenever one is loaded."""

    def __init__(self, images, event):
        self.images, self.event = images, event

    def __len__(self):
        return len(self.images)

    def __getattr__(self, name):
        return getattr(self.images, name)

    def load(self, index):
        self.event(index)
        return self.images.load(index)


@pytest.fixture(scope="session")
def eventful():
    return EventfulImages


@pytest.fixture(scope="session")
def interrupting():
    """Makes images that send SIGTERM to this process when the one at `at` is loaded."""
    return lambda images, at: EventfulImages(
        images, lambda index: index == at and os.kill(os.getpid(), signal.SIGTERM)
    )


@pytest.fixture
def uneven_model(tmp_path):
    """A tiny model whose latent channels have different scales, and means far from 0; it lies in tmp_path/model."""
    from litevae import LiteVAE

    torch.manual_seed(0)
    model = LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4
    )
    with torch.no_grad():
        conv = model.encoder.feature_aggregator.conv_out
        conv.weight[1] *= 10
        conv.bias[:4] = torch.tensor([0.0, 5.0, -3.0, 1.0])
    model.save_pretrained(tmp_path / "model")
    return model


@pytest.fixture
def square_images(tmp_path):
    """Writes five squares, which need not be resized, and a broken file."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        square = data.chelsea()[20 * i : 20 * i + SIZE, 30 * i : 30 * i + SIZE]
        Image.fromarray(square).save(folder / f"{i}.png")
    (folder / "bad.png").write_text("no image")
    return folder


@pytest.fixture
def gradient_runs(tmp_path):
    """Returns a folder with two logs in the trainer's format, and the ratios of gradients on some of their lines."""
    ratios = {"constant": [0.5, 0.4, 0.2, 0.1], "adaptive": [100.0, 0.01, 3.0]}
    for name, values in ratios.items():
        (tmp_path / name).mkdir()
        lines = [{"step": 1, "loss": 1.0}, {"step": 2, "skipped": "the loss is nan", "skipped_steps": 1}]
        lines += [{"step": 10 * i, "gradient_ratio": value} for i, value in enumerate(values, start=1)]
        lines += [{"step": 99, "gradient_ratio": 0.0}]  # cannot be drawn on a logarithmic scale
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"step": 100, "gradi')  # the run was killed
    return tmp_path, ratios


@pytest.fixture(scope="session")
def logged():
    def read(folder):
        """Returns the lines of the log without values that differ from run to run."""
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]

    return read


@pytest.fixture(scope="session")
def variant_settings():
    """The names of the configuration that choose a variant of the encoder."""
    return ("encoder_type", "extractor", "shared_extractor", "aggregator", "finest_level", "encoder_norm")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A `FakeHub`, which huggingface_hub and diffusers use with a token and an empty cache."""
    import huggingface_hub

    hub = runpy.run_path(str(Path(__file__).with_name("fake_hub.py")))["FakeHub"]()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "".join(template[1:]))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", "token")
    yield hub
    hub.close()


class Handler(BaseHTTPRequestHandler):
    """Serves the files of `server.folder` in parts, and fails as `server.failures` and `server.broken` say."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        failure = None
        if with_body:
            self.server.requests.append((self.path, self.headers.get("Range")))
            failure = self.server.failures.popleft() if self.server.failures else None
        if path.name in self.server.broken:
            failure = self.server.broken[path.name]
        if not path.is_file():
            failure = 404
        if isinstance(failure, int):
            self.send_response(failure)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        etag = f'"{zlib.crc32(content)}"'
        begin, end = 0, len(content)
        if self.headers.get("Range"):
            begin, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
            end = min(last + 1, end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if with_body and failure == "cut":
            self.wfile.write(content[begin : (begin + end) // 2])
            self.close_connection = True
        elif with_body:
            self.wfile.write(content[begin:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/"served" over HTTP on this computer.

    `url` is the address of the folder, `requests` lists the GET requests, `failures` holds the failures of the next
    GET requests (a status, "cut" or None), and `broken` those of all requests for a file of a name.
    """
    pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.02, 0.03))
    monkeypatch.setenv("LITEVAE_CACHE", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder = tmp_path / "served"
    server.folder.mkdir()
    server.requests, server.failures, server.broken = [], deque(), {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
