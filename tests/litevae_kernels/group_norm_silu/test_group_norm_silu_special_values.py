"""group_norm_silu of large means, outliers, constants, huge values, infinities and NaN."""

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels import group_norm_silu, use_backend
from litevae_kernels.testing import arrange, assert_within_budget, poisoned_memory

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [
        (torch.float32, 1e4, 1.0),
        (torch.float32, -1e6, 1.0),
        (torch.float32, 1e3, 1e-3),
        (torch.float64, 1e8, 1.0),
        (torch.bfloat16, 1e4, 100.0),
        (torch.float16, 1e4, 10.0),
    ],
)
def test_a_large_mean(make_call, values, check, backend, layout, dtype, mean, std):
    if backend == "reference" and abs(mean) > 1e5 * std and dtype != torch.float64:
        pytest.skip("the reference's mean is a float32")
    for shape, groups, border in [((2, 8, 24, 20), 2, 8), ((1, 32, 40, 33), 8, 18), ((3, 3, 5, 7), 3, 2)]:
        joined = (values(shape) * std + mean).to(dtype)
        c = shape[1]
        call = make_call(
            arrange(joined[:, :border], layout),
            groups,
            values(c, torch.float32, seed=1),
            values(c, torch.float32, seed=2),
            arrange(joined[:, border:], layout) if border < c else None,
        )
        check(call, arrange(values(shape, dtype, seed=3), layout), backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("outlier", [1e4, -1e6])
def test_first_pixels_that_are_far_from_the_rest(make_call, values, check, backend, layout, outlier):
    # A shift taken from the first values would fail: the sum of squares about it keeps no digit of the variance.
    for shape, groups, count in [((2, 8, 24, 20), 2, 1), ((1, 16, 33, 40), 4, 20), ((1, 2, 100, 70), 2, 1)]:
        x = values(shape)
        x.flatten(2)[..., :count] = outlier
        call = make_call(
            arrange(x.float(), layout),
            groups,
            values(shape[1], torch.float32, seed=1),
            values(shape[1], torch.float32, seed=2),
        )
        check(call, arrange(values(shape, torch.float32, seed=3), layout), backend, spread=9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_groups(make_call, forward_roundings, values, check, backend, dtype, layout):
    shape = (2, 8, 6, 5)
    for constant in (0.0, 1.0, -37.0, 1000.0):
        x = arrange(torch.full(shape, constant, dtype=dtype), layout)
        bias = values(8, torch.float32, seed=2)
        call = make_call(x, 4, values(8, torch.float32, seed=1), bias, eps=1e-4)
        actual = check(call, values(shape, dtype, seed=3), backend)
        for name in ("x", "weight", "bias"):
            assert actual[name].isfinite().all()
        if backend == "native" and dtype != torch.float64:
            # the mean of equal values is that value, so only the bias remains
            assert_within_budget(
                actual["y"],
                F.silu(bias.double())[:, None, None].expand(shape),
                magnitude=bias.abs().max().item(),
                operations=forward_roundings,
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-4, 1e12, 1e18])
def test_small_and_huge_values(make_call, values, check, backend, dtype, size):
    if backend == "reference" and dtype == torch.float32 and size > 1e12:
        pytest.skip("autograd's rstd^3 is below float32, in torch.nn.functional.group_norm as well")
    # with 90 values per group, the sum of their squares is 1e38, within float32
    x = values((2, 4, 5, 9), dtype) * size
    call = make_call(x, 2, values(4, torch.float32, seed=1), values(4, torch.float32, seed=2))
    check(call, values(x.shape, dtype, seed=3), backend)


def test_values_whose_squares_overflow_are_right_or_vanish(
    make_call, forward_roundings, values, exact, budgets, backend
):
    # torch's variance is infinite here and the normalised values are zero; better results are allowed
    x = values((1, 4, 32, 32), torch.float32) * 3e19
    bias = values(4, torch.float32, seed=2)
    with use_backend(backend):
        y = group_norm_silu(x, 2, bias=bias)
    vanished = F.silu(bias.double())[:, None, None].expand(x.shape)
    if torch.equal(y[..., :1, :1].expand_as(y), y):
        assert_within_budget(y, vanished, magnitude=3.0, operations=forward_roundings)
    else:
        call = make_call(x, 2, None, bias)
        magnitude, operations = budgets(call, torch.zeros_like(x), backend)["y"]
        expected = exact(call, torch.zeros_like(x))["y"]
        assert_within_budget(y, expected, magnitude=magnitude, operations=operations)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_silu_far_from_zero(make_call, values, check, backend, dtype, layout):
    # z up to 1000 and beyond on both sides, and every size in between
    shape = (1, 6, 21, 13)
    weight = torch.tensor([1e3, -1e3, 90.0, 20.0, 1.0, 1e-3])
    bias = torch.tensor([-1e3, 1e3, -88.0, 60.0, -15.0, 0.0])
    for parameters in [(weight, bias), (None, bias), (weight, None)]:
        actual = check(
            make_call(arrange(values(shape, dtype), layout), 3, *parameters),
            values(shape, dtype, seed=3),
            backend,
        )
        assert all(t.isfinite().all() for t in actual.values())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_own_group_only(make_call, values, run, backend, layout, dtype, bad):
    # groups of 4 channels, images of two groups of x, one over the border and one of skip
    joined, grad = values((2, 16, 11, 9), dtype), values((2, 16, 11, 9), dtype, seed=1)
    parameters = (values(16, dtype, seed=2), values(16, dtype, seed=3))

    def both(joined):
        call = make_call(arrange(joined[:, :10], layout), 4, *parameters, arrange(joined[:, 10:], layout))
        with use_backend(backend), poisoned_memory():
            return run(call, grad)

    clean = both(joined)
    for channel in (1, 9, 10, 15):
        spoiled = joined.clone()
        spoiled[1, channel, 10, 8] = bad
        actual = both(spoiled)
        group = slice(channel // 4 * 4, channel // 4 * 4 + 4)
        for a, b in [
            (actual["y"], clean["y"]),
            *[(torch.cat([t["x"], t["skip"]], 1) for t in (actual, clean))],
        ]:
            assert a[1, group].isnan().all()
            rest = torch.ones(2, 16, dtype=torch.bool)
            rest[1, group] = False
            assert torch.equal(a[rest], b[rest])
        for name in ("weight", "bias"):
            assert actual[name][group].isnan().all()
            rest = torch.ones(16, dtype=torch.bool)
            rest[group] = False
            assert torch.equal(actual[name][rest], clean[name][rest])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_spoils_its_own_group_only(make_call, values, run, backend, bad):
    x, grad = values((2, 6, 5, 7), torch.float32), values((2, 6, 5, 7), torch.float32, seed=1)
    grad[0, 2, 3, 3] = bad
    with use_backend(backend):
        actual = run(make_call(x, 3), grad)["x"]
    assert not actual[0, 2:4].isfinite().any()
    actual[0, 2:4] = 0
    assert actual.isfinite().all()
