"""Divergences by a discriminator."""

import math
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from pyro_lvm.checks import check_positive
from pyro_lvm.divergences.samples import check_two_samples

__all__ = ["Adversarial", "Judgement", "Players"]

Objective = Literal["js", "kl"]
Generator = Literal["non-saturating", "minimax"]


class Players(NamedTuple):
    """What each player minimises, and what they are made of.

    Attributes:
        divergence: With a gradient by the samples alone.
        loss: The discriminator's, with a gradient by its parameters alone.
        parts: By name, without a gradient: nats, and shares where the name has a slash.
    """

    divergence: Tensor
    loss: Tensor
    parts: dict[str, Tensor]


class Judgement(NamedTuple):
    """What a discriminator makes of a sample.

    Attributes:
        logits: Of "this comes from p", ``B``.
        error: What it is to keep small besides, on this sample, a scalar.
    """

    logits: Tensor
    error: Tensor | float = 0.0


class Adversarial(nn.Module):
    """A divergence between two distributions, by a discriminator that learns to tell them apart.

    The discriminator's output T(z) is the logit of "z comes from p". It minimises

        L = E_p softplus(-T(z)) + E_q softplus(T(z)),

    2 log 2 nats at chance, with its optimum at T = log p(z) / q(z). With it, in nats,

        js:  JS(q, p) = log 2 - L / 2        a lower bound in expectation, for a fixed discriminator
        kl:  KL(q || p) = E_q[-T(z)]         wrong by the mean error of T, in either direction

    JS is the Jensen-Shannon divergence, at most log 2. On the draws that the discriminator was
    trained with it is too high if they are few and learned by heart.

    The samples' gradient is not that of the value. It is that of a surrogate through a
    discriminator held fixed:

        js, minimax:         [E_p log sigmoid(T(z)) + E_q log sigmoid(-T(z))] / 2
        js, non-saturating:  [-E_q log sigmoid(T(z)) - E_p log sigmoid(-T(z))] / 2
        kl:                  E_q[-T(z)] - E_p[exp(-T(z))] + 1

    At the optimal discriminator the first and the last have the gradient of the divergence, for
    both samples. The second does not fade where the two are told apart with ease; at the optimum it
    pulls q along the gradient of KL(q || p) / 2 - JS(q, p). Draws from p matter only where the
    prior is learned.

    ``forward`` adds a term of value 0 with the gradient of L by the discriminator's parameters, so
    that one backward pass and one optimiser step serve both players. A weight on the result scales
    both gradients; the discriminator's learning rate is its own.

    q and p pass through the discriminator one after the other: batch norm sees each by itself. L
    updates its buffers (moments, singular vectors); the surrogate works on copies of them. Layers
    under spectral normalisation (`nn.spectral_normalization`) are discriminators like others.

    Under conditions y, such as labels, q(z | y) and p(z | y) are compared: the discriminator is
    called with them too, T(z, y). Row i of both samples belongs to condition i.

    A penalty on the slope of T where the data are keeps the two players from circling each other.
    The discriminator then minimises L plus

        R1 = gamma / 2 E_p |grad_z T(z)|^2,

    estimated at the draws from p, with gamma the ``gradient_penalty``. The samples do not see it.

    Args:
        discriminator: From ``B x D``, and conditions if there are any, to logits, ``B`` or
            ``B x 1``; `nn.Joined` makes a network of several inputs.
        objective: Which divergence.
        generator: Which surrogate for ``"js"``; there is only one for ``"kl"``.
        learning_rate: The discriminator's, for a training loop to read; the loop's own if None.
        gradient_penalty: gamma; 0 for none.

    Raises:
        TypeError: If the discriminator is not an ``nn.Module``.
        ValueError: If the objective or the generator is an unknown word, the generator is set for
            ``"kl"``, the learning rate is not positive, or the penalty negative.

    Reference:
        Goodfellow et al. 2014, "Generative adversarial nets", arXiv 1406.2661, section 3 (the
        players), eq. 5 (JS); Arjovsky and Bottou 2017, arXiv 1701.04862, theorem 2.5 (the pull of
        the non-saturating surrogate); Mescheder et al. 2017, "Adversarial variational Bayes", arXiv
        1701.04722, section 3 (KL by a discriminator); Nguyen, Wainwright and Jordan 2010,
        "Estimating divergence functionals and the likelihood ratio by convex risk minimization",
        arXiv 0809.0853 (the dual form behind the surrogate for KL); Makhzani et al. 2015,
        "Adversarial autoencoders", arXiv 1511.05644; Mirza and Osindero 2014, "Conditional
        generative adversarial nets", arXiv 1411.1784 (conditions); Mescheder, Geiger and Nowozin
        2018, "Which training methods for GANs do actually converge?", arXiv 1801.04406, eq. 9
        (R1).
    """

    takes_conditions: ClassVar[bool] = True
    """That it is called with conditions beside the samples, and not with columns of them."""

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        objective: Objective = "js",
        generator: Generator = "non-saturating",
        learning_rate: float | None = None,
        gradient_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        _check_settings(discriminator, objective, generator)
        if learning_rate is not None:
            check_positive("learning_rate", learning_rate)
        check_positive("gradient_penalty", gradient_penalty, minimum=0.0)
        self.discriminator = discriminator
        self.objective = objective
        self.generator = generator
        self.learning_rate = learning_rate
        self.gradient_penalty = gradient_penalty

    @property
    def own_parameters(self) -> list[nn.Parameter]:
        """The discriminator's parameters, which `learning_rate` is for."""
        return list(self.discriminator.parameters())

    def forward(self, q_samples: Tensor, p_samples: Tensor, *conditions: Tensor) -> Tensor:
        """Estimate the divergence, with the gradients of both players.

        Args:
            q_samples: ``B1 x D``, draws from q.
            p_samples: ``B2 x D``, draws from p.
            *conditions: First dimension ``B = B1 = B2``; what the discriminator is given besides.

        Returns:
            A scalar, in nats: the value of the divergence, whose gradient by the samples is that of
            the surrogate, and by the discriminator's parameters that of its loss.

        Raises:
            TypeError: If a sample is not a floating point tensor.
            ValueError: If a sample is not ``B x D`` with at least one row, the widths D differ, a
                condition has not as many rows as each sample, or the discriminator does not return
                one logit per row.
        """
        divergence, discriminator_loss = self.players(q_samples, p_samples, *conditions)
        return divergence + _slope_alone(discriminator_loss)

    def players(
        self, q_samples: Tensor, p_samples: Tensor, *conditions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What each player minimises, for two optimisers.

        Args:
            q_samples: ``B1 x D``, draws from q.
            p_samples: ``B2 x D``, draws from p.
            *conditions: As for ``forward``.

        Returns:
            The divergence, with a gradient by the samples alone, and the discriminator's loss, with
            one by the discriminator's parameters alone. Scalars, in nats.

        Raises:
            TypeError: As for ``forward``.
            ValueError: As for ``forward``.
        """
        divergence, loss, _ = self.players_and_parts(q_samples, p_samples, *conditions)
        return divergence, loss

    def players_and_parts(
        self, q_samples: Tensor, p_samples: Tensor, *conditions: Tensor
    ) -> Players:
        """The same, with what shows the balance of the players.

        Args:
            q_samples: ``B1 x D``, draws from q.
            p_samples: ``B2 x D``, draws from p.
            *conditions: As for ``forward``.

        Returns:
            Both, and the parts: ``divergence``; ``discriminator``, the loss L; ``penalty``, R1
            where there is one; ``accuracy/draws`` and ``accuracy/data``, the shares of the rows
            of q and p that the discriminator tells right, 1 / 2 at chance.

        Raises:
            TypeError: As for ``forward``.
            ValueError: As for ``forward``.
        """
        check_two_samples(q_samples, p_samples)
        _check_conditions(q_samples, p_samples, conditions)
        q = self._judge(self.discriminator, q_samples.detach(), conditions)
        p, penalty = self._judge_data(p_samples.detach(), conditions)
        loss = softplus(-p.logits).mean() + softplus(q.logits).mean()  # L
        value = math.log(2) - loss / 2 if self.objective == "js" else -q.logits.mean()
        pull = _slope_alone(self._surrogate(q_samples, p_samples, conditions))
        parts = {"divergence": value, "discriminator": loss, **self._parts(q, p)}
        if isinstance(penalty, Tensor):
            parts["penalty"] = penalty
        return Players(
            divergence=(value + q.error).detach() + pull,
            loss=loss + q.error + p.error + penalty,
            parts={name: part.detach() for name, part in parts.items()},
        )

    def _parts(self, q: Judgement, p: Judgement) -> dict[str, Tensor]:
        """What else is to be seen of the two judgements."""
        return {
            "accuracy/draws": (q.logits < 0).to(q.logits.dtype).mean(),
            "accuracy/data": (p.logits > 0).to(p.logits.dtype).mean(),
        }

    def _surrogate(self, q_samples: Tensor, p_samples: Tensor, conditions: tuple) -> Tensor:
        """What the samples move along, but for a constant; a fixed prior costs nothing."""
        q = self._judge(self._fixed, q_samples, conditions)
        surrogate = self._q_term(q.logits).mean() + q.error  # E_q
        if p_samples.requires_grad:
            p = self._judge(self._fixed, p_samples, conditions)
            surrogate = surrogate + self._p_term(p.logits).mean() + p.error  # E_p
        return surrogate

    def _q_term(self, logits: Tensor) -> Tensor:
        if self.objective == "kl":
            return -logits
        return logsigmoid(-logits) / 2 if self.generator == "minimax" else -logsigmoid(logits) / 2

    def _p_term(self, logits: Tensor) -> Tensor:
        if self.objective == "kl":
            return -torch.exp(-logits)
        return self._q_term(-logits)  # JS is symmetric: the logit of "z comes from q" is -T

    def _judge(self, discriminator: Any, z: Tensor, conditions: tuple) -> Judgement:
        return Judgement(_as_column(discriminator(z, *conditions), len(z)))

    def _judge_data(self, z: Tensor, conditions: tuple) -> tuple[Judgement, Tensor | float]:
        """The judgement of draws from p, and R1 there."""
        if not self.gradient_penalty:
            return self._judge(self.discriminator, z, conditions), 0.0
        with torch.enable_grad():  # the slope is needed where no gradient is
            judgement = self._judge(self.discriminator, z.requires_grad_(), conditions)
            (slope,) = torch.autograd.grad(judgement.logits.sum(), z, create_graph=True)
        return judgement, self.gradient_penalty / 2 * slope.square().sum(1).mean()

    def _fixed(self, z: Tensor, *conditions: Tensor) -> Any:
        """The discriminator with constant parameters and copies of the buffers."""
        state = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        state |= {name: b.clone() for name, b in self.discriminator.named_buffers()}
        return torch.func.functional_call(self.discriminator, state, (z, *conditions))

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        generator = f", generator={self.generator!r}" if self.objective == "js" else ""
        rate = "" if self.learning_rate is None else f", learning_rate={self.learning_rate}"
        gamma = f", gradient_penalty={self.gradient_penalty}" if self.gradient_penalty else ""
        return f"objective={self.objective!r}{generator}{rate}{gamma}"


def _slope_alone(x: Tensor) -> Tensor:
    """0, with the gradient of ``x``."""
    return x - x.detach()


def _check_conditions(q: Tensor, p: Tensor, conditions: tuple) -> None:
    sizes = {len(q), len(p), *map(len, conditions)}
    if conditions and len(sizes) > 1:
        raise ValueError(
            f"Expected as many rows of q_samples and p_samples as conditions, each row under its "
            f"own; got {len(q)} and {len(p)} for {[len(c) for c in conditions]}."
        )


def _as_column(logits: Tensor, size: int) -> Tensor:
    """One logit per row, ``B``."""
    if not isinstance(logits, Tensor) or logits.shape not in ((size,), (size, 1)):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"Expected the discriminator to return one logit per row, of shape ({size},) or "
            f"({size}, 1); got {got}. End it with nn.Linear(..., 1)."
        )
    return logits.reshape(size)


def _check_settings(discriminator: object, objective: str, generator: str) -> None:
    if not isinstance(discriminator, nn.Module):
        raise TypeError(
            f"Expected discriminator to be an nn.Module from B x D to B logits; got "
            f"{discriminator!r}. Try nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, 1))."
        )
    if objective not in get_args(Objective):
        raise ValueError(f"Expected objective to be 'js' or 'kl'; got {objective!r}.")
    if generator not in get_args(Generator):
        raise ValueError(
            f"Expected generator to be 'non-saturating' or 'minimax'; got {generator!r}."
        )
    if objective == "kl" and generator != "non-saturating":
        raise ValueError(
            f"Expected no generator for objective='kl', which has one gradient only; got "
            f"{generator!r}. Leave it out, or use objective='js'."
        )
