"""log p(x) by annealed importance sampling."""

from typing import Any

import torch

from pyro_lvm.marginal.annealing.acceptance import AnnealedLogMarginal
from pyro_lvm.marginal.annealing.annealer import Annealer, Settings, ready
from pyro_lvm.marginal.annealing.ends import Start, ends_of
from pyro_lvm.marginal.annealing.hamiltonian import HMC
from pyro_lvm.marginal.annealing.temperatures import Temperatures, schedule_of
from pyro_lvm.marginal.log_marginal import LogMarginal
from pyro_lvm.marginal.minibatches import in_minibatches
from pyro_lvm.marginal.noise import assumption_of
from pyro_lvm.pair import Program

__all__ = ["annealed_importance_sampling"]


@torch.no_grad()
def annealed_importance_sampling(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int = 16,
    temperatures: int | Temperatures = 1000,
    start: Start = "prior",
    transition: HMC = HMC(),  # noqa: B008 - it can't be changed
    chunk_size: int | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    plate: str = "data",
    progress: bool = True,
    **kwargs: Any,
) -> AnnealedLogMarginal:
    """Log p(x_i) by annealed importance sampling, from the prior or the guide to the posterior.

        f_t(z) = f_0(z)^(1 - beta_t) f_1(z)^beta_t,    0 = beta_0 < beta_1 < ... < beta_T = 1
        log w  = sum_(t=1..T) (beta_t - beta_(t-1)) log f_1(z_(t-1)) / f_0(z_(t-1))
        log p(x_i) ~ log (1/K) sum_k w_ik

    with f_0 = p(z | g) or q(z | x_i, g), and f_1 = p(x_i, z | g). Chains start at draws z_0 from
    f_0, and z_t is z_(t-1) after a transition of Hamiltonian Monte Carlo that leaves f_t as it is.
    The mean weight is unbiased for p(x_i), whatever the temperatures are and however little the
    chains move; its logarithm is too low on average. With a single step, T = 1, it is plain
    importance sampling from the start; the more temperatures there are, the less does the estimate
    depend on the start. On data that the model itself has drawn `bidirectional` says how much is
    lost.

    Every chain of every datum has its own latents, in unconstrained coordinates. Step sizes, and
    temperatures if they are adaptive, are each datum's own: a pilot run with a few chains steers
    them, and they are fixed before the first chain that counts. Wu et al. adapt them to the chains
    as they run, which costs less and takes the unbiasedness away. ``acceptance`` of the result says
    what rate the measured chains reached; if it is far from that of the pilot run, a warning says
    so when the result is printed.

    Discrete latents are summed out in the model, those too that the guide enumerates or draws: the
    model must then run with them enumerated. With global latents each chain has its own draw g_k
    from the guide, which stays as it is, and the value is that of the density of x_i averaged over
    them, as with `importance_sampling`.

    The densities run in Python a few times, and then as a recording of their tensor operations,
    which is compiled if it pays.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise. From a start at the prior it only draws the global latents, and
            may be None if there are none.
        *args: The pair's arguments.
        num_samples: ``K``, the number of chains of each datum.
        temperatures: T, for a `SigmoidTemperatures` schedule, or a schedule.
        start: Where chains start. A good guide needs far fewer temperatures than the prior; one
            that misses a mode of the posterior keeps its chains from it.
        transition: How chains move.
        chunk_size: Chains that run at a time; chosen by the size of the data if None.
        batch_size: Data that run at a time; all if None. The tensors among the arguments that have
            a row for each datum are taken apart.
        dtype: ``torch.float64`` or ``torch.float32`` to run everything in that precision, the
            pair's parameters and its arguments included; None for that of the pair. The weights are
            summed in double precision in any case.
        plate: Name of the data plate.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.
        **kwargs: The pair's keyword arguments.

    Returns:
        The estimate per datum, an `AnnealedLogMarginal`, with standard error and effective sample
        size; Pareto k from 21 chains on.

    Raises:
        ValueError: If a setting does not fit; if the pair has no plate of that name, or no
            continuous latent in it; if a latent can't be summed out or mapped to the reals; if the
            guide has no density to start from; or if modules are random, in training mode say.

    References:
        Neal (2001), Annealed importance sampling. Wu, Burda, Salakhutdinov, Grosse (2017), On the
        quantitative analysis of decoder-based models.
    """
    settings = Settings(num_samples, schedule_of(temperatures), transition, chunk_size, progress)
    assumption = assumption_of(model)
    with ready(model, guide, args, kwargs, dtype) as (args, kwargs):
        ends = ends_of(model, guide, args, kwargs, plate=plate, start=start)

        def estimate(args: tuple, kwargs: dict, num_data: int) -> LogMarginal:
            pair = Annealer(ends, args, kwargs, num_data, settings, assumption=assumption)
            return pair.forward()

        score = in_minibatches(estimate, args, kwargs, ends.structure, batch_size)
    assert isinstance(score, AnnealedLogMarginal)
    return score
