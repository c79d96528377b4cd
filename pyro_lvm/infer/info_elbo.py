"""The InfoVAE objective: KL weights, and a divergence on the aggregate posterior."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_lvm.infer import weights
from pyro_lvm.infer.aggregate import aggregate_divergence, check_compared
from pyro_lvm.infer.comparison import Comparison, needs_density
from pyro_lvm.infer.host import LocalWeight, TraceTerms_ELBO, host_class, recorded
from pyro_lvm.infer.objective import Call, Objective
from pyro_lvm.infer.prior import choices_of_prior
from pyro_lvm.infer.schedules import Schedule
from pyro_lvm.infer.weights import Weight, Weights, in_force, may_differ_from, times
from pyro_lvm.pair import PairStructure, data_plate, device_of, inspect_pair, no_guide
from pyro_lvm.terms import Terms, terms_from_traces

__all__ = ["TraceInfo_ELBO"]

_ROUNDING = 1e-6  # of a sum of weights in single precision


class TraceInfo_ELBO(Objective):
    """The InfoVAE objective (Zhao, Song and Ermon 2017, section 3) for any pair.

    To be maximised, over data i and with the aggregate posterior q(z) = mean_i q(z | x_i)::

        sum_i { E_q[log p(x_i | z_i)] - (1 - alpha) KL(q(z_i | x_i) || p(z_i)) }
            - N (alpha + lambda - 1) D(q(z), p(z))  -  KL(q(g) || p(g))

    * ``alpha=0, lambda_=1`` is the ELBO, in value and gradient that of Pyro's objective;
    * ``alpha + lambda_ = 1`` is the beta-VAE with beta = ``lambda_`` = 1 - ``alpha``, and so is
      ``kl_weight=beta``;
    * ``alpha=1`` with `MMD` is the MMD-VAE with ``lambda_`` as the weight of D;
    * ``alpha=1, lambda_=1`` with `Adversarial` is the adversarial autoencoder.

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

    A divergence that needs the prior's density (`Stein`) gets it from the model, the sites that the
    model enumerates summed out. In a conditional story it is that given the datum's own condition.

    Sites that the model enumerates are summed out inside the likelihood; weights do not touch them.
    The prior of a sampled latent that depends on such a sum is its marginal prior.

    The parts of `loss_and_parts` add up::

        loss = - reconstruction + (1 - alpha) sum_s kl_weight[s] kl[s] + free_bits
               + (alpha + lambda - 1) divergence + kl[global]

    They are ``kl[<site>]`` for each local site of the guide, ``kl[global]`` if there are sites
    outside the plate, ``divergence`` if it has a weight, ``discriminator`` (the loss of the
    divergence's own player) if it has one, ``free_bits`` (what they add to the KL) and the weights
    ``alpha``, ``lambda``, ``kl_weight`` or ``kl_weight[<site>]`` where they may change. Where no
    datum has parts of its own (sites enumerated sequentially, or outside the plate) there is only
    ``loss``; without a data plate that is over all data.

    Args:
        alpha: Weight that is taken off the KL of local latents; below 0 for a beta above 1.
        lambda_: Weight of the divergence on the aggregate posterior, as in the paper.
        divergence: Module or function of two tensors, draws from q(z) ``B x D`` and from p(z)
            ``B x D``, that returns a scalar; needed if ``alpha + lambda_ != 1``. A divergence with
            a player of its own (`Adversarial`) has that trained by the same gradient step,
            whatever its weight.
        kl_weight: A factor on the KL of all local latents beside ``1 - alpha``, or site -> factor.
        free_bits: Nats per datum of KL that cost nothing, for each local latent, or site -> nats:
            ``max(free_bits, KL)`` in place of the KL (Kingma et al. 2016, eq. 16), which is the
            mean over the minibatch. So it is biased upwards where the KL is near that bound.
        sites: Local latents to compare, jointly; all of them if None.
        plate: Name of the data plate. It may be missing if all weights are those of the ELBO.
        host: The objective of Pyro's to build on, a subclass of ``pyro.infer.ELBO``. If None:
            ``TraceEnum_ELBO`` for enumerated sites, ``TraceMeanField_ELBO`` where its condition
            holds, ``Trace_ELBO`` otherwise.
        num_particles: Samples of the guide per datum.
        max_plate_nesting: As in ``pyro.infer.ELBO``.
        vectorize_particles: As in ``pyro.infer.ELBO``.
        retain_graph: As in ``pyro.infer.ELBO``.

    ``alpha``, ``lambda_`` and KL weights are numbers, schedules (`LinearSchedule` and others, which
    `fit` advances), or scalar tensors that are changed in place as training goes on: compiled
    losses and steps follow them, where another number would be compiled anew. The last two are in
    the history, under their names.

    Raises:
        ValueError: If the divergence's weight is negative (the aggregate posterior would be pushed
            away from the prior), or is not 0 without a divergence; if a KL weight or ``free_bits``
            is negative.
    """

    def __init__(
        self,
        *,
        alpha: Weight = 0.0,
        lambda_: Weight = 1.0,
        divergence: Callable[..., Tensor] | None = None,
        kl_weight: Weights = 1.0,
        free_bits: float | Mapping[str, float] = 0.0,
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
        super().__init__(divergence=divergence, plate=plate, **settings)
        weights.check("alpha", alpha)
        weights.check("lambda_", lambda_)
        weights.check("kl_weight", kl_weight, minimum=0.0)
        weights.check("free_bits", free_bits, minimum=0.0)
        self.alpha, self.lambda_, self.kl_weight = alpha, lambda_, kl_weight
        self.free_bits, self.sites, self.host = free_bits, sites, host
        self._settings = settings
        self._check_divergence_weight()

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules among the weights, by the names that they have in the history."""
        return {
            name: schedule
            for label, weight in self._weights().items()
            for name, schedule in weights.scheduled(label, weight).items()
        }

    @property
    def divergence_weight(self) -> float | Tensor:
        """``alpha + lambda - 1``, the weight of D per datum, as it is now."""
        weight = in_force(self.alpha) + in_force(self.lambda_) - 1.0
        if isinstance(weight, Tensor):
            return weight
        rounding = 1e-12 * (1 + abs(float(in_force(self.lambda_))))
        return 0.0 if abs(weight) < rounding else weight

    @property
    def has_divergence(self) -> bool:
        """Whether there is a divergence with a weight, which in a tensor may also become 0."""
        return self.divergence is not None and may_differ_from(0.0, self.divergence_weight)

    def _inspect(self, call: Call) -> PairStructure:
        needs_plate = self._is_weighted() or self.has_divergence or self._has_free_bits()
        structure = inspect_pair(*call, plate=self.plate, require_plate=needs_plate)
        self._check_names(structure)
        if self.has_divergence:
            check_compared(self.divergence, self._compared(structure), structure)
            if not needs_density(self.divergence):
                self._check_prior(structure, call)
        return structure

    def _check_prior(self, structure: PairStructure, call: Call) -> None:
        """Refuse a prior whose draws do not learn all that it learns."""
        found = choices_of_prior(call.model, self._compared(structure), call.args, call.kwargs)
        found = [name for name in found if name not in structure.global_latents]
        if found:
            raise ValueError(
                f"Expected a prior whose draws have a pathwise gradient, for a divergence between "
                f"samples; got {found}, whose probabilities are learned and would have none. Fix "
                f"these, or use Stein, which takes the prior's density."
            )

    def _prepare(self, structure: PairStructure) -> "_Prepared":
        base: Any = self.host or host_class(structure)
        return _Prepared(self._host(base, structure), structure)

    def _host(self, base: Any, structure: PairStructure) -> Any:
        weight = LocalWeight(self.plate, structure.model_enumerated)
        return recorded(base)(weight=weight, **self._settings)

    def _evaluate(
        self, call: Call, *, differentiable: bool, parts: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        prepared = self._prepared_for(call)
        with device_of(call.args, call.kwargs):
            loss = torch.as_tensor(self._host_loss(prepared, call, differentiable))
            host, structure = prepared.host, prepared.structure
            compared = None
            if self.has_divergence:
                names = self._compared(structure)
                compared = aggregate_divergence(self.divergence, names, host, structure, call)
            loss = self._with_divergence(host, loss, compared)
            terms = self._terms(host, structure, wanted=parts or self._has_free_bits())
            extra = self._below_free_bits(terms)
        if extra is not None:
            loss = loss + self._size(host) * extra
        found = self._parts(host, structure, loss, terms, compared, extra) if parts else {}
        host.runs.clear()  # the traces hold the activations of the whole batch
        return loss, found

    # the host's part

    def _host_loss(self, prepared: "_Prepared", call: Call, differentiable: bool) -> Any:
        """The weighted loss by the host; by the terms where a weight and a sum collide."""
        try:
            return self._run(prepared.host, call, differentiable)
        except ValueError as error:
            collides = "share a common poutine.scale" in str(error) and self._is_weighted()
            if not collides or self.host is not None:
                raise
            structure = prepared.structure
            if structure.not_reparameterised or structure.guide_enumerated:
                raise self._collision(structure) from error
        prepared.host = self._host(TraceTerms_ELBO, structure)
        return self._run(prepared.host, call, differentiable)

    def _run(self, host: Any, call: Call, differentiable: bool) -> Any:
        host.weight.of = self._weight_of
        host.runs.clear()
        method = host.differentiable_loss if differentiable else host.loss
        return method(call.model, call.guide or no_guide, *call.args, **call.kwargs)

    def _weight_of(self, site: str) -> float | Tensor:
        """The weight of a local latent's KL."""
        weight = self.kl_weight
        if isinstance(weight, Mapping):
            weight = weight.get(site, 1.0)
        return (1.0 - in_force(self.alpha)) * in_force(weight)

    def _collision(self, structure: PairStructure) -> ValueError:
        return ValueError(
            f"Expected only reparameterised latents beside a site that the model enumerates, where "
            f"weights (alpha, kl_weight) are on the KL of the one and not of the other; got "
            f"{list(structure.model_enumerated)} enumerated in the model beside "
            f"{[*structure.not_reparameterised, *structure.guide_enumerated]}. Enumerate all of "
            f"them in the guide, or leave the weights away."
        )

    def _with_divergence(self, host: Any, loss: Tensor, compared: Comparison | None) -> Tensor:
        if compared is None:
            return loss
        divergence, player = compared
        loss = loss + self._size(host) * times(self.divergence_weight, divergence)
        if player is None:
            return loss
        return loss + self._size(host) * (player - player.detach())  # its gradient alone

    # terms and parts

    def _terms(self, host: Any, structure: PairStructure, *, wanted: bool) -> list[Terms] | None:
        if not wanted or structure.plate is None:
            return None
        analytic = isinstance(host, TraceMeanField_ELBO)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._has_free_bits()):
            try:
                return [
                    terms_from_traces(
                        run.model_trace, run.guide_trace, plate=self.plate, analytic=analytic
                    )
                    for run in host.runs
                ]
            except ValueError:  # a sum that all data share: a loss, but no datum has a part
                if self._has_free_bits():
                    raise
                return None

    def _below_free_bits(self, terms: list[Terms] | None) -> Tensor | None:
        """What ``max(free_bits, KL)`` adds to the weighted KLs, per datum."""
        if not self._has_free_bits() or terms is None:
            return None
        free = self.free_bits
        bounds = free if isinstance(free, Mapping) else dict.fromkeys(terms[0].kl, free)
        extra = [
            times(self._weight_of(name), (bound - _mean(t.kl[name] for t in terms)).clamp(min=0))
            for name, bound in bounds.items()
        ]
        return torch.stack(extra).sum() if extra else None

    @torch.no_grad()
    def _parts(
        self,
        host: Any,
        structure: PairStructure,
        loss: Tensor,
        terms: list[Terms] | None,
        compared: Comparison | None,
        extra: Tensor | None,
    ) -> dict[str, Tensor]:
        if structure.plate is None:
            return {"loss": loss.detach()}
        parts = {"loss": loss.detach() / self._size(host)}
        if terms is not None:
            parts["reconstruction"] = _mean(t.log_likelihood for t in terms)
            for name in terms[0].kl:
                parts[f"kl[{name}]"] = _mean(t.kl[name] for t in terms)
            if terms[0].has_globals:
                parts["kl[global]"] = _mean(t.global_kl for t in terms) / terms[0].size
        if compared is not None:
            names = ("divergence", "discriminator")
            values = zip(names, compared, strict=True)
            parts |= {name: value.detach() for name, value in values if value is not None}
        if extra is not None:
            parts["free_bits"] = extra.detach()
        for name, weight in self._weights().items():
            parts |= weights.shown(name, weight)
        return parts

    def _size(self, host: Any) -> float:
        """``N``, the number of all data."""
        frame = data_plate(host.runs[0][:2], self.plate)
        return frame.full_size or frame.size

    # settings and their checks

    def _weights(self) -> dict[str, Weights]:
        return {"alpha": self.alpha, "lambda": self.lambda_, "kl_weight": self.kl_weight}

    def _is_weighted(self) -> bool:
        return may_differ_from(0.0, self.alpha) or may_differ_from(1.0, self.kl_weight)

    def _has_free_bits(self) -> bool:
        return may_differ_from(0.0, self.free_bits)

    def _check_divergence_weight(self) -> None:
        for when, alpha, lambda_ in _ends(self.alpha, self.lambda_):
            weight = alpha + lambda_ - 1.0
            if abs(weight) < _ROUNDING * (1 + abs(lambda_)):
                weight = 0.0
            if weight < 0:
                raise ValueError(
                    f"Expected alpha + lambda_ >= 1{when}, so that the divergence is minimised; "
                    f"got alpha={alpha:g} and lambda_={lambda_:g}, a weight of {weight:g}. A KL "
                    f"weight beside a divergence is kl_weight=."
                )
            if weight != 0 and self.divergence is None:
                raise ValueError(
                    f"Expected a divergence, since alpha + lambda_ - 1 = {weight:g}{when}; got "
                    f"None. Pass divergence=MMD(), or lambda_={1 - alpha:g} for none (a beta-VAE)."
                )

    def _compared(self, structure: PairStructure) -> list[str]:
        return list(structure.local_latents if self.sites is None else self.sites)

    def _check_names(self, structure: PairStructure) -> None:
        """Refuse weights of sites that are no local latents."""
        local = [*structure.local_latents, *structure.auxiliary]
        for setting, given in (("kl_weight", self.kl_weight), ("free_bits", self.free_bits)):
            unknown = [n for n in given if n not in local] if isinstance(given, Mapping) else []
            if unknown:
                raise ValueError(
                    f"Expected {setting} of local latents that the guide samples; got {unknown}. "
                    f"This pair has {local}."
                )
        if self._has_free_bits():
            sampled = [n for n in structure.not_reparameterised if n in local]
            sampled = [n for n in sampled if n not in structure.guide_enumerated]
            if sampled:
                raise ValueError(
                    f"Expected free_bits with reparameterised or enumerated latents; got {sampled} "
                    f"without a pathwise gradient of the KL. Enumerate them, or leave it away."
                )


class _Prepared:
    """The host for a pair, which may turn out to be another one, and what the pair is made of."""

    def __init__(self, host: Any, structure: PairStructure) -> None:
        self.host, self.structure = host, structure


def _ends(alpha: Weight, lambda_: Weight) -> list[tuple[str, float, float]]:
    """Both weights as numbers, where they start and where their schedules end."""
    if not isinstance(alpha, Schedule) and not isinstance(lambda_, Schedule):
        return [("", float(alpha), float(lambda_))]

    def at(weight: Weight, end: bool) -> float:
        if not isinstance(weight, Schedule):
            return float(weight)
        return weight.end if end else weight.at(0)

    whens = ((" at the start", False), (" at the end", True))
    return [(when, at(alpha, end), at(lambda_, end)) for when, end in whens]


def _mean(tables: Iterable[Tensor]) -> Tensor:
    return torch.stack([table.mean() for table in tables]).mean()
