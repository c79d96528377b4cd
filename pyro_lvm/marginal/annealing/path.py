"""The geometric path from the start to the posterior, as a function of unconstrained latents."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_lvm.compiled.recorded import Recorded
from pyro_lvm.marginal.annealing.coordinates import Coordinates
from pyro_lvm.marginal.annealing.ends import Ends, sites_of
from pyro_lvm.marginal.annealing.hamiltonian import Densities, Point

__all__ = ["Path"]


class Path:
    """The densities between the ends of a pair, for some arguments.

        log f_beta(u) = log f_0(u) + beta log f_1(u) / f_0(u)

    with f_0 = p(z | g) or q(z | x, g) and f_1 = p(x, z | g) at z = T(u); the densities are those
    of u, so that log |det dT/du| is in log f_0 and cancels in the ratio.

    Args:
        ends: The ends.
        args: Positional arguments of the pair.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: If the support of a latent is none that a chain could move in.
    """

    def __init__(self, ends: Ends, args: tuple, kwargs: dict) -> None:
        self.ends, self.args, self.kwargs = ends, args, kwargs
        runs = sites_of(ends.model, ends.latents, args, kwargs, num_runs=2)
        self.coordinates = Coordinates(*runs, plate=str(ends.structure.plate))
        self._recorded = Recorded(self._evaluate)
        self._checked = False

    def densities(
        self, example: Tensor, given: Mapping[str, Tensor], num_calls: int = 1
    ) -> Densities:
        """The densities for these global latents, a function of positions like an example.

        Args:
            example: A position, ``K x N x D``.
            given: Site -> ``K x (plates) x event``.
            num_calls: How often they are going to be evaluated.

        Raises:
            ValueError: If a chain's density is not the same twice, or depends on other chains.
        """
        self._check(example, given)
        run = self._recorded.given(example, list(given.values()), num_calls)
        return lambda position: Point(position, *run(position))

    def _check(self, position: Tensor, given: Mapping[str, Tensor]) -> None:
        """Refuse densities that change by themselves, or with those of other chains."""
        if self._checked:
            return
        moved = position.clone()
        if len(moved) > 1:
            moved[0] += 1.0
        # the last chain stays where it was
        once, again = (self._evaluate(u, *given.values())[1][-1] for u in (position, moved))
        if not torch.allclose(once, again, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                "Expected the density of a chain to be the same in every evaluation; got a program "
                "with randomness of its own, or one where it depends on other chains. If it has "
                "dropout or batch normalisation, put its modules into evaluation mode by .eval()."
            )
        self._checked = True

    @torch.enable_grad()
    def _evaluate(self, position: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `Point` has beside the position."""
        u = position.detach().requires_grad_()
        values, log_det = self.coordinates.values(u)
        values.update(zip(self.ends.global_latents, given, strict=True))
        log_start, log_ratio = self.ends.log_densities(self.ends.at(values, self.args, self.kwargs))
        log_start = log_start + log_det
        forces = _gradient(log_start, u), _gradient(log_ratio, u)
        return log_start.detach(), log_ratio.detach(), *forces


def _gradient(log_density: Tensor, position: Tensor) -> Tensor:
    if not log_density.requires_grad:
        return torch.zeros_like(position)
    total = log_density.sum()  # each chain and datum has its own latents
    return torch.autograd.grad(total, position, retain_graph=True, materialize_grads=True)[0]
