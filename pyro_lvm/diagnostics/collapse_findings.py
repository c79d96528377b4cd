"""What the numbers of a collapse report mean, in plain words, and what to do about it."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_lvm.diagnostics.collapse import CollapseReport

__all__ = ["findings_of"]

_NOTHING = 0.05  # nats: what a latent knows that is hardly used
_GAP = 0.5  # nats of KL(q(z) || p(z)) beyond which draws of the prior are of other latents
_NEAR = 1.0  # nats below log N where the bound on the information starts to bind
_CURES = (
    "a KL warm-up (kl_weight=LinearSchedule(...)), free_bits, or an objective that rewards "
    "information (TraceInfo_ELBO with alpha > 0 and a divergence)"
)


def findings_of(report: "CollapseReport") -> list[str]:
    """The findings of a report, the gravest first; one that nothing was found if there are none."""
    rules = (_ignored, _inactive, _saturated, _mismatch, _amortised)
    found = [finding for rule in rules for finding in rule(report)]
    return found or [_nothing_found(report)]


def _ignored(report: "CollapseReport") -> Iterator[str]:
    if _is_ignored(report):
        active = f"{report.num_active} of {report.num_units} units are active and "
        known = "the mean KL" if report.information is None else "I(x; z)"
        yield (
            f"{active if report.num_units else ''}{known} is below {_NOTHING} nats: the decoder "
            f"ignores the latents (posterior collapse). Try {_CURES}."
        )


def _inactive(report: "CollapseReport") -> Iterator[str]:
    idle = report.num_units - report.num_active
    if idle and not _is_ignored(report):
        yield (
            f"{idle} of {report.num_units} units do not vary with the data. That is no fault where "
            f"the model needs no more. If it should use them, try {_CURES}."
        )
    wasted = sum(
        float(each.kl_of_dimensions[~each.active].sum())
        for each in report.latents
        if each.active is not None and each.kl_of_dimensions is not None
    )
    if wasted > _NOTHING:
        yield (
            f"Inactive units cost {wasted:.2f} nats of KL though their means do not vary with the "
            f"data: their q is not the prior. Train longer, or check the prior's scale."
        )


def _saturated(report: "CollapseReport") -> Iterator[str]:
    found = report.information
    if found is not None and found.lower.value > math.log(found.num_data) - _NEAR:
        yield (
            f"The bound of I(x; z) from below is near its largest value, log N = "
            f"{math.log(found.num_data):.2f} nats: each datum can be told from its latent. How "
            f"much more I(x; z) is, and how far q(z) is from the prior, takes more data to tell."
        )


def _mismatch(report: "CollapseReport") -> Iterator[str]:
    by_kl = report.information is not None and report.information.kl_lower.exceeds(_GAP)
    by_mmd = report.aggregate is not None and (
        report.aggregate.mmd.value > 5 * report.aggregate.mmd_null_std_error
    )
    if by_kl or by_mmd:
        signs = [f"KL(q(z) || p(z)) is above {_GAP} nats"] if by_kl else []
        signs += ["MMD^2 is above 5 of its standard errors by chance"] if by_mmd else []
        yield (
            f"The aggregate posterior q(z) is not the prior ({' and '.join(signs)}): draws of the "
            f"prior are decoded where the model was not trained. Put a weight on their divergence "
            f"(TraceInfo_ELBO(lambda_=..., divergence=MMD())), or learn the prior."
        )


def _amortised(report: "CollapseReport") -> Iterator[str]:
    gap = report.amortisation_gap
    if gap is not None and gap.exceeds(_NOTHING):
        yield (
            f"The encoder loses {gap.value:.2f} nats per datum against parameters of each datum's "
            f"own: a larger encoder or more epochs can gain as much, and so does marginal.refined."
        )


def _nothing_found(report: "CollapseReport") -> str:
    active = f"all {report.num_units} units are active, and " if report.num_units else ""
    return f"Nothing found: {active}q(z) is not seen to differ from the prior."


def _is_ignored(report: "CollapseReport") -> bool:
    """Whether nothing is seen to be known: of units that none is active, else beyond the errors."""
    known = report.kl if report.information is None else report.information.upper
    margin = 0.0 if report.num_units else 2 * known.std_error
    return report.num_active == 0 and known.value + margin < _NOTHING
