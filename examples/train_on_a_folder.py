"""Trains a small LiteVAE on your own photographs and shows what it reconstructs.

    python examples/train_on_a_folder.py path/to/images
    python examples/train_on_a_folder.py path/to/images --steps 2000 --output runs/photographs

The first command takes less than a minute on two CPU cores, needs no download, and leaves `reconstructions.png`,
`curves.png` and the model in `runs/folder`. That is enough to see blurred shapes; details come with more
steps. For a model of the paper's size, start from `imagenet-b` instead of `demo`, on a GPU:

    litevae train imagenet-b data.train=path/to/images
"""

import argparse
from pathlib import Path

import torch

from litevae import LiteVAE
from litevae.training import load_config, train


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="a folder of images, or anything else that data.train takes")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=64, help="side of the square crops in pixels")
    parser.add_argument("--output", type=Path, default=Path("runs/folder"))
    args = parser.parse_args(arguments)

    # The demo's small model and its settings. Every key of `litevae config demo` can be set here.
    config = load_config(
        "demo",
        [
            f"data.train={args.images}",
            f"data.size={args.size}",
            "data.crop=random",  # A random square of each image, resized to data.size.
            "data.workers=2",  # Two processes decode images while the model trains.
            f"max_steps={args.steps}",
            f"output_dir={args.output}",
        ],
    )
    result = train(config)
    print(f"{result.steps} steps in {result.seconds:.0f} s")
    print(f"see {args.output / 'reconstructions.png'} and {args.output / 'curves.png'}")

    # The trained model is a diffusers model. Images are (N, 3, H, W) in [-1, 1].
    vae = LiteVAE.from_pretrained(args.output / "model")
    images = torch.zeros(1, 3, args.size, args.size)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        restored = vae.decode(latents).sample
    print(f"images {tuple(images.shape)} -> latents {tuple(latents.shape)} -> images {tuple(restored.shape)}")


if __name__ == "__main__":
    main()
