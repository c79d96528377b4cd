"""The importance weighted bound on log p(x), with three estimators of its gradient."""

import math
from typing import Literal, get_args

import torch
from pyro import poutine
from pyro.poutine import unwrap
from torch import Tensor

from pyro_lvm.checks import check_count
from pyro_lvm.infer.iw_estimate import Chunk, Estimate
from pyro_lvm.infer.objective import Call, Objective
from pyro_lvm.infer.particle_runs import Runs, is_handler
from pyro_lvm.pair import (
    PairStructure,
    Program,
    device_of,
    hold_subsamples,
    inspect_pair,
    no_guide,
    untouched_random_state,
)
from pyro_lvm.terms import Terms

__all__ = ["Gradient", "TraceIW_ELBO"]

Gradient = Literal["dreg", "stl", "reparameterized"]


class TraceIW_ELBO(Objective):
    """The importance weighted bound (Burda, Grosse and Salakhutdinov 2016, eq. 8) for any pair.

    To be maximised, over data i, with ``K`` draws of local latents z and one of the globals g::

        sum_i log (1/K) sum_k w_ik  -  KL(q(g) || p(g)),
        w_ik = p(x_i, z_ik | g) / q(z_ik | x_i, g)

    It is a lower bound on log p(x) that grows with K, in expectation: ELBO = L_1 <= L_K <= L_{K+1},
    and without global latents it is log p(x) for every K where the guide is the posterior.

    With ``N`` data and a minibatch of ``B`` the sum over data is scaled by ``N / B`` outside of the
    logarithm. Global latents are outside of it too, and their KL is sampled; a mask is applied, and
    nested plates are summed, inside each weight. Sites that the model enumerates are summed out in
    each weight.

    The gradient by the model's parameters is that of the bound. That by the guide's is, with
    the normalised weights ``v_k = w_k / sum_l w_l`` held fixed,

    * ``"reparameterized"``: sum_k v_k d log w_k / d phi, the pathwise gradient of the bound. Its
      signal-to-noise ratio falls as 1 / sqrt(K) (Rainforth et al. 2018, theorem 1);
    * ``"dreg"``: sum_k v_k^2 (d log w_k / d z_k) (d z_k / d phi), doubly reparameterised: unbiased
      too, with a signal-to-noise ratio that grows as sqrt(K) (Tucker et al. 2018, eq. 8);
    * ``"stl"``: sum_k v_k (d log w_k / d z_k) (d z_k / d phi), which leaves out the score of the
      guide (Roeder et al. 2017): unbiased for K = 1, biased for larger K (Tucker et al. 2018).

    The last two vanish, without noise, where the guide is the exact posterior. For them the guide
    is run a second time at the latents that it has drawn, where it must give the same density.
    Their loss can be differentiated once.

    The parts of `loss_and_parts` are averaged over particles and add up::

        loss = - reconstruction + sum_s kl[s] + kl[global] - weighting

    with ``kl[<site>]`` for each local site of the guide, ``kl[global]`` if there are sites outside
    the plate, and ``weighting``, L_K minus the ELBO: what several particles gain.

    Args:
        num_particles: ``K``.
        gradient: The estimator of the gradient by the guide's parameters.
        chunk_size: So many particles at a time. Memory does not grow with ``K`` then: all chunks
            are run twice, first for the weights and then, with the same random numbers, for the
            gradient. In Python only: a compiled loss has all particles at once. None for all. With
            1 there is no dimension for particles, which suits programs that can't broadcast.
        plate: Name of the data plate.
        max_plate_nesting: As in ``pyro.infer.ELBO``; found by a run of the pair if infinite.
        retain_graph: As in ``pyro.infer.ELBO``.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        *,
        num_particles: int,
        gradient: Gradient = "dreg",
        chunk_size: int | None = None,
        plate: str = "data",
        max_plate_nesting: float = float("inf"),
        retain_graph: bool | None = None,
    ) -> None:
        check_count("num_particles", num_particles)
        if gradient not in get_args(Gradient):
            raise ValueError(
                f"Expected gradient to be one of {list(get_args(Gradient))}; got {gradient!r}."
            )
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        super().__init__(
            plate=plate,
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            retain_graph=retain_graph,
        )
        self.gradient, self.chunk_size = gradient, chunk_size

    def _inspect(self, call: Call) -> PairStructure:
        structure = inspect_pair(*call, plate=self.plate)
        _check_guide(structure)
        if self.gradient != "reparameterized":
            _check_runs_again(call.guide or no_guide, call.args, call.kwargs, self.gradient)
        return structure

    def _evaluate(
        self, call: Call, *, differentiable: bool, parts: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        run = self._runs(call, self._prepared_for(call))
        sizes = self._chunks()
        with device_of(call.args, call.kwargs):
            if not differentiable:
                with torch.no_grad():
                    if len(sizes) > 1:
                        run.draw_globals()
                    found = Estimate.of(Chunk.of(run(size)) for size in sizes)
                loss = found.loss
            elif self.gradient == "reparameterized" and len(sizes) == 1:
                found = Estimate.of([Chunk.of(run(self.num_particles))])
                loss = found.loss
            else:
                run.draw_globals()
                together = self._in_chunks if len(sizes) > 1 else self._at_once
                found, surrogate = together(run, sizes)
                loss = found.loss.detach() + surrogate
        return loss, found.parts() if parts else {}

    def _runs(self, call: Call, structure: PairStructure) -> Runs:
        model, guide, args, kwargs = call
        guide = guide or no_guide
        if structure.subsampled and len(self._chunks()) > 1:
            model, guide = hold_subsamples(model, guide, args, kwargs)
        nesting = self.max_plate_nesting
        nesting = structure.max_plate_nesting if math.isinf(nesting) else int(nesting)
        return Runs(model, guide, args, kwargs, self.plate, nesting, structure.global_latents)

    def _chunks(self) -> list[int]:
        """The sizes of the chunks of particles."""
        k, chunk = self.num_particles, self.chunk_size or self.num_particles
        sizes = [min(chunk, k - start) for start in range(0, k, chunk)]
        if len(sizes) > 1 and torch._C._get_tracing_state():
            raise ValueError("chunk_size= keeps memory flat in Python only; compile without it")
        return sizes

    def _at_once(self, run: Runs, sizes: list[int]) -> tuple[Estimate, Tensor]:
        """The estimate, and zero with the gradient of the loss."""
        (size,) = sizes
        terms = run(size, at_leaves=self._is_at_leaves())
        found = Estimate.of([Chunk.of(terms)])
        self._add_gradient(run, terms, found.weights()[0])
        run.add(terms.global_kl.mean())
        return found, run.surrogate(found.loss)

    def _in_chunks(self, run: Runs, sizes: list[int]) -> tuple[Estimate, Tensor]:
        """The same with no more than a chunk in memory: first all weights, then the gradient."""
        at_leaves, states, chunks = self._is_at_leaves(), [], []
        with torch.no_grad():
            for size in sizes:
                states.append(_random_state(run.device))
                chunks.append(Chunk.of(run(size, at_leaves=at_leaves)))
        found = Estimate.of(chunks)
        with untouched_random_state(run.args, run.kwargs):
            for size, state, weights in zip(sizes, states, found.weights(), strict=True):
                _set_random_state(run.device, state)
                terms = run(size, at_leaves=at_leaves)
                self._add_gradient(run, terms, weights)
        run.add(terms.global_kl.mean())
        return found, run.surrogate(found.loss)

    def _is_at_leaves(self) -> bool:
        return self.gradient != "reparameterized"

    def _add_gradient(self, run: Runs, terms: Terms, weights: Tensor) -> None:
        """Add the gradient of the local part of the loss, of some particles.

        Args:
            run: The runs, of which this is the last one.
            terms: Its terms.
            weights: The normalised weights v of these particles, ``K x N``.
        """
        scale = -terms.plate_scale
        if not run.leaves:
            run.add(scale * (weights * terms.log_weight).sum())
            return
        leaves = list(run.leaves.values())
        log_joint = terms.log_likelihood + sum(terms.log_prior.values())
        by_joint = run.add(scale * (weights * log_joint).sum(), leaves)
        log_guide = sum(terms.log_guide.values(), torch.zeros_like(weights))
        by_guide = torch.autograd.grad(
            scale * (weights * log_guide).sum(), leaves, retain_graph=True, materialize_grads=True
        )
        path = torch.zeros_like(weights[0, 0])
        for name, p, q in zip(run.leaves, by_joint, by_guide, strict=True):
            gradient = (p - q).detach()  # v_k d log w_k / d z_k
            if self.gradient == "dreg":
                gradient = gradient * run.along(name, weights)
            path = path + (run.live[name] * gradient).sum()
        run.add(path)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The states of the generators that a run on a device draws from."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _check_guide(structure: PairStructure) -> None:
    """Refuse guides whose draws have no importance weights with a pathwise gradient."""
    if structure.guide_enumerated:
        raise ValueError(
            f"Expected a guide without enumerated sites, whose probabilities no importance weight "
            f"would depend on; got {list(structure.guide_enumerated)}. Enumerate them in the model "
            f"and leave them out of the guide, or use TraceInfo_ELBO."
        )
    if structure.not_reparameterised:
        raise ValueError(
            f"Expected reparameterised sites in the guide, for a pathwise gradient of the bound; "
            f"got {list(structure.not_reparameterised)}. Enumerate discrete ones in the model, or "
            f"use TraceInfo_ELBO, which has score-function gradients."
        )
    masses = [n for n in structure.local_latents if n in structure.point_masses]
    if masses and not structure.auxiliary:
        raise ValueError(
            f"Expected a guide with a density at every local latent; got a point mass at {masses}, "
            f"whose weights are all the same. Use a guide that samples, an AutoNormal for one."
        )


def _check_runs_again(guide: Program, args: tuple, kwargs: dict, gradient: str) -> None:
    """Refuse a guide whose density at its own draws is another one when it is run again."""
    remedy = "Use gradient='reparameterized', or put the guide into evaluation mode."
    if is_handler(guide):
        raise ValueError(
            f"Expected a guide that can be run again at given latents, for gradient={gradient!r}; "
            f"got an effect handler, {type(unwrap(guide)).__name__}. {remedy}"
        )
    with (
        torch.no_grad(),
        poutine.block(),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
    ):
        first = poutine.trace(guide).get_trace(*args, **kwargs)
        again = poutine.trace(poutine.replay(guide, trace=first)).get_trace(*args, **kwargs)
    first.compute_log_prob()
    again.compute_log_prob()
    for name, site in first.nodes.items():
        if site["type"] != "sample":
            continue
        if not torch.allclose(site["log_prob"], again.nodes[name]["log_prob"], equal_nan=True):
            raise ValueError(
                f"Expected a guide that has the same density when it is run again at the same "
                f"latents, for gradient={gradient!r}; got another one at site '{name}', as by "
                f"dropout. {remedy}"
            )
