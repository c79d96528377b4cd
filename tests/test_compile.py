"""Compiled losses and steps agree with Python, and say so where they can't."""

import shutil
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim.clipped_adam import ClippedAdam
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.compiled import CompiledStep
from pyro_lvm.pair import parameters_of

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def as_recorded(graph, inputs):
    """A backend that runs what was recorded as it is."""
    return graph


def no_backend(graph, inputs):
    raise RuntimeError("no compiler here")


OBJECTIVES = {
    "elbo": lvm.TraceInfo_ELBO,
    "two particles": lambda: lvm.TraceInfo_ELBO(num_particles=2, vectorize_particles=True),
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceEnum_ELBO": TraceEnum_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
}
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "ClippedAdam": lambda p: ClippedAdam(p, lr=1e-2, lrd=0.99, clip_norm=3.0),
}


def value_and_gradient(loss, parameters):
    return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)


def applies(problem, objective):
    if objective == "TraceEnum_ELBO" or objective in ("elbo", "two particles"):
        return True
    return not problem.enumerated and (
        problem.reparameterised or objective != "TraceMeanField_ELBO"
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_compiled_loss_is_that_of_python(float64, name, objective):
    problem = PROBLEMS[name]()
    if not applies(problem, objective):
        pytest.skip("this objective does not apply")
    elbo = OBJECTIVES[objective]()
    module = lvm.compile(elbo, problem.model, problem.guide, backend=as_recorded)
    module.initialize(*problem.args)
    assert module.fallback_reason is None
    parameters = list(module.parameters())
    assert parameters
    python = lvm.compile(elbo, problem.model, problem.guide, backend=no_backend)
    with pytest.warns(UserWarning, match="no compiler here"):
        python.initialize(*problem.args)
    for seed in (1, 2):
        results = []
        for loss in (module, python):
            pyro.set_rng_seed(seed)
            results.append(value_and_gradient(loss(*problem.args), parameters))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_parts_are_reported_by_the_same_names(float64):
    problem = PROBLEMS["normal_normal"]()
    elbo = lvm.TraceInfo_ELBO()
    module = lvm.compile(elbo, problem.model, problem.guide, backend=as_recorded)
    module.initialize(*problem.args)
    pyro.set_rng_seed(1)
    ours = module.loss_and_parts(*problem.args)
    pyro.set_rng_seed(1)
    theirs = elbo.loss_and_parts(problem.model, problem.guide, *problem.args)
    torch.testing.assert_close(ours, theirs)


def vae(device="cpu", **settings):
    torch.manual_seed(3)
    encoder = lvm.nn.MLP(12, [16], head=lvm.nn.NormalHead(2))
    decoder = lvm.nn.MLP(2, [16], head=lvm.nn.NormalHead(12))
    return lvm.VAE(encoder, decoder, **settings).to(device)


@needs_compiler
def test_inductor_equals_python_over_100_steps(device):
    x = torch.randn(32, 12, device=device)
    results = []
    for backend in (None, no_backend):
        pair = vae(device)
        elbo = lvm.TraceInfo_ELBO(alpha=0.5, lambda_=5.0, divergence=lvm.MMD())
        step = CompiledStep(elbo, pair.model, pair.guide, num_steps=2, divisor=32, backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pyro.set_rng_seed(5)
            losses = torch.cat([step(x) for _ in range(50)])
        assert (step.fallback_reason is None) == (backend is None)
        results.append([losses, *(p.detach() for p in pair.parameters())])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_are_those_of_the_optimiser(float64, optimizer, num_steps):
    tables, parameters, states = [], [], []
    for backend in (as_recorded, no_backend):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        problem = PROBLEMS["modules"]()
        step = CompiledStep(
            lvm.TraceInfo_ELBO(),
            problem.model,
            problem.guide,
            OPTIMIZERS[optimizer],
            num_steps=num_steps,
            clip_norm=20.0,
            clip_value=3.0,
            parts=True,
            backend=backend,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = torch.cat([step.table(*problem.args) for _ in range(20 // num_steps)])
        tables.append(table)
        groups = step.optimizer.param_groups
        parameters.append([p.detach() for g in groups for p in g["params"]])
        states.append((step.optimizer.state_dict()["state"], groups[0]["lr"]))
    torch.testing.assert_close(*tables)
    torch.testing.assert_close(*parameters)
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("name", PROBLEMS)
def test_steps_of_every_kind_of_pair(float64, name):
    results = []
    for backend in (as_recorded, no_backend):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        problem = PROBLEMS[name]()
        step = CompiledStep(
            lvm.TraceInfo_ELBO(), problem.model, problem.guide, num_steps=3, backend=backend
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = step(*problem.args)
        assert (step.fallback_reason is None) == (backend is as_recorded)
        parameters = [p.detach() for g in step.optimizer.param_groups for p in g["params"]]
        results.append([losses, *parameters])
    torch.testing.assert_close(*results)


@pytest.fixture
def two_threads():
    """Compiled as most people will: kernels of several threads are other kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def steps_by_compiler_and_python(make, elbo=lvm.TraceInfo_ELBO, num_calls=2):
    """Losses and parameters of both."""
    results = []
    for backend in (None, no_backend):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = make()
        step = CompiledStep(elbo(), model, guide, num_steps=2, backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = torch.cat([step(*args) for _ in range(num_calls)])
        assert (step.fallback_reason is None) == (backend is None)
        parameters = [p.detach() for g in step.optimizer.param_groups for p in g["params"]]
        results.append([losses, *parameters])
    return results


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - {"score_function"}))
def test_inductor_on_every_kind_of_pair(float64, two_threads, name):
    def make():
        problem = PROBLEMS[name]()
        return problem.model, problem.guide, problem.args

    torch.testing.assert_close(*steps_by_compiler_and_python(make))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
@pytest.mark.parametrize("num_data", [37, 1000])
def test_inductor_on_mixtures(two_threads, covariance, num_data):
    def make():
        mixture = lvm.GaussianMixture(32, 16, covariance)
        return mixture.model, mixture.guide, (torch.randn(num_data, 16),)

    compiled, python = steps_by_compiler_and_python(make)
    torch.testing.assert_close(compiled, python, rtol=1e-4, atol=1e-4)


def test_labels_without_probability_take_no_part_in_a_recorded_expectation(float64):
    """An exact expectation over what the guide enumerates, one of its labels impossible."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(x.new_ones(3) / 3))
            pyro.sample("x", dist.Normal(z.to(x), 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.tensor([0.3, -0.2]))
        logits = torch.cat([logits, logits.new_full((1,), -torch.inf)])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    x = torch.tensor([0.2, 1.5])
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    expected = elbo.differentiable_loss(model, guide, x)
    (parameter,) = pyro.get_param_store().named_parameters()
    gradient = torch.autograd.grad(expected, parameter[1])[0]
    step = CompiledStep(
        elbo, model, guide, lambda p: torch.optim.SGD(p, lr=1.0), backend=as_recorded
    )
    before = parameter[1].detach().clone()
    loss = step(x)
    assert step.fallback_reason is None
    torch.testing.assert_close(loss[0], expected.detach())
    torch.testing.assert_close(before - parameter[1].detach(), gradient)


def test_learning_rates_and_loaded_states_take_effect_without_another_graph(float64):
    made = []

    def counting(graph, inputs):
        made.append(graph)
        return graph

    problem = PROBLEMS["normal_normal"]()
    step = CompiledStep(
        lvm.TraceInfo_ELBO(),
        problem.model,
        problem.guide,
        lambda p: torch.optim.SGD(p, lr=1e-3),
        backend=counting,
    )
    step(*problem.args)
    before = [p.detach().clone() for p in step.optimizer.param_groups[0]["params"]]
    step.optimizer.param_groups[0]["lr"] = 0.0
    step(*problem.args)
    after = [p.detach() for p in step.optimizer.param_groups[0]["params"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert len(made) == 1


SCHEDULED = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules_of_rates_and_momenta_need_no_other_graph(float64, name):
    """One cycle, which changes both in every step; the same as in Python."""
    made, results = [], []
    for backend in (lambda graph, _: made.append(graph) or graph, no_backend):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        problem = PROBLEMS["normal_normal"]()
        parameters = parameters_of(problem.model, problem.guide, problem.args)
        optimizer = SCHEDULED[name](parameters)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=13)
        step = CompiledStep(
            lvm.TraceInfo_ELBO(), problem.model, problem.guide, optimizer, backend=backend
        )
        losses = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="These steps are not compiled")
            warnings.filterwarnings("error", message=".*lr_scheduler.step")
            for _ in range(12):
                losses.append(step(*problem.args))
                schedule.step()
        results.append([torch.cat(losses), *(p.detach().clone() for p in parameters)])
    torch.testing.assert_close(*results)
    assert len(made) == 1


@pytest.mark.parametrize("backend", [as_recorded, no_backend])
@pytest.mark.filterwarnings("ignore:These steps are not compiled")
def test_a_step_without_a_finite_loss_changes_nothing(float64, backend):
    pair = vae()
    step = CompiledStep(lvm.TraceInfo_ELBO(), pair.model, pair.guide, backend=backend)
    x = torch.randn(8, 12)
    step(x)
    before = [p.detach().clone() for p in pair.parameters()]
    with pyro.validation_enabled(False):  # Pyro's checks would raise
        assert torch.isnan(step(x * torch.nan)).all()
    torch.testing.assert_close([p.detach() for p in pair.parameters()], before, rtol=0, atol=0)
    assert torch.isfinite(step(x)).all()
    changed = [float((p - b).abs().max()) for p, b in zip(pair.parameters(), before, strict=True)]
    assert min(changed) > 1e-5


def test_minibatches_are_drawn_without_replacement(float64):
    seen = []

    def model(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            seen.append(len(x))
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    x = torch.arange(6.0)
    step = CompiledStep(
        lvm.TraceInfo_ELBO(),
        model,
        None,
        lambda p: torch.optim.SGD(p, lr=1e-30),
        num_steps=3,
        batch_size=2,
        backend=as_recorded,
    )
    losses = step(x)
    assert set(seen) == {2}
    # three minibatches of an epoch hold each datum once, each scaled from 2 to 6 data
    whole = -dist.Normal(torch.tensor(0.0), 1.0).log_prob(x).sum()
    torch.testing.assert_close(losses.mean(), whole)


def test_data_dependent_python_falls_back_with_its_reason():
    def model(x):
        shift = pyro.param("shift", torch.tensor(0.5))
        if float(shift) > 0:
            shift = 2 * shift
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    x = torch.randn(4)
    module = lvm.compile(lvm.TraceInfo_ELBO(), model, None, backend=as_recorded)
    with pytest.warns(UserWarning, match="value of a tensor .line \\d+ of test_compile.py"):
        loss = module(x)
    exact = -dist.Normal(torch.tensor(1.0), 1.0).log_prob(x).sum()
    torch.testing.assert_close(loss.detach(), exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the reason is said once
        module(x)


def test_a_tensor_in_place_of_another_is_seen(float64):
    problem = PROBLEMS["normal_normal"]()
    module = lvm.compile(lvm.TraceInfo_ELBO(), problem.model, problem.guide, backend=as_recorded)
    pyro.set_rng_seed(1)
    first = module(*problem.args)
    pyro.clear_param_store()
    pyro.param("shift", torch.tensor(5.0))
    pyro.set_rng_seed(1)
    assert abs(float(module(*problem.args) - first)) > 1


@pytest.mark.parametrize("name", ["modules", "global_and_local", "semi_supervised", "mixture"])
def test_weights_in_tensors_take_effect_without_another_graph(float64, name):
    problem, made = PROBLEMS[name](), []

    def counted(graph, _):
        made.append(graph)
        return graph

    alpha, lambda_ = torch.tensor(0.0), torch.tensor(1.0)
    compared = name in ("modules", "global_and_local")
    divergence = lvm.MMD() if compared else None
    elbo = lvm.TraceInfo_ELBO(alpha=alpha, lambda_=lambda_, divergence=divergence)
    module = lvm.compile(elbo, problem.model, problem.guide, backend=counted)
    for new_alpha, new_lambda in ((0.0, 1.0), (0.5, 0.5), (0.25, 3.0 if compared else 0.75)):
        alpha.fill_(new_alpha)
        lambda_.fill_(new_lambda)
        plain = lvm.TraceInfo_ELBO(
            alpha=new_alpha, lambda_=new_lambda, divergence=divergence
        ).differentiable_loss
        plain(problem.model, problem.guide, *problem.args)  # Pyro draws in its first call
        pyro.set_rng_seed(7)
        loss = module(*problem.args)
        pyro.set_rng_seed(7)
        expected = plain(problem.model, problem.guide, *problem.args)
        parameters = list(module.parameters())
        torch.testing.assert_close(
            value_and_gradient(loss, parameters), value_and_gradient(expected, parameters)
        )
    assert module.fallback_reason is None
    assert len(made) == 1
    elbo.alpha = torch.tensor(0.9)  # another tensor is seen too
    pyro.set_rng_seed(7)
    other = module(*problem.args)
    assert (other - loss).abs() > 1e-3 or name == "mixture"  # which has no KL to weigh
    assert len(made) == 2


def test_batch_norm_and_modes():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 1)

        def forward(self, x):
            return self.linear(self.norm(x))

    torch.manual_seed(0)
    encoder = Encoder()

    def model(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(encoder(x), 1.0).to_event(1), obs=x[:, :1])

    x = 3 + 2 * torch.randn(16, 3)
    module = lvm.compile(lvm.TraceInfo_ELBO(), model, None, backend=as_recorded)
    module.initialize(x)
    assert module.fallback_reason is None
    assert int(encoder.norm.num_batches_tracked) == 0  # a check changes no statistics
    training = module(x)
    assert int(encoder.norm.num_batches_tracked) == 1
    torch.testing.assert_close(encoder.norm.running_mean, 0.1 * x.mean(0))
    encoder.eval()
    assert not torch.isclose(module(x), training)
    assert int(encoder.norm.num_batches_tracked) == 1


def dropped_out(x):
    """x ~ N(d, 1) with d = 2 loc or 0, each with a half: a dropout of the mean."""

    network = nn.Dropout(0.5)
    loc = nn.Parameter(torch.full((x.shape[1],), 0.7))

    def model(x):
        pyro.module("network", network)
        mean = network(pyro.param("loc", loc).expand_as(x))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    return model, network


def test_dropout_as_recorded(float64):
    x = torch.randn(5, 3)
    model, network = dropped_out(x)
    elbo = Trace_ELBO()
    module = lvm.compile(elbo, model, None, backend=as_recorded)
    for training in (True, False, True):
        network.train(training)
        for seed in (1, 2):
            pyro.set_rng_seed(seed)
            loss = module(x)
            pyro.set_rng_seed(seed)
            expected = elbo.differentiable_loss(model, lambda x: None, x)
            parameters = list(module.parameters())
            torch.testing.assert_close(
                value_and_gradient(loss, parameters), value_and_gradient(expected, parameters)
            )
    assert module.fallback_reason is None


@needs_compiler
def test_dropout_by_inductor_has_the_same_law():
    """The compiler draws other numbers: the mean loss is compared with its closed form."""
    x = torch.randn(40, 3)
    model, _ = dropped_out(x)
    step = CompiledStep(Trace_ELBO(), model, None, lambda p: torch.optim.SGD(p, lr=0.0))
    losses = torch.cat([step(x) for _ in range(400)])
    assert step.fallback_reason is None
    on, off = (-dist.Normal(mean, 1.0).log_prob(x).sum() for mean in (1.4, 0.0))
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - (on + off) / 2) < 5 * error
    half = -dist.Normal(0.7, 1.0).log_prob(x).sum()  # without a dropout
    assert abs(losses.mean() - half) > 20 * error


def test_the_objective_s_numbers_are_looked_at_in_every_call(float64):
    problem = PROBLEMS["modules"]()
    elbo = lvm.TraceInfo_ELBO(host=TraceMeanField_ELBO)
    module = lvm.compile(elbo, problem.model, problem.guide, backend=as_recorded)
    losses = []
    for alpha in (0.0, -1.0):
        elbo.alpha, elbo.lambda_ = alpha, 1.0 - alpha
        pyro.set_rng_seed(1)
        losses.append(module(*problem.args).detach())
        pyro.set_rng_seed(1)
        expected = elbo.differentiable_loss(problem.model, problem.guide, *problem.args).detach()
        torch.testing.assert_close(losses[-1], expected)
    assert losses[1] > losses[0]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: lvm.compile(None, None, None), TypeError, "instance of a pyro.infer.ELBO"),
        (lambda: CompiledStep(object(), None, None), TypeError, "instance of a pyro.infer.ELBO"),
        (lambda: CompiledStep(Trace_ELBO(), None, None, num_steps=0), ValueError, "num_steps"),
        (lambda: CompiledStep(Trace_ELBO(), None, None, clip_norm=0.0), ValueError, "clip_norm"),
        (lambda: CompiledStep(Trace_ELBO(), None, None, batch_size=0), ValueError, "batch_size"),
    ],
)
def test_bad_settings_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("divergence", [lvm.MMD, lvm.Stein])
def test_many_pairs_of_draws_are_compared_in_python(monkeypatch, divergence):
    """In blocks, of which a compiler could hold all at a time: gigabytes for some thousand rows."""
    from pyro_lvm.divergences import kernel_mean

    monkeypatch.setattr(kernel_mean, "LARGEST_GRAM", 100)
    pair, x = vae(), torch.randn(16, 12)
    elbo = lvm.TraceInfo_ELBO(lambda_=2.0, divergence=divergence())
    module = lvm.compile(elbo, pair.model, pair.guide, backend=as_recorded)
    with pytest.warns(UserWarning, match="256 pairs of draws are compared in blocks"):
        module.initialize(x)
    results = []
    for loss in (module, lambda x: elbo.differentiable_loss(pair.model, pair.guide, x)):
        pyro.set_rng_seed(1)
        results.append(loss(x))
    assert results[0] == results[1]
