"""Markov chains in ArviZ's groups: against ArviZ itself, closed forms, and draws that are given."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.mcmc import StreamingMCMC

from pyro_lvm.datasets import linear_gaussian
from pyro_lvm.inference_data import compare, containers, summarize, to_arviz
from pyro_lvm.marginal import importance_sampling

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz

pytestmark = pytest.mark.usefixtures("float64")


def normal_mean(x):
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def mixture(x):
    """A global mean, and a label that is not marked: Pyro's kernels sum it out unasked."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(mean + 2 * z, 0.5), obs=x)


def nested(x):
    """Global, local and nested latents beside each other."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", x.shape[-1], dim=-1):
        z = pyro.sample("z", dist.Normal(loc[..., 0], 1.0))
        with pyro.plate("words", x.shape[0], dim=-2):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w + loc[..., 1], 0.1), obs=x)


def run_with(values, diverging=((), ()), rates=(0.9, 0.8)):
    """An MCMC as if it had been run, with these draws: site -> C x S x ..."""
    num_chains, num_samples = next(iter(values.values())).shape[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # chains beyond the CPUs
        run = MCMC(NUTS(normal_mean), num_samples=num_samples, num_chains=num_chains)
    run._samples = values
    run._diagnostics = [
        {"divergences": list(d), "acceptance rate": r}
        for d, r in zip(diverging, rates, strict=True)
    ][:num_chains]
    return run


def names_of(idata):
    groups = idata.children if hasattr(idata, "children") else idata.groups()
    return {name.strip("/") for name in groups}


def values_of(idata, group, name):
    """A variable, chains x draws x ..."""
    return torch.as_tensor(np.array(idata[group][name].values))


# ---------------------------------------------------------------------------- chains that were run


@pytest.fixture(scope="module")
def runs_of_hmc():
    """Two runs of HMC, of a chain each, for the mean of five data."""
    x = torch.tensor([0.3, 1.9, -0.4, 2.2, 1.1], dtype=torch.float64)
    runs = []
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        kernel = HMC(
            normal_mean,
            step_size=0.2,
            num_steps=3,
            adapt_step_size=False,
            adapt_mass_matrix=False,
            jit_compile=True,
            ignore_jit_warnings=True,
        )
        run = MCMC(kernel, num_samples=300, warmup_steps=20, disable_progbar=True)
        run.run(x)
        runs.append(run)
    return x, runs


@pytest.mark.skipif(not hasattr(arviz, "from_pyro"), reason="ArviZ 1 has no from_pyro")
def test_groups_are_those_of_arvizs_own_converter(runs_of_hmc):
    x, runs = runs_of_hmc
    for run in runs:
        found, expected = to_arviz(normal_mean, run, x), arviz.from_pyro(run)
        assert names_of(found) >= names_of(expected)
        for group, ours, theirs in (
            ("posterior", "mean", "mean"),
            ("sample_stats", "diverging", "diverging"),
            ("log_likelihood", "marginal", "x"),
            ("observed_data", "x", "x"),
        ):
            assert np.allclose(found[group][ours], expected[group][theirs], rtol=1e-12)
        assert found["sample_stats"]["diverging"].dtype == bool


def test_several_runs_are_chains_of_one_posterior(runs_of_hmc):
    x, runs = runs_of_hmc
    idata = to_arviz(normal_mean, runs, x, num_samples=30)
    means = values_of(idata, "posterior", "mean")
    assert means.shape == (2, 300)
    for chain, run in zip(means, runs, strict=True):
        assert torch.equal(chain, run.get_samples()["mean"])
    assert values_of(idata, "posterior_predictive", "x").shape == (2, 300, 5)
    assert values_of(idata, "prior", "mean").shape == (1, 30)
    assert values_of(idata, "prior_predictive", "x").shape == (1, 30, 5)
    assert values_of(idata, "sample_stats", "acceptance_rate").shape == (2,)
    assert (values_of(idata, "sample_stats", "acceptance_rate") > 0.5).all()


def test_the_conjugate_posterior(runs_of_hmc):
    """The mean is N(sum x / (N + 1/4), 1 / (N + 1/4)); errors by ArviZ's ESS."""
    x, runs = runs_of_hmc
    idata = to_arviz(normal_mean, runs, x)
    (row,) = summarize({"HMC": idata}).to_dict("records")
    precision = len(x) + 0.25
    loc, scale = float(x.sum()) / precision, precision**-0.5
    assert 100 < row["ess_bulk"] < 1500
    assert 100 < row["ess_tail"] < 1500
    assert 0.99 < row["r_hat"] < 1.05
    assert row["mcse_mean"] == pytest.approx(scale / row["ess_bulk"] ** 0.5, rel=0.3)
    assert abs(row["mean"] - loc) < 5 * row["mcse_mean"]
    assert abs(row["sd"] - scale) < 5 * row["mcse_sd"]
    replicates = values_of(idata, "posterior_predictive", "x")  # N(mean, 1)
    spread = math.sqrt((scale**2 + 1) / row["ess_bulk"])
    assert abs(replicates.mean() - loc) < 5 * spread
    assert replicates.var() == pytest.approx(scale**2 + 1, rel=0.2)
    (same,) = arviz.summary(idata, round_to="none").to_dict("records")
    assert same["mean"] == row["mean"]


def test_leave_one_out_by_its_closed_form(runs_of_hmc):
    x, runs = runs_of_hmc
    idata = to_arviz(normal_mean, runs, x)
    rest = len(x) - 1 + 0.25
    expected = dist.Normal((x.sum() - x) / rest, (1 + 1 / rest) ** 0.5).log_prob(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loo = arviz.loo(idata, pointwise=True)
    found = loo.loo_i if hasattr(loo, "loo_i") else loo.elpd_i
    assert np.allclose(found, expected, atol=0.1)


# ---------------------------------------------------------------------------- draws that are given


def test_summed_out_labels():
    """log p(x_i | mean) exactly, and labels from their posterior given the draw."""
    x = torch.tensor([0.1, 0.9, 2.2])
    mean = torch.stack([torch.full((3000,), 0.2), torch.full((3000,), -0.5)])  # two chains
    idata = to_arviz(mixture, run_with({"mean": mean}), x)
    for c, value in enumerate((0.2, -0.5)):
        parts = torch.stack(
            [
                math.log(0.7) + dist.Normal(value, 0.5).log_prob(x),
                math.log(0.3) + dist.Normal(value + 2, 0.5).log_prob(x),
            ]
        )
        marginal = parts.logsumexp(0)
        rows = values_of(idata, "log_likelihood", "marginal")[c]
        assert torch.allclose(rows, marginal.expand(3000, -1), rtol=1e-12)
        log_prior = dist.Normal(0.0, 2.0).log_prob(torch.tensor(value))
        lp = values_of(idata, "sample_stats", "lp")[c]
        assert torch.allclose(lp, (log_prior + marginal.sum()).expand(3000))
        share = (parts[1] - marginal).exp()
        labels = values_of(idata, "posterior", "z")[c]
        error = (share * (1 - share) / 3000).sqrt()
        assert ((labels.mean(0) - share).abs() < 5 * error).all()
        residuals = values_of(idata, "posterior_predictive", "x")[c] - value - 2 * labels
        assert residuals.std() == pytest.approx(0.5, rel=0.05)
    assert values_of(idata, "prior", "z").mean() == pytest.approx(0.3, abs=0.1)


def nested_draws(num_chains, num_draws, num_data=3, num_words=2):
    shapes = {"loc": (2,), "z": (num_data,), "w": (num_words, num_data)}
    return {n: torch.randn(num_chains, num_draws, *shape) for n, shape in shapes.items()}


def test_local_and_nested_latents():
    """Every draw stays with its chain, and the data come before the words."""
    draws, x = nested_draws(2, 40), torch.randn(2, 3)
    idata = to_arviz(nested, run_with(draws, diverging=((3, 7), ())), x, num_samples=11)
    assert torch.equal(values_of(idata, "posterior", "loc"), draws["loc"])
    assert torch.equal(values_of(idata, "posterior", "z"), draws["z"])
    assert torch.equal(values_of(idata, "posterior", "w"), draws["w"].transpose(-1, -2))
    assert idata["posterior"]["loc"].dims == ("chain", "draw", "loc_dim_0")
    assert idata["posterior"]["w"].dims == ("chain", "draw", "data", "w_dim_0")
    assert values_of(idata, "prior", "w").shape == (1, 11, 3, 2)
    replicates = values_of(idata, "posterior_predictive", "x").transpose(-1, -2)
    noise = (replicates - draws["w"] - draws["loc"][..., 1, None, None]) / 0.1
    assert noise.square().mean() == pytest.approx(1.0, abs=5 * math.sqrt(2 / noise.numel()))
    loc, z, w = draws["loc"], draws["z"], draws["w"]
    lp = (
        dist.Normal(0.0, 1.0).log_prob(loc).sum(-1)
        + dist.Normal(loc[..., :1], 1.0).log_prob(z).sum(-1)
        + dist.Normal(z.unsqueeze(-2), 1.0).log_prob(w).sum((-1, -2))
        + dist.Normal(w + loc[..., 1, None, None], 0.1).log_prob(x).sum((-1, -2))
    )
    assert torch.allclose(values_of(idata, "sample_stats", "lp"), lp)
    diverging = values_of(idata, "sample_stats", "diverging")
    assert diverging.nonzero().tolist() == [[0, 3], [0, 7]]
    assert values_of(idata, "sample_stats", "acceptance_rate").tolist() == [0.9, 0.8]


def test_one_chain_and_kernels_without_statistics():
    run = run_with({"mean": torch.randn(1, 6)})
    run._diagnostics = [{}]
    idata = to_arviz(normal_mean, run, torch.randn(4), predictive=False)
    assert set(idata["sample_stats"].data_vars) == {"lp"}
    assert names_of(idata).isdisjoint({"prior_predictive", "posterior_predictive"})


def test_sampled_local_latents_have_no_log_likelihood_and_say_why():
    x = torch.randn(2, 3)
    idata = to_arviz(nested, run_with(nested_draws(2, 10)), x)
    assert "log_likelihood" not in names_of(idata)
    assert "local latents ['z', 'w']" in idata["posterior"].attrs["no_log_likelihood"]
    with pytest.raises(ValueError, match=r"group log_likelihood; got none: .*\['z', 'w'\]"):
        compare({"a": idata, "b": idata})


def test_a_score_is_taken_for_models_with_local_latents_only():
    problem = linear_gaussian(3, 2)
    x = problem.sample(4)
    score = importance_sampling(problem.model, problem.guide, x, num_samples=1)
    run = run_with({"z": torch.randn(2, 5, 4, 2)})
    idata = to_arviz(problem.model, run, x, score=score)
    rows = values_of(idata, "log_likelihood", "marginal")
    assert torch.allclose(rows, problem.log_prob(x).expand(2, 5, -1))
    assert "no_log_likelihood" not in idata["posterior"].attrs
    by_guide = to_arviz(problem.model, problem.guide, x, num_samples=5)
    table = compare({"HMC": idata, "guide": by_guide})
    assert table["diff"].abs().max() < 1e-9
    with pytest.raises(ValueError, match="no score for a pair with global latents"):
        to_arviz(nested, run_with(nested_draws(2, 10)), torch.randn(2, 3), score=score)


def test_the_container_of_arviz_1(monkeypatch):
    xarray = pytest.importorskip("xarray")
    monkeypatch.setattr(containers, "is_arviz_1", lambda: True)
    idata = to_arviz(normal_mean, run_with({"mean": torch.randn(2, 6)}), torch.randn(4))
    assert isinstance(idata, xarray.DataTree)
    assert names_of(idata) >= {"posterior", "sample_stats", "log_likelihood", "observed_data"}
    assert idata["posterior"]["mean"].shape == (2, 6)
    assert summarize({"HMC": idata}, ["mean"]).shape == (1, 7)


# ---------------------------------------------------------------------------- what is refused


def test_what_is_refused():
    x = torch.randn(4)
    fresh = MCMC(NUTS(normal_mean), num_samples=5)
    with pytest.raises(ValueError, match=r"MCMC with draws; got one that was not run"):
        to_arviz(normal_mean, fresh, x)
    streaming = StreamingMCMC(NUTS(normal_mean), num_samples=5)
    with pytest.raises(TypeError, match=r"keeps its draws.*got StreamingMCMC"):
        to_arviz(normal_mean, streaming, x)
    with pytest.raises(TypeError, match="got function"):
        to_arviz(normal_mean, [normal_mean], x)
    with pytest.raises(ValueError, match="runs of one model with as many draws"):
        to_arviz(normal_mean, [], x)
    short, long = (run_with({"mean": torch.randn(1, s)}) for s in (5, 6))
    with pytest.raises(ValueError, match="runs of one model with as many draws"):
        to_arviz(normal_mean, [short, long], x)
    other = run_with({"loc": torch.randn(2, 5)})
    with pytest.raises(ValueError, match=r"latents \['mean'\]; got those of \['loc'\]"):
        to_arviz(normal_mean, other, x)
    with pytest.raises(ValueError, match=r"draws of 'z' of shape \(1, 5\) each; got \(1, 3\)"):
        to_arviz(nested, run_with(nested_draws(2, 10)), torch.randn(2, 5))


def test_subsampled_data_are_refused():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[index])

    with pytest.raises(ValueError, match="sees all data; got one that subsamples plate 'data'"):
        to_arviz(model, run_with({"mean": torch.randn(2, 5)}), torch.randn(6))


def test_devices(device):
    x = torch.randn(4, device=device)
    draws = torch.randn(2, 5, device=device)
    idata = to_arviz(normal_mean, run_with({"mean": draws}), x)
    expected = dist.Normal(draws.unsqueeze(-1), 1.0).log_prob(x).cpu()
    assert torch.allclose(values_of(idata, "log_likelihood", "marginal"), expected)


# ---------------------------------------------------------------------------- side by side


def test_posteriors_side_by_side():
    """Rows by variable, then posterior; a single chain counts as its halves."""
    x = torch.randn(2, 3)
    chains = to_arviz(nested, run_with(nested_draws(2, 50)), x)
    one = to_arviz(nested, run_with({n: v[:1] for n, v in nested_draws(1, 51).items()}), x)
    table = summarize({"two": chains, "one": one}, ["loc"])
    assert list(table.index) == [
        ("loc[0]", "two"),
        ("loc[0]", "one"),
        ("loc[1]", "two"),
        ("loc[1]", "one"),
    ]
    assert np.isfinite(table.to_numpy()).all()
    expected = arviz.summary(chains, var_names=["loc"], round_to="none")
    for name in table.columns:
        assert table.loc[("loc[1]", "two"), name] == expected.loc["loc[1]", name]
    draws = values_of(one, "posterior", "loc")[0, :50, 1]  # halves of 25 each
    assert table.loc[("loc[1]", "one"), "mean"] == pytest.approx(float(draws.mean()))
    assert len(summarize({"two": chains})) == 2 + 3 + 6
    with pytest.raises(ValueError, match="at least one posterior"):
        summarize({})


def test_r_hat_of_a_single_chain_that_drifts():
    drifting = torch.arange(100.0).reshape(1, 100) / 10 + 0.1 * torch.randn(1, 100)
    idata = to_arviz(normal_mean, run_with({"mean": drifting}), torch.randn(3))
    (row,) = summarize({"drifting": idata}).to_dict("records")
    assert row["r_hat"] > 1.5
