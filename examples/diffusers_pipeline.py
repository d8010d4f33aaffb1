"""Trains a diffusion transformer on the latents of a LiteVAE and samples with diffusers' own DiTPipeline.

    litevae train demo max_steps=300
    litevae scale runs/demo demo --size 64
    litevae encode runs/demo demo latents --size 64
    python examples/diffusers_pipeline.py runs/demo latents

The last command takes less than a minute on two CPU cores and leaves `samples.png` and the pipeline in
`runs/dit`. With eight photographs and a few hundred steps, the samples are coloured shapes: they show that the
parts fit together, and nothing about quality. Take your own model and folder of latents for that.

A LiteVAE takes the place of `AutoencoderKL` in any pipeline. A denoiser that was trained on the latents of another
autoencoder has to be trained again: the latent space is a different one.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import make_image_grid
from torch.utils.data import DataLoader

from litevae import LiteVAE
from litevae.latents import LatentDataset


def train_denoiser(
    dataset: LatentDataset, scheduler: DDIMScheduler, steps: int, batch_size: int = 32
) -> DiTTransformer2DModel:
    """Returns a small class-conditional transformer that predicts the noise in scaled latents."""
    channels, side = dataset[0].moments.shape[0] // 2, dataset[0].moments.shape[-1]
    denoiser = DiTTransformer2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        patch_size=2,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,
        num_embeds_ada_norm=max(1, len(dataset.labels)),
    )
    denoiser.train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3, weight_decay=0.0)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=steps * batch_size)
    for step, (moments, labels) in enumerate(DataLoader(dataset, batch_size, sampler=sampler), start=1):
        latents = dataset.sample(moments)  # A draw from each posterior, times scaling_factor.
        noise = torch.randn_like(latents)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, times)
        predicted = denoiser(noisy, timestep=times, class_labels=labels.clamp(min=0)).sample
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}")
    return denoiser.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a training run with a LiteVAE, such as runs/demo")
    parser.add_argument(
        "latents", type=Path, help="a folder that `litevae encode` has written with that model"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/dit"))
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    vae = LiteVAE.from_pretrained(args.model / "model")
    dataset = LatentDataset(args.latents)
    if dataset.shape is None:
        raise SystemExit("this example needs latents of one shape: run litevae encode with --crop middle")
    # The folder's scaling_factor multiplies the latents in training; the model's divides them in the pipeline.
    if vae.config.scaling_factor != dataset.index["latents"]["scaling_factor"]:
        raise SystemExit("the model's scaling_factor has changed: run litevae encode again")

    scheduler = DDIMScheduler(clip_sample=False)
    denoiser = train_denoiser(dataset, scheduler, args.steps)
    pipeline = DiTPipeline(transformer=denoiser, vae=vae, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    classes = [number % max(1, len(dataset.labels)) for number in range(8)]
    images = pipeline(classes, guidance_scale=1.0, num_inference_steps=50).images

    pipeline.save_pretrained(args.output)
    make_image_grid(images, rows=2, cols=4).save(args.output / "samples.png")
    print(f"see {args.output / 'samples.png'}")


if __name__ == "__main__":
    main()
