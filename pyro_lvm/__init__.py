"""Latent variable models on Pyro, for any (model, guide) pair.

Write a generative story as a Pyro program, pair it with a guide, pick an objective, fit it, measure
log p(x) with an error bar, and compare posteriors in ArviZ.
"""

from pyro_lvm import (
    datasets,
    diagnostics,
    distributions,
    divergences,
    infer,
    marginal,
    models,
    nn,
    plots,
)
from pyro_lvm.compiled import CompiledStep, compile
from pyro_lvm.configured import Configured
from pyro_lvm.divergences import MMD, Adversarial, AuxiliaryClassifier, SlicedWasserstein, Stein
from pyro_lvm.infer import (
    CyclicSchedule,
    ImplicitDivergence,
    LinearSchedule,
    SigmoidSchedule,
    TraceInfo_ELBO,
    TraceIW_ELBO,
)
from pyro_lvm.inference_data import compare, summarize, to_arviz
from pyro_lvm.marginal import LogMarginal
from pyro_lvm.models import (
    GAN,
    VAE,
    ConditionalGAN,
    ConditionalVAE,
    Density,
    Gaussian,
    GaussianMixture,
    HierarchicalVAE,
    KernelDensity,
    MixtureVAE,
    PixelCNNVAE,
    SemiSupervisedVAE,
)
from pyro_lvm.pair import masked, plate_size
from pyro_lvm.storage import load, save
from pyro_lvm.terms import Terms, compute_terms
from pyro_lvm.training import Fit, fit

__version__ = "0.1.0.dev0"

__all__ = [
    "GAN",
    "MMD",
    "VAE",
    "Adversarial",
    "AuxiliaryClassifier",
    "CompiledStep",
    "ConditionalGAN",
    "ConditionalVAE",
    "Configured",
    "CyclicSchedule",
    "Density",
    "Fit",
    "Gaussian",
    "GaussianMixture",
    "HierarchicalVAE",
    "ImplicitDivergence",
    "KernelDensity",
    "LinearSchedule",
    "LogMarginal",
    "MixtureVAE",
    "PixelCNNVAE",
    "SemiSupervisedVAE",
    "SigmoidSchedule",
    "SlicedWasserstein",
    "Stein",
    "Terms",
    "TraceIW_ELBO",
    "TraceInfo_ELBO",
    "compare",
    "compile",
    "compute_terms",
    "datasets",
    "diagnostics",
    "distributions",
    "divergences",
    "fit",
    "infer",
    "load",
    "marginal",
    "masked",
    "models",
    "nn",
    "plate_size",
    "plots",
    "save",
    "summarize",
    "to_arviz",
]
