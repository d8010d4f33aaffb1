import torch

from litevae.losses import teacher_kl_loss


def test_equals_torch_distributions(pair):
    mean, logvar, teacher_mean, teacher_logvar = moments = [*pair((2, 4, 3, 5)), *pair((2, 4, 3, 5))[::-1]]
    teacher = torch.distributions.Normal(teacher_mean, (teacher_logvar / 2).exp())
    student = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(teacher, student).mean()
    torch.testing.assert_close(teacher_kl_loss(*moments), expected, rtol=1e-12, atol=0)


def test_gradient_equals_finite_differences(pair):
    moments = [*pair((1, 2, 2, 3)), *pair((1, 2, 2, 3))[::-1]]
    assert torch.autograd.gradcheck(teacher_kl_loss, [tensor.requires_grad_() for tensor in moments])


def test_is_zero_with_zero_gradient_at_the_teacher():
    """At the clamp of the log-variance, where a posterior is all but a point, too."""
    teacher = torch.randn(1, 4, 2, 2), torch.full((1, 4, 2, 2), -30.0)
    mean, logvar = (tensor.clone().requires_grad_() for tensor in teacher)
    loss = teacher_kl_loss(mean, logvar, *teacher)
    loss.backward()
    assert loss == 0
    assert mean.grad.count_nonzero() == logvar.grad.count_nonzero() == 0
