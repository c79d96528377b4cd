"""The record that every estimator of log p(x) returns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pyro_lvm.terms import Terms

__all__ = ["BaseMeasure", "LogMarginal", "Observations"]

_FEW = 10

BaseMeasure = Literal["continuous", "discrete", "mixed"]


@dataclass(frozen=True)
class Observations:
    """What a score is about, so that scores of different data are not ranked.

    Attributes:
        checksum: ``N``, a weighted sum of each datum's values; the weights are the same for all
            models, so two models agree on it, within rounding, if they saw the same data.
        values_per_datum: How many numbers a datum has.
        base_measure: Whether densities are per unit of volume, probabilities, or products of both.
    """

    checksum: Tensor
    values_per_datum: int
    base_measure: BaseMeasure

    @classmethod
    def of(cls, terms: Terms) -> "Observations":
        """The observations that some terms were computed for."""
        kinds = set(terms.discrete.values())
        measure: BaseMeasure = "mixed"
        if len(kinds) == 1:
            measure = "discrete" if kinds.pop() else "continuous"
        found = cls.of_values(terms.observed, terms.num_data, measure)
        missing = cls.of_values({n: ~m for n, m in terms.masks.items()}, terms.num_data, measure)
        # what is missing is 0 there, and is told from an observed 0
        return replace(found, checksum=found.checksum + math.pi * missing.checksum)

    @classmethod
    def of_values(
        cls, observed: Mapping[str, Tensor], num_data: int, base_measure: BaseMeasure
    ) -> "Observations":
        """The observations with these values, site -> ``N x ...``."""
        checksum, size = torch.zeros(num_data, dtype=torch.float64), 0
        for value in observed.values():  # a sum: models may have their sites in any order
            flat = value.reshape(num_data, -1).cpu().double()
            checksum = checksum + flat @ torch.cos(torch.arange(flat.shape[1]).double())
            size += flat.shape[1]
        return cls(checksum, size, base_measure)

    def together(self) -> "Observations":
        """The same observations as those of one datum."""
        position = torch.arange(1.0, 1 + len(self.checksum), dtype=torch.float64)
        total = (self.checksum * torch.cos(position)).sum().reshape(1)
        return replace(
            self, checksum=total, values_per_datum=self.values_per_datum * len(self.checksum)
        )

    @classmethod
    def joined(cls, parts: Sequence["Observations"]) -> "Observations":
        """The observations of several minibatches, in their order."""
        return replace(parts[0], checksum=torch.cat([part.checksum for part in parts]))

    def same_data(self, other: "Observations") -> bool:
        """Whether both are about the same data, up to single precision."""
        return (
            self.values_per_datum == other.values_per_datum
            and self.checksum.shape == other.checksum.shape
            and torch.allclose(self.checksum, other.checksum, rtol=1e-4, atol=1e-4)
        )


@dataclass(frozen=True)
class LogMarginal:
    """An estimate of log p(x_i) for each of ``N`` data, in nats, given the fitted parameters.

    Attributes:
        log_prob: ``N``.
        std_error: ``N``, standard errors of ``log_prob`` from sampling, by the delta method; 0 for
            an exact value, nan for a single sample.
        ess: ``N``, effective number of samples, (sum w)^2 / sum w^2.
        pareto_k: ``N``, shape of the tail of the weights (Vehtari et al. 2024). Above 0.7 neither
            the estimate nor its error is to be trusted; -inf for weights that do not vary, nan for
            too few samples to tell.
        method: How it was computed.
        num_samples: ``K``; 0 for an exact value.
        observations: What the score is about.
        advice: What to do where the estimate is not to be trusted, a sentence.
        assumption: What the number rests on beside the model, if it does; printed with it.
    """

    log_prob: Tensor
    std_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    method: str
    num_samples: int
    observations: Observations
    advice: str = "Take more samples."
    assumption: str | None = None

    @classmethod
    def joined(cls, parts: Sequence["LogMarginal"]) -> "LogMarginal":
        """One estimate of those of several minibatches, in their order."""
        return replace(
            parts[0],
            log_prob=torch.cat([part.log_prob for part in parts]),
            std_error=torch.cat([part.std_error for part in parts]),
            ess=torch.cat([part.ess for part in parts]),
            pareto_k=torch.cat([part.pareto_k for part in parts]),
            observations=Observations.joined([part.observations for part in parts]),
        )

    @property
    def mean(self) -> float:
        """Mean log p(x) per datum, nats."""
        return float(self.log_prob.mean())

    @property
    def mean_std_error(self) -> float:
        """Standard error of `mean` as an estimate of the population's: data and sampling.

        The spread of ``log_prob`` over the data contains the sampling error already.
        """
        if len(self.log_prob) < 2:
            return math.nan
        return float(self.log_prob.std() / math.sqrt(len(self.log_prob)))

    @property
    def sampling_std_error(self) -> float:
        """The part of the error of `mean` that more samples would remove."""
        return float(self.std_error.square().sum().sqrt() / len(self.std_error))

    @property
    def num_unreliable(self) -> int:
        """Data whose Pareto k is above 0.7."""
        return int((self.pareto_k > 0.7).sum())

    def __str__(self) -> str:
        size = len(self.log_prob)
        error = self.mean_std_error if size > 1 else self.sampling_std_error
        over = f"per datum over {size} data" if size > 1 else "of one datum"
        value = f"log p(x) = {self.mean:.3f} +- {error:.3f} nats {over}"
        given = "" if self.assumption is None else f"\n  assuming {self.assumption}"
        if self.num_samples == 0:
            return f"{value} ({self.method}){given}"
        lines = [
            f"{value} ({self.method}, {self.num_samples} samples; sampling error "
            f"{self.sampling_std_error:.3f}){given}",
            f"  ESS median {self.ess.median():.0f}, least {self.ess.min():.1f}; "
            f"Pareto k > 0.7 at {self.num_unreliable} of {len(self.log_prob)} data",
        ]
        return "\n".join([*lines, *(f"  warning: {w}" for w in self.warnings())])

    __repr__ = __str__

    def warnings(self) -> list[str]:
        """Reasons not to trust the estimate, each with what to do about it."""
        found = []
        size = len(self.log_prob)
        few = int((self.ess < _FEW).sum()) if self.num_samples > 1 else 0
        if self.num_unreliable:
            found.append(
                f"Pareto k above 0.7 at {self.num_unreliable} of {size} data: rare samples carry "
                f"most of the weight there, so that log p(x) is likely too low and its error bar "
                f"too short."
            )
        if few:
            found.append(f"fewer than {_FEW} effective samples at {few} of {size} data.")
        return [*found[:-1], f"{found[-1]} {self.advice}"] if found else []
