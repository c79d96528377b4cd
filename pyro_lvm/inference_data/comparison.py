"""Models ranked by log p(x), with ArviZ."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_lvm.inference_data.containers import import_arviz, is_arviz_1, to_numpy
from pyro_lvm.marginal import LogMarginal
from pyro_lvm.marginal.log_marginal import Observations

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare"]

_LEAST_DRAWS = 25  # a fifth of them is the tail that is smoothed, and ArviZ wants five there


def compare(scores: Mapping[str, Any]) -> "pd.DataFrame":
    """Rank models by held-out log p(x), with the paired error of each difference.

        diff = mean_i [log p_m(x_i) - log p_best(x_i)],    dse = its standard error over the data

    The ranking and the weights (pseudo-BMA) are ArviZ's ``compare``; what it sums over the data is
    given here per datum, in nats. The paired error is the one to judge a difference by: it leaves
    out how hard the data are for every model.

    Args:
        scores: Model name -> `LogMarginal` of the same data, or for all models what `to_arviz`
            returns, whose log-likelihoods are then compared by leave-one-out cross-validation. The
            log-likelihood of a pair without global latents is the same for all draws; it is taken
            as it is.

    Returns:
        One row per model, best first: ``rank``, ``mean``, ``se``, ``diff``, ``dse``, ``weight`` and
        ``unreliable``, the number of data whose Pareto k is above 0.7; and ``assuming`` if a score
        rests on more than its model, a kernel density for one.

    Raises:
        TypeError: If the scores are of different kinds.
        ValueError: If there are fewer than two, if they are of different data, or if the models'
            likelihoods have different base measures (a density can't be ranked with a probability);
            if there are fewer than 25 draws to cross-validate by.
    """
    if len(scores) < 2:
        raise ValueError(f"Expected at least two models to compare; got {list(scores)}.")
    held_out = [isinstance(s, LogMarginal) for s in scores.values()]
    if any(held_out) and not all(held_out):
        kinds = {name: type(s).__name__ for name, s in scores.items()}
        raise TypeError(
            f"Expected scores of one kind, all LogMarginal or all ArviZ's; got {kinds}."
        )
    observations = {name: _observations(s) for name, s in scores.items()}
    _check_same_data(observations)
    arviz = import_arviz()
    elpd = {
        name: _elpd(arviz, s) if isinstance(s, LogMarginal) else _cross_validated(arviz, s)
        for name, s in scores.items()
    }
    unreliable = {name: int((e.pareto_k > 0.7).sum()) for name, e in elpd.items()}
    table = _table(arviz, elpd, unreliable)
    assuming = {n: getattr(score, "assumption", None) or "" for n, score in scores.items()}
    return table if not any(assuming.values()) else table.assign(assuming=table.index.map(assuming))


def _observations(score: Any) -> Observations | None:
    """What a score is about; None for a container that was not made here."""
    if isinstance(score, LogMarginal):
        return score.observations
    observed = score["observed_data"]
    if "checksum" not in observed:
        return None
    return Observations(
        checksum=torch.as_tensor(np.array(observed["checksum"])),
        values_per_datum=int(observed.attrs["values_per_datum"]),
        base_measure=observed.attrs["base_measure"],
    )


def _check_same_data(observations: Mapping[str, Observations | None]) -> None:
    known = {name: o for name, o in observations.items() if o is not None}
    if not known:
        return
    (first, reference), *others = known.items()
    for name, other in others:
        if not reference.same_data(other):
            raise ValueError(
                f"Expected scores of the same data, in the same order; got other data for '{name}' "
                f"than for '{first}'. Score both models on one test set."
            )
        if reference.base_measure != other.base_measure:
            raise ValueError(
                f"Expected likelihoods with the same base measure; got a {reference.base_measure} "
                f"one for '{first}' and a {other.base_measure} one for '{name}': a density and a "
                f"probability can't be ranked. Give both models the same kind of likelihood."
            )


def _elpd(arviz: Any, score: LogMarginal) -> Any:
    """A held-out score as what ArviZ's ``compare`` takes."""
    return _pointwise(arviz, to_numpy(score.log_prob), to_numpy(score.pareto_k), score.num_samples)


def _cross_validated(arviz: Any, idata: Any) -> Any:
    """Leave-one-out cross-validation; where no draw differs there is nothing to reweigh."""
    _check_log_likelihood(idata)
    variables = dict(idata["log_likelihood"].data_vars)
    if len(variables) == 1:
        (rows,) = variables.values()
        values = rows.values.reshape(-1, rows.shape[-1])  # draws x N
        if rows.ndim == 3 and (values == values[0]).all():
            return _pointwise(arviz, values[0], np.full(values.shape[1], -np.inf), len(values))
    posterior = idata["posterior"]
    num_draws = posterior.sizes["chain"] * posterior.sizes["draw"]
    if num_draws < _LEAST_DRAWS:
        raise ValueError(
            f"Expected at least {_LEAST_DRAWS} draws of the posterior for leave-one-out "
            f"cross-validation; got {num_draws}. Take hundreds of them."
        )
    return arviz.loo(idata, pointwise=True)


def _check_log_likelihood(idata: Any) -> None:
    reason = idata["posterior"].attrs.get("no_log_likelihood")
    if reason is not None:
        raise ValueError(f"Expected the group log_likelihood; got none: {reason}")


def _pointwise(arviz: Any, values: np.ndarray, pareto_k: np.ndarray, num_samples: int) -> Any:
    """Values of log p(x_i) and their sum, as ArviZ's ``loo`` returns them."""
    import xarray

    values = values.astype(np.float64)
    fields = {
        "se": math.sqrt(len(values) * values.var()),
        "n_samples": max(num_samples, 1),
        "n_data_points": len(values),
        "warning": bool((pareto_k > 0.7).any()),
        "scale": "log",
        "good_k": 0.7,
        "pareto_k": xarray.DataArray(pareto_k),
    }
    pointwise = xarray.DataArray(values)
    if is_arviz_1():
        return arviz.ELPDDataLOO(elpd=values.sum(), p=0.0, elpd_i=pointwise, **fields)
    named = {"elpd_loo": values.sum(), "p_loo": 0.0, "loo_i": pointwise, **fields}
    return arviz.ELPDData(list(named.values()), index=list(named))


def _table(arviz: Any, elpd: Mapping[str, Any], unreliable: Mapping[str, int]) -> "pd.DataFrame":
    import pandas as pd

    settings = {"round_to": "none"} if is_arviz_1() else {}
    ranked = arviz.compare(dict(elpd), method="pseudo-bma", **settings)
    total = ranked["elpd" if "elpd" in ranked else "elpd_loo"].astype(float)
    size = next(iter(elpd.values())).n_data_points
    return pd.DataFrame(
        {
            "rank": ranked["rank"].astype(int),
            "mean": total / size,
            "se": ranked["se"].astype(float) / size,
            "diff": (total - total.max()) / size,
            "dse": ranked["dse"].astype(float) / size,
            "weight": ranked["weight"].astype(float),
            "unreliable": pd.Series(unreliable)[ranked.index],
        },
        index=ranked.index,
    )
