import torch

from litevae.latents.encoder import BatchedEncoder, to_host


def test_batch_becomes_the_moments_of_its_images_and_their_mirrored_copies(model):
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    encoder = BatchedEncoder(model, mirror=True)
    with torch.inference_mode():
        moments = encoder(pixels)
        encoder.finish()
        plain, mirrored = (BatchedEncoder(model, mirror=False)(copy) for copy in (pixels, pixels.flip(-1)))
    assert moments.dtype == torch.float16
    assert moments.shape == (2, 3, 8, 8, 8)
    assert torch.equal(moments, torch.cat([plain, mirrored]))
    assert encoder.seconds > 0


def test_parts_are_joined_along_the_images():
    parts = [torch.randn(2, count, 8, 4, 4) for count in (3, 1)]
    moments, ready = to_host(parts)
    assert ready is None
    assert torch.equal(moments, torch.cat(parts, dim=1))
