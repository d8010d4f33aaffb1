"""The sections of a configuration: defaults that are the paper's, or turn a feature off."""

from litevae.training.sections import (
    AdversaryConfig,
    AutoencoderOptimizerConfig,
    LatentConfig,
    OptimizerConfig,
    ValidatedCheckpointConfig,
)


def test_what_the_paper_does_not_have_is_off():
    latent, adversary = LatentConfig(), AdversaryConfig()
    assert (latent.std, latent.noise, latent.equivariance) == (None, 0, 0)
    assert (adversary.start, adversary.lecam, adversary.r1) == (None, 0, 0)
    assert ValidatedCheckpointConfig().best_by == "psnr"


def test_the_optimizer_is_the_papers():
    for config in (OptimizerConfig(), AutoencoderOptimizerConfig()):
        assert (config.learning_rate, config.betas, config.weight_decay) == (1e-4, (0.5, 0.9), 0)
        assert (config.kind, config.decay_biases) == ("adamw", True)
    assert AutoencoderOptimizerConfig().encoder_learning_rate is None
    assert AutoencoderOptimizerConfig().decoder_learning_rate is None
