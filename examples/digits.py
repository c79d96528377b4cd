"""Handwritten digits: from real data to compared posteriors.

Fits a Gaussian mixture, a VAE under the ELBO and the same VAE under InfoVAE to scikit-learn's
digits, scores held-out images, and compares the models in ArviZ. Then it does the two VAEs again on
200 images, where the ELBO's aggregate posterior drifts away from the prior and generation suffers,
while reconstructions look as good as ever.

    python examples/digits.py --out out        # then open out/index.html

The images are dequantised to densities on [0, 1]^64: log p(x) is a log-density in nats, and may be
positive.
"""

import argparse
import copy
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from page import Page
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

import pyro_lvm as lvm

mpl.use("Agg")
import matplotlib.pyplot as plt

SMALL = 200  # training images of the second part
MMD = lvm.MMD()  # also the yardstick of the aggregate posterior, whatever a model was trained by


@dataclass
class Fitted:
    """A fitted model with its score on the test images."""

    pair: Any
    fit: lvm.Fit
    score: lvm.LogMarginal


def main() -> None:
    args = parse()
    start = time.perf_counter()
    torch.set_num_threads(1)  # too little work to share: threads would mostly wait for each other
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = lvm.datasets.digits(seed=args.seed)
    train, valid, test = (x.to(device) for x in (data.train, data.validation, data.test))
    few = train[:SMALL]
    args.out.mkdir(parents=True, exist_ok=True)
    counts = f"{len(train)} training, {len(valid)} validation and {len(test)} test images"
    print(f"{counts}; {device}")

    torch.manual_seed(args.seed)
    info = lvm.TraceInfo_ELBO(alpha=0.5, lambda_=50.0, divergence=MMD)
    long, longer = (3, 3) if args.short else (250, 1500)
    stop = {"validation": valid, "patience": 40}
    vae = build_vae(num_latents=8).to(device)
    small = build_vae(num_latents=5).to(device)
    runs = {
        "mixture": partial(fit_mixture, train, valid, epochs=3 if args.short else 60),
        "VAE, ELBO": partial(fit_vae, vae, train, None, epochs=long, **stop),
        "VAE, InfoVAE": partial(fit_vae, vae, train, info, epochs=long, **stop),
        f"ELBO, {SMALL}": partial(fit_vae, small, few, None, epochs=longer),
        f"InfoVAE, {SMALL}": partial(fit_vae, small, few, info, epochs=longer),
    }
    num_samples = 50 if args.short else 5000
    models = {}
    for name, run in runs.items():
        pair, fit = run(seed=args.seed)
        models[name] = Fitted(pair, fit, score(pair, test, num_samples))
        print(f"\n{name}: {fit}\n{models[name].score}")

    comparison = lvm.compare({name: m.score for name, m in models.items()})
    effect = hidden_by_the_elbo(models, few)
    print("\nHeld-out log p(x), nats per datum, with paired standard errors of the differences:")
    print(comparison.round(2).to_string())
    print(f"\nWhat the ELBO hides, {SMALL} training images:")
    print(effect.round(3).to_string())

    pictures = draw(models, comparison, train, few, test, data.image_shape)
    for name, figure in pictures.items():
        figure.savefig(args.out / f"{name}.png", dpi=110, bbox_inches="tight")
    files = save_posteriors(models, test, args.out, num_samples=10 if args.short else 50)
    seconds = time.perf_counter() - start
    write_page(args.out, counts, models, comparison, effect, pictures, files, seconds)
    print(f"\n{seconds:.0f} s; open {args.out / 'index.html'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the pictures go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few steps, to see that all runs")
    return parser.parse_args()


def build_vae(num_latents: int) -> lvm.VAE:
    """The dequantisation has a standard deviation of 0.017; no decoder should claim less."""
    encoder = lvm.nn.MLP(64, [128, 128], head=lvm.nn.NormalHead(num_latents))
    decoder = lvm.nn.MLP(num_latents, [128, 128], head=lvm.nn.NormalHead(64, floor=0.02))
    return lvm.VAE(encoder, decoder)


def fit_mixture(train: Tensor, valid: Tensor, *, epochs: int, seed: int) -> tuple[Any, lvm.Fit]:
    mixture = lvm.GaussianMixture(30, 64, "diagonal").to(train.device).initialize(train)
    fit = lvm.fit(
        mixture.model,
        mixture.guide,
        train,
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        epochs=epochs,
        validation=valid,
        patience=15,
        optimizer=partial(torch.optim.Adam, lr=5e-3),
        seed=seed,
    )
    return mixture, fit


def fit_vae(
    start: lvm.VAE,
    x: Tensor,
    elbo: lvm.TraceInfo_ELBO | None,
    *,
    epochs: int,
    seed: int,
    **stop: Any,
) -> tuple[Any, lvm.Fit]:
    """Fit a copy, so that each objective starts from the same parameters."""
    vae = copy.deepcopy(start)
    return vae, lvm.fit(vae.model, vae.guide, x, elbo=elbo, epochs=epochs, seed=seed, **stop)


def score(pair: Any, test: Tensor, num_samples: int) -> lvm.LogMarginal:
    if isinstance(pair, lvm.GaussianMixture):
        return lvm.marginal.exact(pair.model, pair.guide, test)
    # fitted guides are too narrow for images that they were not trained on
    proposal = lvm.marginal.widened(pair.guide, (1.0, 2.0, 4.0, 8.0, 16.0))
    return lvm.marginal.importance_sampling(pair.model, proposal, test, num_samples=num_samples)


def furthest_from_prior(z: Tensor) -> Tensor:
    """Draws along the two principal axes whose variance is furthest from the prior's, 1."""
    variances, axes = torch.linalg.eigh(torch.cov(z.T))
    return z @ axes[:, variances.log().abs().argsort(descending=True)[:2]]


def aggregate_posterior(vae: lvm.VAE, x: Tensor, draws: int = 20) -> Tensor:
    """Draws from q(z) = mean_i q(z | x_i), ``draws * N x D``."""
    with torch.no_grad():
        return vae.encode(x).sample((draws,)).flatten(0, 1)


def hidden_by_the_elbo(models: dict[str, Fitted], few: Tensor) -> Any:
    """The aggregate posterior against the prior, beside what the model generates."""
    import pandas as pd

    rows = {}
    for name in (f"ELBO, {SMALL}", f"InfoVAE, {SMALL}"):
        z = aggregate_posterior(models[name].pair, few)
        rows[name] = {
            "abs log det Cov[q(z)]": float(torch.logdet(torch.cov(z.T)).abs()),
            "MMD(q(z), p(z))": float(MMD(z, torch.randn_like(z))),
            "training reconstruction": models[name].fit.history["reconstruction"][-1],
            "test log p(x)": models[name].score.mean,
            "its error": models[name].score.mean_std_error,
        }
    return pd.DataFrame(rows).T


def draw(
    models: dict[str, Fitted],
    comparison: Any,
    train: Tensor,
    few: Tensor,
    test: Tensor,
    image_shape: tuple[int, ...],
) -> dict[str, Any]:
    """All pictures, by file name."""
    vaes = {name: m for name, m in models.items() if isinstance(m.pair, lvm.VAE)}
    mixture = models["mixture"].pair
    shape = {"image_shape": image_shape}

    def grid(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
        return plt.subplots(
            rows, columns, figsize=(width * columns, height * rows), layout="constrained"
        )

    pictures = {}
    pictures["comparison"], ax = grid(1, 1, 8, 3.2)
    lvm.plots.plot_comparison(comparison, ax=ax)

    pictures["reconstructions"], axes = grid(2, 2, 6, 2.2)
    for ax, (name, m) in zip(axes.flat, vaes.items(), strict=True):
        x = test[:16]
        lvm.plots.plot_reconstructions(x, m.pair.reconstruct(x), **shape, ax=ax)
        ax.set_title(f"{name}: test images")

    pictures["samples"], axes = grid(2, 3, 4, 4.2)
    lvm.plots.plot_images(train[:64], **shape, columns=8, ax=axes.flat[0])
    axes.flat[0].set_title("training images")
    samples = {"mixture": mixture.sample(64)} | {
        name: m.pair.sample(64, mean=True) for name, m in vaes.items()
    }
    for ax, (name, images) in zip(axes.flat[1:], samples.items(), strict=True):
        lvm.plots.plot_images(images, **shape, columns=8, ax=ax)
        ax.set_title(f"{name}: prior samples")

    pictures["aggregate_posterior"], axes = grid(2, 2, 4.6, 4.6)
    for ax, (name, m) in zip(axes.flat, vaes.items(), strict=True):
        z = aggregate_posterior(m.pair, few if str(SMALL) in name else train)
        lvm.plots.plot_aggregate_posterior(furthest_from_prior(z), ax=ax)
        ax.set(title=f"{name}: q(z) and the prior", xlabel="first axis", ylabel="second axis")

    pictures["mixture_means"], ax = grid(1, 1, 9, 4.2)
    values = {k: v.detach() for k, v in mixture.values().items()}
    order = values["weights"].argsort(descending=True)
    lvm.plots.plot_means(
        values["loc"][order], weights=values["weights"][order], **shape, columns=10, ax=ax
    )

    pictures["training"], axes = grid(2, 3, 5, 3.4)
    for ax, (name, m) in zip(axes.flat, models.items(), strict=False):
        lvm.plots.plot_history(m.fit.history, ax=ax)
        ax.set_title(name)
    axes.flat[-1].axis("off")
    return pictures


def save_posteriors(
    models: dict[str, Fitted], test: Tensor, out: Path, num_samples: int
) -> dict[str, str]:
    """Each posterior as NetCDF, read back by ArviZ; file name -> groups."""
    import arviz

    files = {}
    for name, m in models.items():
        idata = lvm.to_arviz(
            m.pair.model, m.pair.guide, test, num_samples=num_samples, score=m.score
        )
        path = out / f"{name.replace(', ', '_').replace(' ', '_').lower()}.nc"
        idata.to_netcdf(str(path))
        again = arviz.from_netcdf(str(path))
        groups = again.groups() if callable(again.groups) else again.groups  # ArviZ 0.x, ArviZ 1
        files[path.name] = ", ".join(g.strip("/") for g in groups if g != "/")
    return files


def write_page(
    out: Path,
    counts: str,
    models: dict[str, Fitted],
    comparison: Any,
    effect: Any,
    pictures: dict[str, Any],
    files: dict[str, str],
    seconds: float,
) -> None:
    page = Page("Handwritten digits: five models, one test set")
    page.text(
        f"scikit-learn's 8 x 8 digits, dequantised to densities on [0, 1]: {counts}. "
        f"Everything here took {seconds:.0f} seconds."
    )
    page.heading("Held-out log p(x)")
    page.text(
        "Nats per datum, with standard errors: se of each mean over the test images, dse of its "
        "difference to the best, image by image. Exact for the mixture, importance sampling from "
        "the widened guide for the others; unreliable counts the images whose Pareto k is above "
        "0.7, where the estimate is likely too low."
    )
    page.picture(pictures["comparison"])
    page.table(comparison.round(2))
    page.heading(f"What the ELBO hides: {SMALL} training images")
    page.text(
        "The ELBO rewards coding few training images far apart, so that q(z), their average "
        "posterior, leaves the prior: the log-determinant of its covariance leaves 0, and samples "
        "of the prior land where the decoder has seen nothing. InfoVAE (Zhao et al. 2017) weighs "
        "the divergence between q(z) and the prior. Training reconstruction is E_q[log p(x | z)]."
    )
    page.table(effect.round(3))
    captions = {
        "aggregate_posterior": "Aggregate posterior against the prior, along the two axes where "
        "it is furthest from it",
        "samples": "Prior samples",
        "reconstructions": "Reconstructions",
        "mixture_means": "Cluster means of the mixture",
        "training": "Training, term by term",
    }
    for name, caption in captions.items():
        page.heading(caption)
        page.picture(pictures[name])
    page.heading("Fits")
    for name, m in models.items():
        page.preformatted(f"{name}\n{m.fit}\n{m.score}")
    page.heading("Posteriors for ArviZ")
    page.preformatted("\n".join(f"{name}: {groups}" for name, groups in files.items()))
    page.write(out / "index.html")


if __name__ == "__main__":
    main()
