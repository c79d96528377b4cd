"""The terms of a pair, as a record."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Terms"]


@dataclass(frozen=True)
class Terms:
    """The log-probabilities of a pair, per particle and datum, in nats.

    Attributes:
        log_likelihood: ``K x N``, log p(x_i | z_i, g), over all observed sites of a datum.
        log_prior: Site -> ``K x N``, one entry per local latent of the guide.
        log_guide: Site -> ``K x N``, one entry per local site of the guide, auxiliary ones too.
        log_weight: ``K x N``, log p(x_i, z_i | g) / q(z_i | x_i, g), enumerated sites summed out.
        kl: Site -> ``K x N``, log q - log p of each local site of the guide, or the closed form of
            its expectation if that was asked for and is known.
        global_log_prior: ``K``, all sites of the model outside the plate.
        global_log_guide: ``K``, all sites of the guide outside the plate.
        global_kl: ``K``, ``global_log_guide - global_log_prior``, or closed forms likewise.
        samples: Site -> ``K x N x (nested plates) x event``; local latents without enumeration.
        global_samples: Site -> ``K x (plates) x event``.
        observed: Site -> ``N x (nested plates) x event``, the observations in the plate; 0 where
            they are missing.
        masks: Site -> likewise, True where an entry is observed; sites without a mask are left out.
        discrete: Site -> whether the observations have a density against the counting measure.
        plate_scale: Data in all / data in this run, never multiplied into the terms.
        has_globals: Whether there are sites outside the plate.
    """

    log_likelihood: Tensor
    log_prior: dict[str, Tensor]
    log_guide: dict[str, Tensor]
    log_weight: Tensor
    kl: dict[str, Tensor]
    global_log_prior: Tensor
    global_log_guide: Tensor
    global_kl: Tensor
    samples: dict[str, Tensor]
    global_samples: dict[str, Tensor]
    observed: dict[str, Tensor]
    masks: dict[str, Tensor]
    discrete: dict[str, bool]
    plate_scale: float
    has_globals: bool

    @property
    def num_particles(self) -> int:
        """``K``."""
        return self.log_likelihood.shape[0]

    @property
    def num_data(self) -> int:
        """``N``, the data of this run."""
        return self.log_likelihood.shape[1]

    @property
    def size(self) -> float:
        """The number of all data: ``plate_scale * N``."""
        return self.plate_scale * self.num_data
