"""The errors that group_norm_silu raises."""

import pytest
import torch

from litevae_kernels import group_norm_silu

X = torch.zeros(2, 6, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: group_norm_silu("x", 2), TypeError, "x is a str; a torch.Tensor is needed"),
        (
            lambda: group_norm_silu(X.int(), 2),
            TypeError,
            "x has dtype torch.int32; allowed: float32, float64",
        ),
        (
            lambda: group_norm_silu(X.to_sparse(), 2),
            TypeError,
            "x is torch.sparse_coo; a dense (strided) tensor",
        ),
        (lambda: group_norm_silu(torch.nested.nested_tensor([X[0]]), 2), TypeError, "x is nested; a dense"),
        (lambda: group_norm_silu(X[0, 0, 0], 2), ValueError, "x has 1 dimensions; at least 2 are needed"),
        (lambda: group_norm_silu(X, 2, skip=1.0), TypeError, "skip is a float; a torch.Tensor is needed"),
        (
            lambda: group_norm_silu(X, 2, skip=X.double()),
            TypeError,
            "skip has dtype torch.float64; allowed: x's, torch.float32",
        ),
        (
            lambda: group_norm_silu(X, 2, skip=X[:1]),
            ValueError,
            "skip has shape (1, 6, 4, 4); all but the channels must be as in x, (2, 6, 4, 4)",
        ),
        (lambda: group_norm_silu(X, 2, skip=X[..., :3]), ValueError, "skip has shape (2, 6, 4, 3); all but"),
        (lambda: group_norm_silu(X, 2, skip=X[..., 0]), ValueError, "skip has shape (2, 6, 4); all but"),
        (lambda: group_norm_silu(X, 2.0), TypeError, "num_groups is 2.0; an integer is needed"),
        (lambda: group_norm_silu(X, True), TypeError, "num_groups is True; an integer is needed"),
        (lambda: group_norm_silu(X, 4), ValueError, "num_groups is 4; it must divide the 6 channels"),
        (
            lambda: group_norm_silu(X, 5, skip=X),
            ValueError,
            "num_groups is 5; it must divide the 12 channels",
        ),
        (lambda: group_norm_silu(X, 0), ValueError, "num_groups is 0; it must divide the 6 channels"),
        (lambda: group_norm_silu(X, -2), ValueError, "num_groups is -2; it must divide the 6 channels"),
        (lambda: group_norm_silu(X[:, :0], 2), ValueError, "num_groups is 2; it must divide the 0 channels"),
        (lambda: group_norm_silu(X, 2, eps=0.0), ValueError, "eps is 0.0; a positive number is needed"),
        (lambda: group_norm_silu(X, 2, eps=-1e-6), ValueError, "eps is -1e-06; a positive number is needed"),
        (lambda: group_norm_silu(X, 2, eps=float("nan")), ValueError, "eps is nan; a positive number"),
        (lambda: group_norm_silu(X, 2, eps="1"), TypeError, "eps is '1'; a positive number is needed"),
        (lambda: group_norm_silu(X, 2, eps=torch.ones(2)), TypeError, "eps is a Tensor; a positive number"),
        (lambda: group_norm_silu(X, 2, eps=True), TypeError, "eps is True; a positive number is needed"),
        (
            lambda: group_norm_silu(X, 2, eps=float("inf")),
            ValueError,
            "eps is inf; a positive number is needed",
        ),
        (
            lambda: group_norm_silu(X, torch.ones(9, 9)),
            TypeError,
            "num_groups is a Tensor; an integer is needed",
        ),
        (lambda: group_norm_silu(X, 2, [1.0] * 6), TypeError, "weight is a list; a torch.Tensor is needed"),
        (lambda: group_norm_silu(X, 2, torch.ones(5)), ValueError, "weight has shape (5,); (6,) is needed"),
        (lambda: group_norm_silu(X, 2, torch.ones(6), skip=X), ValueError, "weight has shape (6,); (12,) is"),
        (
            lambda: group_norm_silu(X, 2, torch.ones(6, 1)),
            ValueError,
            "weight has shape (6, 1); (6,) is needed",
        ),
        (
            lambda: group_norm_silu(X, 2, bias=torch.ones(7)),
            ValueError,
            "bias has shape (7,); (6,) is needed",
        ),
        (
            lambda: group_norm_silu(X, 2, bias=torch.ones(6).bool()),
            TypeError,
            "bias has dtype torch.bool; allowed: float32",
        ),
        (
            lambda: group_norm_silu(X, 2, torch.ones(6, device="meta")),
            ValueError,
            "weight is on meta; allowed: x's device, cpu",
        ),
        (
            lambda: group_norm_silu(X, 2, bias=torch.ones(6, device="meta")),
            ValueError,
            "bias is on meta; allowed: x's device, cpu",
        ),
        (
            lambda: group_norm_silu(X, 2, skip=X.to("meta")),
            ValueError,
            "skip is on meta; allowed: x's device, cpu",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
