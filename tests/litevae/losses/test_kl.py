import torch

from litevae.losses import kl_loss


def test_equals_torch_distributions(pair):
    mean, logvar = pair((2, 4, 3, 5))
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, prior).mean()
    torch.testing.assert_close(kl_loss(mean, logvar), expected, rtol=1e-12, atol=0)


def test_gradient_equals_finite_differences(pair):
    assert torch.autograd.gradcheck(kl_loss, [tensor.requires_grad_() for tensor in pair((1, 2, 2, 3))])


def test_is_zero_with_zero_gradient_at_the_prior():
    mean, logvar = (torch.zeros(1, 4, 2, 2, requires_grad=True) for _ in "ab")
    loss = kl_loss(mean, logvar)
    loss.backward()
    assert loss == 0
    assert mean.grad.count_nonzero() == logvar.grad.count_nonzero() == 0
