"""One table of all models, under one protocol.

Every model of the other examples is fitted by what its own file says, and asked the same questions
on the same held-out images:

* log p(x), nats per image, with the standard error over images and sampling: exact where there is
  a closed form, by importance sampling with K draws from the guide otherwise; of stories without a
  density by a kernel density around K draws (Parzen). What a number assumes stands beside it.
* How many latent dimensions vary with the image, and the information I(x; z) in nats (a lower
  bound).
* Draws per second.
* For models that are told the class: how many draws a classifier of real digits takes for it.

Binary images have probabilities and grey ones (bytes made continuous, u ~ U[0, 1), (byte + u)/256)
have densities. The two kinds of numbers can't be compared, and are not: there are two tables. Nor
does log p(x | y), of models that are told the class y, compare with log p(x) but as an upper limit
to what the class can say.

    python examples/mnist_table.py                          # 8 x 8 digits, some ten minutes
    python examples/mnist_table.py --data folder/of/MNIST   # some hours on two cores

Rows are kept in the folder of --out as soon as they are there, so that a run that was ended goes
on, and rows can be made one by one (--rows vae gan).
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conditional_gan
import conditional_vae
import density_baselines
import gan
import matplotlib.pyplot as plt
import mixture_vae
import pandas as pd
import pixelcnn
import semi_supervised
import torch
import vae
from common import grey_images, images, parser, ready, save
from digit_classifier import CLASSES, agreement, train_classifier
from pyro.poutine import infer_config
from torch import Tensor, nn

import pyro_lvm as lvm

DRAWS = 1000  # to time, and to look at
Data = Any  # what an example loads


def main() -> None:
    options = parser(__doc__, epochs=0)
    names = [row.name for row in ROWS]
    options.add_argument(
        "--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names)
    )
    args = ready(options.parse_args())
    folder = args.out / "mnist_table"
    folder.mkdir(exist_ok=True)
    data = Loaded(args)
    chosen = [row for row in ROWS if row.name in args.rows]
    for row in chosen:
        if not (folder / f"{row.name}.json").exists():
            write(folder / f"{row.name}.json", made(row, data, args))
    for kind in ("binary", "grey"):
        found = {r.name: read(folder / f"{r.name}.json") for r in chosen if r.kind == kind}
        if found:
            print(f"\n{kind} images: log p in nats per image\n{table(found)}")
    every = {row.name: read(folder / f"{row.name}.json")["draws"] for row in chosen}
    save(draw(every, data.grey.image_shape), args, "mnist_table")


# the rows


@dataclass(frozen=True)
class Row:
    """How a row of the table is made.

    Attributes:
        name: Of the row.
        kind: "binary" or "grey", what the images are that are scored.
        data: From all that is loaded to what the example trains on.
        fit: From data and options to a fitted model.
        score: From the model, the arguments of its pair, and options to log p of each image.
        epochs: Of training on MNIST, and on the 8 x 8 digits.
        told_class: Whether model and draws are given the label.
        images: The most images that are scored, where one of them takes long.
        samples: The most draws for one of them.
    """

    name: str
    kind: str
    data: Callable[["Loaded"], Data]
    fit: Callable[[Data, argparse.Namespace], Any]
    score: Callable[..., lvm.LogMarginal]
    epochs: tuple[int, int] = (1, 1)
    told_class: bool = False
    images: int = 10_000
    samples: int = 1_000_000


def of(example: Any, *what: Any, **how: Any) -> Callable[[Data, argparse.Namespace], Any]:
    """What an example builds and trains."""

    def fit(data: Data, args: argparse.Namespace) -> Any:
        model = example.build(data, *what)
        example.train(model, data, args, **{name: make() for name, make in how.items()})
        return model

    return fit


def pixelcnn_alone(data: Data, args: argparse.Namespace) -> Any:
    """The autoregressive density."""
    model = pixelcnn.build_density(data)
    pixelcnn.train(model, data, args)
    return model


def baseline(name: str) -> Callable[[Data, argparse.Namespace], Any]:
    """What is fitted in closed form, or by expectation-maximisation."""
    return lambda data, args: density_baselines.baselines(data, args)[name]


def by_moments(data: Data, args: argparse.Namespace) -> Any:
    """The GAN's generator, by a kernel."""
    model = gan.build(data)
    gan.train_by_moments(model, data, args)
    return model


def by_guide(model: Any, batch: tuple[Tensor, ...], args: argparse.Namespace) -> lvm.LogMarginal:
    """Importance sampling, a hundred images at a time."""
    return lvm.marginal.importance_sampling(
        model.model, model.guide, *batch, num_samples=args.samples, batch_size=100
    )


def by_drawn_class(
    model: Any, batch: tuple[Tensor, ...], args: argparse.Namespace
) -> lvm.LogMarginal:
    """The same, the class drawn by the guide as well, and not summed out."""
    drawn = infer_config(model.guide, lambda site: {"enumerate": None})
    return lvm.marginal.importance_sampling(
        model.model, drawn, *batch, num_samples=args.samples, batch_size=100
    )


def exactly(model: Any, batch: tuple[Tensor, ...], args: argparse.Namespace) -> lvm.LogMarginal:
    """No sampling at all."""
    return lvm.marginal.exact(model.model, model.guide, *batch)


def by_wide_guide(
    model: Any, batch: tuple[Tensor, ...], args: argparse.Namespace
) -> lvm.LogMarginal:
    """As pixelcnn.py does it."""
    return pixelcnn.estimate(model, *batch, args.samples)


def by_refined_guide(
    model: Any, batch: tuple[Tensor, ...], args: argparse.Namespace
) -> lvm.LogMarginal:
    """As density_baselines.py does it: guides of grey images have to be refined."""
    return density_baselines.score(model, *batch, args)


def by_kernels(model: Any, batch: tuple[Tensor, ...], args: argparse.Namespace) -> lvm.LogMarginal:
    """A kernel density around draws, its width chosen on the validation images."""
    return lvm.marginal.kernel_density(
        model.model,
        *batch,
        validation=density_baselines.levels(args.data).validation[:1000].to(args.device),
        num_samples=10 * DRAWS if args.samples > DRAWS else args.samples,
    )


infovae = {"elbo": lambda: lvm.TraceInfo_ELBO(alpha=0.5, lambda_=100.0, divergence=lvm.MMD())}
few = {"images": 100, "samples": 200}
binary = functools.partial(Row, kind="binary", data=lambda loaded: loaded.binary)
levels = functools.partial(Row, kind="grey", data=lambda loaded: loaded.levels)
grey = functools.partial(Row, kind="grey", data=lambda loaded: loaded.grey)
ROWS = [
    binary("vae", fit=of(vae), score=by_guide, epochs=(100, 100)),
    binary("infovae", fit=of(vae, **infovae), score=by_guide, epochs=(100, 100)),
    binary("mixture_prior", fit=of(mixture_vae, "mixture"), score=by_guide, epochs=(50, 100)),
    binary("vamp_prior", fit=of(mixture_vae, "vamp"), score=by_guide, epochs=(50, 100)),
    binary("flow_prior", fit=of(mixture_vae, "flow"), score=by_guide, epochs=(50, 100)),
    binary("two_layers", fit=of(mixture_vae, "layers"), score=by_guide, epochs=(50, 100)),
    binary("pixelcnn", fit=pixelcnn_alone, score=exactly, epochs=(3, 60)),
    binary("pixelcnn_vae", fit=of(pixelcnn), score=by_wide_guide, epochs=(3, 60), **few),
    binary("pixelcnn_infovae", fit=of(pixelcnn, elbo=pixelcnn.OBJECTIVES["InfoVAE"]),
           score=by_wide_guide, epochs=(3, 60), **few),
    binary("semi_supervised", fit=of(semi_supervised), score=by_drawn_class, epochs=(30, 100)),
    binary("conditional_vae", fit=of(conditional_vae), score=by_guide, epochs=(100, 100),
           told_class=True),
    levels("gaussian", fit=baseline("Gaussian, full"), score=exactly),
    levels("kernel_density", fit=baseline("kernel density"), score=exactly),
    levels("mixture", fit=baseline("Gaussian mixture"), score=exactly, epochs=(20, 20)),
    levels("grey_vae", fit=of(density_baselines), score=by_refined_guide, epochs=(50, 100)),
    grey("gan", fit=of(gan), score=by_kernels, epochs=(30, 100)),
    grey("gmmn", fit=by_moments, score=by_kernels, epochs=(30, 100)),
    grey("conditional_gan", fit=of(conditional_gan), score=by_kernels, epochs=(30, 100),
         told_class=True),
]  # fmt: skip


# one row


class Loaded:
    """The images, in all the forms that examples train on, and a classifier of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.grey, self.binary = grey_images(args.data), images(args.data)
        self.levels = density_baselines.levels(args.data)
        self.args = args

    def scored(self, row: Row) -> Tensor:
        """Held-out images of one kind, the same for all models."""
        return self.binary.test if row.kind == "binary" else self.levels.test

    @functools.cached_property
    def classifier(self) -> nn.Module:
        """A judge of draws, trained on real digits when it is first asked."""
        epochs = 1 if self.args.epochs == 1 else None
        return train_classifier(self.grey, epochs=epochs, device=self.args.device)


def made(row: Row, data: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    """Fit a model, and ask it all questions."""
    on_digits = args.data is None
    args = argparse.Namespace(**vars(args))
    args.epochs = args.epochs or row.epochs[on_digits]
    args.samples, num_images = min(args.samples, row.samples), min(args.images, row.images)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    model = row.fit(row.data(data), args).to(args.device)
    seconds = time.perf_counter() - start
    given = [data.scored(row), *([data.grey.test_labels] if row.told_class else [])]
    batch = tuple(t[:num_images].to(args.device) for t in given)
    score = row.score(model, batch, args)
    wanted = torch.arange(CLASSES, device=args.device).repeat(DRAWS // CLASSES)
    draws, rate = timed_draws(model, wanted if row.told_class else None)
    found = {
        "log p of": "x | y" if row.told_class and row.score is not by_kernels else "x",
        "log p": f"{score.mean:.2f}",
        "error": f"{score.mean_std_error:.2f}",
        "by": score.method,
        "K": score.num_samples or "",
        "images": num_images,
        "k > 0.7": score.num_unreliable,
        **latents(model, batch),
        "draws/s": f"{rate:.3g}",
        "class right": (row.told_class and f"{agreement(data.classifier, draws, wanted):.1%}")
        or "",
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
    }
    print(f"{row.name}: {found}", flush=True)
    return {
        "row": found,
        "assumption": score.assumption,
        "log_prob": score.log_prob.tolist(),
        "draws": draws[: 2 * CLASSES].cpu().tolist(),
    }


def timed_draws(model: Any, wanted: Tensor | None) -> tuple[Tensor, float]:
    """Images, of the classes that are wanted, and how many there are in a second."""
    means = {"mean": True} if isinstance(model, lvm.ConditionalVAE) else {}
    start = time.perf_counter()
    draws = model.sample(DRAWS) if wanted is None else model.sample(wanted, **means)
    return draws, len(draws) / (time.perf_counter() - start)


def latents(model: Any, batch: tuple[Tensor, ...]) -> dict[str, Any]:
    """How many latent dimensions are in use, and what they know of an image."""
    if getattr(model, "guide", None) is None or isinstance(model, NO_LATENTS):
        return {"active units": "", "I(x; z)": ""}
    few = tuple(t[:500] for t in batch)
    report = lvm.diagnostics.collapse_report(model.model, model.guide, *few)
    return {
        "active units": f"{report.num_active} of {report.num_units}",
        "I(x; z)": f"{report.information.lower.value:.2f}",
    }


NO_LATENTS = (
    lvm.GaussianMixture,
    lvm.models.Density,
    lvm.models.Gaussian,
    lvm.models.KernelDensity,
)


# what is kept, the table, and the picture


def write(path: Path, found: dict[str, Any]) -> None:
    """A row, whole or not at all."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A row that was written."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(found: dict[str, dict[str, Any]]) -> str:
    """The rows, with the differences to the first one image by image, and what they assume."""
    first = torch.tensor(next(iter(found.values()))["log_prob"])
    rows = {}
    for name, each in found.items():
        own = torch.tensor(each["log_prob"])
        apart = own - first[: len(own)]
        error = apart.std() / len(own) ** 0.5
        rows[name] = {**each["row"], "to the first": f"{apart.mean():.2f} +- {error:.2f}"}
    lines = [pd.DataFrame(rows).T.to_string(na_rep="")]
    lines += [f"{name}: {f['assumption']}" for name, f in found.items() if f["assumption"]]
    return "\n".join(lines)


def draw(draws: dict[str, list], image_shape: tuple[int, int]) -> plt.Figure:
    """Draws of every model, the classes in order where they are told."""
    figure, axes = plt.subplots(
        len(draws), 1, figsize=(10, 0.55 * len(draws) + 0.5), layout="constrained", squeeze=False
    )
    for ax, (name, x) in zip(axes.flat, draws.items(), strict=True):
        lvm.plots.plot_images(torch.tensor(x), image_shape=image_shape, columns=len(x), ax=ax)
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


if __name__ == "__main__":
    main()
