"""Observations that are missing in part: programs with masks at their observed sites."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.checks import check_boolean
from pyro_lvm.distributions import Incomplete
from pyro_lvm.pair.programs import Program

__all__ = ["Masks", "entry_mask", "masked"]


def masked(model: Program, /, **masks: Tensor | None) -> Program:
    """Let a model have observations of which some entries are missing.

        log p(x_i | z_i) becomes log p(x_io | z_i),    o: where the mask is True

    The observed site counts the entries under the mask's True only, as if the others had never been
    measured; what stands there, NaN too, does not matter. Every estimate is then one given what was
    observed, and `marginal.impute` draws the rest.

    Masks are those of one call. Where the data come in minibatches the mask comes with them::

        def model(x, mask):
            return lvm.masked(story, x=mask)(x)

    Args:
        model: The model.
        **masks: Observed site -> booleans, True where an entry is observed: ``N x event`` or
            broadcastable to it, with a dimension for each of the plates and of the event; or
            ``N``, of whole events. Where a plate draws a part of its data, a mask of all of them is
            taken apart likewise. None stands for all.

    Returns:
        A program with the model's arguments.

    Raises:
        TypeError: When it runs, if a mask is not a tensor of booleans.
        ValueError: When it runs, if there is no such observed site, if a shape does not fit, or if
            the entries depend on each other without a closed form of their marginal.
    """
    return Masks(**masks)(model)


def entry_mask(site: str, mask: Tensor, plates: Sequence[int], event: Sequence[int]) -> Tensor:
    """A mask with a dimension for each of the plates and of the event.

    Args:
        site: Name of the observed site, for errors.
        mask: As for `masked`.
        plates: Sizes of the plates; -1 for one that is not known.
        event: The event shape.

    Returns:
        The mask, with dimensions of size 1 for the event if it was of whole events.

    Raises:
        TypeError: If the mask is not a tensor of booleans.
        ValueError: If its shape does not fit.
    """
    check_boolean(site, mask)
    given, expected = tuple(mask.shape), (*plates, *event)
    if mask.dim() == len(plates):
        mask = mask.reshape(*mask.shape, *[1] * len(event))
    if mask.dim() != len(expected) or any(
        own != 1 and full not in (own, -1) for own, full in zip(mask.shape, expected, strict=True)
    ):
        raise ValueError(
            f"Expected a mask for site '{site}' of shape {expected}, or {tuple(plates)} for whole "
            f"events; got {given}. One that all data share has size 1 in their place."
        )
    return mask


class Masks(Messenger):
    """Puts masks on observed sites; outside of the plates around them.

    Args:
        **masks: Site -> mask, as for `masked`.
    """

    def __init__(self, **masks: Tensor | None) -> None:
        super().__init__()
        self.masks = {name: mask for name, mask in masks.items() if mask is not None}
        self._met: set[str] = set()
        self._indices: dict[str, Tensor] = {}

    def __enter__(self) -> "Masks":
        self._met, self._indices = set(), {}
        return super().__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        missing = sorted(self.masks.keys() - self._met)
        if missing and exc_type is None:
            raise ValueError(
                f"Expected observed sites with the names of the masks; got none at {missing}. Name "
                f"the sites as the model does."
            )

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.masks or site_is_subsample(msg):
            return
        if not msg["is_observed"] and not msg["infer"].get("was_observed"):
            raise ValueError(
                f"Expected an observed site to mask; got the latent site '{msg['name']}'. Mask "
                f"what pyro.sample has obs= for; a model that poutine.condition gives its data "
                f"goes inside: masked(poutine.condition(model, ...), ...)."
            )
        self._met.add(msg["name"])
        mask = self._fitted(msg, self.masks[msg["name"]])
        try:
            msg["fn"] = Incomplete(msg["fn"], mask)
        except ValueError as error:
            raise ValueError(f"Site '{msg['name']}' has no such marginal. {error}") from error

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._indices[msg["name"]] = msg["value"]

    def _fitted(self, msg: Any, mask: Tensor) -> Tensor:
        """The mask with the dimensions of the site's plates and event."""
        check_boolean(msg["name"], mask)
        frames = {f.dim: f for f in msg["cond_indep_stack"] if f.vectorized}
        plates = [
            frames[dim].size if dim in frames else 1 for dim in range(min(frames, default=0), 0)
        ]
        for dim, frame in frames.items():
            mask = self._of_plate(mask, frame, dim + len(plates))
        return entry_mask(msg["name"], mask, plates, msg["fn"].event_shape)

    def _of_plate(self, mask: Tensor, frame: Any, dim: int) -> Tensor:
        """The rows that a plate has drawn, of a mask of all that it stands for."""
        index = self._indices.get(frame.name)
        if index is None or dim >= mask.dim() or frame.full_size == frame.size:
            return mask
        if mask.shape[dim] != frame.full_size:
            return mask
        return mask.index_select(dim, index.to(mask.device))
