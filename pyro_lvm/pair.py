"""What a (model, guide) pair is made of: its sites and plates, and its parameters.

A pair is any two callables with the same arguments: functions with ``pyro.param`` or
``pyro.module``, ``PyroModule`` objects, bound methods, ``poutine``-wrapped programs. No guide
(``None``) stands for one that samples nothing.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger, _context_wrap
from pyro.poutine.trace_messenger import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = [
    "PairStructure",
    "Program",
    "at_rest",
    "data_plate",
    "declared_by",
    "device_of",
    "hold_subsamples",
    "inspect_pair",
    "modules_of",
    "no_guide",
    "parameters_of",
    "plate_size",
    "untouched_random_state",
]

Program = Callable[..., Any]


@dataclass(frozen=True)
class PairStructure:
    """The sites of a pair, sorted relative to the data plate.

    Attributes:
        plate: Name of the data plate; None if the pair has none.
        num_data: ``N``, the data of one call (the size of the minibatch).
        observed: Observed sites inside the plate, in the model's order.
        local_latents: Latent sites inside the plate that the guide samples.
        global_latents: Latent sites outside the plate that the guide samples.
        auxiliary: Sites of the guide alone, marked ``infer={"is_auxiliary": True}``.
        model_enumerated: Latent sites that the model sums out.
        guide_enumerated: Latent sites of which the guide takes the exact expectation.
        max_plate_nesting: How many tensor dimensions the plates use.
        subsampled: Whether a plate sees only a part of what it stands for.
        not_reparameterised: Sites of the guide whose samples have no pathwise gradient.
        masked: Sites of the guide under a mask.
        point_masses: Sites of the guide whose distribution is a ``Delta``.
        constrained: Latent sites of the model that do not live in all of the reals.
        has_analytic_kl: Whether ``TraceMeanField_ELBO`` is right for this pair.
    """

    plate: str | None
    num_data: int
    observed: tuple[str, ...]
    local_latents: tuple[str, ...]
    global_latents: tuple[str, ...]
    auxiliary: tuple[str, ...]
    model_enumerated: tuple[str, ...]
    guide_enumerated: tuple[str, ...]
    max_plate_nesting: int
    subsampled: bool
    not_reparameterised: tuple[str, ...]
    masked: tuple[str, ...]
    point_masses: tuple[str, ...]
    constrained: tuple[str, ...]
    has_analytic_kl: bool


def inspect_pair(
    model: Program,
    guide: Program | None,
    args: tuple = (),
    kwargs: dict | None = None,
    *,
    plate: str = "data",
    require_plate: bool = True,
) -> PairStructure:
    """Run the pair once on ``args`` and ``kwargs``, and say what it is made of.

    The run takes no gradients, leaves the random state as it was, and evaluates every
    log-probability, so that data outside a site's support are refused here.

    Args:
        model: The model.
        guide: The guide, or None for one that samples nothing.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        plate: Name of the data plate.
        require_plate: Whether a pair without this plate is refused.

    Returns:
        The structure.

    Raises:
        ValueError: If the plate is missing or sequential, if the guide misses a latent of the
            model or has one that the model lacks, or if an observation is outside its support.
    """
    guide = no_guide if guide is None else guide
    model_trace, guide_trace = _plain_traces(model, guide, args, kwargs or {})
    _check_sites_match(model_trace, guide_trace)
    frame = data_plate((model_trace, guide_trace), plate, required=require_plate)

    def is_local(site: dict) -> bool:
        return any(f.name == plate for f in site["cond_indep_stack"])

    model_sites, guide_sites = _sample_sites(model_trace), _sample_sites(guide_trace)
    latents = [n for n, s in model_sites.items() if not s["is_observed"] and n in guide_sites]
    return PairStructure(
        plate=None if frame is None else plate,
        num_data=0 if frame is None else int(frame.size),
        observed=tuple(n for n, s in model_sites.items() if s["is_observed"] and is_local(s)),
        local_latents=tuple(n for n in latents if is_local(model_sites[n])),
        global_latents=tuple(n for n in latents if not is_local(model_sites[n])),
        auxiliary=tuple(n for n in guide_sites if n not in model_sites),
        model_enumerated=tuple(
            n for n, s in model_sites.items() if not s["is_observed"] and n not in guide_sites
        ),
        guide_enumerated=tuple(n for n, s in guide_sites.items() if s["infer"].get("enumerate")),
        max_plate_nesting=_plate_nesting((model_trace, guide_trace)),
        subsampled=any(
            f.full_size not in (None, f.size)
            for s in model_sites.values()
            for f in s["cond_indep_stack"]
        ),
        not_reparameterised=tuple(n for n, s in guide_sites.items() if not _has_rsample(s)),
        masked=tuple(n for n, s in guide_sites.items() if not _is_unmasked(s)),
        point_masses=tuple(n for n, s in guide_sites.items() if _is_point_mass(s)),
        constrained=tuple(n for n in latents if not _is_in_the_reals(model_sites[n])),
        has_analytic_kl=_is_mean_field(model_sites, guide_sites),
    )


def no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide that samples nothing."""


@contextmanager
def at_rest(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in evaluation mode, so that no statistics change and no dropout is drawn.

    Parameters that are frozen stay so, though Pyro would have them trained once it knows them.
    """
    modules = list(modules)
    frozen = [p for m in modules for p in m.parameters() if not p.requires_grad]
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p in frozen:
            p.requires_grad_(False)


def modules_of(*programs: Any) -> list[nn.Module]:
    """The modules that programs belong to: themselves, or the owners of bound methods.

    Modules that a plain function closes over can't be seen from outside; `parameters_of` finds what
    such a function declares by ``pyro.module`` or ``pyro.param`` when it is run.
    """
    modules: list[nn.Module] = []
    for program in programs:
        while isinstance(program, functools.partial):
            # a handler of Pyro's holds the program that it wraps as an argument
            program = program.args[1] if program.func is _context_wrap else program.func
        owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
        if isinstance(owner, nn.Module) and not any(owner is m for m in modules):
            modules.append(owner)
    return modules


def parameters_of(
    model: Program, guide: Program | None, args: tuple = (), kwargs: dict | None = None
) -> list[Tensor]:
    """All leaf tensors that training the pair changes, each once.

    They are the parameters of the modules that the pair belongs to, then what a run of the pair
    declares by ``pyro.param`` and ``pyro.module`` (unconstrained, as an optimiser needs them).

    Args:
        model: The model.
        guide: The guide, or None.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.

    Returns:
        The parameters that require a gradient, in a fixed order.
    """
    declared = declared_by(model, guide, args, kwargs).values()
    owned = [p for module in modules_of(model, guide) for p in module.parameters()]
    unique = {id(p): p for p in [*owned, *declared] if p.requires_grad}
    return list(unique.values())


def declared_by(
    model: Program, guide: Program | None, args: tuple = (), kwargs: dict | None = None
) -> dict[str, Tensor]:
    """What a run of the pair declares: name -> unconstrained leaf tensor, the guide's first.

    These are parameters from ``pyro.param`` and ``pyro.module``, and those of a ``PyroModule`` that
    the run has read. The arguments are those of `parameters_of`.
    """
    guide = no_guide if guide is None else guide
    kwargs = kwargs or {}
    with (
        poutine.trace(param_only=True) as capture,
        poutine.block(hide_types=["sample"]),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
        torch.enable_grad(),
    ):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        poutine.replay(model, trace=guide_trace)(*args, **kwargs)
    return {name: _unconstrained(site["value"]) for name, site in capture.trace.nodes.items()}


def plate_size(program: Program, size: int, *, plate: str = "data") -> Program:
    """Let a program that was written for all data see a minibatch of them.

    Inside the plate every log-probability is multiplied by ``size / B``, where ``B`` is the plate's
    own size, so that its sum over a minibatch estimates the sum over ``size`` data. A plate that
    subsamples by itself, and says so by its size, is left as it is.

    Args:
        program: A model or a guide.
        size: ``N``, the number of all data.
        plate: Name of the data plate.

    Returns:
        A program with the same arguments.
    """
    return _PlateSize(size, plate)(program)


def data_plate(traces: Iterable[Trace], plate: str, *, required: bool = True) -> Any:
    """The frame of the data plate in some traces, with ``size``, ``full_size`` and ``dim``.

    Raises:
        ValueError: If there is no such plate and it is required, or if it is sequential.
    """
    sites = [site for trace in traces for site in _sample_sites(trace).values()]
    frames = [frame for site in sites for frame in site["cond_indep_stack"]]
    found = next((frame for frame in frames if frame.name == plate), None)
    if found is None and required:
        names = sorted({frame.name for frame in frames})
        has = f"plates named {names}" if names else "no plates at all"
        raise ValueError(
            f"Expected a plate named '{plate}' over the data; got {has}. Wrap the data in "
            f"pyro.plate('{plate}', len(x)), or name the plate that holds them by plate=."
        )
    if found is not None and not found.vectorized:
        raise ValueError(
            f"Expected plate '{plate}' to be vectorised (with pyro.plate(...):); got a sequential "
            f"one (for i in pyro.plate(...))."
        )
    if found is not None and found.size == -1:
        found = _with_size(found, sites)
    return found


def _with_size(frame: Any, sites: Iterable[dict]) -> Any:
    """The frame of a plate without a size of its own, ``pyro.plate("data")``, with its sites'."""
    inside = [s for s in sites if any(f.name == frame.name for f in s["cond_indep_stack"])]
    shapes = {site["name"]: site["fn"].batch_shape for site in inside}
    sizes = {n: b[frame.dim] if len(b) >= -frame.dim else 1 for n, b in shapes.items()}
    size = max(sizes.values())
    alone = [name for name, own in sizes.items() if own != size]
    if alone:
        raise ValueError(
            f"Expected plate '{frame.name}' to have a size, as sites have to be expanded to it; "
            f"got none, and {alone} have one value for all data. Write "
            f"pyro.plate('{frame.name}', len(x))."
        )
    return frame._replace(size=size, full_size=size)


def hold_subsamples(
    model: Program, guide: Program, args: tuple = (), kwargs: dict | None = None
) -> tuple[Program, Program]:
    """Let all runs of a pair see one and the same minibatch, which its plates draw here.

    Values per datum from several runs of a pair that subsamples by itself would otherwise be of
    different data.
    """
    kwargs = kwargs or {}
    with torch.no_grad(), poutine.block(), device_of(args, kwargs):
        indices = poutine.trace(model).get_trace(*args, **kwargs)
    for name in [n for n, s in indices.nodes.items() if not site_is_subsample(s)]:
        indices.remove_node(name)
    return poutine.replay(model, trace=indices), poutine.replay(guide, trace=indices)


class _PlateSize(Messenger):
    """Multiplies the scale inside a plate by full size / size, as a subsampled plate does."""

    def __init__(self, size: int, plate: str) -> None:
        super().__init__()
        self.size, self.plate = size, plate

    def _process_message(self, msg: Any) -> None:
        frames = msg["cond_indep_stack"]
        for i, frame in enumerate(frames):
            if frame.name == self.plate and frame.full_size in (None, frame.size):
                if frame.size == -1:
                    if msg["type"] != "sample":
                        continue
                    frame = _with_size(frame, [msg])
                full = frame._replace(full_size=self.size)
                msg["cond_indep_stack"] = (*frames[:i], full, *frames[i + 1 :])
                msg["scale"] = msg["scale"] * (self.size / frame.size)


def device_of(args: tuple = (), kwargs: dict | None = None) -> AbstractContextManager[Any]:
    """Let a program make its tensors where its arguments are, if that is not the CPU.

    ``dist.Normal(0.0, 1.0)`` in a plate is a tensor with an entry per datum. Inside this context it
    is made on the device of the data, so that a story in plain numbers runs on any device.
    """
    tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
    elsewhere = (t.device for t in tensors if t.device.type != "cpu")
    return next(elsewhere, nullcontext())


@contextmanager
def untouched_random_state(args: tuple = (), kwargs: dict | None = None) -> Iterator[None]:
    """Put torch's generators back as they were: the CPU's, and those of the arguments' devices."""
    tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
    devices = sorted({t.device.index for t in tensors if t.is_cuda})
    if not devices and torch.cuda.is_initialized():
        devices = [torch.cuda.current_device()]
    with torch.random.fork_rng(devices=devices):
        yield


def _plain_traces(model: Program, guide: Program, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
    with (
        torch.no_grad(),
        poutine.block(),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
        warnings.catch_warnings(),
    ):
        # Pyro warns where sites do not match; here that is an error, with its remedy
        warnings.simplefilter("ignore")
        return get_importance_trace("flat", float("inf"), model, guide, args, kwargs)


def _sample_sites(trace: Trace) -> dict[str, dict]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def _check_sites_match(model_trace: Trace, guide_trace: Trace) -> None:
    model_sites, guide_sites = _sample_sites(model_trace), _sample_sites(guide_trace)
    for name, site in model_sites.items():
        summed_out = site["infer"].get("enumerate") == "parallel"
        if not site["is_observed"] and name not in guide_sites and not summed_out:
            raise ValueError(
                f"Expected the guide to sample every latent of the model; got none at site "
                f"'{name}'. Add pyro.sample('{name}', ...) to the guide, or, if it is discrete, "
                f"sum it out by infer={{'enumerate': 'parallel'}} in the model."
            )
    for name, site in guide_sites.items():
        known = name in model_sites and not model_sites[name]["is_observed"]
        if not known and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"Expected every site of the guide among the latents of the model; got '{name}'. "
                f"Rename it, or mark it infer={{'is_auxiliary': True}}."
            )


def _plate_nesting(traces: tuple[Trace, ...]) -> int:
    sites = [site for trace in traces for site in _sample_sites(trace).values()]
    dims = [f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized]
    return -min(dims, default=0)


def _is_mean_field(model_sites: dict[str, dict], guide_sites: dict[str, dict]) -> bool:
    """A condition that suffices for the analytic KL of ``TraceMeanField_ELBO`` to be right.

    Every latent is reparameterised, model and guide have them in the same order (so that no parent
    of a latent in the model can be its descendant in the guide), and both weigh and mask them
    alike, since that objective reads scale and mask from the guide alone.
    """
    shared = [name for name in model_sites if name in guide_sites]
    if shared != [name for name in guide_sites if name in model_sites]:
        return False
    if any(name not in guide_sites for name, s in model_sites.items() if not s["is_observed"]):
        return False
    if not all(_has_rsample(site) for site in guide_sites.values()):
        return False
    return all(
        _same(model_sites[name][key], guide_sites[name][key])
        for name in shared
        for key in ("scale", "mask")
    )


def _has_rsample(site: dict) -> bool:
    return bool(getattr(site["fn"], "has_rsample", False))


def _is_point_mass(site: dict) -> bool:
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _is_in_the_reals(site: dict) -> bool:
    try:
        support = site["fn"].support
    except NotImplementedError:  # a distribution that does not know
        return True
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real


def _is_unmasked(site: dict) -> bool:
    return site["mask"] is None or site["mask"] is True


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _unconstrained(value: Tensor) -> Tensor:
    """The leaf tensor behind a parameter's value, as SVI finds it."""
    unconstrained = getattr(value, "unconstrained", None)
    return value if unconstrained is None else unconstrained()
