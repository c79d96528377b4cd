"""Time of a step of an IWAE and of a semi-supervised VAE, beside code written by hand for speed.

Before anything is timed, each objective is compared with the loss by hand, in value and gradient,
under the same noise. `handwritten_onednn` is the hand-written loss through our own compiler, whose
matrix products are faster on some processors: beside it, what a pair costs shows alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI, RenyiELBO

from benchmarks.peers import by_hand_family as by_hand
from benchmarks.problems import Problem, own_parameters, semi_supervised_vae, vae
from benchmarks.report import Timed
from benchmarks.timing import interleaved
from pyro_lvm import CompiledStep, TraceInfo_ELBO, TraceIW_ELBO
from pyro_lvm.compiled.inductor import compile_graph

__all__ = ["check", "family"]

IWAE = {"batch": 20, "particles": 50}


def family(rounds: int = 15) -> Iterator[Timed]:
    """Times of a step.

    Args:
        rounds: How many times of each.
    """
    for title, steps in (
        ("IWAE, pathwise gradient", _iwae("reparameterized", by_hand.iwae)),
        ("IWAE, DReG", _iwae("dreg", by_hand.dreg)),
        ("semi-supervised VAE, batch 100", _semi_supervised()),
    ):
        yield Timed(title, interleaved(steps, rounds=rounds), "pyro_svi")


def check(problem: Problem, elbo: ELBO, loss: by_hand.Loss) -> None:
    """Compare an objective with a loss by hand, in value and gradient, under the same noise.

    Raises:
        AssertionError: If they differ.
    """
    (x,), networks = problem.args, problem.networks
    assert networks is not None
    differentiable = own_parameters(
        lambda: elbo.differentiable_loss(problem.model, problem.guide, x)
    )
    differentiable()  # looks at the pair
    found = []
    for of_networks in (differentiable, lambda: loss(networks, x)):
        torch.manual_seed(0)
        networks.zero_grad()
        value = of_networks()
        value.backward()
        found.append([value.detach(), *(p.grad for p in networks.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def _iwae(gradient: Any, written: Callable[..., by_hand.Loss]) -> dict[str, Callable[[], Any]]:
    count = IWAE["particles"]
    renyi = RenyiELBO(alpha=0, num_particles=count, vectorize_particles=True, max_plate_nesting=1)
    return _peers(
        lambda: vae(IWAE["batch"]),
        lambda: TraceIW_ELBO(num_particles=count, gradient=gradient),
        lambda transform: written(count, transform),
        renyi,
    )


def _semi_supervised() -> dict[str, Callable[[], Any]]:
    of_pyro = semi_supervised_vae().elbo
    return _peers(semi_supervised_vae, TraceInfo_ELBO, by_hand.labels_summed_out, of_pyro)


def _peers(
    problem: Callable[[], Problem],
    ours: Callable[[], ELBO],
    written: Callable[..., by_hand.Loss],
    of_pyro: ELBO,
) -> dict[str, Callable[[], Any]]:
    """The same step in several forms, each on networks of its own."""
    check(problem(), ours(), written(_as_it_is))
    return {
        "handwritten_eager": _by_hand(problem(), written(_as_it_is)),
        "handwritten_compiled": _by_hand(problem(), written(torch.compile)),
        "handwritten_onednn": _by_hand(problem(), written(_by_our_compiler)),
        "pyro_svi": _svi(problem(), of_pyro),
        "pyro_lvm_svi": _svi(problem(), ours()),
        "pyro_lvm_step": _compiled(problem(), ours()),
    }


def _as_it_is(function: Callable) -> Callable:
    return function


def _by_our_compiler(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=compile_graph)


def _by_hand(problem: Problem, loss: by_hand.Loss) -> Callable[[], Any]:
    assert problem.networks is not None
    return by_hand.steps(loss, problem.networks, *problem.args)


def _svi(problem: Problem, elbo: ELBO) -> Callable[[], Any]:
    svi = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    return own_parameters(lambda: svi.step(*problem.args))


def _compiled(problem: Problem, elbo: ELBO) -> Callable[[], Any]:
    step = CompiledStep(elbo, problem.model, problem.guide)
    return own_parameters(lambda: step(*problem.args))
