"""Numbers with their standard errors."""

import math
from typing import NamedTuple

from torch import Tensor

__all__ = ["Estimate"]


class Estimate(NamedTuple):
    """A number that was estimated.

    Attributes:
        value: The number.
        std_error: Its standard error, 0 for an exact value.
    """

    value: float
    std_error: float

    @classmethod
    def of_mean(cls, values: Tensor) -> "Estimate":
        """The mean over data, ``N``, for the population that they are from."""
        if len(values) < 2:
            return cls(float(values.mean()), math.nan)
        return cls(float(values.mean()), float(values.std() / math.sqrt(len(values))))

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.std_error:.3f}"

    def exceeds(self, bound: float, *, num_errors: float = 2.0) -> bool:
        """Whether it is above a bound by more than so many standard errors."""
        return self.value - num_errors * self.std_error > bound
