"""A variational autoencoder on binary images: fit, score, and look.

The story of an image x has a latent vector z, and the guide guesses it from the image:

    z ~ N(0, I),   x ~ Bernoulli(decoder(z));   q(z | x) = N(mean(x), diag(sd(x)^2)) = encoder(x)

Both are trained by the ELBO, a lower bound of log p(x) (Kingma and Welling 2014). Grey images are
made binary afresh whenever they are looked at (dynamic binarisation, Burda et al. 2016), which
`fit` does by ``transform=torch.bernoulli``; held-out images are binary once and for all.

What is reported is not the bound but log p(x) by importance sampling, with its error, beside how
many of the latent dimensions carry anything.

    python examples/vae.py                              # 8 x 8 digits of scikit-learn, a minute
    python examples/vae.py --data folder/of/MNIST       # 784-400-400-20, some ten minutes
"""

import argparse
import time
from functools import partial

import matplotlib.pyplot as plt
import torch
from common import arguments, images, save
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

import pyro_lvm as lvm


def main() -> None:
    args = arguments(__doc__, epochs=100)
    data = images(args.data)
    vae = build(data)
    print(f"{train(vae, data, args)}\n")
    x = data.test[: args.images].to(args.device)
    vae.to(args.device)
    start = time.perf_counter()
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, x, num_samples=args.samples)
    print(f"{score}\n({time.perf_counter() - start:.0f} s)\n")
    print(lvm.diagnostics.collapse_report(vae.model, vae.guide, x))
    save(draw(vae, x, data.image_shape), args, "vae")


def build(data: lvm.datasets.Split) -> lvm.VAE:
    """Two hidden layers on either side."""
    pixels = data.train.shape[1]
    hidden, latents = ([400, 400], 20) if pixels > 100 else ([128, 128], 8)
    encoder = lvm.nn.MLP(pixels, hidden, head=lvm.nn.NormalHead(latents))
    decoder = lvm.nn.MLP(latents, hidden, head=lvm.nn.BernoulliHead(pixels))
    return lvm.VAE(encoder, decoder)


def train(
    vae: lvm.VAE,
    data: lvm.datasets.Split,
    args: argparse.Namespace,
    elbo: lvm.TraceInfo_ELBO | None = None,
    batch_size: int = 128,
) -> lvm.Fit:
    """A learning rate that rises and falls once gets to the end sooner (Smith and Topin 2018)."""
    steps = args.epochs * -(-len(data.train) // batch_size)
    return lvm.fit(
        vae.model,
        vae.guide,
        data.train,
        elbo=elbo,
        transform=torch.bernoulli,
        validation=data.validation,
        epochs=args.epochs,
        batch_size=batch_size,
        scheduler=partial(OneCycleLR, max_lr=3e-3, total_steps=steps),
        device=args.device,
        seed=args.seed,
    )


def draw(vae: lvm.VAE, x: Tensor, image_shape: tuple[int, int]) -> plt.Figure:
    """What it makes of images, what it makes up, and what lies between two images."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    shape = {"image_shape": image_shape}
    lvm.plots.plot_reconstructions(x[:10], vae.reconstruct(x[:10]), **shape, ax=axes[0])
    axes[0].set_title("test images, and E[x | z] at the mean of q(z | x)")
    lvm.plots.plot_images(vae.sample(100, mean=True), **shape, columns=10, ax=axes[1])
    axes[1].set_title("E[x | z], z ~ N(0, I)")
    between = vae.interpolate(x[:10], x[10:20], num_steps=10).transpose(0, 1)  # image by image
    lvm.plots.plot_images(between.flatten(0, 1), **shape, columns=10, ax=axes[2])
    axes[2].set_title("from one test image to another")
    return figure


if __name__ == "__main__":
    main()
