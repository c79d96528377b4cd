"""Does a strong decoder use its latents? PixelCNN by itself, and as the decoder of a VAE.

A PixelCNN is a density of images without latents, pixel by pixel, and an exact one:

    log p(x) = sum_d log p(x_d | x_1, ..., x_(d-1))

As the decoder p(x | z) of a VAE it can do without z, and the ELBO,

    E_q[log p(x | z)] - KL(q(z | x) || p(z)),    KL(q(z | x) || p(z)) = I(x; z) + KL(q(z) || p(z))

asks a price for every nat of information I(x; z): where the decoder models the images as well
without it, none is bought. InfoVAE (Zhao et al. 2017, section 4) with alpha = 1 drops that price
and keeps the aggregate posterior q(z) at the prior by the maximum mean discrepancy alone:

    E_q[log p(x | z)] - lambda MMD^2(q(z), p(z))

The table has log p(x) of held-out images, exact or by importance sampling, beside what z knows of
them. What is used has its price in log p(x), since q(z) gets only near the prior. The picture has
draws of x given the z of some test images, and their averages, which are like the image only where
z is used.

    python examples/pixelcnn.py                         # 8 x 8 digits of scikit-learn, minutes
    python examples/pixelcnn.py --data folder/of/MNIST  # an hour of one core
"""

import argparse
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from common import images, parser, ready, save
from pyro.infer import ELBO
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

import pyro_lvm as lvm

OBJECTIVES = {
    "ELBO": lambda: lvm.TraceInfo_ELBO(),
    "InfoVAE": lambda: lvm.TraceInfo_ELBO(alpha=1.0, lambda_=40.0, divergence=lvm.MMD()),
}
ROWS = 500  # images that a decoder works on at a time


def main() -> None:
    options = parser(__doc__, epochs=3, of_digits=40)
    options.set_defaults(images=100, samples=200)
    args = ready(options.parse_args())
    data = images(args.data)
    x = data.test.to(args.device)
    pixelcnn = build_density(data)
    print(f"PixelCNN by itself: {train(pixelcnn, data, args)}\n")
    vaes = {name: build(data) for name in OBJECTIVES}
    for name, vae in vaes.items():
        print(f"VAE by {name}: {train(vae, data, args, OBJECTIVES[name]())}\n")
    for model in (pixelcnn, *vaes.values()):
        model.to(args.device)
    rows = {"PixelCNN": exact_score(pixelcnn, x[: args.images])}
    for name, vae in vaes.items():
        rows[f"VAE, {name}"] = score(vae, x[: args.images], args.samples) | information(vae, x)
    print(pd.DataFrame(rows).T.to_string(na_rep="", float_format=lambda v: f"{v:.2f}"))
    save(draw(pixelcnn, vaes, x[:8], data.image_shape), args, "pixelcnn")


def sizes(data: lvm.datasets.Split) -> dict[str, Any]:
    """Of the network, which knows where in an image it is: how large it is, how far it looks."""
    if data.train.shape[1] > 100:
        return {"channels": 16, "layers": 4, "kernel_size": 5, "position_bias": True}
    return {"channels": 8, "layers": 3, "first_kernel_size": 5, "position_bias": True}


def build_density(data: lvm.datasets.Split) -> lvm.models.Density:
    """The PixelCNN by itself."""
    return lvm.models.Density(lvm.nn.PixelCNN(data.image_shape, **sizes(data)))


def build(data: lvm.datasets.Split) -> lvm.models.PixelCNNVAE:
    """The same as a decoder; its encoder starts with narrow q(z | x), from which z can be told."""
    pixels, latents = data.train.shape[1], 10
    encoder = lvm.nn.MLP(pixels, [200, 200], head=lvm.nn.NormalHead(latents))
    with torch.no_grad():
        encoder.layers[-1].bias[latents:] = -3.0  # a standard deviation of 0.05
    decoder = lvm.nn.PixelCNN(data.image_shape, **sizes(data), context_features=latents)
    return lvm.models.PixelCNNVAE(encoder, decoder)


def train(
    model: lvm.models.Density | lvm.models.PixelCNNVAE,
    data: lvm.datasets.Split,
    args: argparse.Namespace,
    elbo: ELBO | None = None,
    batch_size: int = 64,
) -> lvm.Fit:
    """Small batches, and a learning rate that rises and falls once."""
    steps = args.epochs * -(-len(data.train) // batch_size)
    return lvm.fit(
        model.model,
        model.guide,
        data.train,
        elbo=elbo,
        transform=torch.bernoulli,
        validation=data.validation[:1000],
        epochs=args.epochs,
        batch_size=batch_size,
        scheduler=partial(OneCycleLR, max_lr=5e-3, total_steps=steps),
        compile=False,  # convolutions are compiled code already
        device=args.device,
        seed=args.seed,
    )


def exact_score(pixelcnn: lvm.models.Density, x: Tensor) -> dict[str, float]:
    """Log p(x), nats per image."""
    found = lvm.marginal.exact(pixelcnn.model, pixelcnn.guide, x)
    return {"log p(x)": found.mean, "its error": found.mean_std_error}


def score(vae: lvm.models.PixelCNNVAE, x: Tensor, num_samples: int) -> dict[str, float]:
    """Log p(x), nats per image, and how far it can be believed."""
    found = estimate(vae, x, num_samples)
    return {
        "log p(x)": found.mean,
        "its error": found.mean_std_error,
        "of sampling": found.sampling_std_error,
        "k > 0.7": found.num_unreliable,
    }


def estimate(vae: lvm.models.PixelCNNVAE, x: Tensor, num_samples: int) -> lvm.LogMarginal:
    """Importance sampling.

    Without the KL in the objective q(z | x) is narrower than the posterior, and a wider proposal
    misses less.
    """
    wide = lvm.marginal.widened(vae.guide, scales=(1.0, 2.0, 4.0))
    return lvm.marginal.importance_sampling(
        vae.model, wide, x, num_samples=num_samples, chunk_size=max(1, ROWS // len(x))
    )


def information(vae: lvm.models.PixelCNNVAE, x: Tensor) -> dict[str, float]:
    """What z knows of x, nats per image."""
    report = lvm.diagnostics.collapse_report(vae.model, vae.guide, x[:1000])
    return {
        "I(x; z)": report.information.lower.value,
        "KL(q(z) || p(z))": report.information.kl_upper.value,
        "active units": report.num_active,
    }


def draw(
    pixelcnn: lvm.models.Density,
    vaes: dict[str, lvm.models.PixelCNNVAE],
    x: Tensor,
    image_shape: tuple[int, int],
) -> plt.Figure:
    """Draws of the PixelCNN; of every test image, the average of draws given its z, and some."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.4), layout="constrained")
    settings = {"image_shape": image_shape, "columns": len(x)}
    lvm.plots.plot_images(pixelcnn.sample(len(x) ** 2), **settings, ax=axes[0])
    axes[0].set_title("PixelCNN: draws of x")
    for ax, (name, vae) in zip(axes[1:], vaes.items(), strict=True):
        draws = [vae.reconstruct(x) for _ in range(len(x) - 2)]
        grid = torch.stack([x, vae.reconstruct(x, num_draws=32), *draws], 1)  # image by image
        lvm.plots.plot_images(grid.flatten(0, 1), **settings, ax=ax)
        for column in (1, 2):
            ax.axvline(column * (image_shape[1] + 1), color="tab:orange", linewidth=3)
        ax.set_title(f"{name}: image | mean of 32 draws given its z | draws")
    return figure


if __name__ == "__main__":
    main()
