"""Derivatives, registration and compilation of the Haar operators."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from litevae_kernels import haar_dwt2d, haar_idwt2d, haar_pyramid, use_backend, wavedec2, waverec2
from litevae_kernels.haar import op
from litevae_kernels.haar.shapes import MODES
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory, shapes


def random_tensor(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def gradient(function, inputs, layout):
    """Gradient of `function` for incoming gradients of a given layout, the same ones on every call."""
    inputs = inputs.detach().requires_grad_()
    outputs = function(inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    outputs = [x for out in outputs for x in (out if isinstance(out, tuple) else (out,))]
    grads = [arrange(random_tensor(x.shape, x.dtype, seed=i), layout) for i, x in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, grads)[0]


FUNCTIONS = {
    "pyramid": lambda levels, mode: lambda x: haar_pyramid(x, levels, mode=mode),
    "wavedec2": lambda levels, mode: lambda x: wavedec2(x, levels, mode=mode),
    "dwt2d": lambda levels, mode: lambda x: haar_dwt2d(x, mode=mode),
}


# 600 cases: 3 functions x 5 modes x 5 gradient layouts x 8 shapes; the input layouts take turns.
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_backward_equals_autograd_of_the_reference(name, mode, layout, fewer):
    compared = 0
    count = 24 if mode == "reflect" else 8
    for i, shape in enumerate(shapes(count, seed=len(name))):
        if compared == fewer(count):
            break
        levels = 1 + i % 4
        if mode == "reflect" and (min(shape[2:]) - 1) >> (levels - 1) == 0:
            continue  # shrinks to a length of 1, which reflect does not allow
        image = arrange(random_tensor(shape, seed=i), LAYOUTS[i % len(LAYOUTS)])
        function = FUNCTIONS[name](levels, mode)
        with use_backend("native"), poisoned_memory():
            actual = gradient(function, image, layout)
        with use_backend("reference"):
            exact = gradient(function, image, layout)
        assert actual.shape == image.shape
        # incoming gradients are below 8; four bands at half weight, up to four folded samples per level
        assert_within_budget(actual, exact, magnitude=16.0 * 4**levels, operations=5 * levels)
        compared += 1
    assert compared >= fewer(8)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_in_other_dtypes(layout, dtype):
    for shape in [(2, 3, 32, 40), (1, 2, 13, 31)]:
        image = random_tensor(shape, dtype)
        with use_backend("native"):
            actual = gradient(lambda x: haar_pyramid(x, 3), image, layout)
            from_float = gradient(lambda x: haar_pyramid(x, 3, dtype=dtype), image.float(), layout)
        with use_backend("reference"):
            # the incoming gradients are rounded, everything else is float64
            exact = gradient(lambda x: [g.to(dtype) for g in haar_pyramid(x, 3)], image.double(), layout)
        assert actual.dtype == dtype
        assert from_float.dtype == torch.float32
        assert_within_budget(actual, exact, magnitude=16.0, operations=12)
        assert_within_budget(from_float, exact, magnitude=16.0, operations=12)


@pytest.mark.usefixtures("isa")
def test_backward_of_the_inverse():
    coeffs = random_tensor((2, 12, 9, 11))
    for size in (None, (17, 22), (18, 21), (17, 21)):
        with use_backend("native"):
            actual = gradient(lambda x, size=size: haar_idwt2d(x, output_size=size), coeffs, "transposed")
        with use_backend("reference"):
            exact = gradient(lambda x, size=size: haar_idwt2d(x, output_size=size), coeffs, "transposed")
        assert_within_budget(actual, exact, magnitude=16.0, operations=4)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_twice(mode):
    image = random_tensor((1, 2, 7, 10)).requires_grad_()

    def pyramid(x):
        return haar_pyramid(x, 2, mode=mode)

    def round_trip(x):
        coeffs = wavedec2(x, 2, mode=mode)
        return waverec2(
            (coeffs[0], *(tuple(d**2 for d in level) for level in coeffs[1:])), output_size=(7, 10)
        )

    for function in (pyramid, round_trip):
        assert torch.autograd.gradcheck(function, image)
        assert torch.autograd.gradgradcheck(function, image)


def test_only_some_outputs_have_gradients():
    image = random_tensor((1, 3, 16, 16)).requires_grad_()
    (actual,) = torch.autograd.grad(haar_pyramid(image)[2].sum(), image)
    with use_backend("reference"):
        (exact,) = torch.autograd.grad(haar_pyramid(image)[2].sum(), image)
    torch.testing.assert_close(actual, exact)


def test_gradient_keeps_the_memory_format():
    image = arrange(random_tensor((2, 3, 16, 16)), "channels_last").requires_grad_()
    (grad,) = torch.autograd.grad(haar_pyramid(image)[0].square().sum(), image)
    assert grad.is_contiguous(memory_format=torch.channels_last)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (1, 2, 7, 13)])
def test_opcheck(shape, layout, channels_last, stacked):
    image = arrange(random_tensor(shape, torch.float32), layout)
    rest = ("reflect", 0.5, stacked, torch.bfloat16, channels_last, "native")
    torch.library.opcheck(torch.ops.litevae.haar_analysis, (image, 3, *rest), test_utils=OPCHECKS)
    coeffs = [arrange(x, layout) for x in op._analysis(image, 3, *rest)]
    arguments = (coeffs, *shape[2:], *rest)
    torch.library.opcheck(torch.ops.litevae.haar_synthesis, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("channels_last", [True, False])
def test_fake_strides_are_the_real_ones(channels_last):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = "channels_last" if channels_last else "contiguous"
    image = arrange(random_tensor((2, 3, 7, 10), torch.float32), layout)
    real = haar_pyramid(image)
    with FakeTensorMode() as mode:
        fake = haar_pyramid(mode.from_tensor(image))
    assert [x.stride() for x in fake] == [x.stride() for x in real]


def loss(image):
    low, *_ = haar_pyramid(image.sin(), 2)
    approximation, details = wavedec2(image, 1)
    back = waverec2((approximation, details), output_size=image.shape[-2:])
    return low.square().mean() + haar_idwt2d(haar_dwt2d(image)).abs().mean() + (back * image).mean()


@pytest.mark.parametrize(
    ("backend", "compiler"), [("native", "inductor"), ("native", "aot_eager"), ("reference", "aot_eager")]
)
def test_compiles_forward_and_backward(backend, compiler):
    torch._dynamo.reset()
    with use_backend(backend):
        compiled = torch.compile(loss, fullgraph=True, backend=compiler)
        for shape in [(2, 3, 16, 16), (2, 3, 15, 9)]:
            image = random_tensor(shape, torch.float32).requires_grad_()
            expected = loss(image)
            actual = compiled(image)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(*(torch.autograd.grad(x, image)[0] for x in (actual, expected)))


@pytest.mark.parametrize("dynamic", [None, True])
def test_no_new_graph_for_another_batch_size(dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (2, 3, 5, 8, 13):
        image = random_tensor((batch, 3, 16, 16), torch.float32).requires_grad_()
        value = compiled(image)
        torch.testing.assert_close(value, loss(image))
        value.backward()
    assert counter.frame_count <= (1 if dynamic else 2)  # the second one is for dynamic sizes


def test_the_backward_keeps_the_backend_of_the_forward(monkeypatch):
    calls = []
    original = op._backend
    monkeypatch.setattr(op, "_backend", lambda name: calls.append(name) or original(name))
    image = random_tensor((1, 1, 8, 8)).requires_grad_()
    with use_backend("native"):
        out = haar_dwt2d(image)
    with use_backend("reference"):
        out.sum().backward()
    assert calls == ["native", "native"]


def test_autocast_leaves_the_dtype_alone():
    image = random_tensor((1, 3, 8, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert haar_pyramid(image)[0].dtype == torch.float32
