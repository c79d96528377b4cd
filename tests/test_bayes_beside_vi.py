"""A die with few throws: NUTS, SVI and the closed form agree to Monte Carlo error."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch.distributions import constraints

import pyro_lvm as lvm
from pyro_lvm.inference_data import summarize

THROWS = torch.tensor([2, 0, 2, 2, 1, 2, 0, 2])  # a die of three faces is cheaper
COUNTS = torch.bincount(THROWS, minlength=3)
PRIOR = torch.tensor([2.0, 2.5, 2.0])  # with one throw less, 1 / p still has a variance
EXACT = dist.Dirichlet(PRIOR + COUNTS)


def model(throws):
    p = pyro.sample("p", dist.Dirichlet(PRIOR))
    with pyro.plate("data", len(throws)):
        pyro.sample("throw", dist.Categorical(p), obs=throws)


def guide(throws):
    a = pyro.param("a", torch.ones(3), constraint=constraints.positive)
    pyro.sample("p", dist.Dirichlet(a))


@pytest.fixture(scope="module")
def posteriors():
    """The posterior by two chains of NUTS, and by SVI with the conjugate family."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    chains = []
    for _ in range(2):
        kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True, max_plate_nesting=1)
        chains.append(MCMC(kernel, num_samples=200, warmup_steps=80, disable_progbar=True))
        chains[-1].run(THROWS)
    lvm.fit(
        model,
        guide,
        THROWS,
        elbo=lvm.TraceInfo_ELBO(num_particles=50, vectorize_particles=True),
        epochs=250,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.1),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 250),
        device="cpu",
    )
    return {
        "NUTS": lvm.to_arviz(model, chains, THROWS),
        "SVI": lvm.to_arviz(model, guide, THROWS, num_samples=500),
    }


def test_nuts_svi_and_the_closed_form_agree(posteriors):
    table = summarize(posteriors)
    assert len(table) == 6
    assert ((table["r_hat"] > 0.98) & (table["r_hat"] < 1.05)).all()
    assert ((table["ess_bulk"] > 100) & (table["ess_bulk"] < 1500)).all()
    for face in range(3):
        rows = table.loc[f"p[{face}]"]
        mean, sd = EXACT.mean[face].item(), EXACT.variance[face].sqrt().item()
        assert ((rows["mean"] - mean).abs() < 5 * rows["mcse_mean"]).all()
        assert ((rows["sd"] - sd).abs() < 5 * rows["mcse_sd"]).all()
        # five errors are a small part of what the data have moved
        assert (5 * rows["mcse_mean"] < 0.5 * sd).all()


def test_log_likelihood_and_its_cross_validation_agree(posteriors):
    for idata in posteriors.values():
        p = torch.as_tensor(np.array(idata["posterior"]["p"].values))
        rows = torch.as_tensor(np.array(idata["log_likelihood"]["marginal"].values))
        assert torch.allclose(rows, p.log()[..., THROWS], atol=1e-5)
    expected = ((EXACT.concentration - 1) / (EXACT.concentration.sum() - 1)).log()[THROWS].mean()
    table = lvm.compare(posteriors)
    assert np.allclose(table["mean"], expected, atol=0.05)
    assert table["diff"].abs().max() < 0.05


def test_the_evidence_is_the_closed_form():
    def log_beta(a):
        return torch.lgamma(a).sum() - torch.lgamma(a.sum())

    pyro.param("a", 0.8 * (PRIOR + COUNTS), constraint=constraints.positive)  # near, not exact
    found = lvm.marginal.evidence(model, guide, THROWS, num_samples=2000)
    exact = log_beta(PRIOR + COUNTS) - log_beta(PRIOR)
    assert 0 < found.sampling_std_error < 0.02
    assert abs(found.mean - exact) < 5 * found.sampling_std_error


def test_a_diagonal_normal_lacks_what_the_posterior_has():
    """Its errors are of the family, and more draws only show them: the test can fail."""
    exact = EXACT.sample((4000,))
    biased = dist.Dirichlet(0.7 * EXACT.concentration).sample((4000,))
    dims = ("chain", "draw", "p_dim_0")
    xarray = pytest.importorskip("xarray")
    made = {
        n: {"posterior": xarray.Dataset({"p": (dims, v.numpy()[None])})}
        for n, v in {"exact": exact, "biased": biased}.items()
    }
    table = summarize(made)
    error = (table.xs("p[2]")["sd"] - EXACT.variance[2].sqrt().item()) / table.xs("p[2]")["mcse_sd"]
    assert abs(error["exact"]) < 5 < abs(error["biased"])
