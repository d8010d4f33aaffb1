"""The kernel that adds a block's residual hands the statistics of the sum over to the next GroupNorm.

Triton reads TRITON_INTERPRET when a kernel is defined, so this module runs itself again in a process that sets it, with
the interpreter on the CPU in place of a GPU.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from litevae.models.decoder import UpBlock
from litevae.models.feature_unet import FeatureUNet
from litevae.models.layers import Measured, MidBlock, ResBlock
from litevae_kernels import use_backend
from litevae_kernels.conv3x3 import addition
from litevae_kernels.testing import gpu_calls, on_gpu

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Calls(TorchDispatchMode):
    """Notes how many statistics each norm is given, and how often the residual's kernel measures its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[int] = []
        self.measured: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "litevae::group_norm_silu":
            self.given.append(len(args[8]) if len(args) > 8 else 0)
        elif func._schema.name == "litevae::add_residuals_":
            self.measured.append(args[3])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_under_the_interpreter(under_the_interpreter: Any) -> None:
    under_the_interpreter(__file__, old_numpy=True)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@torch.no_grad()
def test_encode_with_and_without(make_variant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, both differ from float64 alike, and repeated calls have the same bits."""
    model = make_variant().eval()
    image = torch.rand(1, 3, 24, 16) * 2 - 1
    exact = copy.deepcopy(model).double().encode(image.double()).latent_dist.parameters
    with use_backend("triton"):
        with Calls() as calls:
            first, second = (model.encode(image).latent_dist.parameters for _ in range(2))
        monkeypatch.setattr(addition, "serves", lambda x, measure=False: False)
        without = model.encode(image).latent_dist.parameters
    assert torch.equal(first, second)
    assert 2 in calls.given
    assert True in calls.measured
    errors = [(y - exact).norm() / exact.norm() for y in (first, without)]
    assert errors[0] <= 2 * errors[1]  # The order of additions differs, not their number.
    assert errors[1] <= 1e-5  # 170 roundings of float32: the encoder has about as many operations in a row.


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU's operators")
def test_a_forced_convolution_is_not_replaced_by_the_addition() -> None:
    block = ResBlock(16, 16, 4, norm="none").bfloat16().eval()
    x = torch.empty(2, 16, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    names = [name for name, _ in gpu_calls(block, x)]
    assert names.count("litevae::conv3x3") == 2
    assert "litevae::add_residuals_" not in names


def run(module: nn.Module, *shapes: tuple[int, ...]) -> Calls:
    """Returns the calls of a module on a GPU that this machine need not have."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = on_gpu(module)
        inputs = [torch.empty(shape, device="cuda") for shape in shapes]
        with Calls() as calls:
            module(*inputs)
    return calls


UNET = FeatureUNet(6, 5, 8, (1, 2), num_groups=4)
SHAPE = (2, 6, 8, 8)
# The first norm of each block but the U-Net's first; those of the decoder read two tensors.
FIRST_NORMS = [0, 1, 1, 1, 1, 1, 2, 2, 2, 2]


def first_norms(calls: Calls) -> list[int]:
    assert calls.given[1::2] == [0] * (len(calls.given) // 2), "a convolution precedes the second norms"
    return calls.given[::2]


def test_norms_that_read_a_sum_get_its_statistics() -> None:
    calls = run(UNET, SHAPE)
    assert first_norms(calls) == FIRST_NORMS
    assert calls.measured == [True] * 9 + [False]  # conv_out follows the last sum


def test_nothing_is_handed_over_with_gradients_or_on_a_cpu() -> None:
    for device, grad in (("cuda", True), ("cpu", False)):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(grad):
            module = on_gpu(UNET) if device == "cuda" else UNET
            with Calls() as calls:
                module(torch.empty(SHAPE, device=device))
        assert not any(calls.given)
        assert not calls.measured


def hooked(layer: str) -> nn.Module:
    net = copy.deepcopy(UNET)
    net.get_submodule(layer).register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        # A hook may change what a layer returns, or the input of a norm.
        ("encoder_blocks.0", [0, 0, 1, 1, 1, 1, 2, 2, 2, 0]),
        ("encoder_blocks.0.conv2", [0, 0, 1, 1, 1, 1, 2, 2, 2, 0]),
        ("encoder_blocks.2.conv_shortcut", [0, 1, 1, 0, 1, 1, 2, 0, 2, 2]),
        ("encoder_blocks.1.norm1", [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
        ("mid_block", [0, 1, 1, 1, 0, 1, 0, 2, 2, 2]),
    ],
)
def test_layers_that_must_be_called_hand_nothing_over(layer: str, given: list[int]) -> None:
    assert first_norms(run(hooked(layer), SHAPE)) == given


def test_attention_and_other_norms_hand_nothing_over() -> None:
    middle = run(MidBlock(8, 4, attention=True), (2, 8, 4, 4))
    assert not any(middle.given)
    assert middle.measured == [False, False]
    for norm in ("smc", "none"):
        assert not any(run(ResBlock(8, 8, 4, norm), (2, 8, 4, 4)).measured)


def test_the_decoders_blocks_hand_over() -> None:
    calls = run(UpBlock(8, 12, 3, 4, "group", upsample=True), (2, 8, 4, 4))
    assert first_norms(calls) == [0, 1, 1]
    assert calls.measured == [True, True, False]  # an upsampler follows


def test_concatenated_inputs_have_no_statistics() -> None:
    """A block without a shortcut concatenates its inputs, of which one may be measured."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        block = on_gpu(ResBlock(12, 12, 4))
        x, skip = (torch.empty(2, c, 4, 4, device="cuda") for c in (8, 4))
        statistics = torch.empty(2, 8, 2, dtype=torch.float64, device="cuda")
        with Calls() as calls:
            block.measured(Measured(x, statistics), Measured(skip), measure=True)
    assert calls.given == [0, 0]


def test_the_triton_convolution_hands_over_everything() -> None:
    """Where it is on, its epilogue measures what the second norms read, too."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), use_backend("triton"):
        module = on_gpu(UNET, torch.bfloat16)
        x = torch.empty(SHAPE, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
        seen = []

        class Convolutions(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func._schema.name == "litevae::measured_norm_silu_conv3x3":
                    seen.append((len(args[9]), args[10]))
                return func(*args, **(kwargs or {}))

        with Convolutions():
            module(x)
    assert [given for given, _ in seen[::2]] == FIRST_NORMS
    assert [given for given, _ in seen[1::2]] == [1] * 10
    assert [measure for _, measure in seen] == [True] * 19 + [False]


def test_compiles_to_one_graph() -> None:
    """The compiler adds without statistics itself, and gets no second pass over what it measures."""
    graphs = []

    def keep(graph: Any, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        compiled = torch.compile(on_gpu(UNET), backend=aot_autograd(fw_compiler=keep), fullgraph=True)
        y: Tensor = compiled(torch.empty(SHAPE, device="cuda"))
    assert y.shape == (2, 5, 8, 8)
    (graph,) = graphs
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    assert calls["auto_functionalized_v2"] == 9
    norms = [node for node in graph.graph.nodes if str(node.target) == "litevae.group_norm_silu.default"]
    assert [len(node.args[8]) if len(node.args) > 8 else 0 for node in norms][::2] == FIRST_NORMS
