"""Pairs of every kind that users bring, small enough to be checked by hand.

Each constructor returns a `Problem`. Where ``log_prob`` is given it is the exact log p(x), ``N``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import Tensor, nn
from torch.distributions import constraints

NUM_DATA = 6


@dataclass(frozen=True)
class Problem:
    model: Callable
    guide: Callable
    args: tuple[Any, ...]
    log_prob: Tensor | None = None
    enumerated: bool = False
    reparameterised: bool = True


def _data(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, generator=generator, dtype=torch.get_default_dtype())


def _log_normal(x, loc, variance):
    return -0.5 * ((x - loc) ** 2 / variance + math.log(2 * math.pi) + torch.log(variance))


def normal_normal() -> Problem:
    """z ~ N(0, 1), x ~ N(z, 1): p(x) = N(0, 2); functions with ``pyro.param``."""
    x = _data(NUM_DATA)

    def model(x):
        shift = pyro.param("shift", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.4))
        scale = pyro.param("scale", torch.tensor(0.8), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, scale))

    exact = _log_normal(x, 0.3, torch.tensor(2.0))
    return Problem(model, guide, (x,), exact)


def modules() -> Problem:
    """The same story with PyroModules, the guide a bound method, an event of rank two."""
    x = _data(NUM_DATA, 2, 3)

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 6)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                loc = self.linear(z).unflatten(-1, (2, 3))
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(2), obs=x)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 2)
            self.scale = PyroParam(torch.ones(2), constraint=constraints.positive)

        @pyro_method
        def encode(self, x):
            with pyro.plate("data", len(x)):
                loc = self.linear(x.flatten(-2))
                pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))

    torch.manual_seed(3)
    model, guide = Model(), Guide()
    covariance = model.linear.weight @ model.linear.weight.T + torch.eye(6)
    exact = dist.MultivariateNormal(model.linear.bias, covariance).log_prob(x.flatten(1)).detach()
    return Problem(model, guide.encode, (x,), exact)


def global_and_local() -> Problem:
    """A global mean beside local latents, in a subsampled plate."""
    x = _data(30)

    def plate():
        return pyro.plate("data", len(x), subsample_size=NUM_DATA)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with plate() as index:
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    def guide():
        loc = pyro.param("loc", torch.tensor(0.1))
        slope = pyro.param("slope", torch.tensor(0.5))
        pyro.sample("mean", dist.Normal(loc, 0.2))
        with plate() as index:
            pyro.sample("z", dist.Normal(slope * x[index], 0.7))

    return Problem(model, guide, ())


def nested_masked() -> Problem:
    """Words in documents: a plate inside the data plate, a mask, and a user's scale."""
    x = _data(4, NUM_DATA)
    mask = torch.tensor([[True] * NUM_DATA] * 3 + [[False, True] * (NUM_DATA // 2)])

    def model(x):
        with pyro.plate("data", NUM_DATA, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("words", 4, dim=-2):
                w = pyro.sample("w", dist.Normal(z[..., 0], 1.0))
                with poutine.mask(mask=mask), poutine.scale(scale=0.5):
                    pyro.sample("x", dist.Normal(w + z[..., 1], 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.4))
        with pyro.plate("data", NUM_DATA, dim=-1):
            loc = slope * torch.stack([x.mean(0), x[0]], -1)
            pyro.sample("z", dist.Normal(loc, 0.6).to_event(1))
            with pyro.plate("words", 4, dim=-2):
                pyro.sample("w", dist.Normal(slope * x, 0.5))

    return Problem(model, guide, (x,))


def auxiliary() -> Problem:
    """A guide with an auxiliary site: z = a + 1, which the model does not know of."""
    x = _data(NUM_DATA)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(slope * x - 1.0, 0.7), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(a + 1.0))

    return Problem(model, guide, (x,), _log_normal(x, 0.0, torch.tensor(2.0)))


def score_function() -> Problem:
    """A latent without reparameterisation: y ~ Bernoulli, sampled by the guide."""
    x = _data(NUM_DATA)

    def model(x):
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(loc[y.long()], 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=slope * x))

    one = torch.ones(())
    parts = [math.log(0.7) + _log_normal(x, -1.0, one), math.log(0.3) + _log_normal(x, 1.0, one)]
    exact = torch.logsumexp(torch.stack(parts), 0)
    return Problem(model, guide, (x,), exact, reparameterised=False)


def mixture() -> Problem:
    """A Gaussian mixture with z summed out in the model; the guide is empty."""
    x = _data(NUM_DATA, 2)

    def model(x):
        loc = pyro.param("loc", torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 0.0]]))
        weights = pyro.param(
            "weights", torch.tensor([0.2, 0.3, 0.5]), constraint=constraints.simplex
        )
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)

    def guide(x):
        pass

    loc, weights = (
        torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 0.0]]),
        torch.tensor([0.2, 0.3, 0.5]),
    )
    parts = dist.Normal(loc, 1.0).to_event(1).log_prob(x[:, None]) + weights.log()
    return Problem(model, guide, (x,), parts.logsumexp(-1), enumerated=True)


def topics() -> Problem:
    """A topic summed out for every word in a nested plate, given a sampled local latent."""
    words = torch.tensor([[0, 2, 1, 1, 0, 2], [1, 1, 0, 2, 2, 0], [2, 0, 0, 1, 2, 1]])
    table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])

    def model(words):
        word_probs = pyro.param("word_probs", table, constraint=constraints.simplex)
        with pyro.plate("data", NUM_DATA, dim=-1):
            logit = pyro.sample("logit", dist.Normal(0.0, 1.0))
            with pyro.plate("words", 3, dim=-2):
                probs = torch.stack([torch.sigmoid(logit), torch.sigmoid(-logit)], -1)
                t = pyro.sample("t", dist.Categorical(probs), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(word_probs[t]), obs=words)

    def guide(words):
        slope = pyro.param("slope", torch.tensor(0.4))
        with pyro.plate("data", NUM_DATA, dim=-1):
            pyro.sample("logit", dist.Normal(slope * (words == 0).double().mean(0), 1.0))

    grid = torch.linspace(-8, 8, 4001)  # log p(words) by quadrature over the logit
    theta = torch.stack([torch.sigmoid(grid), torch.sigmoid(-grid)], -1) @ table
    per_word = theta.log()[:, words].sum(1)  # grid x N
    density = dist.Normal(0.0, 1.0).log_prob(grid)[:, None] + math.log(grid[1] - grid[0])
    return Problem(model, guide, (words,), (per_word + density).logsumexp(0), enumerated=True)


def mixture_prior() -> Problem:
    """y summed out in the model, z given y sampled by the guide: a mixture prior over z."""
    x = _data(NUM_DATA)
    weights, centre = torch.tensor([0.25, 0.75]), torch.tensor([-2.0, 1.0])

    def model(x):
        loc = pyro.param("loc", centre)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(loc[y], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.8))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.5))

    parts = _log_normal(x[:, None], centre, torch.tensor(1.25)) + weights.log()
    return Problem(model, guide, (x,), parts.logsumexp(-1), enumerated=True)


def _two_clusters() -> tuple[Tensor, Tensor, Callable, Tensor]:
    """Data, centres, model and log p(x) of x ~ N(z + centre[y], 0.5)."""
    x = _data(NUM_DATA)
    weights, centre = torch.tensor([0.25, 0.75]), torch.tensor([-2.0, 1.0])

    def model(x):
        loc = pyro.param("loc", centre)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + loc[y], 0.5), obs=x)

    parts = _log_normal(x[:, None], centre, torch.tensor(1.25)) + weights.log()
    return x, centre, model, parts.logsumexp(-1)


def semi_supervised() -> Problem:
    """y enumerated in the guide, and z | x, y sampled there: the M2 model without labels."""
    x, centre, model, exact = _two_clusters()

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.8))
        with pyro.plate("data", len(x)):
            logits = torch.stack([-slope * x, slope * x], -1)
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(slope * (x - centre[y]), 0.5))

    return Problem(model, guide, (x,), exact, enumerated=True)


def independent_guide() -> Problem:
    """y enumerated in the guide beside a z that does not depend on it."""
    x, _, model, exact = _two_clusters()

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            logits = torch.stack([-slope * x, slope * x], -1)
            pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(slope * x, 1.2))

    return Problem(model, guide, (x,), exact, enumerated=True)


def guide_chain() -> Problem:
    """Two enumerated sites in the guide, the second given the first, and one in a nested plate."""
    x = _data(2, NUM_DATA)
    start, step = torch.tensor([0.4, 0.6]), torch.tensor([[0.9, 0.1], [0.3, 0.7]])

    def model(x):
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", NUM_DATA, dim=-1):
            a = pyro.sample("a", dist.Categorical(start))
            b = pyro.sample("b", dist.Categorical(step[a]))
            with pyro.plate("words", 2, dim=-2):
                c = pyro.sample("c", dist.Categorical(step[b]))
                pyro.sample("x", dist.Normal(loc[c], 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.6))
        with pyro.plate("data", NUM_DATA, dim=-1):
            shape = torch.stack([-slope * x.mean(0), slope * x.mean(0)], -1)
            enumerate_ = {"enumerate": "parallel"}
            a = pyro.sample("a", dist.Categorical(logits=shape), infer=enumerate_)
            b = pyro.sample("b", dist.Categorical(logits=shape + step[a].log()), infer=enumerate_)
            with pyro.plate("words", 2, dim=-2):
                logits = torch.stack([-slope * x, slope * x], -1) + step[b].log()
                pyro.sample("c", dist.Categorical(logits=logits), infer=enumerate_)

    log_x = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(x[..., None])  # words x N x c
    given_b = (log_x[..., None, :] + step.log()).logsumexp(-1).sum(0)  # N x b
    exact = (given_b + (start @ step).log()).logsumexp(-1)
    return Problem(model, guide, (x,), exact, enumerated=True)


def two_under_a_sum() -> Problem:
    """Two sampled latents whose priors depend on one site that the model sums out."""
    x = _data(NUM_DATA)
    weights, centre = torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 0.5])

    def model(x):
        loc = pyro.param("loc", centre)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights), infer={"enumerate": "parallel"})
            a = pyro.sample("a", dist.Normal(loc[y], 1.0))
            b = pyro.sample("b", dist.Normal(2 * loc[y], 1.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(slope * x, 1.2))
            pyro.sample("b", dist.Normal(slope * x, 1.5))

    parts = _log_normal(x[:, None], 3 * centre, torch.tensor(3.0)) + weights.log()
    return Problem(model, guide, (x,), parts.logsumexp(-1), enumerated=True)


def masked_mixture() -> Problem:
    """A mixture whose two features are observed at some of the data only."""
    x = _data(2, NUM_DATA)
    seen = torch.tensor(
        [[True, True, False, True, False, True], [True, False, True, True] + [False] * 2]
    )
    weights, centre = torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 0.5])

    def model(x):
        loc = pyro.param("loc", centre)
        with pyro.plate("data", NUM_DATA, dim=-1):
            with poutine.mask(mask=seen[0]):  # a label's own mask takes no prior away
                z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            for i, scale in enumerate((1.0, 0.5)):
                with poutine.mask(mask=seen[i]):
                    pyro.sample(f"x{i}", dist.Normal(loc[z], scale), obs=x[i])

    def guide(x):
        pass

    parts = weights.log() + sum(
        seen[i, :, None] * dist.Normal(centre, scale).log_prob(x[i, :, None])
        for i, scale in enumerate((1.0, 0.5))
    )
    return Problem(model, guide, (x,), parts.logsumexp(-1), enumerated=True)


PROBLEMS = {
    f.__name__: f
    for f in (
        normal_normal,
        modules,
        global_and_local,
        nested_masked,
        auxiliary,
        score_function,
        mixture,
        topics,
        mixture_prior,
        semi_supervised,
        guide_chain,
        independent_guide,
        two_under_a_sum,
        masked_mixture,
    )
}
