import pytest
import torch

from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory, shapes


def test_budget_accepts_rounding_and_no_more():
    exact = torch.linspace(-3, 3, 101, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert_within_budget(exact.to(dtype), exact, magnitude=3.0, operations=1)
        with pytest.raises(AssertionError, match="over the budget"):
            assert_within_budget(
                exact.to(dtype) * (1 + 4 * torch.finfo(dtype).eps), exact, magnitude=1.0, operations=1
            )


def test_budget_rejects_nan_and_shapes():
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(torch.tensor([float("nan")]), torch.zeros(1), magnitude=1e9, operations=9)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(torch.zeros(2), torch.zeros(1), magnitude=1.0, operations=1)


def test_poisoned_memory():
    with poisoned_memory():
        assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrange_keeps_the_values(layout):
    x = torch.randn(2, 3, 4, 5)
    y = arrange(x, layout)
    assert torch.equal(y, x[:1].expand_as(x) if layout == "expanded" else x)


def test_shapes_are_varied():
    made = shapes(200)
    sides = {side for shape in made for side in shape[2:]}
    assert {1, 2, 3} <= sides
    assert max(sides) <= 67
    assert len(set(made)) > 150
