"""Programs with the values of some sites given."""

from collections.abc import Mapping
from typing import Any

from pyro.poutine.messenger import Messenger

__all__ = ["Given"]


class Given(Messenger):
    """Lets a program have these values at its latent sites and for its plates' indices.

    It belongs outside of what enumerates, which has to see a site before its value is there.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
