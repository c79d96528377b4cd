"""The evidence of pairs with global latents, against closed forms; guides widened for it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_lvm.marginal import evidence, widened
from pyro_lvm.models import GaussianMixture
from pyro_lvm.terms import compute_terms

pytestmark = pytest.mark.usefixtures("float64")

NUM_DATA = 12


def local_model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def local_guide(x):
    pyro.sample("mean", dist.Normal(x.mean(), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.5))


def model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 0.5), obs=x)


def joint(x, variance):
    """log p(x_1 .. x_N) of data with a common mean N(0, 4) and this variance of their own."""
    covariance = variance * torch.eye(len(x)) + 4.0
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x)


@pytest.fixture
def x():
    return 1 + torch.randn(NUM_DATA)


@pytest.mark.parametrize("num_local", [1, 50])
@pytest.mark.parametrize("wide", [{}, {"scales": [1.0, 2.0]}, {"scales": [1.0], "df": 5.0}])
def test_global_and_local_latents(x, num_local, wide):
    guide = widened(local_guide, latents="all", **wide) if wide else local_guide
    score = evidence(local_model, guide, x, num_samples=1000, num_local=num_local)
    assert score.log_prob.shape == (1,)
    assert (score.log_prob - joint(x, 1.25)).abs() < 5 * score.std_error
    assert score.std_error < (0.25 if num_local == 1 else 0.05)
    assert f"+- {score.sampling_std_error:.3f} nats of one datum" in str(score)


def test_widened_guides_have_the_densities_of_their_mixtures(x):
    """Against the formulas, at the values that were drawn."""
    settings = {"num_particles": 5, "max_plate_nesting": 1}
    guide = widened(local_guide, [1.0, 3.0], df=4.0, latents="all")
    terms = compute_terms(local_model, guide, x, **settings)
    for value, found, loc, scale in (
        (terms.samples["z"], terms.log_guide["z"], 0.8 * x, 0.5),
        (terms.global_samples["mean"], terms.global_log_guide, x.mean(), 0.5),
    ):
        parts = [dist.StudentT(4.0, loc, s * scale).log_prob(value) for s in (1.0, 3.0)]
        assert torch.allclose(found, torch.logsumexp(torch.stack(parts), 0) - math.log(2))
    auto = AutoMultivariateNormal(model, init_scale=0.1)
    auto(x)
    auto.loc.data.fill_(0.3)
    terms = compute_terms(model, widened(auto, [2.0], df=4.0, latents="global"), x, **settings)
    mean = terms.global_samples["mean"]
    assert torch.allclose(terms.global_log_guide, dist.StudentT(4.0, 0.3, 0.2).log_prob(mean))


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("wide", [None, {}, {"scales": [1.0], "df": 3.0}])
def test_autoguides_and_their_widening(x, make, wide):
    guide = make(model, init_loc_fn=lambda site: x.mean(), init_scale=0.1)
    if wide is not None:
        guide = widened(guide, latents="global", **wide)
    score = evidence(model, guide, x, num_samples=3000)
    assert (score.log_prob - joint(x, 0.25)).abs() < 5 * score.std_error
    assert score.pareto_k < 0.7
    assert score.std_error < 0.03


def test_enumerated_local_latents_are_summed_out():
    """A mixture with a prior on its means; the evidence by quadrature over them."""
    x = torch.tensor([[-1.0], [0.5], [2.0]])
    gmm = GaussianMixture(
        1, 1, "spherical", priors={"loc": dist.Normal(0.0, 2.0).expand([1, 1]).to_event(2)}
    )
    score = evidence(gmm.model, widened(gmm.guide, latents="all"), x, num_samples=4000)
    assert (score.log_prob - joint(x.squeeze(1), 1.0)).abs() < 5 * score.std_error
    assert 0 < score.std_error < 0.2


def test_other_data_in_another_order_are_other_observations(x):
    first = evidence(model, lambda x: pyro.sample("mean", dist.Normal(1.0, 0.2)), x)
    again = evidence(model, lambda x: pyro.sample("mean", dist.Normal(1.0, 0.3)), x)
    other = evidence(model, lambda x: pyro.sample("mean", dist.Normal(1.0, 0.3)), x.flip(0))
    assert first.observations.same_data(again.observations)
    assert not first.observations.same_data(other.observations)


def subsampled(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x), subsample_size=3) as index:
        pyro.sample("x", dist.Normal(mean, 0.5), obs=x[index])


def test_what_is_refused(x):
    with pytest.raises(ValueError, match=r"point mass at \['mean'\]"):
        evidence(model, lambda x: pyro.sample("mean", dist.Delta(torch.tensor(0.1))), x)
    with pytest.raises(ValueError, match=r"point mass at \['mean'\]"):
        evidence(model, AutoDelta(model), x)
    with pytest.raises(ValueError, match="subsamples plate 'data'"):
        evidence(subsampled, lambda x: pyro.sample("mean", dist.Normal(0.0, 1.0)), x)
    with pytest.raises(ValueError, match=r"num_local.*positive"):
        evidence(local_model, local_guide, x, num_local=0)
    with pytest.raises(ValueError, match=r"latents in .*; got 'z'"):
        widened(local_guide, latents="z")
    with pytest.raises(ValueError, match=r"df.*positive"):
        widened(local_guide, df=0.0)
