"""The InfoVAE objective: a KL weight, and a divergence on the aggregate posterior."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import torch_item
from torch import Tensor, nn

from pyro_lvm.checks import check_weight
from pyro_lvm.infer.gathering import batch_is_shared, gather_rows
from pyro_lvm.infer.host import LocalWeight, host_class, recorded
from pyro_lvm.infer.prior import sample_prior_sites
from pyro_lvm.pair import (
    PairStructure,
    Program,
    data_plate,
    device_of,
    inspect_pair,
    modules_of,
    no_guide,
)
from pyro_lvm.terms import depends_on_enumeration, sample_table, terms_from_traces

__all__ = ["TraceInfo_ELBO"]

_ROUNDING = 1e-6  # of a sum of weights in single precision


class TraceInfo_ELBO(ELBO):
    """The InfoVAE objective (Zhao, Song and Ermon 2017, section 3) for any pair.

    To be maximised, over data i and with the aggregate posterior q(z) = mean_i q(z | x_i)::

        sum_i { E_q[log p(x_i | z_i)] - (1 - alpha) KL(q(z_i | x_i) || p(z_i)) }
            - N (alpha + lambda - 1) D(q(z), p(z))  -  KL(q(g) || p(g))

    * ``alpha=0, lambda_=1`` is the ELBO, in value and gradient that of Pyro's objective;
    * ``alpha + lambda_ = 1`` is the beta-VAE with beta = ``lambda_`` = 1 - ``alpha``;
    * ``alpha=1`` with `MMD` is the MMD-VAE with ``lambda_`` as the weight of D.

    The first line and the KL of the global latents ``g`` are estimated by an objective of Pyro's
    (``host``), with its analytic KL, score-function gradients and enumeration. ``D`` compares the
    local latents of the minibatch with as many draws from the prior, in the unit of the divergence.
    With ``N`` data and a minibatch of ``B`` (a subsampled plate) the sum over data is scaled by
    ``N / B`` and D by ``N``: ``lambda_`` means the same at every batch size, as long as the
    divergence is unbiased. With several particles D is averaged over them.

    Where several processes share a batch (`fit` and `PairModule` on several devices, or a loop of
    your own inside `pyro_lvm.infer.gathering.across_processes`), D compares the latents of all of
    them with the prior draws of all: it is that of the whole batch, in value and gradient. Each
    process draws its own global latents, as if they were particles, and ``p(z)`` is the mixture of
    the priors that these give.

    Sites that the model enumerates are summed out inside the likelihood; ``alpha`` does not touch
    them. As ``alpha`` weighs only what is sampled, a sampled latent whose prior depends on such a
    sum is refused for ``alpha != 0``.

    Args:
        alpha: Weight that is taken off the KL of local latents; below 0 for a beta above 1.
        lambda_: Weight of the divergence on the aggregate posterior, as in the paper. Both may be
            tensors, scalars on the device of the data that are changed in place as training goes
            on: compiled losses and steps follow them, where another number would be compiled anew.
        divergence: Module or function of two tensors, draws from q(z) ``B x D`` and from p(z)
            ``B x D``, that returns a scalar; needed if ``alpha + lambda_ != 1``.
        sites: Local latents to compare, jointly; all of them if None.
        plate: Name of the data plate. It may be missing if ``alpha`` and the divergence's weight
            are 0.
        host: The objective of Pyro's to build on, a subclass of ``pyro.infer.ELBO``. If None:
            ``TraceEnum_ELBO`` for enumerated sites, ``TraceMeanField_ELBO`` where its condition
            holds, ``Trace_ELBO`` otherwise.
        num_particles: Samples of the guide per datum.
        max_plate_nesting: As in ``pyro.infer.ELBO``.
        vectorize_particles: As in ``pyro.infer.ELBO``.
        retain_graph: As in ``pyro.infer.ELBO``.

    Raises:
        ValueError: If the divergence's weight is negative (the aggregate posterior would be pushed
            away from the prior), or is not 0 without a divergence.
    """

    def __init__(
        self,
        *,
        alpha: float | Tensor = 0.0,
        lambda_: float | Tensor = 1.0,
        divergence: Callable[[Tensor, Tensor], Tensor] | None = None,
        sites: Sequence[str] | None = None,
        plate: str = "data",
        host: type[ELBO] | None = None,
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        settings = {
            "num_particles": num_particles,
            "max_plate_nesting": max_plate_nesting,
            "vectorize_particles": vectorize_particles,
            "retain_graph": retain_graph,
            "strict_enumeration_warning": False,
        }
        super().__init__(**settings)
        check_weight("alpha", alpha)
        check_weight("lambda_", lambda_)
        self.alpha, self.lambda_ = alpha, lambda_
        self.divergence, self.sites, self.plate, self.host = divergence, sites, plate, host
        self._settings = settings
        self._prepared: dict[tuple, tuple[Any, PairStructure]] = {}
        self._check_divergence_weight()

    @property
    def divergence_weight(self) -> float | Tensor:
        """``alpha + lambda - 1``, the weight of D per datum."""
        weight = self.alpha + self.lambda_ - 1.0
        if isinstance(weight, Tensor):
            return weight
        rounding = 1e-12 * (1 + abs(float(self.lambda_)))
        return 0.0 if abs(weight) < rounding else weight

    @property
    def has_divergence(self) -> bool:
        """Whether there is a divergence with a weight, which in a tensor may also become 0."""
        return self.divergence is not None and _may_differ_from(0.0, self.divergence_weight)

    def __call__(self, model: Program, guide: Program) -> ELBOModule:
        """The loss of one pair as a module, which owns what the pair's bound methods belong to."""
        return _PairLoss(model, guide, self)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """An estimate of the loss, the negative objective in nats over all data, to be minimised.

        Its gradient is an unbiased estimate of the gradient of the negative objective.
        """
        host, _, loss, _ = self._estimate("differentiable_loss", model, guide, args, kwargs)
        host.runs.clear()  # the traces hold the activations of the whole batch
        return loss

    def loss_and_parts(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts by name; the loss is differentiable if gradients are enabled.

        The parts are per datum, in nats, averaged over particles, without gradient, and add up::

            loss = - reconstruction + (1 - alpha) sum_s kl[s] + (alpha + lambda - 1) divergence
                   + kl[global]

        Returns:
            The loss, a scalar over all data, and the parts: ``loss``, ``reconstruction``,
            ``kl[<site>]`` for each local site of the guide, ``kl[global]`` if there are sites
            outside the plate, ``divergence`` if it has a weight. Where no datum has parts of its
            own (sites enumerated sequentially, or outside the plate) only ``loss``; without a data
            plate that is over all data.
        """
        method = "differentiable_loss" if torch.is_grad_enabled() else "loss"
        host, structure, estimate, divergence = self._estimate(method, model, guide, args, kwargs)
        loss = torch.as_tensor(estimate)
        parts = self._parts(host, structure, loss, divergence)
        host.runs.clear()
        return loss, parts

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, in nats over all data, without a gradient."""
        with torch.no_grad():
            host, _, loss, _ = self._estimate("loss", model, guide, args, kwargs)
        host.runs.clear()
        return torch_item(loss)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss; its gradient is added to that of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return torch_item(loss)

    def check_pair(
        self, model: Program, guide: Program | None, args: tuple = (), kwargs: dict | None = None
    ) -> PairStructure:
        """Refuse a pair that this objective has no meaning for, before any work starts.

        Returns:
            What the pair is made of.

        Raises:
            ValueError: What was expected, what came, which site, and the remedy.
        """
        needs_plate = _may_differ_from(0.0, self.alpha) or self.has_divergence
        structure = inspect_pair(
            model, guide, args, kwargs, plate=self.plate, require_plate=needs_plate
        )
        if self.has_divergence:
            self._check_sites(structure)
        return structure

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}  # made again where it is needed

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError("The traces are drawn by the host.")

    def _prepare(
        self, model: Program, guide: Program | None, args: tuple, kwargs: dict
    ) -> tuple[Any, PairStructure]:
        """The host for this pair and this kind of arguments, chosen once for each."""
        key = (model, guide, _kinds(args), tuple(sorted(kwargs)), _kinds(kwargs.values()))
        if key not in self._prepared:
            if len(self._prepared) >= 16:  # programs made afresh for every call must not pile up
                self._prepared.clear()
            structure = self.check_pair(model, guide, args, kwargs)
            weight = LocalWeight(1.0, self.plate, structure.model_enumerated)
            base: Any = self.host or host_class(structure)
            host = recorded(base)(weight=weight, **self._settings)
            self._prepared[key] = host, structure
        host, structure = self._prepared[key]
        host.weight.weight = 1.0 - self.alpha
        host.runs.clear()
        return host, structure

    def _estimate(
        self, method: str, model: Program, guide: Program | None, args: tuple, kwargs: dict
    ) -> tuple[Any, PairStructure, Any, Tensor | None]:
        """The loss by a method of the host, the divergence added, and what it came from."""
        host, structure = self._prepare(model, guide, args, kwargs)
        run = getattr(host, method)
        with device_of(args, kwargs):
            loss = self._explained(run, structure, model, guide or no_guide, args, kwargs)
            divergence = self._divergence(host, structure, model, args, kwargs)
        if divergence is not None:
            loss = loss + self._size(host) * self.divergence_weight * divergence
        return host, structure, loss, divergence

    def _explained(
        self,
        method: Callable,
        structure: PairStructure,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        """Call a method of the host; where a KL weight and a sum collide, say so."""
        try:
            return method(model, guide, *args, **kwargs)
        except ValueError as error:
            if not _may_differ_from(0.0, self.alpha) or "share a common poutine.scale" not in str(
                error
            ):
                raise
            raise ValueError(
                f"Expected no sampled latent whose prior depends on a site that the model "
                f"enumerates, since alpha = {float(self.alpha):g} weighs the one and not the "
                f"other; got {list(structure.model_enumerated)} enumerated beside "
                f"{list(structure.local_latents)}. Enumerate them in the guide, or use alpha=0."
            ) from error

    def _divergence(
        self, host: Any, structure: PairStructure, model: Program, args: tuple, kwargs: dict
    ) -> Tensor | None:
        """D between the latents of the minibatch and the prior's, averaged over particles."""
        if not self.has_divergence:
            return None
        assert self.divergence is not None
        names, values = self._compared(structure), []
        if len(host.runs) > self.num_particles:
            raise ValueError(
                f"Expected one run per particle for the divergence; got sequential enumeration in "
                f"the guide at {list(structure.guide_enumerated)}. Enumerate it in parallel."
            )
        story = host._vectorized_num_particles(model) if host.vectorize_particles else model
        for run in host.runs:
            given = {n: run.guide_trace.nodes[n]["value"] for n in structure.global_latents}
            drawn = sample_prior_sites(story, names, args, kwargs, given={**given, **run.indices})
            q = self._joint({n: run.guide_trace.nodes[n] for n in names})
            q, p = _of_the_whole_batch(q, self._joint(drawn))
            values += [self.divergence(q_k, p_k) for q_k, p_k in zip(q, p, strict=True)]
        return torch.stack(values).mean()

    def _joint(self, sites: dict[str, dict]) -> Tensor:
        """The values of some sites side by side, ``K x N x D``."""
        for name, site in sites.items():
            if depends_on_enumeration(site):
                raise ValueError(
                    f"Expected one value per datum of the latents that the divergence compares; "
                    f"got site '{name}', which depends on an enumerated one. Name others by sites="
                    f", or sample the enumerated site."
                )
        tables = [sample_table(site, self.plate) for site in sites.values()]
        return torch.cat([t.reshape(*t.shape[:2], -1) for t in tables], -1)

    @torch.no_grad()
    def _parts(
        self, host: Any, structure: PairStructure, loss: Tensor, divergence: Tensor | None
    ) -> dict[str, Tensor]:
        if structure.plate is None:
            return {"loss": loss.detach()}
        parts = {"loss": loss.detach() / self._size(host)}
        analytic = isinstance(host, TraceMeanField_ELBO)
        try:
            terms = [
                terms_from_traces(
                    run.model_trace, run.guide_trace, plate=self.plate, analytic=analytic
                )
                for run in host.runs
            ]
        except ValueError:  # a sum that all data share: the host has a loss, but no datum a part
            return parts
        parts["reconstruction"] = _mean(t.log_likelihood for t in terms)
        for name in terms[0].kl:
            parts[f"kl[{name}]"] = _mean(t.kl[name] for t in terms)
        if terms[0].has_globals:
            parts["kl[global]"] = _mean(t.global_kl for t in terms) / terms[0].size
        if divergence is not None:
            parts["divergence"] = divergence.detach()
        return parts

    def _size(self, host: Any) -> float:
        """``N``, the number of all data."""
        frame = data_plate(host.runs[0][:2], self.plate)
        return frame.full_size or frame.size

    def _check_divergence_weight(self) -> None:
        alpha, lambda_ = float(self.alpha), float(self.lambda_)
        weight = float(self.divergence_weight)
        if isinstance(self.divergence_weight, Tensor) and abs(weight) < _ROUNDING:
            weight = 0.0
        if weight < 0:
            raise ValueError(
                f"Expected alpha + lambda_ >= 1, so that the divergence is minimised; got alpha="
                f"{alpha:g} and lambda_={lambda_:g}, a weight of {weight:g}."
            )
        if weight != 0 and self.divergence is None:
            raise ValueError(
                f"Expected a divergence, since alpha + lambda_ - 1 = {weight:g}; got None. Pass "
                f"divergence=MMD(), or lambda_={1 - alpha:g} for none (a beta-VAE)."
            )

    def _compared(self, structure: PairStructure) -> list[str]:
        return list(structure.local_latents if self.sites is None else self.sites)

    def _check_sites(self, structure: PairStructure) -> None:
        names = self._compared(structure)
        unknown = [n for n in names if n not in structure.local_latents]
        if unknown or not names:
            raise ValueError(
                f"Expected a divergence between local latents that the guide samples; got sites "
                f"{unknown or names}. This pair has {list(structure.local_latents)}."
            )
        for names_of_kind, kind in (
            (structure.not_reparameterised, "not reparameterised in the guide"),
            (structure.masked, "masked"),
        ):
            for name in set(names).intersection(names_of_kind):
                raise ValueError(
                    f"Expected latents with a value for every datum and a pathwise gradient for "
                    f"the divergence; got site '{name}', which is {kind}. Name others by sites=."
                )
        if structure.num_data < 2 and not batch_is_shared():
            raise ValueError(
                f"Expected at least two data in plate '{self.plate}', to compare the aggregate "
                f"posterior with the prior; got {structure.num_data}. Use a larger batch."
            )


class _PairLoss(ELBOModule):
    """The loss of a pair as a module whose parameters are complete for bound methods too."""

    def __init__(self, model: Program, guide: Program, elbo: TraceInfo_ELBO) -> None:
        super().__init__(model, guide, elbo)
        self.owners = nn.ModuleList(modules_of(model, guide, elbo.divergence))


def _may_differ_from(number: float, weight: float | Tensor) -> bool:
    """Whether a weight is, or may become, another number; looks at the value of no tensor."""
    return isinstance(weight, Tensor) or weight != number


def _of_the_whole_batch(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Two tables ``K x b x D`` with the rows of all processes that share a batch."""
    if not batch_is_shared():
        return q, p
    both = gather_rows(torch.cat([q, p], -1).transpose(0, 1))  # B x K x 2D
    q, p = both.transpose(0, 1).chunk(2, -1)
    return q, p


def _kinds(values: Iterable[Any]) -> tuple:
    """What decides about the structure of a run: which arguments are there, and their ranks."""
    return tuple((type(v), v.dim() if isinstance(v, Tensor) else None) for v in values)


def _mean(tables: Iterable[Tensor]) -> Tensor:
    return torch.stack([table.mean() for table in tables]).mean()
