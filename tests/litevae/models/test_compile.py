"""The model under torch.compile, in inference and training, and in CUDA graphs."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from litevae import LiteVAE

VARIANTS = {"group": {}, "smc": {"decoder_norm": "smc", "output_type": "wavelet"}}
FOUR_BLOCKS = {"block_out_channels": (8, 8, 16, 16)}


# The compiled model runs the same operators as the eager one, but fuses them elsewhere and sums in another order. Its
# distance from float64 is therefore another sample of the same rounding errors, and is compared with the largest one
# of eager PyTorch. A few times that is chance; a real error would be larger by orders of magnitude.
CHANCE = 4


@pytest.fixture
def make_small(tiny_config):
    """Returns a function that makes a LiteVAE with few layers to trace; no earlier compilation is cached."""
    torch._dynamo.reset()

    def make(**options) -> LiteVAE:
        torch.manual_seed(0)
        few = {"extractor_multipliers": (1,), "aggregator_multipliers": (1,), "block_out_channels": (8, 16)}
        return LiteVAE(**{**tiny_config, **few, **options})

    return make


def training_loss(vae: nn.Module, image: Tensor, autocast: bool = False) -> Tensor:
    with torch.autocast(image.device.type, torch.bfloat16, enabled=autocast):
        posterior = vae.encode(image).latent_dist
        reconstruction = vae.decode(posterior.mode()).sample
    return (reconstruction - image).square().mean() + 1e-3 * posterior.kl().mean()


def gradients(loss, vae: nn.Module, image: Tensor) -> Tensor:
    vae.zero_grad()
    loss(image).backward()
    return torch.cat([parameter.grad.flatten() for parameter in vae.parameters()])


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Inference


@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_and_decode_compile_whole_for_all_batch_sizes(make_small, variant):
    vae = make_small(**FOUR_BLOCKS, **VARIANTS[variant])
    encode_graphs, decode_graphs = CompileCounter(), CompileCounter()
    encode = torch.compile(lambda x: vae.encode(x).latent_dist.mode(), fullgraph=True, backend=encode_graphs)
    decode = torch.compile(lambda z: vae.decode(z).sample, fullgraph=True, backend=decode_graphs)
    with torch.no_grad():
        for batch in (2, 3, 5, 7):
            image = torch.randn(batch, 3, 16, 24)
            z = encode(image)
            assert torch.equal(z, vae.encode(image).latent_dist.mode())
            assert torch.equal(decode(z), vae.decode(z).sample)
    # One graph has the first batch size as a constant, the other has it as a variable.
    assert encode_graphs.frame_count == decode_graphs.frame_count == 2


def test_checks_allow_dynamic_image_sizes(make_small):
    vae = make_small(**FOUR_BLOCKS)
    graphs = CompileCounter()
    compiled = torch.compile(lambda x: vae(x).sample, fullgraph=True, backend=graphs, dynamic=True)
    with torch.no_grad():
        for size in [(2, 3, 16, 24), (3, 3, 32, 16), (5, 3, 40, 48)]:
            assert compiled(torch.randn(size)).shape == size
    assert graphs.frame_count == 1


# Training


def test_training_step_compiles_whole_under_autocast(make_small, image):
    vae = make_small(**FOUR_BLOCKS)

    def loss(image):
        with torch.autocast("cpu", torch.bfloat16):
            return vae(image).sample.float().square().mean()

    loss(image).backward()
    expected = [parameter.grad.clone() for parameter in vae.parameters()]
    vae.zero_grad()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(image).backward()
    for parameter, gradient in zip(vae.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-3, rtol=5e-2)


@pytest.mark.parametrize(("variant", "autocast"), [("group", False), ("smc", True)])
def test_training_step_compiles_whole_for_all_batch_sizes(make_small, variant, autocast):
    vae = make_small(**VARIANTS[variant])
    loss = partial(training_loss, vae, autocast=autocast)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    exact_vae = copy.deepcopy(vae).double()
    for batch in (2, 3, 5, 7):
        image = images(batch, 3, 16, 24)
        exact = gradients(partial(training_loss, exact_vae), exact_vae, image.double())
        error = (gradients(compiled, vae, image) - exact).norm()
        assert error <= CHANCE * (gradients(loss, vae, image) - exact).norm()
        assert error < 0.1 * exact.norm()
    # One graph has the first batch size as a constant, the other has it as a variable.
    assert graphs.frame_count == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_step_compiles_whole_for_all_sizes_at_once(make_small, variant):
    vae = make_small(**VARIANTS[variant])
    loss = partial(training_loss, vae)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=graphs, dynamic=True)
    expected = gradients(loss, vae, images(2, 3, 12, 20))
    torch.testing.assert_close(gradients(compiled, vae, images(2, 3, 12, 20)), expected, atol=1e-5, rtol=1e-3)
    # Dynamo may recompile once, when it finds that nn.GroupNorm's eps, a float, is a constant.
    first = graphs.frame_count
    assert first <= 2
    for size in [(3, 3, 12, 20), (5, 3, 20, 12), (2, 3, 16, 36)]:
        torch.testing.assert_close(
            gradients(compiled, vae, images(*size)), gradients(loss, vae, images(*size)), atol=1e-5, rtol=1e-3
        )
    assert graphs.frame_count == first


def train(vae: LiteVAE, steps: int, compiled: bool = False) -> Tensor:
    """Returns the losses of `steps` training steps on one batch."""
    dtype = vae.dtype
    loss_of = partial(training_loss, vae)
    if compiled:
        loss_of = torch.compile(loss_of, fullgraph=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3)
    batch, losses = images(2, 3, 16, 16, seed=0).to(dtype), []
    for _ in range(steps):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_of_20_compiled_steps_are_those_of_eager_ones(make_small, variant):
    vae = make_small(**VARIANTS[variant])
    exact = train(copy.deepcopy(vae).double(), 20)
    # AdamW divides by the gradient's magnitude, so pure rounding errors move the weights as far as real gradients do.
    # Two orders of summation (contiguous and channels_last) sample the effect.
    eager = [
        train(copy.deepcopy(vae).to(memory_format=memory_format), 20)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    ]
    # The compiled code may add the terms of a mean one after another, which gives a random walk of n roundings.
    terms = images(2, 3, 16, 16).numel()
    summation = terms**0.5 * torch.finfo(torch.float32).eps / 2 * exact.max()
    error = (train(vae, 20, compiled=True) - exact).abs().max()
    assert exact[-5:].mean() < exact[:5].mean()  # it trains
    assert error <= CHANCE * max((losses - exact).abs().max() for losses in eager) + summation
    assert error < 1e-4 * exact.min()


# On a GPU


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_graph_replays_the_model_on_other_images(make_small, cuda, variant, dtype):
    vae = make_small(**VARIANTS[variant]).to(cuda, dtype).requires_grad_(False)
    static = torch.zeros(2, 3, 32, 48, device=cuda, dtype=dtype)

    def run() -> tuple[Tensor, Tensor]:
        moments = vae.encode(static).latent_dist.parameters
        return moments, vae.decode(moments.chunk(2, dim=1)[0]).sample

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate and choose algorithms in their first calls
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (0, 1):
        static.copy_(images(2, 3, 32, 48, seed=seed))
        graph.replay()
        replayed = [x.clone() for x in captured]
        for actual, expected in zip(replayed, run(), strict=True):
            assert actual.isfinite().all()
            assert torch.equal(actual, expected)  # the same kernels


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_reduce_overhead_on_a_gpu(make_small, cuda, variant):
    """Runs the CUDA graphs that torch.compile itself records, forward and backward."""
    vae = make_small(**VARIANTS[variant]).to(cuda)
    loss = partial(training_loss, vae)
    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    exact_vae = copy.deepcopy(vae).double()
    for seed in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        image = images(2, 3, 16, 24, seed=seed).to(cuda)
        exact = gradients(partial(training_loss, exact_vae), exact_vae, image.double())
        error = (gradients(compiled, vae, image) - exact).norm()
        assert error <= CHANCE * (gradients(loss, vae, image) - exact).norm()


@pytest.mark.gpu
def test_reduce_overhead_encodes_on_a_gpu(make_small, cuda):
    """The way that docs/performance.md recommends against the host's time; each shape has its own graph."""
    vae = make_small().to(cuda).requires_grad_(False)
    encode = torch.compile(vae.encode, mode="reduce-overhead")
    with torch.inference_mode():
        for seed in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            image = images(1 + seed % 2, 3, 16, 24, seed=seed).to(cuda)
            exact = copy.deepcopy(vae).double().encode(image.double()).latent_dist.parameters
            eager = vae.encode(image).latent_dist.parameters
            replayed = encode(image).latent_dist.parameters.clone()
            assert (replayed - exact).norm() <= CHANCE * (eager - exact).norm()
