"""Whether a latent variable model has learned anything: a report on the latents of a pair."""

from dataclasses import dataclass
from typing import Any

import pyro
import torch

from pyro_lvm.checks import check_count, check_positive
from pyro_lvm.diagnostics.aggregate import Aggregate, compare_aggregate
from pyro_lvm.diagnostics.collapse_findings import findings_of
from pyro_lvm.diagnostics.draws import Draws, draw, draw_prior
from pyro_lvm.diagnostics.estimates import Estimate
from pyro_lvm.diagnostics.gaps import amortisation_gap
from pyro_lvm.diagnostics.held import hold
from pyro_lvm.diagnostics.information import Information, information_of
from pyro_lvm.diagnostics.latent_dimensions import LatentSummary
from pyro_lvm.diagnostics.tables import aligned
from pyro_lvm.pair import PairStructure, Program, at_rest, inspect_pair, modules_of

__all__ = ["CollapseReport", "collapse_report"]

_MOST_SHOWN = 24  # dimensions in a printed table
_GAP_SAMPLES = 100
_NOT_COMMON = (
    "The guide computes its latents from auxiliary sites in another way for each datum, so that "
    "their densities are not known: no I(x; z)."
)


@dataclass(frozen=True, eq=False)
class CollapseReport:
    """What the local latents of a pair have learned.

    Attributes:
        latents: One summary for each local latent that the guide samples.
        kl: Mean KL(q(z | x) || p(z)) of all of them together, nats per datum.
        information: I_q(x; z) and KL(q(z) || p(z)); None where a note says why.
        aggregate: Covariance and discrepancy of q(z); None without continuous latents or where a
            note says why.
        amortisation_gap: What refining the guide for each datum gains, nats per datum; None if it
            was not asked for.
        num_data: ``N``.
        num_samples: Draws of the guide for each datum.
        notes: What is left out, and why.
    """

    latents: tuple[LatentSummary, ...]
    kl: Estimate
    information: Information | None
    aggregate: Aggregate | None
    amortisation_gap: Estimate | None
    num_data: int
    num_samples: int
    notes: tuple[str, ...]

    @property
    def num_units(self) -> int:
        """Dimensions of all continuous latents."""
        return sum(each.num_dimensions for each in self.latents if each.active is not None)

    @property
    def num_active(self) -> int:
        """How many of them are active."""
        return sum(each.num_active for each in self.latents)

    @property
    def findings(self) -> list[str]:
        """What the numbers mean and what to do about it, a paragraph each."""
        return findings_of(self)

    def __str__(self) -> str:
        head = (
            f"Local latents of {self.num_data} data, {self.num_samples} draws of each: "
            f"{self.num_active} of {self.num_units} units are active"
        )
        lines = [head, "", *aligned(self._dimensions()), "", *aligned(self._numbers())]
        lines += [f"  note: {note}" for note in self.notes]
        found = self.findings
        return "\n".join([*lines, "", *(f"{i}. {each}" for i, each in enumerate(found, 1))])

    __repr__ = __str__

    def _dimensions(self) -> list[list[str]]:
        """The dimensions with the largest KL first, or in their order where it is not known."""
        table = [["dimension", "KL, nats", "Var E[z | x]", ""]]
        for each in self.latents:
            if each.kl is not None and len(self.latents) > 1 and each.num_dimensions > 1:
                table.append([f"{each.site} (all)", f"{each.kl.value:.4f}", "", ""])
            order = _order(each)
            table += [_cells(each, d) for d in order[:_MOST_SHOWN]]
            if len(order) > _MOST_SHOWN:
                table.append([f"... and {len(order) - _MOST_SHOWN} more", "", "", ""])
        return table

    def _numbers(self) -> list[list[str]]:
        rows: list[tuple[str, Any]] = [("mean KL(q(z | x) || p(z))", self.kl)]
        if self.information is not None:
            found = self.information
            rows += [
                ("I(x; z), bound from below", found.lower),
                ("I(x; z), bound from above", found.upper),
                ("KL(q(z) || p(z)), from below", found.kl_lower),
                ("KL(q(z) || p(z)), from above", found.kl_upper),
            ]
        if self.aggregate is not None:
            rows += [
                ("log det Cov[q(z)]", self.aggregate.log_det_covariance),
                ("log det Cov[p(z)]", self.aggregate.prior_log_det_covariance),
                ("MMD^2(q(z), p(z))", self.aggregate.mmd),
            ]
        if self.amortisation_gap is not None:
            rows.append(("amortisation gap", self.amortisation_gap))
        table = [["nats (MMD^2: kernel)", "value", "std error"]]
        return table + [[n, f"{e.value:.4f}", f"{e.std_error:.4f}"] for n, e in rows]


@torch.no_grad()
def collapse_report(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 32,
    num_draws: int = 1000,
    threshold: float = 0.01,
    refine_steps: int = 0,
    chunk_size: int | None = None,
    plate: str = "data",
    progress: bool = True,
    **kwargs: Any,
) -> CollapseReport:
    """Measure what the local latents of a pair know of the data.

    * A unit (a dimension of a latent) is active if Var_x(E_q[z_d | x]) is above a threshold (Burda
      et al. 2016, section 5.2). Its KL to the prior is what it costs in the ELBO.
    * The information I_q(x; z) between data and latents, and KL(q(z) || p(z)) of the aggregate
      posterior q(z) = mean_x q(z | x), which add up to the mean KL (Hoffman and Johnson 2016).
    * The covariance of q(z): log det Cov[q(z)] is 0 if it is that of a standard normal prior, and
      below where q(z) has collapsed (Zhao, Song and Ermon 2017, figure 2).
    * MMD^2(q(z), p(z)), and how large it may be by chance.
    * On request, the amortisation gap: refining takes some hundred gradients of the ELBO.

    All of it is about the sites that the guide samples in the data plate; those that it enumerates
    are drawn. Sites that the model enumerates are no latents here, since they are summed out, and
    global latents are drawn once. A user's own ``poutine.scale`` is left away (but for the
    amortisation gap): KLs are those of the distributions, without a weight. Plates inside the data
    plate are flattened into the dimensions, with a unit for each position.

    The decoder is not run but for checks and the amortisation gap. Modules that the pair belongs to
    are in evaluation mode for the while.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise.
        *args: The pair's arguments.
        num_samples: Draws for each datum, of all but the table of I(x; z); at least 2.
        num_draws: ``M``, rows of that table, which is ``M x N``, and of the samples that MMD^2
            compares; so many data are chosen at random if there are more.
        threshold: Of the variance above which a unit is active.
        refine_steps: Steps of refinement for the amortisation gap; 0 for none.
        chunk_size: Draws of all data, or rows of the table, in one vectorised run; what suits the
            data if None. With 1 the pair runs draw by draw, which suits programs that can't
            broadcast.
        plate: Name of the data plate.
        progress: Whether a terminal shows progress bars for what takes longer than two seconds.
        **kwargs: The pair's keyword arguments.

    Returns:
        The report; it prints as tables and findings.

    Raises:
        ValueError: If the guide draws no local latent, or there is a single datum.

    Reference:
        Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders"; Hoffman and
        Johnson 2016, "ELBO surgery"; Zhao, Song and Ermon 2017, "InfoVAE".
    """
    check_count("num_samples", num_samples)
    check_positive("num_samples", num_samples, minimum=2)
    check_count("num_draws", num_draws)
    check_positive("num_draws", num_draws, minimum=2)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if refine_steps != 0:
        check_count("refine_steps", refine_steps)
    with at_rest(modules_of(model, guide)):
        structure = inspect_pair(model, guide, args, kwargs, plate=plate)
        _check_structure(structure)
        with pyro.validation_enabled(False):
            pair = hold(model, guide, args, kwargs, structure)
            draws = draw(pair, num_samples, chunk_size=chunk_size, progress=progress)
            notes = _obstacles(draws)
            information, aggregate = None, None
            if not notes:
                information = information_of(
                    pair, draws.samples, draws.kl, num_draws=num_draws, chunk_size=chunk_size
                )
                prior = draw_prior(pair, num_samples, chunk_size=chunk_size)
                aggregate = compare_aggregate(
                    draws.continuous, prior.continuous, num_draws=num_draws
                )
        gap = None
        if refine_steps:
            gap = amortisation_gap(
                model,
                guide,
                args,
                kwargs,
                structure,
                num_samples=_GAP_SAMPLES,
                refine_steps=refine_steps,
                chunk_size=chunk_size,
                progress=progress,
            ).mean
    if information is None and not notes:
        notes = [_NOT_COMMON]
    return CollapseReport(
        latents=draws.summaries(threshold),
        kl=Estimate.of_mean(draws.kl),
        information=information,
        aggregate=aggregate,
        amortisation_gap=gap,
        num_data=structure.num_data,
        num_samples=num_samples,
        notes=tuple(notes),
    )


def _check_structure(structure: PairStructure) -> None:
    if not structure.local_latents:
        raise ValueError(
            f"Expected a guide that samples local latents in plate '{structure.plate}'; got none "
            f"(the model sums out {list(structure.model_enumerated)}). There is nothing to report: "
            f"sites that the model enumerates have no approximate posterior."
        )
    if structure.num_data < 2:
        raise ValueError(
            f"Expected at least two data in plate '{structure.plate}', to compare their latents; "
            f"got {structure.num_data}. Pass more data."
        )


def _obstacles(draws: Draws) -> list[str]:
    """Why latents have no information or aggregate that could be told, if so."""
    masked = [name for name, tables in draws.latents.items() if tables.mask is not None]
    if not masked:
        return []
    return [
        f"{masked} are under a mask, so that data differ in which latents they have: no I(x; z) "
        f"and no q(z) of all."
    ]


def _order(latent: LatentSummary) -> list[int]:
    """The dimensions that cost most first, then those that vary most."""
    key = latent.kl_of_dimensions
    key = latent.variance_of_mean if key is None else key
    return [] if key is None else torch.argsort(key, descending=True).tolist()


def _cells(latent: LatentSummary, dimension: int) -> list[str]:
    kl, variance, active = latent.kl_of_dimensions, latent.variance_of_mean, latent.active
    return [
        latent.name_of(dimension),
        "-" if kl is None else f"{float(kl[dimension]):.4f}",
        "-" if variance is None else f"{float(variance[dimension]):.4f}",
        "active" if active is not None and active[dimension] else "",
    ]
