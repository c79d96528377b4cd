"""What the scales of a pair's terms say, in plain sentences."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_lvm.diagnostics.scale_terms import ScaledTerm, alike
from pyro_lvm.infer import TraceInfo_ELBO

__all__ = ["Finding", "Minibatches", "find_defects", "resolved"]

Terms = Sequence[ScaledTerm]


@dataclass(frozen=True)
class Minibatches:
    """``B`` of ``N`` data, in a plate."""

    num_data: int
    batch_size: int
    plate: str

    def number(self, value: float) -> str:
        """A number, and what it is made of."""
        n, b = self.num_data, self.batch_size
        if n != b and alike(value, b / n):
            return f"B/N = {b}/{n} = {value:.4g}"
        if n != b and alike(value, n / b):
            return f"N/B = {n}/{b} = {value:.4g}"
        return f"{value:.4g}"


@dataclass(frozen=True)
class Finding:
    """One defect.

    Attributes:
        sentence: What, where, what it does, and the remedy.
        verdict: The same in a few words, for the rows of a table.
        terms: The terms that have it.
    """

    sentence: str
    verdict: str
    terms: tuple[ScaledTerm, ...]


def resolved(terms: Terms, minibatches: Minibatches) -> list[ScaledTerm]:
    """The terms, where a constant that was to make a minibatch stand for all data is no meaning.

    Such a constant is on all data too, so that `scaled_terms` can't tell it from one that is meant.
    On an observed site it is N/B, or any above 1 in a plate without a size.
    """
    factor = minibatches.num_data / minibatches.batch_size

    def for_the_size(t: ScaledTerm) -> bool:
        return t.is_local and (alike(t.own, factor) or (t.stated_size is None and t.own > 1))

    if alike(factor, 1.0) or not any(t.kind == "observed" and for_the_size(t) for t in terms):
        return list(terms)
    return [t.with_own(1.0) if for_the_size(t) else t for t in terms]


def find_defects(terms: Terms, minibatches: Minibatches, elbo: Any) -> Iterator[Finding]:
    """What is wrong with the scales of terms, and with the weights that an objective ends with.

    A term is accused of one wrong scale at most; a KL weight may come on top.
    """
    unlike = list(_unlike(terms))
    accused = [t for finding in unlike for t in finding.terms]
    left = [t for t in terms if t not in accused]
    yield from _no_sums(terms)
    yield from unlike
    yield from _local_defects(left, terms, minibatches)
    yield from _global_defects(left, terms, minibatches)
    yield from _scaled_alike(terms, minibatches)
    yield from _kl_weights(left, terms, elbo)


# a term that is no sum over data


def _no_sums(terms: Terms) -> Iterator[Finding]:
    for t in terms:
        if t.is_as_expected:
            continue
        where = (
            "A factor in it depends on the size of the minibatch (a mean in place of a sum, a "
            "division by len(x)), or a datum's value on the other data. Let the site hold each "
            "datum's own term, and the plate sum them."
            if t.is_local
            else "It is outside the data plate, and yet depends on the data in the minibatch. Move "
            "it into the plate, or let it depend on what all minibatches share."
        )
        yield Finding(
            f"Site '{t.site}' of the {t.program} is no sum over data: by its scale its mean over "
            f"minibatches is {t.expected:.4g} times its value on all data; measured: "
            f"{t.measured:.4g}. {where}",
            "no sum over data",
            (t,),
        )


# log q - log p with different scales


def _unlike(terms: Terms) -> Iterator[Finding]:
    pairs = [(p, q) for p, q in _shared(terms) if _differ(p.counts, q.counts)]
    for group in _grouped(pairs, lambda pair: (pair[0].scale, pair[1].scale)):
        p, q = group[0]
        yield Finding(
            f"{_which(p, q)}: the scale of {_sites(p for p, _ in group)} is {p.scale:.4g} in the "
            f"model and {q.scale:.4g} in the guide, so that log q - log p is no KL. Put the same "
            f"plate, poutine.scale and poutine.mask around both sites.",
            "model and guide differ",
            tuple(t for pair in group for t in pair),
        )


def _which(p: ScaledTerm, q: ScaledTerm) -> str:
    """What differs between a latent's site in the model and that in the guide."""
    if alike(p.scale, q.scale):
        return "A mask, or scales per datum, that differ between model and guide"
    if (p.stated_size is None) != (q.stated_size is None):
        return f"A data plate that knows its size in the {_holder(p.stated_size)} only"
    if alike(p.by_hand, 1.0) or alike(q.by_hand, 1.0):
        return f"A scale in the {_holder(not alike(p.by_hand, 1.0))} only"
    return "Scales that differ between model and guide"


def _holder(model_has_it: Any) -> str:
    return "model" if model_has_it else "guide"


def _differ(a: Tensor, b: Tensor) -> bool:
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:  # events of other ranks
        return not alike(float(a.double().mean()), float(b.double().mean()))
    return not torch.allclose(a.double(), b.double(), rtol=1e-4)


# local terms that do not count each datum once


def _local_defects(left: Terms, terms: Terms, m: Minibatches) -> Iterator[Finding]:
    off = [t for t in left if t.is_local and not alike(t.expected, 1.0)]
    for group in _grouped(off, lambda t: (_cause(t, m), f"{t.expected:.4g}")):
        factor = group[0].expected
        opening, verdict, remedy = _explanation(_cause(group[0], m), group[0], m)
        yield Finding(
            f"{opening}: over minibatches {_sites(group)} sum to {m.number(factor)} times their "
            f"value on all data. {_consequence(factor, terms, m)} {remedy}",
            verdict,
            tuple(group),
        )


Cause = Literal["size", "no size", "doubled", "other"]


def _cause(t: ScaledTerm, m: Minibatches) -> Cause:
    if t.stated_size is not None and alike(t.expected, t.stated_size / m.num_data):
        return "size"
    if t.stated_size is None and alike(t.expected, m.batch_size / m.num_data):
        return "no size"
    return "doubled" if alike(t.expected, m.num_data / m.batch_size) else "other"


def _explanation(cause: Cause, t: ScaledTerm, m: Minibatches) -> tuple[str, str, str]:
    """What is wrong, the verdict, and the remedy."""
    n = m.num_data
    if cause == "size":
        return (
            f"Plate '{m.plate}' says that there are {t.stated_size} data; got {n}",
            f"plate says {t.stated_size} data",
            "Write the size that the data have, or pass all of them to the audit.",
        )
    if cause == "no size":
        return (
            f"Plate '{m.plate}' has no size, and can't know that its {m.batch_size} data stand for "
            f"{n}",
            "plate has no size",
            f"Write pyro.plate('{m.plate}', {n}, subsample_size=len(x)), wrap model and guide in "
            f"lvm.plate_size(program, {n}), or train by lvm.fit, which does so by itself.",
        )
    if cause == "doubled":
        return (
            f"A doubled scale of {t.scale:.4g}, {_sources(t, m)}",
            "scaled twice",
            "Remove the poutine.scale: a plate that knows its size scales by itself.",
        )
    return (
        f"A scale of {t.scale:.4g}, {_sources(t, m)}, where N/B = {n / m.batch_size:.4g} is right",
        f"counts {t.expected:.4g} times",
        "Leave the scale to the plate.",
    )


def _sources(t: ScaledTerm, m: Minibatches) -> str:
    """Where a local term's scale comes from."""
    plates = 1.0 if t.stated_size is None else t.stated_size / m.batch_size
    return f"{plates:.4g} from plate '{m.plate}' times {t.by_hand:.4g} by poutine.scale"


def _consequence(factor: float, terms: Terms, m: Minibatches) -> str:
    """What a factor on some terms does to their balance with all others."""
    others = [t for t in terms if not alike(t.weight, factor)]
    if not others:
        return (
            "All terms do so alike: the gradient has the right direction, but the loss is not that "
            "over all data."
        )
    shared = [t for t in others if not t.is_local and alike(t.weight, 1.0)]
    if shared and factor:
        return (
            f"Global terms ({_sites(shared)}) count in full in every minibatch, "
            f"{m.number(1 / factor)} times as heavy relative to the data as they should be: a "
            f"global latent is counted once per minibatch."
        )
    return f"Other terms ({_sites(others)}) do not, so that their balance is wrong."


# global terms, which should count once


def _global_defects(left: Terms, terms: Terms, m: Minibatches) -> Iterator[Finding]:
    base = _common([t.own for t in terms])
    if _common([t.weight for t in terms], none=0.0):  # all terms are as heavy as one another
        return
    off = [t for t in left if not t.is_local and not alike(t.weight, base)]
    for group in _grouped(off, lambda t: f"{t.weight / base:.4g}"):
        yield Finding(
            f"A global latent in a scaled context: {_sites(group)} count "
            f"{m.number(group[0].weight / base)} times, where a term that all data share counts "
            f"once. Sample it outside of poutine.scale, in model and guide, and leave the scale of "
            f"the data to plate '{m.plate}'.",
            "global, but scaled",
            tuple(group),
        )


# one scale on all that is local


def _scaled_alike(terms: Terms, m: Minibatches) -> Iterator[Finding]:
    local = [t for t in terms if t.is_local]
    scale = _common([t.own for t in local])
    if alike(scale, 1.0) or any(not t.own for t in local):
        return
    yield Finding(
        f"All terms in plate '{m.plate}' have a scale of {scale:.4g} beside the plate's, in "
        f"minibatches and on all data. {_consequence(scale, terms, m)} Remove the poutine.scale.",
        f"scale {scale:.4g} of its own",
        tuple(t for t in local),
    )


# the weight of a KL


def _kl_weights(left: Terms, terms: Terms, elbo: Any) -> Iterator[Finding]:
    base = _common([t.own for t in terms if t.is_local])
    local = [t for t in left if t.is_local and t.kind != "observed"]
    sampled = {t.site for t in local if t.program == "guide"}

    def parts(t: ScaledTerm) -> tuple[tuple[str, float], ...]:
        own = t.own / base
        by_hand = [] if alike(own, 1.0) else [(f"poutine.scale {own:.4g}", own)]
        return (*by_hand, *(_objective_weights(elbo, t.site) if t.site in sampled else ()))

    for group in _grouped([t for t in local if parts(t)], parts):
        weight = math.prod(value for _, value in parts(group[0]))
        if alike(weight, 1.0):
            continue
        of = ", ".join(label for label, _ in parts(group[0]))
        yield Finding(
            f"The KL of {_sites(group)} ends with weight {weight:.4g} ({of}): {_beta(weight)} Let "
            f"the weight end at 1 if an ELBO is wanted; log p(x) itself is measured by "
            f"lvm.marginal, whatever the weight.",
            f"KL weight {weight:.4g}",
            tuple(group),
        )


def _beta(weight: float) -> str:
    name = f"the objective is that of a beta-VAE with beta = {weight:.4g}, not the ELBO"
    if weight < 1:
        return f"{name}, and with beta < 1 no bound on log p(x)."
    return f"{name}; with beta > 1 it is a bound on log p(x), but a looser one."


def _objective_weights(elbo: Any, site: str) -> tuple[tuple[str, float], ...]:
    """The weights other than 1 that an objective ends with on the KL of a local latent."""
    # alpha means other things in other objectives
    alpha = _end(elbo.alpha) if isinstance(elbo, TraceInfo_ELBO) else 0.0
    kl_weight = getattr(elbo, "kl_weight", 1.0)
    if isinstance(kl_weight, Mapping):
        kl_weight = kl_weight.get(site, 1.0)
    weights = ((f"alpha = {alpha:.4g}", 1 - alpha), ("kl_weight", _end(kl_weight)))
    return tuple((label, weight) for label, weight in weights if not alike(weight, 1.0))


def _end(weight: Any) -> float:
    """A weight at the end of its schedule; a number, or a tensor as it is now."""
    return float(getattr(weight, "end", weight))


# words


def _shared(terms: Terms) -> list[tuple[ScaledTerm, ScaledTerm]]:
    """The terms of a latent in model and guide."""
    guide = {t.site: t for t in terms if t.program == "guide"}
    model = [t for t in terms if t.program == "model" and t.kind != "observed"]
    return [(t, guide[t.site]) for t in model if t.site in guide]


def _common(numbers: Sequence[float], none: float = 1.0) -> float:
    """What all numbers are; ``none`` if they are not all the same."""
    alike_all = bool(numbers) and all(alike(n, numbers[0]) for n in numbers)
    return numbers[0] if alike_all else none


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _sites(terms: Iterable[ScaledTerm]) -> str:
    return ", ".join(dict.fromkeys(f"'{t.site}'" for t in terms))
