"""How well do we know log p(x) of a VAE? Five estimators of one number, and two bounds.

The number is the log-likelihood of held-out images under a fitted VAE with Bernoulli pixels,

    log p(x) = log integral p(x | z) p(z) dz,

in which naive Monte Carlo draws z from the prior, importance sampling from the guide q(z | x), as
it is, widened, or refined for each image, and annealed importance sampling moves draws of the
prior to the posterior step by step. All are too low on average, and the highest is the best. How
low is seen on images that the model has drawn itself: these come with an exact posterior sample,
from which annealing backwards gives an upper bound as well (bidirectional Monte Carlo).

Then the questions behind the number: what the guide loses to amortisation and to its family, and
whether the latents are used at all.

    python examples/log_marginal.py                        # 8 x 8 digits of scikit-learn
    python examples/log_marginal.py --data folder/of/MNIST
"""

import time

import matplotlib.pyplot as plt
import pandas as pd
import torch
from common import images, parser, ready, save
from torch import Tensor, nn

import pyro_lvm as lvm

marginal = lvm.marginal


def main() -> None:
    options = parser(__doc__, epochs=200)
    options.set_defaults(images=100)
    options.add_argument("--temperatures", type=int, default=500, help="of annealing")
    args = ready(options.parse_args())
    start = time.perf_counter()
    data = images(args.data)
    train, valid, test = once(data.train), data.validation, data.test
    vae = build(train.shape[1])
    watch = lvm.training.CollapseMetrics(valid[:200], every=max(1, args.epochs // 20))
    fit = lvm.fit(
        vae.model,
        vae.guide,
        train,
        epochs=args.epochs,
        validation=valid,
        patience=None,
        callbacks=[watch],
        device=args.device,
        seed=args.seed,
    )
    print(f"{fit}\n")
    x = test[: args.images].to(args.device)
    vae.to(args.device)
    print(f"{estimates(vae, x, args.samples, args.temperatures).round(2).to_string()}\n")
    bound = marginal.bidirectional(
        vae.model, vae.guide, x[:20], num_samples=8, temperatures=args.temperatures
    )
    print(f"{bound}\n")
    print(f"{lvm.diagnostics.inference_gaps(vae.model, vae.guide, x)}\n")
    report = lvm.diagnostics.collapse_report(vae.model, vae.guide, test.to(args.device))
    print(report)
    print(f"\n{time.perf_counter() - start:.0f} s")
    save(draw(bound, report), args, "log_marginal")


def once(x: Tensor) -> Tensor:
    """Binary images for all of training: what a guide makes of images that it has seen is asked."""
    return lvm.datasets.binarize(x, generator=torch.Generator().manual_seed(1))


def build(num_pixels: int) -> lvm.VAE:
    """The networks of Burda et al. (2016), smaller for small images."""
    hidden, latents = ([200, 200], 50) if num_pixels > 100 else ([100, 100], 10)
    encoder = lvm.nn.MLP(num_pixels, hidden, activation=nn.Tanh, head=lvm.nn.NormalHead(latents))
    decoder = lvm.nn.MLP(latents, hidden, activation=nn.Tanh, head=lvm.nn.BernoulliHead(num_pixels))
    return lvm.VAE(encoder, decoder)


def estimates(vae: lvm.VAE, x: Tensor, num_samples: int, temperatures: int) -> pd.DataFrame:
    """The mean of log p(x) by every estimator, nats per image."""
    pair = (vae.model, vae.guide)
    wide = marginal.widened(vae.guide, scales=(1.0, 1.5))
    better = marginal.refined(*pair, x)
    scores = {
        "naive, 10,000": marginal.naive_monte_carlo(vae.model, x, num_samples=10_000),
        "guide, 1": marginal.importance_sampling(*pair, x, num_samples=1),
        "guide, 100": marginal.importance_sampling(*pair, x, num_samples=100),
        f"guide, {num_samples:,}": marginal.importance_sampling(*pair, x, num_samples=num_samples),
        f"guide widened, {num_samples:,}": marginal.importance_sampling(
            vae.model, wide, x, num_samples=num_samples
        ),
        f"guide refined, {num_samples:,}": marginal.importance_sampling(
            vae.model, better, x, num_samples=num_samples
        ),
        "annealed, 16 chains": marginal.annealed_importance_sampling(
            *pair, x, temperatures=temperatures
        ),
    }
    rows = {
        name: {
            "log p(x)": score.mean,
            "sampling error": score.sampling_std_error,
            "error with the data's": score.mean_std_error,
            "median ESS": float(score.ess.median()),
            "k > 0.7": score.num_unreliable,
        }
        for name, score in scores.items()
    }
    return pd.DataFrame(rows).T


def draw(bound: marginal.BidirectionalBound, report: lvm.diagnostics.CollapseReport) -> plt.Figure:
    """The two bounds, and the latents."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    lvm.plots.plot_bidirectional(bound, ax=left)
    lvm.plots.plot_collapse(report, ax=right)
    return figure


if __name__ == "__main__":
    main()
