"""The semi-supervised variational autoencoder as a Pyro pair: some data have labels."""

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from pyro_lvm.checks import check_data, check_finite, check_positive
from pyro_lvm.models.base import Model
from pyro_lvm.models.latents import check_prior, draws, head_shape, prior_of
from pyro_lvm.pair import Masks

__all__ = ["SemiSupervisedVAE"]

_UNKNOWN = -1


class SemiSupervisedVAE(Model):
    """A VAE with a class beside the latent vector, learnt from a few labels (Kingma et al. 2014).

        model:  y_i ~ Categorical(class_probs),  label_i = y_i,
                z_i ~ p(z),  x_i ~ p(x | z_i, y_i) = decoder(z_i, y_i)
        guide:  y_i ~ q(y | x_i) = classifier(x_i), or the label where there is one,
                z_i ~ q(z | x_i, y_i) = encoder(x_i, y_i)

    with sites "y", "label", "z" and "x" in the plate "data": the model M2 of the paper. Model and
    guide take the data ``x``, ``N x event``, and the labels ``y``, integers ``N``, -1 where there
    is none; without ``y`` no datum has one. The label is an exact reading of the class, under a
    mask where it is unknown, so that all data have one bound (eq. 6 and 7):

        labelled:    log p(x, y) >= L(x, y) = E_q(z|x,y)[log p(x|y,z) p(y) p(z) - log q(z|x,y)]
        unlabelled:  log p(x)    >= U(x) = sum_y q(y|x) (L(x, y) - log q(y|x))

    The sum over classes is exact, by enumeration in the guide: it needs ``TraceEnum_ELBO`` or one
    of our objectives. Each datum costs as much as ``C``, a labelled one too, which is little where
    labels are few. Importance weights are those of log p(x, y) and of log p(x).

    Nothing in this bound trains the classifier at labelled data. The paper adds a classification
    term to what is maximised (eq. 9),

        sum_i [L(x_i, y_i) or U(x_i)]  +  label_weight sum_labelled log q(y_i | x_i)

    and so does ``supervised_model``. It is for training alone, as it is no log-probability::

        vae = SemiSupervisedVAE(classifier, encoder, decoder, num_classes=10, label_weight=50.0)
        lvm.fit(vae.supervised_model, vae.guide, (x, y))
        lvm.marginal.importance_sampling(vae.model, vae.guide, x_test)  # log p(x)

    The paper's weight is ``0.1 N / (number of labelled data)``. Where labels are few, the rows that
    have one can be repeated in the training data, so that every minibatch has some; a row that is
    there r times counts r times in both terms.

    Args:
        classifier: Module or function, x -> a Categorical, batch shape ``N``.
        encoder: Module or function, (x, labels) -> a Distribution over z. Labels have the batch
            shape ``N`` or, enumerated, ``C x 1``, and the result that of both together; `nn.Joined`
            makes such networks.
        decoder: Module or function, (z ``... x latent``, labels) -> a Distribution over x.
        num_classes: ``C``.
        prior: A Distribution over z, or a module that returns one when it is called. If None, a
            standard normal of the encoder's event shape.
        class_probs: p(y), ``C``; uniform if None.
        label_weight: Of the classification term, per labelled row.
        plate: Name of the data plate.

    Raises:
        ValueError: If a number does not fit, or the prior has a batch shape.

    Reference:
        Kingma, Rezende, Mohamed and Welling 2014, "Semi-supervised learning with deep generative
        models", arXiv 1406.5298.
    """

    def __init__(
        self,
        classifier: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        num_classes: int,
        prior: dist.Distribution | nn.Module | None = None,
        class_probs: Sequence[float] | Tensor | None = None,
        label_weight: float = 1.0,
        plate: str = "data",
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes, minimum=2)
        check_finite("label_weight", label_weight)
        check_positive("label_weight", label_weight, minimum=0.0)
        check_prior(prior)
        self.classifier, self.encoder, self.decoder = classifier, encoder, decoder
        self.num_classes, self.prior, self.plate = num_classes, prior, plate
        self.label_weight = label_weight
        self._latent_shape = head_shape(encoder)
        like = next(self.parameters(), torch.zeros(()))
        log_probs = _logits(class_probs, num_classes).to(like)
        self.register_buffer("_log_class_probs", log_probs, persistent=False)

    @pyro_method
    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The generative story, conditioned on x ``N x event`` and the labels y ``N``."""
        self._check(x, y)
        with Masks(label=_is_known(y)), pyro.plate(self.plate, len(x)):
            return self._story(x, y)

    @pyro_method
    def supervised_model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The model, and a factor q(y_i | x_i)^label_weight for every datum with a label."""
        self._check(x, y)
        with Masks(label=_is_known(y)), pyro.plate(self.plate, len(x)):
            if y is not None:
                pyro.factor("classification", self.label_weight * self._log_classified(x, y))
            return self._story(x, y)

    @pyro_method
    def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The class, enumerated, and the amortised posterior of z given x and the class."""
        self._check(x, y)
        with pyro.plate(self.plate, len(x)):
            q = self._classified(x, y)
            label = pyro.sample("y", q, infer={"enumerate": "parallel"})
            return pyro.sample("z", self.encode(x, label))

    def encode(self, x: Tensor, y: Tensor) -> Any:
        """q(z | x, y), a Distribution with the batch shape of x and y together."""
        q = self.encoder(x, y)
        self._latent_shape = q.event_shape  # for the default prior
        return q

    def decode(self, z: Tensor, y: Tensor) -> Any:
        """p(x | z, y), a Distribution with the batch shape of z ``... x latent`` and y."""
        return self.decoder(z, y)

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """q(y | x), ``N x C``."""
        return self.classifier(x).probs

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x' | z, y] at the mean z of q(z | x, y), ``N x event``.

        Args:
            x: ``N x event``.
            y: Labels ``N``; where there is none, the most probable class.
        """
        self._check(x, y)
        label = self._classified(x, y).logits.argmax(-1)
        return self.decode(self.encode(x, label).mean, label).mean

    @torch.no_grad()
    def sample(
        self, num_samples: int, y: Tensor | int | None = None, *, mean: bool = False
    ) -> Tensor:
        """Draws of x, ``num_samples x event``, from z ~ p(z), x ~ p(x | z, y).

        Args:
            num_samples: How many.
            y: The class of all, or of each, ``num_samples``; drawn from p(y) if None.
            mean: Whether to return E[x | z, y] in place of a draw of x.
        """
        if y is None:
            y = self._class_prior().sample((num_samples,))
        label = torch.as_tensor(y, device=self._log_class_probs.device).expand(num_samples)
        likelihood = self.decode(draws(self.prior_distribution(), num_samples), label)
        return likelihood.mean if mean else likelihood.sample()

    def prior_distribution(self) -> Any:
        """p(z), a Distribution without batch shape.

        Raises:
            ValueError: If the prior is the default one and the encoder has not been run yet.
        """
        return prior_of(self.prior, self._latent_shape, self._log_class_probs)

    def _story(self, x: Tensor, y: Tensor | None) -> Tensor:
        label = pyro.sample("y", self._class_prior())
        if y is not None:
            pyro.sample("label", dist.Categorical(logits=self._log_indicator(label)), obs=y)
        z = pyro.sample("z", self._prior_given(x))
        return pyro.sample("x", self.decode(z, label), obs=x)

    def _class_prior(self) -> Any:
        return dist.Categorical(logits=self._log_class_probs)

    def _prior_given(self, x: Tensor) -> Any:
        if self.prior is None and self._latent_shape is None:
            with torch.no_grad():
                self.encode(x, torch.zeros(len(x), dtype=torch.long, device=x.device))
        return self.prior_distribution()

    def _classified(self, x: Tensor, y: Tensor | None) -> Any:
        """q(y | x, label): the classifier's, or all mass on the label where there is one."""
        q = self.classifier(x)
        if y is None:
            return q
        known, indicator = (y != _UNKNOWN).unsqueeze(-1), self._log_indicator(y)
        return dist.Categorical(logits=torch.where(known, indicator, q.logits))

    def _log_classified(self, x: Tensor, y: Tensor) -> Tensor:
        """Log q(y_i | x_i), ``N``; 0 where there is no label."""
        log_prob = self.classifier(x).log_prob(y.clamp(min=0))
        return torch.where(y == _UNKNOWN, 0.0, log_prob)

    def _log_indicator(self, label: Tensor) -> Tensor:
        """0 at the label and -inf elsewhere, ``... x C``."""
        classes = torch.arange(self.num_classes, device=label.device)
        return (label.unsqueeze(-1) == classes).to(self._log_class_probs).log()

    def _check(self, x: Tensor, y: Tensor | None) -> None:
        if not isinstance(x, Tensor) or x.dim() < 1 or len(x) == 0:
            check_data("x", x)  # says what is wrong with it
        if y is None:
            return
        if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"Expected labels y of integers; got {got}. Try y.long().")
        if y.shape != x.shape[:1]:
            raise ValueError(
                f"Expected a label for each of the {len(x)} data, -1 where it is unknown; got y of "
                f"shape {tuple(y.shape)}."
            )
        if is_validation_enabled():  # it looks at values, which no recording of a loss does
            _check_range(y, self.num_classes)


def _is_known(y: Tensor | None) -> Tensor | None:
    return None if y is None else y != _UNKNOWN


def _logits(probs: Sequence[float] | Tensor | None, num_classes: int) -> Tensor:
    """Log p(y), ``C``."""
    table = torch.full((num_classes,), 1 / num_classes) if probs is None else torch.as_tensor(probs)
    if table.shape != (num_classes,) or not bool((table > 0).all()):
        raise ValueError(
            f"Expected class_probs to be {num_classes} positive numbers; got {probs!r}. "
            f"A class that never comes is none: leave it away."
        )
    return (table / table.sum()).log()


def _check_range(y: Tensor, num_classes: int) -> None:
    wrong = y[(y < _UNKNOWN) | (y >= num_classes)]
    if wrong.numel():
        raise ValueError(
            f"Expected labels from 0 to {num_classes - 1}, or -1 where they are unknown; got "
            f"{int(wrong[0])}."
        )
