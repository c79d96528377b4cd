"""The temperatures of an annealed path, from its start at 0 to the posterior at 1."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.checks import check_count, check_positive

__all__ = [
    "AdaptiveTemperatures",
    "LinearTemperatures",
    "SigmoidTemperatures",
    "Temperatures",
    "schedule_of",
]


class Temperatures(ABC):
    """A rule for the next temperature, 0 = beta_0 < beta_1 < ... < beta_T = 1.

    Attributes:
        num_steps: T, or a guess if it is to be found.
        num_chains: Chains that the pilot run needs at least to follow the rule.
    """

    num_steps: int = 200
    num_chains: int = 1

    @abstractmethod
    def after(self, beta: Tensor, log_ratio: Tensor, log_weight: Tensor, step: int) -> Tensor:
        """The temperature of each datum that follows on ``beta``.

        Args:
            beta: The temperatures now, ``N``, double.
            log_ratio: log f_1(z) / f_0(z) at the chains of the pilot run, ``K x N``, double.
            log_weight: Their log-weights so far, ``K x N``, double.
            step: How many temperatures there were before, 0 at the start of the path.

        Returns:
            ``N``, from which on 1 is the end.
        """

    def transitions(self, least: int) -> int:
        """Transitions of the pilot run at each temperature, if it is to have so many in all."""
        return -(-least // self.num_steps)


class _Fixed(Temperatures):
    """Temperatures that are known beforehand, the same for all data."""

    @abstractmethod
    def table(self) -> Tensor:
        """The temperatures, ``T + 1``, double."""

    def after(self, beta: Tensor, log_ratio: Tensor, log_weight: Tensor, step: int) -> Tensor:
        return self.table()[step + 1].to(beta).expand_as(beta)


@dataclass(frozen=True)
class LinearTemperatures(_Fixed):
    """Temperatures in equal steps, beta_t = t / T.

    Attributes:
        num_steps: T.
    """

    num_steps: int = 1000

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)

    def table(self) -> Tensor:
        """The temperatures, ``T + 1``, double."""
        return torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class SigmoidTemperatures(_Fixed):
    """Temperatures in small steps at both ends, where the path changes fastest.

        b_t = sigmoid(sharpness (2 t / T - 1)),    beta_t = (b_t - b_0) / (b_T - b_0)

    Attributes:
        num_steps: T.
        sharpness: How much smaller the steps at the ends are.

    Reference:
        Wu, Burda, Salakhutdinov, Grosse (2017), On the quantitative analysis of decoder-based
        models (with a sharpness of 4).
    """

    num_steps: int = 1000
    sharpness: float = 4.0

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        check_positive("sharpness", self.sharpness)

    def table(self) -> Tensor:
        """The temperatures, ``T + 1``, double."""
        ends = torch.linspace(-1, 1, self.num_steps + 1, dtype=torch.float64)
        b = torch.sigmoid(self.sharpness * ends)
        return (b - b[0]) / (b[-1] - b[0])


@dataclass(frozen=True)
class AdaptiveTemperatures(Temperatures):
    """Temperatures so far apart that the conditional effective sample size stays as stated.

        CESS(beta, beta') = K (sum_k W_k v_k)^2 / sum_k W_k v_k^2,
        v_k = (f_1(z_k) / f_0(z_k))^(beta' - beta)

    with the normalised weights W of the pilot run's chains. Each datum has its own temperatures,
    found by the pilot run and fixed before a chain is measured; a datum that is at 1 before others
    waits there. The number of steps grows about with the square root of the dimension.

    Attributes:
        conditional_ess: CESS / K, between 0 and 1; the nearer to 1 the more temperatures.
        num_chains: Chains of the pilot run.
        most: The largest number of temperatures.

    Reference:
        Zhou, Johansen, Aston (2016), Toward automatic model comparison: an adaptive sequential
        Monte Carlo approach.
    """

    conditional_ess: float = 0.99
    num_chains: int = 32
    most: int = 10_000

    def __post_init__(self) -> None:
        if not 0 < self.conditional_ess < 1:
            raise ValueError(
                f"Expected conditional_ess between 0 and 1; got {self.conditional_ess}."
            )
        check_count("num_chains", self.num_chains)
        if self.num_chains < 2:
            raise ValueError("Expected num_chains >= 2, whose weights can differ; got 1.")
        check_count("most", self.most)

    def after(self, beta: Tensor, log_ratio: Tensor, log_weight: Tensor, step: int) -> Tensor:
        """The temperature of each datum that follows, see `Temperatures`."""
        if step >= self.most:
            raise ValueError(
                f"Expected at most {self.most} temperatures; got more, at the last {beta.min():.3g}"
                f" for a datum. Lower conditional_ess, start from a better guide, or raise most."
            )
        wanted = torch.tensor(self.conditional_ess, dtype=torch.float64).log()
        low, high = torch.zeros_like(beta), 1 - beta
        at_end = _log_conditional_ess(log_weight, log_ratio, high) >= wanted
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = _log_conditional_ess(log_weight, log_ratio, middle) >= wanted
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return torch.where(at_end, 1.0, (beta + high).clamp(max=1.0))

    def transitions(self, least: int) -> int:
        """Transitions of the pilot run at each temperature."""
        return 4  # the number of temperatures is not known, and steps have to keep up with them


_HALVINGS = 50  # of an interval within [0, 1], in double precision


def _log_conditional_ess(log_weight: Tensor, log_ratio: Tensor, step: Tensor) -> Tensor:
    """The logarithm of CESS / K after a step, ``N``; it falls with the step."""
    weight = log_weight.log_softmax(0)
    moved = weight + step * log_ratio
    return 2 * moved.logsumexp(0) - (moved + step * log_ratio).logsumexp(0)


def schedule_of(temperatures: int | Temperatures) -> Temperatures:
    """The rule that an argument stands for.

    Raises:
        ValueError: If it is neither a positive integer nor a rule.
    """
    if isinstance(temperatures, Temperatures):
        return temperatures
    if isinstance(temperatures, bool) or not isinstance(temperatures, int):
        raise ValueError(
            f"Expected temperatures to be a number of steps, or LinearTemperatures, "
            f"SigmoidTemperatures or AdaptiveTemperatures; got {temperatures!r}."
        )
    check_count("temperatures", temperatures)
    return SigmoidTemperatures(temperatures)
