"""Several posteriors side by side, with ArviZ."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyro_lvm.inference_data.containers import import_arviz

if TYPE_CHECKING:
    import pandas as pd
    import xarray

__all__ = ["posterior_of", "summarize"]

_COLUMNS = ["mean", "sd", "mcse_mean", "mcse_sd", "ess_bulk", "ess_tail", "r_hat"]


def summarize(
    posteriors: Mapping[str, Any], var_names: Sequence[str] | None = None
) -> "pd.DataFrame":
    """Mean, standard deviation, Monte Carlo errors, ESS and R-hat of several posteriors.

    All numbers are ArviZ's. A single chain, such as the draws from a guide, is taken as two, its
    halves, for which R-hat is known as well; that of independent draws says nothing of the guide.

    Args:
        posteriors: Name -> what `to_arviz` returns.
        var_names: The variables to summarize; all if None.

    Returns:
        One row for each number of a variable and, below each other, posterior that has it, with the
        columns ``mean``, ``sd``, their Monte Carlo standard errors ``mcse_mean`` and ``mcse_sd``,
        ``ess_bulk``, ``ess_tail`` and ``r_hat``.

    Raises:
        ValueError: If there is no posterior.
    """
    import pandas as pd

    if not posteriors:
        raise ValueError("Expected at least one posterior to summarize; got none.")
    tables = {name: _summary(idata, var_names) for name, idata in posteriors.items()}
    joined = pd.concat(tables, names=["posterior", "variable"]).swaplevel()
    order = joined.index.get_level_values("variable").unique()
    return pd.concat([joined.loc[[variable]] for variable in order])


def posterior_of(idata: Any) -> "xarray.Dataset":
    """The posterior group of ArviZ's container, as a dataset."""
    group = idata["posterior"]
    return group.to_dataset() if hasattr(group, "to_dataset") else group


def _summary(idata: Any, var_names: Sequence[str] | None) -> "pd.DataFrame":
    posterior = posterior_of(idata)
    posterior = posterior if var_names is None else posterior[list(var_names)]
    return import_arviz().summary(_chains(posterior), round_to="none")[_COLUMNS].astype(float)


def _chains(posterior: "xarray.Dataset") -> "xarray.Dataset":
    """At least two chains."""
    import xarray

    half = posterior.sizes["draw"] // 2
    if posterior.sizes["chain"] > 1:
        return posterior
    first, second = posterior.isel(draw=slice(half)), posterior.isel(draw=slice(half, 2 * half))
    second = second.assign_coords(chain=[1], draw=first["draw"])
    return xarray.concat([first.assign_coords(chain=[0]), second], "chain")
