"""Functions that are recorded for many runs: the numbers of Python, and less to compute."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from torch import nn

from pyro_lvm.compiled.recording import NotRecordable
from pyro_lvm.compiled.repeated import repeated
from pyro_lvm.marginal import importance_sampling
from pyro_lvm.marginal.chunks import in_chunks
from pyro_lvm.models import VAE
from pyro_lvm.nn import MLP, BernoulliHead, NormalHead
from pyro_lvm.pair import hold_subsamples, inspect_pair
from pyro_lvm.terms import compute_terms


def runs(function, count=3, seed=1):
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        return [function()[0].clone() for _ in range(count)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_runs_are_those_of_python(name):
    problem = PROBLEMS[name]()
    model, guide = hold_subsamples(problem.model, problem.guide, problem.args)
    nesting = inspect_pair(model, guide, problem.args).max_plate_nesting

    def weights():
        terms = compute_terms(
            model, guide, *problem.args, num_particles=5, max_plate_nesting=nesting
        )
        return [terms.log_weight]

    try:
        recorded = repeated(weights)
    except NotRecordable as reason:
        pytest.fail(str(reason))
    expected = runs(weights)
    for ours, python in zip(runs(recorded), expected, strict=True):
        assert torch.allclose(ours, python, rtol=1e-12, atol=1e-12)
    if problem.reparameterised and name not in ("mixture", "guide_chain", "masked_mixture"):
        assert not torch.equal(expected[0], expected[1])


def vae():
    encoder = MLP(30, [20], head=NormalHead(3))
    decoder = MLP(3, [20], head=BernoulliHead(30))
    return VAE(encoder, decoder), (torch.rand(7, 30) < 0.5).float()


def test_what_does_not_change_is_computed_once():
    pair, x = vae()
    calls = []
    pair.encoder.register_forward_hook(lambda *_: calls.append(1))

    def weights():
        settings = {"num_particles": 4, "max_plate_nesting": 1}
        return [compute_terms(pair.model, pair.guide, x, **settings).log_weight]

    recorded = repeated(weights)
    before, products = len(calls), torch.ops.aten.addmm.default
    runs(recorded)
    assert len(calls) == before
    # two layers of the decoder are left
    assert len(recorded._rest.module.graph.find_nodes(op="call_function", target=products)) == 2


def test_what_is_changed_in_place_is_changed_in_every_run():
    total = torch.zeros(3)
    base = torch.zeros(4)

    def function():
        total.add_(1.0)
        noise = torch.empty(3).normal_()
        own = base[1:] * 1.0  # its own memory, which does not change but here
        view = own[:2]
        view.add_(noise[:2])
        return [noise, own]

    recorded = repeated(function)
    total.zero_()
    with torch.no_grad():
        pyro.set_rng_seed(3)
        first, second = recorded(), recorded()
    assert total[0] == 2
    pyro.set_rng_seed(3)
    noise = torch.empty(3).normal_(), torch.empty(3).normal_()
    for i, found in enumerate((first, second)):
        assert torch.equal(found[0], noise[i])
        assert torch.equal(found[1][:2], noise[i][:2])


def test_state_of_random_numbers_is_as_it_was():
    pyro.set_rng_seed(5)
    expected = torch.rand(2)
    pyro.set_rng_seed(5)
    repeated(lambda: [torch.randn(4)])
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda: [torch.randn(1).exp() * torch.randn(1).item()], "value of a tensor"),
        (lambda: [(lambda x: x[x > 0].sum())(torch.randn(50))], "depends on random numbers"),
    ],
)
def test_what_python_decides_is_refused(function, match):
    with pytest.raises(NotRecordable, match=match):
        repeated(function)


def test_log_probability_of_bernoullis_is_exact_in_the_tails():
    """Against double precision, up to the roundings of logits of this size."""
    logits = torch.tensor([[-80.0, -20.0, -3.0, 0.0, 3.0, 20.0, 80.0]])

    def function():
        shifted = logits + 0.0 * torch.randn(2, 1)
        one, zero = torch.ones(7), torch.zeros(7)
        return [torch.stack([dist.Bernoulli(logits=shifted).log_prob(x) for x in (one, zero)])]

    found = runs(repeated(function), 1)[0]
    exact = dist.Bernoulli(logits=logits.double())
    for i, x in enumerate((torch.ones(7), torch.zeros(7))):
        expected = exact.log_prob(x.double())
        assert ((found[i] - expected).abs() <= 1e-7 * (1 + logits.abs())).all()


def test_chunks_are_recorded_and_the_rest_is_not():
    sizes = []

    def draw(size):
        sizes.append(size)
        return torch.randn(size, 2)

    chunks = list(in_chunks(draw, 203, 10))
    assert sorted(map(len, chunks)) == [3, *[10] * 20]
    assert len(sizes) == 3  # twice for the recording, once for the rest
    assert torch.cat(chunks).unique().numel() == 406
    sizes.clear()
    assert len(list(in_chunks(draw, 35, 10))) == 4
    assert len(sizes) == 4  # too few to record


def test_long_runs_are_compiled(monkeypatch):
    """The same law by another compiler: the weights of both are equal under one seed."""
    pair, x = vae()
    settings = {"num_samples": 400, "chunk_size": 20, "progress": False}
    pyro.set_rng_seed(2)
    plain = importance_sampling(pair.model, pair.guide, x, **settings)
    compiled = []
    monkeypatch.setattr("pyro_lvm.marginal.chunks._SECONDS", 0.0)
    compile_ = type(repeated(lambda: [torch.randn(2)])).compile
    monkeypatch.setattr(
        "pyro_lvm.compiled.repeated.Repeated.compile",
        lambda self: (compile_(self), compiled.append(1)),
    )
    pyro.set_rng_seed(2)
    long = importance_sampling(pair.model, pair.guide, x, **settings)
    assert compiled == [1]
    # to compile draws once more: other numbers, the same estimate
    error = (plain.std_error.square() + long.std_error.square()).sqrt()
    assert ((plain.log_prob - long.log_prob).abs() < 5 * error).all()


def test_batch_norm_in_training_goes_on_counting():
    norm = nn.BatchNorm1d(3)
    recorded = repeated(lambda: [norm(torch.randn(10, 3)).sum().reshape(1)])
    norm.reset_running_stats()
    runs(recorded, 4)
    assert norm.num_batches_tracked == 4
