"""The scale audit: every defect is found where it is, and right pairs have none."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_lvm.diagnostics import audit_scale
from pyro_lvm.infer import LinearSchedule, TraceInfo_ELBO

N, B = 12, 3


def _data() -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(5)) + 1.0


def sized(x):
    return pyro.plate("data", N, subsample_size=len(x))


def unsized(x):
    return pyro.plate("data", len(x))


def by_hand(x):
    return poutine.scale(scale=N / len(x))


def constant(x):
    return poutine.scale(scale=N / B)


def half(x):
    return poutine.scale(scale=0.5)


def nothing(x):
    return nullcontext()


@dataclass(frozen=True)
class Story:
    """A mean, a latent and an observation per datum, with scales wherever one may put them."""

    model_plate: Callable = sized
    guide_plate: Callable = sized
    model_around: Callable = nothing
    guide_around: Callable = nothing
    model_in_plate: Callable = nothing
    guide_in_plate: Callable = nothing
    model_on_z: Callable = nothing
    guide_on_z: Callable = nothing
    has_mean: bool = True
    observe: Callable | None = None

    def model(self, x, spread=1.0):
        with self.model_around(x):
            mean = pyro.sample("mean", dist.Normal(0.0, 3.0)) if self.has_mean else 0.0
            with self.model_plate(x), self.model_in_plate(x):
                with self.model_on_z(x):
                    z = pyro.sample("z", dist.Normal(mean, spread))
                if self.observe is None:
                    pyro.sample("x", dist.Normal(z, 0.5), obs=x)
                else:
                    self.observe(z, x)

    def guide(self, x, slope=0.4):
        with self.guide_around(x):
            if self.has_mean:
                pyro.sample("mean", dist.Normal(0.5, 0.2))
            with self.guide_plate(x), self.guide_in_plate(x), self.guide_on_z(x):
                pyro.sample("z", dist.Normal(slope * x, 0.7))


class ModelModule(PyroModule):
    def __init__(self, story):
        super().__init__()
        self.story = story
        self.spread = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x):
        self.story.model(x, self.spread)


class GuideModule(PyroModule):
    def __init__(self, story):
        super().__init__()
        self.story = story
        self.slope = PyroParam(torch.tensor(0.4))

    def forward(self, x):
        self.story.guide(x, self.slope)


FORMS = {
    "functions": lambda story: (story.model, story.guide),
    "modules": lambda story: (ModelModule(story), GuideModule(story)),
}


def both(**settings) -> Story:
    """A story with the same settings in model and guide."""
    return Story(**{f"{p}_{k}": v for k, v in settings.items() for p in ("model", "guide")})


def mean_of_squares(z, x):
    """A hand-written loss that is divided by the size of the minibatch."""
    pyro.factor("x", -((x - z) ** 2) / len(x))


def observe_half(z, x):
    with half(x):
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def whole_batch(z, x):
    """A site that depends on the other data of the minibatch."""
    pyro.sample("x", dist.Normal(z - z.mean(), 0.5), obs=x)


@dataclass(frozen=True)
class Outside(Story):
    """The observations outside the plate, as one event."""

    def model(self, x, spread=1.0):
        with self.model_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, spread))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def mask(x):
    return poutine.mask(mask=x > 0.5)


beta = LinearSchedule(0.0, 0.3, steps=10)
DEFECTS = {
    "no size": (
        both(plate=unsized),
        None,
        r"Plate 'data' has no size, .* 'z', 'x' sum to B/N = 3/12 = 0\.25 times .* \('mean'\) "
        r"count in full in every minibatch, N/B = 12/3 = 4 times as heavy .* once per minibatch",
    ),
    "no size, nothing global": (
        Story(unsized, unsized, has_mean=False),
        None,
        "Plate 'data' has no size, .* All terms do so alike",
    ),
    "doubled": (
        both(in_plate=by_hand),
        None,
        r"A doubled scale of 16, 4 from plate 'data' times 4 by poutine.scale: .* 'z', 'x' sum to "
        r"N/B = 12/3 = 4 times .* B/N = 3/12 = 0\.25 times as heavy",
    ),
    "doubled by a constant": (both(in_plate=constant), None, "A doubled scale of 16"),
    "scale in the model": (
        Story(model_plate=unsized, guide_plate=unsized, model_around=by_hand),
        None,
        r"A scale in the model only: the scale of 'mean', 'z' is 4 in the model and 1 in the guide",
    ),
    "scale in the guide": (
        Story(guide_in_plate=by_hand),
        None,
        "A scale in the guide only: the scale of 'z' is 4 in the model and 16 in the guide",
    ),
    "size in the model": (
        Story(guide_plate=unsized),
        None,
        "A data plate that knows its size in the model only: the scale of 'z' is 4 in the model",
    ),
    "mask in the model": (Story(model_on_z=mask), None, "A mask, or scales per datum, that differ"),
    "wrong size": (
        both(plate=lambda x: pyro.plate("data", 60, subsample_size=len(x))),
        None,
        r"Plate 'data' says that there are 60 data; got 12: .* sum to 5 times",
    ),
    "wrong scale by hand": (
        both(plate=unsized, in_plate=lambda x: poutine.scale(scale=1000 / len(x))),
        None,
        r"A scale of 333.3, 1 from plate 'data' times 333.3 by poutine.scale, where N/B = 4",
    ),
    "wrong constant": (
        both(plate=unsized, in_plate=lambda x: poutine.scale(scale=10.0)),
        None,
        r"A scale of 10, .* where N/B = 4 is right: .* sum to 2\.5 times",
    ),
    "wrong power": (
        both(in_plate=lambda x: poutine.scale(scale=(N / len(x)) ** 2)),
        None,
        r"A scale of 64, 4 from plate 'data' times 16 by poutine.scale, .* sum to 16 times",
    ),
    "scaled global": (
        both(plate=unsized, around=by_hand),
        None,
        "A global latent in a scaled context: 'mean' count N/B = 12/3 = 4 times",
    ),
    "mean over the minibatch": (
        both(plate=unsized, around=lambda x: poutine.scale(scale=1 / len(x))),
        None,
        "A global latent in a scaled context: 'mean' count N/B = 12/3 = 4 times",
    ),
    "scaled alike": (
        both(around=half),
        None,
        "All terms in plate 'data' have a scale of 0.5 beside the plate's",
    ),
    "KL weight by hand": (
        both(on_z=half),
        None,
        r"The KL of 'z' ends with weight 0\.5 \(poutine.scale 0\.5\): .* beta = 0\.5, not the "
        r"ELBO, and with beta < 1 no bound",
    ),
    "alpha": (
        Story(),
        TraceInfo_ELBO(alpha=0.5, lambda_=0.5),
        r"The KL of 'z' ends with weight 0\.5 \(alpha = 0\.5\)",
    ),
    "alpha and by hand": (
        both(on_z=half),
        TraceInfo_ELBO(alpha=0.5, lambda_=0.5),
        r"The KL of 'z' ends with weight 0\.25 \(poutine.scale 0\.5, alpha = 0\.5\)",
    ),
    "KL weight of one site": (
        Story(),
        TraceInfo_ELBO(kl_weight={"z": torch.tensor(4.0)}),
        r"The KL of 'z' ends with weight 4 .* with beta > 1 it is a bound on log p\(x\)",
    ),
    "schedule that ends low": (
        Story(),
        TraceInfo_ELBO(kl_weight=beta),
        r"The KL of 'z' ends with weight 0\.3",
    ),
    "divided by the minibatch": (
        Story(observe=mean_of_squares),
        None,
        r"Site 'x' of the model is no sum over data: .* is 1 times its value .* measured: 4\. A "
        r"factor in it depends on the size",
    ),
    "other data": (Story(observe=whole_batch), None, "Site 'x' of the model is no sum over data"),
    "observed outside the plate": (
        Outside(has_mean=False),
        None,
        r"Site 'x' of the model is no sum over data: .* measured: 0\.25\. It is outside the data",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name, form):
    story, elbo, pattern = DEFECTS[name]
    audit = audit_scale(*FORMS[form](story), elbo, _data(), batch_size=B)
    assert not audit.ok
    assert any(re.search(pattern, finding) for finding in audit.findings), audit
    assert all(finding in str(audit) for finding in audit.findings)


SOLE = set(DEFECTS) - {"mean over the minibatch"}  # whose terms are all per datum, too


@pytest.mark.parametrize("name", sorted(SOLE))
def test_one_defect_is_one_finding(name):
    story, elbo, _ = DEFECTS[name]
    assert len(audit_scale(story.model, story.guide, elbo, _data(), batch_size=B).findings) == 1


RIGHT = {
    "sized": (Story(), None),
    "scaled by hand": (both(plate=unsized, in_plate=by_hand), None),
    "scaled by a constant": (both(plate=unsized, in_plate=constant), None),
    "weighted observations": (Story(observe=observe_half), Trace_ELBO()),
    "masked alike": (both(on_z=mask), None),
    "plain objective": (Story(), TraceInfo_ELBO(alpha=0.0)),
    "schedule that ends at 1": (
        Story(),
        TraceInfo_ELBO(kl_weight=LinearSchedule(0.0, 1.0, steps=5)),
    ),
    "alpha of another meaning": (Story(), RenyiELBO(alpha=0.5, num_particles=2)),
    "weights that cancel": (both(on_z=half), TraceInfo_ELBO(kl_weight=2.0)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_found_where_nothing_is(name, form):
    story, elbo = RIGHT[name]
    audit = audit_scale(*FORMS[form](story), elbo, _data(), batch_size=B)
    assert audit.ok, audit
    assert "Nothing found" in str(audit)
    assert [row.measured for row in audit.rows] == pytest.approx([1.0] * len(audit.rows), rel=1e-4)


IN_ROWS = [  # whose arguments have the data first; the others see all data, or subsample
    "normal_normal",
    "modules",
    "auxiliary",
    "score_function",
    "mixture",
    "mixture_prior",
    "semi_supervised",
    "independent_guide",
    "two_under_a_sum",
]


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_right_as_they_are(name):
    problem = PROBLEMS[name]()
    audit = audit_scale(problem.model, problem.guide, Trace_ELBO(), *problem.args)
    assert audit.ok, audit
    assert [row.expected for row in audit.rows] == pytest.approx([1.0] * len(audit.rows))


@pytest.mark.parametrize("name", IN_ROWS)
def test_problems_are_right_in_minibatches_of_fit(name):
    problem = PROBLEMS[name]()
    settings = {"batch_size": 2, "called_by": "fit"}
    audit = audit_scale(problem.model, problem.guide, Trace_ELBO(), *problem.args, **settings)
    assert audit.ok, audit
    measured = [row.measured for row in audit.rows if row.measured is not None]
    assert len(measured) >= 1
    assert measured == pytest.approx([1.0] * len(measured), rel=1e-4)


def test_kinds():
    problem = PROBLEMS["auxiliary"]()
    audit = audit_scale(problem.model, problem.guide, None, *problem.args)
    kinds = {(row.program, row.site): row.kind for row in audit.rows}
    assert kinds == {
        ("model", "z"): "local latent",
        ("model", "x"): "observed",
        ("guide", "a"): "auxiliary",
        ("guide", "z"): "local latent",
    }
    rows = audit_scale(Story().model, Story().guide, None, _data(), batch_size=B).rows
    assert {row.site for row in rows if row.kind == "global latent"} == {"mean"}


@pytest.mark.parametrize(
    ("story", "factor"),
    [
        (both(plate=unsized), B / N),
        (both(in_plate=by_hand), N / B),
        (both(in_plate=constant), N / B),
        (both(plate=unsized, in_plate=lambda x: poutine.scale(scale=10.0)), 10 * B / N),
    ],
)
def test_ratio_is_minibatch_over_all(story, factor):
    """Without a size 1/4 of the data's value, with twice the scale 4 times it: not the inverse."""
    for row in audit_scale(story.model, story.guide, None, _data(), batch_size=B).rows:
        right = 1.0 if row.site == "mean" else factor
        assert row.expected == pytest.approx(right)
        assert row.measured == pytest.approx(right, rel=1e-4)
        assert row.ratio == row.measured


def test_measured_ratio_by_hand():
    """The mean over minibatches and the value on all data, of a factor divided by the minibatch."""
    x = _data()
    story = Story(observe=lambda z, x: pyro.factor("x", -(x**2) / len(x)))
    parts = [-(N / B) * (x[i : i + B] ** 2).sum() / B for i in range(0, N, B)]
    row = audit_scale(story.model, story.guide, None, x, batch_size=B).rows[2]
    assert row.site == "x"
    assert row.measured == pytest.approx(float(sum(parts) / len(parts) / (-(x**2).sum() / N)))


def test_fit_mends_a_missing_size_and_doubles_a_scale_by_hand():
    story, x = both(plate=unsized), _data()
    assert not audit_scale(story.model, story.guide, None, x, batch_size=B).ok
    mended = audit_scale(story.model, story.guide, None, x, batch_size=B, called_by="fit")
    assert mended.ok
    assert "lvm.fit" in str(mended)
    for scale in (by_hand, constant):
        story = both(plate=unsized, in_plate=scale)
        assert audit_scale(story.model, story.guide, None, x, batch_size=B).ok
        doubled = audit_scale(story.model, story.guide, None, x, batch_size=B, called_by="fit")
        assert "A doubled scale of 16" in doubled.findings[0]


def documents():
    """Rows of documents: a nested plate that subsamples words, a mask, a scale, a sum over y."""

    def model(x, seen):
        with pyro.plate("data", N, subsample_size=len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            with pyro.plate("words", 4, subsample_size=2, dim=-1) as index:
                w = pyro.sample("w", dist.Normal(z[..., 0] + y, 1.0))
                with poutine.mask(mask=seen[:, index]), poutine.scale(scale=0.5):
                    pyro.sample("x", dist.Normal(w + z[..., 1], 1.0), obs=x[:, index])

    def guide(x, seen):
        with pyro.plate("data", N, subsample_size=len(x), dim=-2):
            loc = torch.stack([x.mean(1), x[:, 0]], -1).unsqueeze(1)
            pyro.sample("z", dist.Normal(loc, 0.6).to_event(1))
            with pyro.plate("words", 4, subsample_size=2, dim=-1) as index:
                pyro.sample("w", dist.Normal(0.5 * x[:, index], 0.5))

    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(2))
    return model, guide, (x, x < 0.5)


def test_nested_plates_masks_and_sums_are_sliced():
    model, guide, args = documents()
    audit = audit_scale(model, guide, None, *args, batch_size=5)  # of which two are left over
    assert audit.ok, audit
    assert [row.measured for row in audit.rows] == pytest.approx([1.0] * 6, rel=1e-4)
    assert {row.site: row.scale for row in audit.rows} == pytest.approx(
        {"z": 12 / 5, "y": 12 / 5, "w": 24 / 5, "x": 12 / 5}
    )
    (x,) = (row for row in audit.rows if row.site == "x")
    assert "scale of 0.5 that it always has" in x.verdict


def subsampling(subsample, *, scale=1.0):
    x = _data()

    def plate():
        return pyro.plate("data", N, **subsample())

    def model():
        with plate() as index, poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    def guide():
        with plate() as index, poutine.scale(scale=scale):
            pyro.sample("z", dist.Normal(0.4 * x[index], 0.7))

    return model, guide


def test_pair_that_subsamples_is_read_or_measured():
    model, guide = subsampling(lambda: {"subsample_size": B})
    audit = audit_scale(model, guide, None)
    assert (audit.ok, audit.num_data, audit.batch_size) == (True, N, B)
    assert all(row.measured is None and row.expected == 1.0 for row in audit.rows)
    assert "fixed subsample_size" in str(audit)
    model, guide = subsampling(lambda: {"subsample": torch.randperm(N)[:B]})
    audit = audit_scale(model, guide, None)
    assert audit.ok
    assert [row.measured for row in audit.rows] == pytest.approx([1.0] * 3, rel=1e-4)


def test_pair_that_subsamples_with_a_doubled_scale():
    for subsample in (
        lambda: {"subsample_size": B},
        lambda: {"subsample": torch.randperm(N)[:B]},
    ):
        audit = audit_scale(*subsampling(subsample, scale=N / B), None)
        assert "A doubled scale of 16" in audit.findings[0]
        assert audit.rows[0].expected == pytest.approx(N / B)


def test_randomness_of_a_program_is_no_defect():
    def dropout(z, x):
        pyro.sample("x", dist.Normal(nn.functional.dropout(z, 0.5), 0.5), obs=x)

    story = Story(observe=dropout)
    audit = audit_scale(story.model, story.guide, None, _data(), batch_size=B)
    assert audit.ok, audit
    assert [row.measured is None for row in audit.rows] == [False, False, True, False, False]


class Normalised(PyroModule):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        with sized(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.norm(z[:, None])[:, 0] * self.frozen, 1.0), obs=x)


def test_nothing_is_changed():
    model, story, x = Normalised(), Story(has_mean=False), _data()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    audit_scale(model, story.guide, None, x, batch_size=B)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.norm.training
    assert not model.frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_audit_does_not_depend_on_the_draw():
    story = both(in_plate=by_hand)
    audits = []
    for seed in range(5):
        torch.manual_seed(seed)
        audits.append(audit_scale(story.model, story.guide, None, _data(), batch_size=B))
    assert len({audit.findings for audit in audits}) == 1


def test_many_minibatches_and_a_plate_of_another_name():
    def model(x):
        with pyro.plate("rows", 500, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    audit = audit_scale(model, None, None, torch.randn(500), batch_size=2, plate="rows")
    assert audit.ok
    assert audit.rows[0].measured == pytest.approx(1.0, rel=1e-4)


def no_plate(x):
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1), obs=x)


def transposed(x):
    with pyro.plate("data", x.shape[1]):
        pyro.sample("x", dist.Normal(torch.zeros(x.shape[1], len(x)), 1.0).to_event(1), obs=x.T)


STORY = Story()
ERRORS: dict[str, tuple[Any, ...]] = {
    "no data": (STORY.model, (), {"batch_size": B}, ValueError, "Expected data to slice"),
    "no tensor": (STORY.model, ([1.0] * N,), {"batch_size": B}, TypeError, r"data\[0\]"),
    "all data": (STORY.model, (_data(),), {"batch_size": N}, ValueError, "Expected batch_size bel"),
    "none": (STORY.model, (_data(),), {"batch_size": 0}, ValueError, "Expected batch_size to be"),
    "rows": (
        STORY.model,
        (_data(), _data()[1:]),
        {"batch_size": B},
        ValueError,
        r"one number of rows, the data; got \[11, 12\]",
    ),
    "plate": (
        STORY.model,
        (_data(),),
        {"batch_size": B, "plate": "rows"},
        ValueError,
        r"Expected a plate named 'rows' over the data; got plates named \['data'\]",
    ),
    "no plate": (no_plate, (_data(),), {"batch_size": B}, ValueError, "got no plates at all"),
    "transposed": (
        transposed,
        (torch.randn(N, 5),),
        {"batch_size": B},
        ValueError,
        "Expected plate 'data' to hold the 3 rows of a minibatch; got a plate of 5",
    ),
    "subsamples": (
        lambda x: subsampling(lambda: {"subsample_size": B})[0](),
        (_data(),),
        {"batch_size": B},
        ValueError,
        "to hold all 12 data when the pair is called with them; got a plate of 3",
    ),
    "caller": (STORY.model, (_data(),), {"called_by": "loop"}, ValueError, "'SVI' or 'fit'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_calls_without_meaning_are_refused(name):
    model, data, settings, error, match = ERRORS[name]
    guide = STORY.guide if model == STORY.model else None
    if name == "subsamples":
        guide = lambda x: subsampling(lambda: {"subsample_size": B})[1]()  # noqa: E731
    with pytest.raises(error, match=match):
        audit_scale(model, guide, None, *data, **settings)


def test_on_a_device(device):
    for story, found in ((Story(), 0), (both(in_plate=by_hand), 1)):
        audit = audit_scale(story.model, story.guide, None, _data().to(device), batch_size=B)
        assert len(audit.findings) == found
