import pytest
import torch
from torch import nn

from litevae import LiteVAE
from litevae.models.vit import ViT


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("latent_channels", "parameters"), [(4, 835_720), (12, 837_784)])
def test_vit_has_the_papers_size(latent_channels, parameters):
    """Table 20: the U-Net has 1.69 M parameters and the ViT 0.84 M, without our position embedding."""
    with torch.device("meta"):
        unet = LiteVAE.from_preset("litevae-b").encoder.feature_aggregator
        vae = LiteVAE.from_preset("litevae-b", latent_channels, aggregator="vit")
    transformer = vae.encoder.feature_aggregator
    assert transformer.pos_embed.shape == (128, 32, 32)
    assert count(transformer) - transformer.pos_embed.numel() == parameters
    assert f"{parameters / 1e6:.2f}" == "0.84"
    assert f"{count(unet) / 1e6:.2f}" == "1.69"


def test_vit_is_pytorchs_transformer(randomised):
    torch.manual_seed(0)
    transformer = randomised(ViT(6, 5, channels=8, size=4).double())
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    embedded = transformer.conv_in(x) + transformer.pos_embed
    expected = embedded.flatten(2).transpose(1, 2)
    for block in transformer.blocks:
        layer = nn.TransformerEncoderLayer(
            32, 4, 128, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).double()
        names = {
            "to_qkv.weight": "self_attn.in_proj_weight",
            "to_qkv.bias": "self_attn.in_proj_bias",
            "to_out.weight": "self_attn.out_proj.weight",
            "to_out.bias": "self_attn.out_proj.bias",
        }
        layer.load_state_dict({names.get(name, name): value for name, value in block.state_dict().items()})
        expected = layer(expected)
    expected = transformer.conv_out(expected.transpose(1, 2).reshape(2, 32, 4, 4))
    torch.testing.assert_close(transformer(x), expected, atol=1e-11, rtol=1e-11)


def test_vit_takes_one_size_and_says_which(make_variant):
    vae = make_variant(aggregator="vit", sample_size=32)
    message = "image must be 32x32, the sample_size that aggregator='vit' was made for, got 48x32"
    tall = torch.zeros(1, 3, 48, 32)
    for call in (vae.encode, vae.forward):
        with pytest.raises(ValueError, match=message):
            call(tall)
    # With tiles of that size it takes larger images.
    vae.enable_tiling()
    latent = vae.encode(tall).latent_dist.mode()
    assert latent.shape == (1, 4, 6, 4)
    assert vae.decode(latent).sample.shape == tall.shape
    with pytest.raises(ValueError, match=r"image must be 32x32, .* got 32x24"):
        vae.encode(torch.zeros(1, 3, 48, 24))
