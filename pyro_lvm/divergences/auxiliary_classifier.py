"""Divergences by a discriminator that also names the class."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyro_lvm.checks import check_count, check_positive
from pyro_lvm.divergences.adversarial import Adversarial, Judgement

__all__ = ["AuxiliaryClassifier"]


class AuxiliaryClassifier(Adversarial):
    """A conditional divergence by a discriminator that tells real from drawn, and names the class.

    The discriminator's first output is T(z), the logit of "z comes from p", the others are those of
    a classifier f(y | z). It minimises, with L as in `Adversarial` and the weight w,

        L + w [E_p -log f(y | z) + E_q -log f(y | z)],

    and the samples what `Adversarial` has for them, with the classification of their own added:

        JS(q, p) + w E_q -log f(y | z)

    Both players want the class to be told: the draws under label y come to look like y. The value
    is this sum (at q = p not 0, but w times the entropy of y given z), in nats.

    The classifier sees no label, hence neither does T: q and p are compared as they are over all
    labels, and the classification alone ties z to y. Where classes overlap it draws q(z | y) away
    from where other classes are, so that p(z | y) is not the optimum (Shu et al. 2017).

    Args:
        discriminator: From ``B x D`` to ``B x (1 + C)``: T, then the logits of the C classes.
        num_classes: ``C``.
        weight: w.
        **settings: As for `Adversarial`.

    Raises:
        TypeError: If the discriminator is not an ``nn.Module``.
        ValueError: If the number of classes or the weight is not positive, or as for `Adversarial`.

    Reference:
        Odena, Olah and Shlens 2017, "Conditional image synthesis with auxiliary classifier GANs",
        arXiv 1610.09585, eq. 2 and 3; Shu, Bui and Ermon 2017, "AC-GAN learns a biased
        distribution", NIPS workshop on Bayesian deep learning.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        num_classes: int,
        *,
        weight: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(discriminator, **settings)
        check_count("num_classes", num_classes)
        check_positive("weight", weight)
        self.num_classes, self.weight = num_classes, weight

    def forward(self, q_samples: Tensor, p_samples: Tensor, *conditions: Tensor) -> Tensor:
        """Estimate the divergence, with the gradients of both players.

        Args:
            q_samples: ``B x D``, draws from q(z | y).
            p_samples: ``B x D``, draws from p(z | y).
            *conditions: One, the labels y ``B``, integers from 0 to C - 1.

        Returns:
            A scalar, in nats.

        Raises:
            TypeError: If a sample is not a floating point tensor, or the labels are no integers.
            ValueError: If a sample is not ``B x D``, there is not one label for each row, or the
                discriminator does not return ``1 + C`` logits per row.
        """
        return super().forward(q_samples, p_samples, *conditions)

    def _judge(self, discriminator: Any, z: Tensor, conditions: tuple) -> Judgement:
        labels = _labels(conditions, len(z))
        logits, of_classes = self._split(discriminator(z), len(z))
        # a label below 0 is out of range too, and not one to be ignored
        error = cross_entropy(of_classes, labels, ignore_index=torch.iinfo(torch.long).min)
        return Judgement(logits, self.weight * error)

    def _split(self, logits: Any, size: int) -> tuple[Tensor, Tensor]:
        """T, ``B``, and the logits of the classes, ``B x C``."""
        expected = (size, 1 + self.num_classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"Expected the discriminator to return a logit of real data and one for each of "
                f"{self.num_classes} classes per row, of shape {expected}; got {got}. End it with "
                f"nn.Linear(..., {1 + self.num_classes})."
            )
        return logits[:, 0], logits[:, 1:]

    def _parts(self, q: Judgement, p: Judgement) -> dict[str, Tensor]:
        """The classifier's losses too, in nats, without their weight."""
        errors = {"classifier[draws]": q.error, "classifier[data]": p.error}
        found = {name: torch.as_tensor(error) / self.weight for name, error in errors.items()}
        return {**super()._parts(q, p), **found}

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"num_classes={self.num_classes}, weight={self.weight}, {super().extra_repr()}"


def _labels(conditions: tuple, size: int) -> Tensor:
    """The labels, ``B``, int64."""
    if len(conditions) != 1:
        raise ValueError(
            f"Expected one condition, the labels; got {len(conditions)}. Name their site, as in "
            f"ImplicitDivergence(AuxiliaryClassifier(...), conditions=['y'])."
        )
    (labels,) = conditions
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"Expected labels of integers; got {got}. Try labels.long().")
    if labels.shape != (size,):
        raise ValueError(
            f"Expected one label per row, of shape ({size},); got {tuple(labels.shape)}."
        )
    return labels.long()
