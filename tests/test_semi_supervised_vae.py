"""The semi-supervised VAE: against the paper's bound written by hand, enumeration, closed forms."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_lvm as lvm
from pyro_lvm.compiled.recordable import recordable
from pyro_lvm.models import SemiSupervisedVAE
from pyro_lvm.nn import MLP, BernoulliHead, Joined, LabelHead, NormalHead

NUM_DATA, FEATURES, LATENTS, CLASSES = 8, 5, 2, 3
LABELS = {
    "mixed": [-1, 0, 2, -1, 1, -1, 2, 0],
    "all known": [1, 0, 2, 2, 1, 0, 2, 0],
    "none known": [-1] * NUM_DATA,
    "none given": None,
}

pytestmark = pytest.mark.usefixtures("float64")
every_labelling = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
several = pytest.mark.parametrize("particles", [1, 3])


def networks(**settings):
    classifier = MLP(FEATURES, [8], head=LabelHead(CLASSES))
    encoder = Joined(MLP(FEATURES + CLASSES, [8], head=NormalHead(LATENTS)), [FEATURES, CLASSES])
    decoder = Joined(MLP(LATENTS + CLASSES, [8], head=NormalHead(FEATURES)), [LATENTS, CLASSES])
    settings = {"num_classes": CLASSES, "class_probs": [0.5, 0.2, 0.3], **settings}
    return SemiSupervisedVAE(classifier, encoder, decoder, **settings)


def data(labels, device="cpu"):
    """Arguments of model and guide."""
    x = torch.randn(NUM_DATA, FEATURES, device=device)
    return (x,) if labels is None else (x, torch.tensor(labels, device=device))


def noise(particles, device="cpu"):
    """What the guide draws, ``C x K x N x L``."""
    shape = (CLASSES, NUM_DATA, LATENTS)
    if particles > 1:
        shape = (CLASSES, particles, NUM_DATA, LATENTS)
    zeros = torch.zeros(shape, device=device)
    draws = torch.normal(zeros, torch.ones_like(zeros))
    return draws.reshape(CLASSES, particles, NUM_DATA, LATENTS)


def joint_and_posterior(vae, x, eps):
    """Log p(x, y, z) and log q(z | x, y) at draws of z, each ``C x K x N``; loops, no Pyro."""
    joint, posterior = [], []
    for c in range(CLASSES):
        y = torch.full((NUM_DATA,), c, device=x.device)
        q = vae.encoder(x, y)
        z = q.mean + q.stddev * eps[c]
        log_prior = (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(-1)
        log_y = math.log([0.5, 0.2, 0.3][c])
        joint.append(log_y + log_prior + vae.decoder(z, y.expand(z.shape[:-1])).log_prob(x))
        posterior.append(q.log_prob(z))
    return torch.stack(joint), torch.stack(posterior)


def bound_by_hand(vae, x, y, eps):
    """L(x, y) of labelled and U(x) of unlabelled data, ``N`` (Kingma et al. 2014, eq. 6 and 7)."""
    joint, posterior = joint_and_posterior(vae, x, eps)
    of_class = (joint - posterior).mean(1)  # C x N
    rows = []
    log_q = vae.classifier(x).logits
    for i in range(len(x)):
        if y is not None and y[i] >= 0:
            rows.append(of_class[y[i], i])
        else:
            rows.append((log_q[i].exp() * (of_class[:, i] - log_q[i])).sum())
    return torch.stack(rows)


def loss_and_gradient(vae, loss):
    vae.zero_grad()
    loss.backward()
    return loss.detach(), [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in vae.parameters()
    ]


def seeded(make, model, vae, args, particles=1):
    pyro.set_rng_seed(3)
    elbo = make(max_plate_nesting=1, num_particles=particles, vectorize_particles=particles > 1)
    return elbo.differentiable_loss(model, vae.guide, *args)


@several
@every_labelling
@pytest.mark.parametrize("make", [TraceEnum_ELBO, lvm.TraceInfo_ELBO])
def test_bound_is_that_of_the_paper(make, labels, particles, device):
    vae, args = networks().to(device), data(labels, device)
    found = loss_and_gradient(vae, seeded(make, vae.model, vae, args, particles))
    pyro.set_rng_seed(3)
    by_hand = bound_by_hand(vae, args[0], args[1] if labels else None, noise(particles, device))
    expected = loss_and_gradient(vae, -by_hand.sum())
    assert torch.allclose(found[0], expected[0], rtol=1e-10)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@several
@every_labelling
def test_importance_weights_are_those_of_p_of_x_and_y(labels, particles):
    """Log sum_y p(x, y, z_y) / q(z_y | x, y), over the class that is known, or over all."""
    vae, args = networks(), data(labels)
    pyro.set_rng_seed(3)
    terms = lvm.compute_terms(
        vae.model, vae.guide, *args, num_particles=particles, max_plate_nesting=1
    )
    pyro.set_rng_seed(3)
    joint, posterior = joint_and_posterior(vae, args[0], noise(particles))
    table = joint - posterior  # C x K x N
    for i in range(NUM_DATA):
        known = labels is not None and labels[i] >= 0
        expected = table[labels[i], :, i] if known else table[:, :, i].logsumexp(0)
        assert torch.allclose(terms.log_weight[:, i], expected, rtol=1e-10)


@every_labelling
def test_parts_add_up(labels):
    vae, args = networks(), data(labels)
    loss, parts = lvm.TraceInfo_ELBO().loss_and_parts(vae.model, vae.guide, *args)
    assert torch.allclose(loss.detach() / NUM_DATA, parts["loss"])
    total = -parts["reconstruction"] + parts["kl[y]"] + parts["kl[z]"]
    assert torch.allclose(parts["loss"], total, rtol=1e-10)
    if labels == LABELS["all known"]:  # the class costs what its prior says
        probs = torch.tensor([0.5, 0.2, 0.3])[args[1]]
        assert torch.allclose(parts["kl[y]"], -probs.log().mean(), rtol=1e-10)


@several
def test_classification_is_a_term_of_its_own(particles):
    vae, (x, y) = networks(label_weight=7.0), data(LABELS["mixed"])
    plain = loss_and_gradient(vae, seeded(TraceEnum_ELBO, vae.model, vae, (x, y), particles))
    both = seeded(TraceEnum_ELBO, vae.supervised_model, vae, (x, y), particles)
    both = loss_and_gradient(vae, both)
    known = y >= 0
    error = -vae.classifier(x[known]).log_prob(y[known]).sum()
    term = loss_and_gradient(vae, 7.0 * error)
    assert torch.allclose(both[0] - plain[0], term[0], rtol=1e-9)
    for a, b, c in zip(both[1], plain[1], term[1], strict=True):
        assert torch.allclose(a - b, c, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("labels", [LABELS["none known"], None])
def test_without_labels_there_is_nothing_to_classify(labels):
    vae, args = networks(label_weight=7.0), data(labels)
    losses = [
        seeded(TraceEnum_ELBO, m, vae, args).detach() for m in (vae.model, vae.supervised_model)
    ]
    assert losses[0] == losses[1]


def test_a_minibatch_is_scaled_to_all_data():
    """Both terms; ``fit`` sets the size of the plate likewise."""
    vae, (x, y) = networks(label_weight=7.0), data(LABELS["mixed"])

    def scaled(program):
        return pyro.poutine.scale(program, 5.0)

    one = seeded(TraceEnum_ELBO, vae.supervised_model, vae, (x, y)).detach()
    pyro.set_rng_seed(3)
    five = TraceEnum_ELBO(max_plate_nesting=1).loss(
        scaled(vae.supervised_model), scaled(vae.guide), x, y
    )
    assert five == pytest.approx(5 * float(one), rel=1e-10)
    report = lvm.diagnostics.audit_scale(
        vae.supervised_model, vae.guide, lvm.TraceInfo_ELBO(), x, y, batch_size=4, called_by="fit"
    )
    assert "wrong" not in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [TraceEnum_ELBO, lvm.TraceInfo_ELBO])
@pytest.mark.filterwarnings("error")
def test_a_classifier_that_is_sure_gives_finite_gradients(make, dtype):
    """Probabilities that underflow to 0, right or wrong, at labelled and unlabelled data."""
    vae, (x, y) = networks().to(dtype), data(LABELS["mixed"])
    with torch.no_grad():
        vae.classifier.layers[-1].weight.mul_(1e5)
    x = x.to(dtype)
    assert (vae.classify(x) == 0).any()
    loss, gradient = loss_and_gradient(vae, seeded(make, vae.model, vae, (x, y)))
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradient)
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, x, y, num_samples=10)
    assert score.log_prob.isfinite().all()


@pytest.mark.filterwarnings(r"ignore:[\s\S]*use TraceEnum_ELBO instead")
def test_sampled_classes_have_the_same_bound():
    """Pyro's ``Trace_ELBO`` draws the class; its mean is what enumeration has."""
    vae, args = networks(), data(LABELS["mixed"])
    settings = {"num_particles": 200, "vectorize_particles": True, "max_plate_nesting": 1}
    sampled, enumerated = (
        torch.tensor([kind(**settings).loss(vae.model, vae.guide, *args) for _ in range(10)])
        for kind in (Trace_ELBO, TraceEnum_ELBO)
    )
    error = math.sqrt((sampled.var() + enumerated.var()) / 10)
    assert abs(sampled.mean() - enumerated.mean()) < 5 * error


def test_it_can_be_recorded():
    """Value and gradient of the graph that ``fit`` compiles, without the compiler."""
    vae, (x, y) = networks(label_weight=3.0), data(LABELS["mixed"])
    elbo = lvm.TraceInfo_ELBO()
    program = vae.supervised_model
    elbo.differentiable_loss(program, vae.guide, x, y)  # looks at the pair once

    def loss(x, y):
        pyro.set_rng_seed(3)
        return elbo.differentiable_loss(program, vae.guide, x, y)

    expected = loss_and_gradient(vae, loss(x, y))
    with recordable():
        graph = make_fx(loss)(x, y)
    pyro.set_rng_seed(3)
    found = loss_and_gradient(vae, graph(x, y))
    assert torch.allclose(found[0], expected[0], rtol=1e-10)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)
    pyro.set_rng_seed(3)
    fewer = graph(x, torch.full_like(y, -1))  # labels are no constants of it
    pyro.set_rng_seed(3)
    assert torch.allclose(fewer, loss(x, torch.full_like(y, -1)))


# ------------------------------------------------------------------------- a linear model


class LinearDecoder(nn.Module):
    """x | z, y ~ N(W_y z + b_y, 0.6^2)."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(CLASSES, FEATURES, LATENTS))
        self.b = nn.Parameter(2 * torch.randn(CLASSES, FEATURES))

    def forward(self, z, y):
        loc = (self.W[y] @ z.unsqueeze(-1)).squeeze(-1) + self.b[y]
        return dist.Normal(loc, 0.6).to_event(1)

    def log_prob(self, x):
        """Log p(x | y), ``C x N``."""
        noise = 0.36 * torch.eye(FEATURES)
        covariance = self.W @ self.W.mT + noise
        return dist.MultivariateNormal(self.b.unsqueeze(1), covariance.unsqueeze(1)).log_prob(x)


class LinearEncoder(nn.Module):
    """The posterior of z given x and y, its standard deviation times ``width``."""

    def __init__(self, decoder, width):
        super().__init__()
        self.decoder, self.width = decoder, width
        self.head = NormalHead(LATENTS)

    def forward(self, x, y):
        W, b = self.decoder.W[y], self.decoder.b[y]
        precision = torch.eye(LATENTS) + W.mT @ W / 0.36
        residual = ((x - b).unsqueeze(-2) @ W / 0.36).mT
        loc = torch.linalg.solve(precision, residual).squeeze(-1)
        scale = torch.linalg.cholesky(torch.linalg.inv(precision))
        return dist.MultivariateNormal(loc, scale_tril=self.width * scale)


def linear(width):
    decoder = LinearDecoder()
    classifier = MLP(FEATURES, [], head=LabelHead(CLASSES))
    probs = [0.5, 0.2, 0.3]
    return SemiSupervisedVAE(
        classifier, LinearEncoder(decoder, width), decoder, num_classes=CLASSES, class_probs=probs
    )


def exact(vae, x, y):
    """Log p(x, y), or log p(x) where y is not known, ``N``."""
    joint = vae.decoder.log_prob(x) + torch.tensor([0.5, 0.2, 0.3]).log().unsqueeze(-1)
    if y is None:
        return joint.logsumexp(0)
    known = joint.gather(0, y.clamp(min=0).unsqueeze(0)).squeeze(0)
    return torch.where(y < 0, joint.logsumexp(0), known)


@every_labelling
def test_the_exact_posterior_has_one_weight(labels):
    vae, args = linear(1.0), data(labels)
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, *args, num_samples=1)
    expected = exact(vae, args[0], args[1] if labels else None)
    assert torch.allclose(score.log_prob, expected.detach(), rtol=1e-9)


@every_labelling
def test_log_p_by_importance_sampling(labels):
    vae, args = linear(1.3), data(labels)
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, *args, num_samples=4000)
    expected = exact(vae, args[0], args[1] if labels else None).detach()
    assert (score.std_error > 0).all()
    assert ((score.log_prob - expected).abs() < 5 * score.std_error).all()


def test_missing_labels_are_imputed():
    """Draws of the label are those of p(y | x), whatever the classifier says."""
    vae, (x, y) = linear(1.0), data(LABELS["mixed"])
    joint = vae.decoder.log_prob(x).detach() + torch.tensor([0.5, 0.2, 0.3]).log().unsqueeze(-1)
    found = lvm.marginal.impute(vae.model, vae.guide, x, y, num_samples=2000)
    for i in range(NUM_DATA):
        expected = joint[:, i].softmax(0) if y[i] < 0 else nn.functional.one_hot(y[i], CLASSES)
        is_class = nn.functional.one_hot(found.draws["label"][:, i], CLASSES)  # K x C
        weights = found.weights[:, i : i + 1]
        shares = (weights * is_class).sum(0)
        error = (weights * (is_class - shares)).square().sum(0).sqrt()
        assert ((shares - expected).abs() <= 5 * error + 1e-9).all()


# ----------------------------------------------------------------------- what it is used for


def test_it_learns_from_labelled_and_unlabelled_data():
    """Three blobs, a few labels in each: the classifier gets the rest right."""
    y_true = torch.arange(90) % CLASSES
    centres = 4 * torch.eye(CLASSES, FEATURES)
    x = centres[y_true] + 0.7 * torch.randn(90, FEATURES)
    y = torch.full_like(y_true, -1)
    y[:15] = y_true[:15]
    vae = networks(label_weight=10.0, class_probs=None)
    fit = lvm.fit(
        vae.supervised_model,
        vae.guide,
        (x, y),
        epochs=40,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        compile=False,
        seed=0,
    )
    assert fit.history["loss"][-1] < fit.history["loss"][0]
    assert (vae.classify(x).argmax(-1) == y_true).double().mean() > 0.95


def test_a_repeated_row_counts_as_often():
    vae = linear(1.0)
    x, y = data(LABELS["mixed"])
    rows = torch.tensor([0, 1, 1, 1])
    log_prob = exact(vae, x, y).detach()
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, x[rows], y[rows], num_samples=1)
    expected = log_prob[0] + 3 * log_prob[1]
    assert torch.allclose(score.log_prob.sum(), expected)


def test_classify_reconstruct_and_sample(device):
    vae, (x, y) = networks().to(device), data(LABELS["mixed"], device)
    probs = vae.classify(x)
    assert torch.allclose(probs, vae.classifier(x).probs)
    label = torch.where(y < 0, probs.argmax(-1), y)
    expected = vae.decoder(vae.encoder(x, label).mean, label).mean
    assert torch.equal(vae.reconstruct(x, y), expected)
    most_probable = probs.argmax(-1)
    unlabelled = vae.decoder(vae.encoder(x, most_probable).mean, most_probable).mean
    assert torch.equal(vae.reconstruct(x), unlabelled)
    for found in (vae.sample(4), vae.sample(4, 2), vae.sample(4, y[1:5].clamp(min=0), mean=True)):
        assert found.shape == (4, FEATURES)
        assert found.device.type == device
        assert not found.requires_grad


def test_draws_are_of_the_class_that_is_asked_for():
    vae = linear(1.0)
    n = 20_000
    for c in range(CLASSES):
        x = vae.sample(n, c)
        assert ((x.mean(0) - vae.decoder.b[c]).abs() < 5 * x.std(0) / math.sqrt(n)).all()
    mean = torch.tensor([0.5, 0.2, 0.3]) @ vae.decoder.b
    x = vae.sample(n)
    assert ((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(n)).all()
    means = vae.sample(n, 1, mean=True)
    variance = (vae.decoder.W[1] @ vae.decoder.W[1].mT).diagonal()
    squares = (means - vae.decoder.b[1]).square()
    assert ((squares.mean(0) - variance).abs() < 5 * squares.std(0) / math.sqrt(n)).all()


def test_it_is_saved_and_copied(tmp_path):
    vae, args = networks(label_weight=7.0, plate="rows"), data(LABELS["mixed"])
    lvm.save(vae, tmp_path / "vae")
    expected = seeded(TraceEnum_ELBO, vae.supervised_model, vae, args)
    for other in (lvm.load(tmp_path / "vae"), copy.deepcopy(vae)):
        assert seeded(TraceEnum_ELBO, other.supervised_model, other, args) == expected


def test_the_prior_can_be_given_or_found():
    """An encoder without a head says the shape of z when it has been run."""
    x, y = data(LABELS["mixed"])
    base = networks()

    def encoder(x, y):
        return base.encoder(x, y)

    vae = SemiSupervisedVAE(base.classifier, encoder, base.decoder, num_classes=CLASSES)
    with pytest.raises(ValueError, match="shape of z"):
        vae.sample(3)
    vae.model(x, y)
    assert vae.sample(3).shape == (3, FEATURES)
    prior = dist.Normal(torch.full((LATENTS,), 5.0), 0.1).to_event(1)
    far = networks(prior=prior)
    assert far.prior_distribution() is prior
    trace = pyro.poutine.trace(far.model).get_trace(x)
    assert (trace.nodes["z"]["value"] > 4).all()
    other = networks(prior=MLP(1, [], head=NormalHead(LATENTS)))
    other.prior.forward = lambda: prior
    assert other.prior_distribution() is prior


@pytest.mark.parametrize("program", ["model", "supervised_model", "guide"])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda y: y + 3, ValueError, r"labels from 0 to 2, or -1.*got 3"),
        (lambda y: y - 1, ValueError, r"labels from 0 to 2, or -1.*got -2"),
        (lambda y: y.double(), TypeError, r"labels y of integers; got torch\.float64"),
        (lambda y: y > 0, TypeError, r"labels y of integers; got torch\.bool"),
        (lambda y: y.tolist(), TypeError, r"labels y of integers; got list"),
        (lambda y: y[:3], ValueError, r"label for each of the 8 data.*\(3,\)"),
        (lambda y: y.unsqueeze(-1), ValueError, r"label for each of the 8 data.*\(8, 1\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(program, change, error, match):
    vae, (x, y) = networks(), data(LABELS["mixed"])
    with pytest.raises(error, match=match):
        getattr(vae, program)(x, change(y))


def test_data_that_do_not_fit_are_refused():
    vae, (x, y) = networks(), data(LABELS["mixed"])
    with pytest.raises(ValueError, match="at least one datum"):
        vae.model(x[:0], y[:0])
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        lvm.fit(vae.supervised_model, vae.guide, (x, y + 2), epochs=1)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"label_weight": -1.0}, "label_weight"),
        ({"label_weight": math.nan}, "label_weight"),
        ({"class_probs": [0.5, 0.5]}, "class_probs to be 3 positive numbers"),
        ({"class_probs": [0.5, 0.5, 0.0]}, "class_probs to be 3 positive numbers"),
        ({"prior": dist.Normal(torch.zeros(2), 1.0)}, "batch shape"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        networks(**settings)


def test_label_head():
    head = LabelHead(4)
    raw = torch.randn(2, 3, 4)
    q = head(raw)
    assert q.batch_shape == (2, 3)
    assert q.event_shape == ()
    assert torch.allclose(q.probs, raw.softmax(-1))
    assert repr(head) == "LabelHead(4)"
    with pytest.raises(ValueError, match="num_classes"):
        LabelHead(1)
    with pytest.raises(ValueError, match="raw"):
        head(raw[..., :3])


def test_binary_images_and_labels_may_be_of_a_smaller_type():
    encoder = Joined(MLP(FEATURES + CLASSES, [8], head=NormalHead(LATENTS)), [FEATURES, CLASSES])
    decoder = Joined(MLP(LATENTS + CLASSES, [8], head=BernoulliHead(FEATURES)), [LATENTS, CLASSES])
    classifier = MLP(FEATURES, [8], head=LabelHead(CLASSES))
    vae = SemiSupervisedVAE(classifier, encoder, decoder, num_classes=CLASSES)
    x, y = data(LABELS["mixed"])
    losses = [
        seeded(TraceEnum_ELBO, vae.supervised_model, vae, ((x > 0).double(), y.to(dtype)))
        for dtype in (torch.int64, torch.int32, torch.int8)
    ]
    assert losses[0] == losses[1] == losses[2]
