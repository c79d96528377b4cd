"""A story in plain numbers runs where its data are, from fit to ArviZ."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_lvm as lvm
from pyro_lvm.pair import device_of


def model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))  # made of numbers, not of the data
        y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + mean + y, 1.0), obs=x)


def guide(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("mean", dist.Normal(loc, 0.1))
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 1.0))


def test_tensors_are_made_where_the_arguments_are():
    """The device without storage stands for any other than the CPU."""
    elsewhere = torch.zeros(2, device="meta")
    for args, kwargs in (((elsewhere,), {}), ((1.0,), {"y": elsewhere}), ((elsewhere, None), None)):
        with device_of(args, kwargs):
            assert dist.Normal(0.0, 1.0, validate_args=False).loc.device.type == "meta"
        assert torch.zeros(()).device.type == "cpu"
    with device_of((torch.zeros(2), "text"), {"flag": True}):
        assert dist.Normal(0.0, 1.0).loc.device.type == "cpu"


@pytest.mark.parametrize(
    "elbo", [lambda: lvm.TraceInfo_ELBO(lambda_=3.0, divergence=lvm.MMD()), None]
)
def test_from_fit_to_arviz(elbo, device):
    x = torch.randn(40, device=device)
    fit = lvm.fit(model, guide, x, elbo=elbo and elbo(), epochs=3, batch_size=16, device=device)
    assert fit.num_epochs == 3
    for name in ("loc", "slope"):  # back where they were declared
        parameter = pyro.get_param_store()[name]
        parameter.data = parameter.data.to(device)
    score = lvm.marginal.importance_sampling(model, guide, x, num_samples=20)
    assert score.log_prob.device.type == device
    assert score.log_prob.isfinite().all()
    idata = lvm.to_arviz(model, guide, x, num_samples=5, num_weights=5)
    assert idata["posterior"]["z"].shape == (1, 5, 40)


def test_models_move_with_their_data(device):
    torch.manual_seed(0)
    x = torch.rand(30, 4, device=device)
    encoder = lvm.nn.MLP(4, [8], head=lvm.nn.NormalHead(2))
    decoder = lvm.nn.MLP(2, [8], head=lvm.nn.NormalHead(4))
    vae = lvm.VAE(encoder, decoder).to(device)
    mixture = lvm.GaussianMixture(2, 4).to(device).initialize(x)
    for pair in (vae, mixture):
        lvm.fit(pair.model, pair.guide, x, epochs=2, device=device)
        assert all(p.device.type == device for p in pair.parameters())
        assert lvm.fit(pair.model, pair.guide, x, elbo=None, epochs=1).num_epochs == 1
        pair.sample(3)
    widened = lvm.marginal.widened(vae.guide)
    score = lvm.marginal.importance_sampling(vae.model, widened, x, num_samples=10)
    table = lvm.compare({"vae": score, "gmm": lvm.marginal.exact(mixture.model, None, x)})
    assert len(table) == 2


def test_pyros_own_objective_runs_there_too(device):
    def plain(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def amortised(x):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    x = torch.randn(20, device=device)
    assert lvm.fit(plain, amortised, x, elbo=Trace_ELBO(), epochs=2, device=device).num_epochs == 2
