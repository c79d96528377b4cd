"""Terms at given values of latents, and guides that draw from the prior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS

from pyro_lvm.infer.prior import prior_guide
from pyro_lvm.pair import hold_subsamples, inspect_pair
from pyro_lvm.terms import compute_terms, terms_at

pytestmark = pytest.mark.usefixtures("float64")

# with samples that depend on no enumerated site
SAMPLED = [
    "normal_normal",
    "modules",
    "global_and_local",
    "nested_masked",
    "auxiliary",
    "score_function",
    "topics",
    "mixture_prior",
    "independent_guide",
    "two_under_a_sum",
]


def pair_of(name):
    problem = PROBLEMS[name]()
    pair = hold_subsamples(problem.model, problem.guide, problem.args)
    return *pair, problem.args, inspect_pair(*pair, problem.args).max_plate_nesting


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("name", SAMPLED)
def test_terms_at_what_was_drawn_are_those_of_the_draw(name, num_particles):
    model, guide, args, nesting = pair_of(name)
    drawn = compute_terms(
        model, guide, *args, num_particles=num_particles, max_plate_nesting=nesting
    )
    values = {**drawn.samples, **drawn.global_samples}
    again = terms_at(model, guide, values, *args, max_plate_nesting=nesting)
    assert torch.equal(again.log_weight, drawn.log_weight)
    assert torch.equal(again.global_log_prior, drawn.global_log_prior)
    for site, value in values.items():
        found = again.samples.get(site, again.global_samples.get(site))
        assert torch.equal(found, value)
    moved = {n: v + 0.1 if v.is_floating_point() and n != "y" else v for n, v in values.items()}
    if name not in ("score_function", "auxiliary"):  # y is 0 or 1; z must stay a + 1
        other = terms_at(model, guide, moved, *args, max_plate_nesting=nesting)
        assert (other.log_weight - drawn.log_weight).abs().min() > 1e-6


def test_particles_data_and_nested_plates_stay_where_they_are():
    """Rows of one particle, datum and word, computed by hand at values that are all different."""
    x = torch.randn(2, 3)

    def model(x):
        with pyro.plate("data", 3, dim=-1), pyro.plate("words", 2, dim=-2):
            w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w.sum(-1), 2.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3, dim=-1), pyro.plate("words", 2, dim=-2):
            pyro.sample("w", dist.Normal(torch.ones(4), 3.0).to_event(1))

    w = torch.randn(5, 3, 2, 4, requires_grad=True)  # K x N x words x event
    terms = terms_at(model, guide, {"w": w}, x, max_plate_nesting=2)
    log_likelihood = dist.Normal(w.sum(-1), 2.0).log_prob(x.T).sum(-1)
    assert torch.allclose(terms.log_likelihood, log_likelihood)
    assert torch.allclose(terms.log_guide["w"], dist.Normal(1.0, 3.0).log_prob(w).sum((-1, -2)))
    (gradient,) = torch.autograd.grad(terms.log_likelihood[3, 2], w)
    assert (gradient.abs().sum((-1, -2)) > 0).nonzero().tolist() == [[3, 2]]


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_weights_under_the_prior_are_likelihoods(name, num_particles):
    model, guide, args, _ = pair_of(name)
    structure = inspect_pair(model, guide, args)
    latents = [*structure.global_latents, *structure.local_latents, *structure.model_enumerated]
    guide = prior_guide(model, latents)
    structure = inspect_pair(model, guide, args)
    assert not structure.model_enumerated
    assert {*structure.local_latents, *structure.global_latents} == set(latents)
    terms = compute_terms(
        model,
        guide,
        *args,
        num_particles=num_particles,
        max_plate_nesting=structure.max_plate_nesting,
    )
    assert torch.allclose(terms.log_weight, terms.log_likelihood)
    assert torch.allclose(terms.global_log_prior, terms.global_log_guide)


def test_two_nested_plates_come_from_the_left():
    """``K x N x (nested plates, from the left) x event``, as `Terms` has them."""

    def model(x):
        data, rows = pyro.plate("data", 2, dim=-2), pyro.plate("rows", 3, dim=-1)
        with data, rows, pyro.plate("pages", 4, dim=-3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    w = torch.randn(5, 2, 4, 3)  # particles x data x pages x rows
    x = torch.randn(4, 2, 3)
    terms = terms_at(model, prior_guide(model, ["w"]), {"w": w}, x, max_plate_nesting=3)
    expected = dist.Normal(w, 1.0).log_prob(x.movedim(0, 1)).sum((-1, -2))
    assert torch.allclose(terms.log_likelihood, expected)
    assert torch.equal(terms.samples["w"], w)


def test_guide_from_the_prior_leaves_before_the_decoder():
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            seen.append("decoder")
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    prior_guide(model, ["z"])(torch.zeros(3))
    assert not seen
