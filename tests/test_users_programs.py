"""Programs as users write them, run as they are under every objective that applies.

Labels that are there or not, in the arguments of one program; a plate of another name, or without a
size; what is hidden taken out by a mask; scales, and sums over what is discrete.
"""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta
from torch import nn

import pyro_lvm as lvm
from pyro_lvm import MMD, LinearSchedule, SlicedWasserstein, Stein, TraceInfo_ELBO, TraceIW_ELBO
from pyro_lvm.divergences import Adversarial
from pyro_lvm.infer import ImplicitDivergence
from pyro_lvm.pair import parameters_of

pytestmark = pytest.mark.usefixtures("float64")

NUM_PATIENTS, NUM_TESTS, NUM_ILLS = 12, 5, 3


class Clinic(nn.Module):
    """Test results x of patients with an illness y, known or not, and a constitution z."""

    def __init__(self, sized=True):
        super().__init__()
        torch.manual_seed(3)
        self.results = nn.Linear(2 + NUM_ILLS, NUM_TESTS)
        self.constitution = nn.Linear(NUM_TESTS + NUM_ILLS, 4)
        self.verdict = nn.Linear(NUM_TESTS, NUM_ILLS)
        self.sized = sized

    def patients(self, x):
        return pyro.plate("patients", len(x)) if self.sized else pyro.plate("patients")

    def model(self, x, y=None):
        pyro.module("clinic", self)
        with self.patients(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            even = x.new_ones(len(x), NUM_ILLS) / NUM_ILLS
            y = pyro.sample("y", dist.OneHotCategorical(even), obs=y)
            pyro.sample("x", dist.Normal(self.results(_joined(z, y)), 0.5).to_event(1), obs=x)

    @config_enumerate
    def guide(self, x, y=None):
        with self.patients(x):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.verdict(x)))
            loc, log_scale = self.constitution(_joined(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    # the same, with an argument of another kind that says whether the illness is known

    def model_of_batch(self, batch):
        self.model(batch[0], batch[-1])

    def guide_of_batch(self, batch):
        self.guide(batch[0], batch[-1])

    def model_by_flag(self, x, y, known=True):
        self.model(x, y if known else None)

    def guide_by_flag(self, x, y, known=True):
        self.guide(x, y if known else None)

    # the classifier alone, whose loss counts five times

    def model_of_verdict(self, x, y):
        with self.patients(x), poutine.scale(scale=5.0):
            pyro.sample("sure", dist.OneHotCategorical(logits=self.verdict(x)), obs=y)


def _joined(a, b):
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)


class Restorer(nn.Module):
    """Hidden pixels given those that are seen, and a first guess that is not trained here."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first_guess = nn.Linear(6, 6)
        self.prior, self.encoder, self.decoder = nn.Linear(12, 4), nn.Linear(12, 4), nn.Linear(2, 6)

    def model(self, image, hidden):
        pyro.module("restorer", self)
        seen = image.masked_fill(hidden, 0.0)
        with torch.no_grad():
            guess = self.first_guess(seen)
        with pyro.plate("images"):
            loc, log_scale = self.prior(torch.cat([seen, guess], -1)).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc = self.decoder(z)[hidden].view(len(image), -1)
            truth = image[hidden].view(len(image), -1)
            pyro.sample("truth", dist.Normal(loc, 0.5).to_event(1), obs=truth)

    def guide(self, image, hidden):
        with pyro.plate("images"):
            loc, log_scale = self.encoder(torch.cat([image, 1.0 * hidden], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@config_enumerate
def two_sources(x):
    """Arrival times from two sources, their places and the noise unknown."""
    share = pyro.sample("share", dist.Dirichlet(torch.full((2,), 2.0)))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("sources", 2):
        place = pyro.sample("place", dist.Normal(0.0, 5.0))
    with pyro.plate("arrivals", len(x)):
        source = pyro.sample("source", dist.Categorical(share))
        pyro.sample("x", dist.Normal(place[source], noise), obs=x)


def clinic(sized=True):
    """The programs, results and illnesses."""
    story = Clinic(sized)
    y = torch.eye(NUM_ILLS)[torch.arange(NUM_PATIENTS) % NUM_ILLS]
    return story, torch.randn(NUM_PATIENTS, NUM_TESTS) + y @ torch.randn(NUM_ILLS, NUM_TESTS), y


def hidden_of(count):
    """A mask that hides so many pixels of each of twelve images, others in each."""
    return torch.rand(NUM_PATIENTS, 6).argsort(-1) < count


def value_and_gradient(elbo, model, guide, *args, seed=1, **kwargs):
    """Of the second call, as an objective of Pyro's may draw numbers of its own in the first."""
    parameters = parameters_of(model, guide, args, kwargs)
    elbo.loss(model, guide, *args, **kwargs)
    pyro.set_rng_seed(seed)
    loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
    gradient = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    return loss.item(), gradient


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-11)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def discriminator():
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))


OBJECTIVES = {
    "elbo": lambda **k: TraceInfo_ELBO(**k),
    "particles": lambda **k: TraceInfo_ELBO(num_particles=3, **k),
    "beta": lambda **k: TraceInfo_ELBO(alpha=0.5, lambda_=0.5, **k),
    "kl_weight": lambda **k: TraceInfo_ELBO(kl_weight={"z": 0.3}, **k),
    "schedule": lambda **k: TraceInfo_ELBO(kl_weight=LinearSchedule(0.2, 0.8, steps=9), **k),
    "free_bits": lambda **k: TraceInfo_ELBO(free_bits=3.0, **k),
    "mmd": lambda **k: TraceInfo_ELBO(alpha=1.0, lambda_=5.0, divergence=MMD(), **k),
    "sliced": lambda **k: TraceInfo_ELBO(lambda_=5.0, divergence=SlicedWasserstein(), **k),
    "stein": lambda **k: TraceInfo_ELBO(alpha=0.5, lambda_=2.0, divergence=Stein(), **k),
    "adversarial": lambda **k: TraceInfo_ELBO(
        alpha=1.0, lambda_=1.0, divergence=Adversarial(discriminator()), **k
    ),
    "reparameterized": lambda **k: TraceIW_ELBO(num_particles=4, gradient="reparameterized", **k),
    "stl": lambda **k: TraceIW_ELBO(num_particles=4, gradient="stl", **k),
    "dreg": lambda **k: TraceIW_ELBO(num_particles=4, **k),
    "chunks": lambda **k: TraceIW_ELBO(num_particles=4, chunk_size=3, **k),
    "one by one": lambda **k: TraceIW_ELBO(num_particles=4, chunk_size=1, **k),
}
DIVERGENCES = ("mmd", "sliced", "stein", "adversarial")
WEIGHTED = ("stl", "dreg", "reparameterized", "chunks", "one by one")


def sum_of_parts(elbo, parts):
    """The loss by the formula in the docstring of ``loss_and_parts``."""
    kl = {n[3:-1]: v for n, v in parts.items() if n.startswith("kl[")}
    loss = kl.pop("global", 0.0) - parts["reconstruction"]
    if isinstance(elbo, TraceIW_ELBO):
        return float(loss + sum(kl.values()) - parts["weighting"])
    for name, value in kl.items():
        weight = elbo.kl_weight
        weight = weight.get(name, 1.0) if isinstance(weight, dict) else weight
        weight = parts["kl_weight"] if isinstance(weight, LinearSchedule) else weight
        loss = loss + (1 - elbo.alpha) * weight * value
    loss = loss + elbo.divergence_weight * parts.get("divergence", 0.0)
    return float(loss + parts.get("free_bits", 0.0))


def assert_trains(elbo, model, guide, *args, rate=0.02, steps=25, **kwargs):
    """SVI makes the loss finite and smaller, and the parts add up to it."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": rate}), elbo)
    losses = [svi.step(*args, **kwargs) for _ in range(steps)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < sum(losses[:5])
    loss, parts = elbo.loss_and_parts(model, guide, *args, **kwargs)
    assert float(parts["loss"]) == pytest.approx(sum_of_parts(elbo, parts), rel=1e-10)
    size = len(args[0]) if isinstance(args[0], torch.Tensor) else len(args[0][0])
    assert loss.item() == pytest.approx(size * float(parts["loss"]), rel=1e-12)


def assert_recorded(elbo, model, guide, *calls):
    """A recorded loss is that of Python in every call, and none of them ran in Python."""
    compiled = lvm.compile(elbo, model, guide, backend=lambda graph, _: graph)
    for args in calls:
        elbo.loss(model, guide, *args)
        compiled(*args)
        pyro.set_rng_seed(5)
        python = elbo.loss(model, guide, *args)
        pyro.set_rng_seed(5)
        assert compiled(*args).item() == pytest.approx(python, rel=1e-10)
    assert compiled.fallback_reason is None


# --- labels that are there or not


@pytest.mark.parametrize("name", OBJECTIVES)
def test_known_labels(name):
    story, x, y = clinic()
    assert_trains(OBJECTIVES[name](plate="patients"), story.model, story.guide, x, y)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in (*DIVERGENCES, *WEIGHTED)])
def test_unknown_labels(name):
    story, x, _ = clinic()
    assert_trains(OBJECTIVES[name](plate="patients"), story.model, story.guide, x)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_divergence_on_a_latent_that_an_enumerated_one_decides_on(name):
    story, x, _ = clinic()
    elbo = OBJECTIVES[name](plate="patients", sites=["z"])
    with pytest.raises(ValueError, match="'z', which depends on an enumerated one"):
        elbo.loss(story.model, story.guide, x)


@pytest.mark.parametrize("name", WEIGHTED)
def test_no_importance_weights_of_an_enumerated_label(name):
    story, x, _ = clinic()
    with pytest.raises(ValueError, match=r"without enumerated sites.*\['y'\]"):
        OBJECTIVES[name](plate="patients").loss(story.model, story.guide, x)


def test_value_and_gradient_are_those_of_pyro_with_and_without_labels():
    story, x, y = clinic()
    elbo = TraceInfo_ELBO(plate="patients", max_plate_nesting=1)
    enumerating = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    for args, theirs in (((x,), enumerating), ((x, y), TraceMeanField_ELBO()), ((x,), enumerating)):
        ours = value_and_gradient(elbo, story.model, story.guide, *args)
        assert_same(ours, value_and_gradient(theirs, story.model, story.guide, *args))
    weighted = TraceIW_ELBO(num_particles=1, gradient="reparameterized", plate="patients")
    ours = value_and_gradient(weighted, story.model, story.guide, x, y)
    assert_same(ours, value_and_gradient(Trace_ELBO(), story.model, story.guide, x, y))


def test_labels_by_position_and_by_name_are_the_same():
    story, x, y = clinic()
    elbo = TraceInfo_ELBO(plate="patients", max_plate_nesting=1)
    for given, named in (((x, y), {"y": y}), ((x, None), {"y": None}), ((x,), {})):
        ours = value_and_gradient(elbo, story.model, story.guide, *given)
        assert_same(ours, value_and_gradient(elbo, story.model, story.guide, x, **named))


@pytest.mark.parametrize("known_first", [True, False])
def test_labels_in_a_list(known_first):
    story, x, y = clinic()
    elbo = TraceInfo_ELBO(plate="patients", max_plate_nesting=1)
    pair = story.model_of_batch, story.guide_of_batch
    for known in (known_first, not known_first):
        args = (x, y) if known else (x, None)
        ours = value_and_gradient(elbo, *pair, list(args))
        fresh = TraceInfo_ELBO(plate="patients", max_plate_nesting=1)
        assert_same(ours, value_and_gradient(fresh, story.model, story.guide, *args))


def test_labels_by_a_flag():
    story, x, y = clinic()
    elbo = TraceInfo_ELBO(plate="patients", max_plate_nesting=1)
    for known in (True, False):
        pair = story.model_by_flag, story.guide_by_flag
        ours = value_and_gradient(elbo, *pair, x, y, known=known)
        fresh = TraceInfo_ELBO(plate="patients", max_plate_nesting=1)
        assert_same(ours, value_and_gradient(fresh, *pair, x, y, known=known))


def test_what_is_refused_stays_so_behind_a_list_that_was_not():
    story, x, y = clinic()
    elbo = TraceIW_ELBO(num_particles=3, plate="patients")
    elbo.loss(story.model_of_batch, story.guide_of_batch, [x, y])
    with pytest.raises(ValueError, match="without enumerated sites"):
        elbo.loss(story.model_of_batch, story.guide_of_batch, [x, None])


def test_a_recorded_loss_tells_labels_from_none():
    story, x, y = clinic()
    elbo = TraceInfo_ELBO(plate="patients", max_plate_nesting=1)
    assert_recorded(elbo, story.model, story.guide, (x,), (x, y), (x, None))


def test_fit_takes_all_that_the_program_takes():
    story, x, y = clinic()
    for data in ((x, y), (x,)):
        run = lvm.fit(
            story.model, story.guide, data, plate="patients", epochs=4, batch_size=5, progress=False
        )
        assert run.history["loss"][-1] < run.history["loss"][0]


def test_a_scale_is_part_of_the_loss_and_of_the_parts():
    story, x, y = clinic()
    entropy = nn.functional.cross_entropy(story.verdict(x), y, reduction="sum").item()
    for elbo in (
        TraceInfo_ELBO(plate="patients"),
        TraceInfo_ELBO(plate="patients", kl_weight=0.1),
        TraceIW_ELBO(num_particles=3, plate="patients"),
    ):
        loss, parts = elbo.loss_and_parts(story.model_of_verdict, None, x, y)
        assert loss.item() == pytest.approx(5 * entropy)
        assert float(parts["reconstruction"]) == pytest.approx(-5 * entropy / NUM_PATIENTS)


def test_numbers_or_one_hot_labels():
    story, x, y = clinic()

    def model(x, number):
        with story.patients(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            number = pyro.sample("y", dist.Categorical(x.new_ones(NUM_ILLS)), obs=number)
            loc = story.results(_joined(z, nn.functional.one_hot(number, NUM_ILLS).to(x)))
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    def guide(x, number):
        story.guide(x, nn.functional.one_hot(number, NUM_ILLS).to(x))

    for name in ("elbo", "mmd", "dreg"):
        elbo = OBJECTIVES[name](plate="patients")
        pyro.set_rng_seed(1)
        by_number = elbo.loss(model, guide, x, y.argmax(-1))
        pyro.set_rng_seed(1)
        assert elbo.loss(story.model, story.guide, x, y) == pytest.approx(by_number, rel=1e-11)


# --- a plate that has no size: pyro.plate("data")


def test_a_loss_without_weights_needs_no_size():
    for known in (True, False):
        story, x, y = clinic(sized=False)
        args = (x, y) if known else (x,)
        elbo = TraceInfo_ELBO(plate="patients", max_plate_nesting=1)
        ours = value_and_gradient(elbo, story.model, story.guide, *args)
        story.sized = True
        fresh = TraceInfo_ELBO(plate="patients", max_plate_nesting=1)
        assert_same(ours, value_and_gradient(fresh, story.model, story.guide, *args))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_plate_without_a_size_has_that_of_its_sites(name):
    values = []
    for sized in (True, False):
        pyro.set_rng_seed(0)
        story, x, y = clinic(sized)
        elbo = OBJECTIVES[name](plate="patients")
        pyro.set_rng_seed(1)
        loss, parts = elbo.loss_and_parts(story.model, story.guide, x, y)
        values.append({"total": float(loss), **{n: float(v) for n, v in parts.items()}})
    assert values[1] == pytest.approx(values[0], rel=1e-11)


def test_a_plate_without_a_size_is_scaled_to_all_data():
    for program in ("model", "guide"):
        scales = []
        for sized in (True, False):
            story, x, y = clinic(sized)
            scaled = lvm.plate_size(getattr(story, program), 60, plate="patients")
            trace = poutine.trace(scaled).get_trace(x, y)
            scales.append({n: s["scale"] for n, s in trace.nodes.items() if n in "xyz"})
        assert scales[0] == scales[1] != {}


def test_an_implicit_story_in_a_plate_without_a_size():
    generator = nn.Linear(2, 3)

    def story(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(generator(z), event_dim=1), obs=x)

    loss, parts = ImplicitDivergence(MMD()).loss_and_parts(story, None, torch.randn(9, 3) + 4)
    assert loss.item() == pytest.approx(9 * float(parts["divergence"]))


# --- what is hidden taken out by a mask


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in WEIGHTED] + ["one by one"])
def test_hidden_pixels_taken_out_by_a_mask(name):
    story, image = Restorer(), torch.randn(NUM_PATIENTS, 6)
    before = story.first_guess.weight.detach().clone()
    elbo = OBJECTIVES[name](plate="images")
    assert_trains(elbo, story.model, story.guide, image, hidden_of(3))
    assert torch.equal(before, story.first_guess.weight)


def test_the_loss_of_hidden_pixels_is_that_of_pyro():
    story, image, hidden = Restorer(), torch.randn(NUM_PATIENTS, 6), hidden_of(3)
    ours = value_and_gradient(
        TraceInfo_ELBO(plate="images"), story.model, story.guide, image, hidden
    )
    theirs = value_and_gradient(TraceMeanField_ELBO(), story.model, story.guide, image, hidden)
    assert_same(ours, theirs)


def mean_over_seen(x, seen):
    """The mean over as many entries as a mask selects, a number of Python's."""
    loc = pyro.param("loc", torch.zeros(6))
    with pyro.plate("data", len(x)):
        errors = ((x - loc) ** 2)[seen]
        pyro.factor("error", -errors.sum() / errors.shape[0] * torch.ones(len(x)))


def sum_by_rows(x, seen):
    """The rows that a mask selects by their numbers, a share of each."""
    loc = pyro.param("loc", torch.zeros(6))
    with pyro.plate("data", len(x)):
        rows = seen.any(1).nonzero().squeeze(-1)
        errors = ((x - loc) ** 2).sum(-1)[rows] / len(rows)
        pyro.factor("error", -torch.zeros(len(x)).index_add(0, rows, errors))


@pytest.mark.parametrize("model", [mean_over_seen, sum_by_rows])
def test_a_recorded_loss_follows_what_a_mask_selects(model):
    x, few, many = torch.randn(8, 6), torch.zeros(8, 6), torch.ones(8, 6)
    few[:2, :3] = 1
    elbo = TraceInfo_ELBO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may say that it runs in Python
        compiled = lvm.compile(elbo, model, None, backend=lambda graph, _: graph)
        for seen in (many, few, many):
            python = elbo.loss(model, None, x, seen.bool())
            assert compiled(x, seen.bool()).item() == pytest.approx(python, rel=1e-10)


def test_a_fixed_mask_is_recorded():
    columns, loc = torch.tensor([True, False, True]), nn.Parameter(torch.zeros(2))

    def model(x):
        pyro.param("loc", loc)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[:, columns])

    assert_recorded(TraceInfo_ELBO(), model, None, (torch.randn(8, 3),), (torch.randn(5, 3),))


# --- sums over what is discrete


def source_guide():
    exposed = poutine.block(two_sources, expose=["share", "noise", "place"])
    start = {"share": torch.tensor([0.4, 0.6]), "noise": torch.tensor(1.0)}
    start["place"] = torch.tensor([-1.0, 2.0])
    return AutoDelta(exposed, init_loc_fn=lambda site: start[site["name"]])


@pytest.mark.parametrize("name", ["elbo", "particles", "beta", "free_bits", *WEIGHTED])
def test_a_mixture_with_its_parameters_at_a_point(name):
    x = torch.cat([torch.randn(20) - 3, torch.randn(20) + 3])
    elbo = OBJECTIVES[name](plate="arrivals")
    assert_trains(elbo, two_sources, source_guide(), x, rate=0.05)


def test_a_mixture_is_that_of_pyro_and_can_be_recorded():
    x = torch.cat([torch.randn(20) - 3, torch.randn(20) + 3])
    guide = source_guide()
    guide(x)
    theirs = TraceEnum_ELBO(max_plate_nesting=1)
    for elbo in (
        TraceInfo_ELBO(plate="arrivals", max_plate_nesting=1),
        TraceIW_ELBO(num_particles=5, plate="arrivals"),  # nothing local is drawn
    ):
        ours = value_and_gradient(elbo, two_sources, guide, x)
        assert_same(ours, value_and_gradient(theirs, two_sources, guide, x))
        assert_recorded(elbo, two_sources, guide, (x,), (x[:30],))


# --- numbers that have to be right, or refused


def gradient_per_datum(elbo, model, guide, x, name, repeats=150):
    """Mean of the gradient by one parameter, per datum, and its standard error."""
    found = []
    for _ in range(repeats):
        pyro.clear_param_store()
        loss = elbo.differentiable_loss(model, guide, x)
        parameter = pyro.get_param_store()._params[name]
        options = {"allow_unused": True, "materialize_grads": True}
        gradient = torch.autograd.grad(loss, parameter, **options) if loss.requires_grad else [0.0]
        found.append(float(gradient[0]) / len(x))
    table = torch.tensor(found)
    return table.mean().item(), table.std().item() / math.sqrt(repeats)


def squared_difference(q, p):
    return (q.mean() - p.mean()) ** 2


LOGIT = 0.3
SHARE = 1 / (1 + math.exp(-LOGIT))
SLOPE = 2 * (2 * SHARE) * 2 * SHARE * (1 - SHARE)  # of (2 share - 0)^2 by the logit


def switch(x):
    logit = pyro.param("logit", torch.tensor(LOGIT))
    return dist.Bernoulli(logits=logit.expand(len(x)))


def at_zero(x):
    return dist.Normal(torch.zeros(len(x)), 0.1)


@pytest.mark.parametrize("where", ["guide", "prior", "story"])
def test_a_divergence_learns_through_a_switch_or_refuses_it(where):
    def around(draw, observe=True):
        def program(x):
            with pyro.plate("data", len(x)):
                draw(x)
                if observe:
                    pyro.sample("x", at_zero(x), obs=x)

        return program

    def switched(x, infer=None):
        y = pyro.sample("y", switch(x), infer=infer)
        pyro.sample("z", dist.Normal(2 * y, 0.1))

    def plain(x):
        pyro.sample("z", at_zero(x))

    def plain_beside_switch(x):
        pyro.sample("y", dist.Bernoulli(0.5))
        pyro.sample("z", at_zero(x))

    def drawn(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", switch(x))
            pyro.sample("x", dist.Normal(2 * y, 0.1), obs=x)

    by_latents = TraceInfo_ELBO(
        alpha=1.0, lambda_=1.0, divergence=squared_difference, sites=["z"], max_plate_nesting=1
    )
    elbo, model, guide = {
        "guide": (by_latents, around(plain_beside_switch), around(switched, observe=False)),
        "prior": (
            by_latents,
            around(lambda x: switched(x, {"enumerate": "parallel"})),
            around(plain, observe=False),
        ),
        "story": (ImplicitDivergence(squared_difference), drawn, None),
    }[where]
    try:
        slope, error = gradient_per_datum(elbo, model, guide, torch.zeros(200), "logit")
    except ValueError:
        return
    assert slope == pytest.approx(SLOPE, abs=4 * error)


def test_chunks_share_their_global_latents_without_a_gradient_too():
    x = torch.randn(30)

    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("shift", dist.Normal(0.0, scale))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    elbo = TraceIW_ELBO(num_particles=6, chunk_size=2, max_plate_nesting=1)
    for seed in range(5):
        pyro.set_rng_seed(seed)
        differentiable = elbo.differentiable_loss(model, guide, x).item()
        pyro.set_rng_seed(seed)
        assert elbo.loss(model, guide, x) == pytest.approx(differentiable, rel=1e-10)
