"""Draws of Markov chain Monte Carlo in the place of a guide's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import MCMC, config_enumerate
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvm.inference_data.containers import Arrays
from pyro_lvm.pair import PairStructure, Program

__all__ = ["Chains", "are_chains", "latents_of", "read_chains", "summing_out"]


@dataclass(frozen=True)
class Chains:
    """What Markov chains have drawn.

    Attributes:
        values: Site -> ``C S x (plates) x event``, the ``S`` draws of each of ``C`` chains.
        num_chains: ``C``.
        num_draws: ``S``.
        statistics: ArviZ's ``diverging`` and, where the kernel has it, ``acceptance_rate``, the
            mean over each chain.
    """

    values: dict[str, Tensor]
    num_chains: int
    num_draws: int
    statistics: Arrays

    def check(self, structure: PairStructure) -> None:
        """Refuse draws of another model.

        Raises:
            ValueError: If the latents differ, or the model subsamples its data.
        """
        latents = {*structure.local_latents, *structure.global_latents}
        if latents != set(self.values):
            raise ValueError(
                f"Expected draws of the model's latents {sorted(latents)}; got those of "
                f"{sorted(self.values)}. Pass the model that the chains have run."
            )
        if structure.subsampled:
            raise ValueError(
                f"Expected a model that sees all data; got one that subsamples plate "
                f"'{structure.plate}'. Remove subsample_size."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What `PosteriorDraws` takes to have these draws and no others."""
        return {
            "num_draws": self.num_draws,
            "num_chains": self.num_chains,
            "outermost": _AtDraws(self.values),
        }


def are_chains(guide: Any) -> bool:
    """Whether the draws come from Markov chains, and not from a guide."""
    return isinstance(guide, AbstractMCMC | list | tuple)


def read_chains(mcmc: MCMC | Sequence[MCMC]) -> Chains:
    """The draws of one MCMC object, or of several with the same sites and as many draws.

    Raises:
        TypeError: If they are of another kind.
        ValueError: If they have not been run, or do not fit each other.
    """
    runs = list(mcmc) if isinstance(mcmc, Sequence) else [mcmc]
    parts = [_samples_of(run) for run in runs]
    shapes = [{name: tuple(value.shape[1:]) for name, value in part.items()} for part in parts]
    if not runs or any(other != shapes[0] for other in shapes):
        raise ValueError(
            f"Expected runs of one model with as many draws each; got {shapes}. Run all chains "
            f"with one num_samples."
        )
    values = {n: torch.cat([part[n] for part in parts]) for n in parts[0]}  # C x S x ...
    num_draws = runs[0].num_samples
    return Chains(
        values={n: v.flatten(0, 1) for n, v in values.items()},
        num_chains=sum(run.num_chains for run in runs),
        num_draws=num_draws,
        statistics=_statistics([d for run in runs for d in _diagnostics(run)], num_draws),
    )


def summing_out(model: Program) -> Program:
    """The model with its discrete latents summed out, as Pyro's kernels have it."""
    return config_enumerate(model)


def latents_of(model: Program) -> Program:
    """The latents of a model that Markov chains draw, as a program of their own."""
    return poutine.block(model, hide_fn=_is_not_drawn)


def _is_not_drawn(site: Any) -> bool:
    if site["type"] != "sample":
        return False
    return bool(site["is_observed"] or getattr(site["fn"], "has_enumerate_support", False))


def _samples_of(run: Any) -> dict[str, Tensor]:
    if not isinstance(run, MCMC):
        raise TypeError(
            f"Expected a pyro.infer.MCMC, which keeps its draws, or several; got "
            f"{type(run).__name__}."
        )
    samples = run.get_samples(group_by_chain=True)
    if not samples:
        raise ValueError("Expected an MCMC with draws; got one that was not run. Call run(...).")
    return samples


def _diagnostics(run: MCMC) -> list[dict[str, Any]]:
    """Those of each chain's kernel."""
    found = run.diagnostics()
    kernels = ("divergences", "acceptance rate")
    return [
        {key: found[key][f"chain {c}"] for key in kernels if key in found}
        for c in range(run.num_chains)
    ]


def _statistics(chains: list[dict[str, Any]], num_draws: int) -> Arrays:
    arrays: Arrays = {}
    if all("divergences" in chain for chain in chains):
        diverging = np.zeros((len(chains), num_draws), dtype=bool)
        for row, chain in zip(diverging, chains, strict=True):
            row[chain["divergences"]] = True
        arrays["diverging"] = (("chain", "draw"), diverging)
    if all("acceptance rate" in chain for chain in chains):
        rates = np.array([float(chain["acceptance rate"]) for chain in chains])
        arrays["acceptance_rate"] = (("chain",), rates)
    return arrays


class _AtDraws(Messenger):
    """Lets a program, vectorised over draws, have these values at its latents."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.values or msg["is_observed"]:
            return
        value = self.values[msg["name"]]
        shape = msg["fn"].batch_shape + msg["fn"].event_shape  # K x 1 ... x (plates) x event
        value = value.reshape(len(value), *[1] * (len(shape) - value.dim()), *value.shape[1:])
        if value.shape != shape:
            raise ValueError(
                f"Expected draws of '{msg['name']}' of shape {tuple(shape[1:])} each; got "
                f"{tuple(value.shape[1:])}. Pass the arguments that the chains have been run on."
            )
        msg["value"], msg["done"] = value, True
