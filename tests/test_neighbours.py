"""Defects that were found by reading neighbouring libraries, and that ours must not have.

More of them are in the tests of the thing itself: kernels and scales of the discrepancy in
`test_mmd.py`, the importance weighted bound in `test_iw_elbo.py`.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS
from pyro.infer.importance import vectorized_importance_weights

import pyro_lvm as lvm

pytestmark = pytest.mark.usefixtures("float64")


def test_pyro_trace_mmd_compares_particles_of_a_datum_and_ours_the_aggregate_posterior():
    """Every q(z | x_i) is far from the prior, and their mean is the prior: D is about 0."""
    x = dist.Normal(0.0, 1.0).icdf((torch.arange(500.0) + 0.5) / 500)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.999 * x, 0.05))

    elbo = lvm.TraceInfo_ELBO(alpha=1.0, lambda_=1.0, divergence=lvm.MMD())
    ours = elbo.loss_and_parts(model, guide, x)[1]["divergence"]
    assert ours.abs() < 0.01
    particles = dist.Normal(0.999 * x[:1], 0.05).sample((200,))
    assert lvm.MMD()(particles, torch.randn(200, 1)) > 0.1  # what the particles of one datum give


def test_pyro_vectorized_importance_weights_sum_over_all_data_and_ours_are_per_datum():
    problem = PROBLEMS["normal_normal"]()
    pair = problem.model, problem.guide
    theirs = vectorized_importance_weights(
        *pair, *problem.args, num_samples=50, max_plate_nesting=1
    )
    assert theirs[0].shape == (50,)  # one number for all data
    ours = lvm.marginal.importance_sampling(*pair, *problem.args, num_samples=5000)
    assert ours.log_prob.shape == (NUM_DATA,)
    assert ((ours.log_prob - problem.log_prob).abs() < 5 * ours.std_error).all()


def test_infovae_authors_make_weights_from_the_analytic_kl_and_ours_from_densities():
    """exp(log p(x | z) - KL) has not the mean p(x); p(x, z) / q(z | x) has."""
    problem = PROBLEMS["normal_normal"]()
    (x,) = problem.args
    terms = lvm.compute_terms(problem.model, problem.guide, x, num_particles=200_000)
    ours = terms.log_weight.logsumexp(0) - math.log(200_000)
    assert (ours - problem.log_prob).abs().max() < 0.02
    q = dist.Normal(0.4 * x, 0.8)
    kl = torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0))
    theirs = terms.log_likelihood.logsumexp(0) - math.log(200_000) - kl
    assert (theirs - problem.log_prob).abs().max() > 0.1  # what the test would see


def test_pythae_defaults_give_the_mmd_a_negative_weight_and_ours_are_refused():
    with pytest.raises(ValueError, match=r"a weight of -0\.999"):
        lvm.TraceInfo_ELBO(alpha=0.0, lambda_=1e-3, divergence=lvm.MMD())
    assert lvm.TraceInfo_ELBO(divergence=lvm.MMD()).divergence_weight == 0.0


def test_pythae_get_nll_returns_a_log_likelihood_of_100_samples_and_ours_says_what_it_is():
    """The sign is that of log p, the number of samples is the one asked for, and both are said."""
    problem = PROBLEMS["normal_normal"]()
    score = lvm.marginal.importance_sampling(
        problem.model, problem.guide, *problem.args, num_samples=777
    )
    assert score.num_samples == 777
    assert score.mean == pytest.approx(problem.log_prob.mean().item(), abs=0.1)
    assert "log p(x)" in str(score)
    assert "777" in str(score)


def test_scvi_kl_warm_up_does_nothing_for_a_model_without_a_kl_weight_and_ours_weighs_any():
    """The program knows of no weight; the loss follows the schedule all the same."""
    problem = PROBLEMS["normal_normal"]()
    schedule = lvm.LinearSchedule(0.0, 1.0, steps=10)
    elbo = lvm.TraceInfo_ELBO(kl_weight=schedule)
    losses = []
    for step in (0, 5, 10):
        schedule.update(step=step, epoch=0)
        pyro.set_rng_seed(1)
        losses.append(elbo.loss_and_parts(problem.model, problem.guide, *problem.args)[0].item())
    kl = NUM_DATA * elbo.loss_and_parts(problem.model, problem.guide, *problem.args)[1]["kl[z]"]
    assert losses[1] - losses[0] == pytest.approx(0.5 * kl.item())
    assert losses[2] - losses[0] == pytest.approx(kl.item())


def test_scvi_warm_up_longer_than_the_run_leaves_beta_below_one_and_ours_says_so():
    problem = PROBLEMS["normal_normal"]()
    elbo = lvm.TraceInfo_ELBO(kl_weight=lvm.LinearSchedule(0.0, 1.0, epochs=100))
    with pytest.warns(UserWarning, match=r"kl_weight.*(more epochs|shorten)"):
        fit = lvm.fit(problem.model, problem.guide, *problem.args, elbo=elbo, epochs=4)
    assert fit.history["kl_weight"] == pytest.approx([0.0, 0.01, 0.02, 0.03])


def test_pyroved_clears_the_param_store_in_a_constructor_and_nothing_of_ours_does():
    kept = pyro.param("of another model", torch.tensor(2.0))
    problem = PROBLEMS["modules"]()
    x = problem.args[0].flatten(1)
    encoder = lvm.nn.MLP(6, [4], head=lvm.nn.NormalHead(2))
    decoder = lvm.nn.MLP(2, [4], head=lvm.nn.NormalHead(6))
    vae = lvm.VAE(encoder, decoder)
    lvm.GaussianMixture(2, 6).initialize(x)
    elbos = [lvm.TraceInfo_ELBO(), lvm.TraceIW_ELBO(num_particles=2)]
    elbos += [lvm.TraceInfo_ELBO(lambda_=2.0, divergence=lvm.MMD())]
    for elbo in elbos:
        lvm.fit(vae.model, vae.guide, x, elbo=elbo, epochs=1)
    assert pyro.get_param_store()["of another model"] is not None
    assert torch.equal(pyro.param("of another model"), kept)
