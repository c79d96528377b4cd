"""Datasets and DataLoaders in fit: the same runs as with tensors, and what is refused."""

import math
from datetime import timedelta

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.training import fit
from pyro_lvm.training.loaders import Loaded

pytestmark = pytest.mark.usefixtures("float64")


def data(num=23, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, generator=generator) + torch.tensor([2.0, 0.0, -1.0])


class Rows(Dataset):
    """Items by number; ``seen`` counts how often each was asked for."""

    def __init__(self, *tensors):
        self.tensors = tensors
        self.seen = torch.zeros(len(tensors[0]), dtype=torch.long)

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        self.seen[i] += 1
        items = tuple(t[i] for t in self.tensors)
        return items if len(items) > 1 else items[0]


class Stacked(Rows):
    def __getitem__(self, i):
        raise AssertionError("one at a time is slow")

    def __getitems__(self, rows):
        return self.tensors[0][rows]


class Listed(Stacked):
    def __getitems__(self, rows):
        return [self.tensors[0][i] for i in rows]


def model(x):
    loc = pyro.param("loc", torch.zeros(3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(loc + z[:, None], 1.0).to_event(1), obs=x)


def guide(x):
    slope = pyro.param("slope", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x.sum(1), 0.5))


def run(given, **settings):
    pyro.clear_param_store()
    settings = {"epochs": 4, "batch_size": 6, "seed": 2, **settings}
    adam = settings.pop("optimizer", lambda p: torch.optim.Adam(p, lr=0.05))
    result = fit(model, guide, given, optimizer=adam, **settings)
    values = [v.detach().clone() for v in pyro.get_param_store().values()]
    return result, values


def assert_same(one, other):
    assert one[0].history == other[0].history
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("make", [Rows, Stacked, Listed, TensorDataset])
def test_a_dataset_is_fitted_as_its_tensors_are(make):
    expected = run(data(), validation=data(7, seed=3))
    assert_same(run(make(data()), validation=make(data(7, seed=3))), expected)


def test_every_item_is_seen_once_an_epoch():
    rows = Rows(data(24))  # batches of 6 leave none out
    run(rows, epochs=4)
    checks = rows.seen - 4
    assert checks.min() >= 1
    assert checks.max() <= 4  # all once, and the first ones for what is looked at beside


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_has_its_own_batches(workers):
    """Full batches, so that its order does not matter."""
    loader = DataLoader(Rows(data()), batch_size=23, num_workers=workers)
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "epochs": 1}
    result, _ = run(loader, **still, elbo=TraceInfo_ELBO(num_particles=50))
    expected, _ = run(data(), **still, batch_size=23, elbo=TraceInfo_ELBO(num_particles=50))
    assert result.history["loss"] == pytest.approx(expected.history["loss"], rel=0.02)
    sizes = []

    def watched(x):
        sizes.append(len(x))
        return model(x)

    fit(watched, guide, DataLoader(Rows(data()), batch_size=10), epochs=1)
    assert sizes[-4:-1] == [10, 10, 3]  # and the smallest batch once more at the end


def test_a_loader_is_scaled_to_all_data():
    """In batches of 6 and 5 of 23 data as with all at once."""

    def story(x):
        mean = pyro.param("mean", torch.tensor(1.0))
        pyro.sample("mean_prior", dist.Normal(0.0, 1.0), obs=mean)  # counts once
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=x)

    histories = []
    for given in (data(), DataLoader(Rows(data()), batch_size=6, shuffle=True)):
        pyro.clear_param_store()
        still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "batch_size": 23}
        histories.append(fit(story, None, given, epochs=2, **still).history["loss"])
    assert histories[0] == pytest.approx(histories[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shuffled_loader_is_resumed_to_the_last_bit(workers, tmp_path):
    def loader():
        return DataLoader(Rows(data()), batch_size=6, shuffle=True, num_workers=workers)

    expected = run(loader(), validation=DataLoader(Rows(data(7)), batch_size=4))
    settings = {"validation": DataLoader(Rows(data(7)), batch_size=4), "checkpoint_dir": tmp_path}
    run(loader(), epochs=2, **settings)
    assert_same(run(loader(), resume=True, **settings), expected)


def test_a_dataset_is_resumed_within_an_epoch(tmp_path):
    class Stop(Rows):
        left = 80

        def __getitem__(self, i):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    settings = {"checkpoint_dir": tmp_path, "checkpoint_every": timedelta(0)}
    stopped, _ = run(Stop(data()), **settings)
    assert stopped.stopped == "interrupted"
    assert_same(run(Rows(data()), resume=True, **settings), run(Rows(data())))


@pytest.mark.parametrize("own", [True, False])
def test_a_look_at_a_loader_draws_nothing(own):
    generator = torch.Generator() if own else None
    loader = DataLoader(Rows(data()), batch_size=6, shuffle=True, generator=generator)
    state = torch.get_rng_state()
    own_state = generator.get_state() if own else None
    assert len(list(Loaded(loader).in_order())) == 4
    assert torch.equal(torch.get_rng_state(), state)
    assert not own or torch.equal(generator.get_state(), own_state)
    first, second = (torch.cat([x for (x,) in Loaded(loader)]) for _ in range(2))
    assert not torch.equal(first, second)


# ---------------------------------------------------------------------------- what is refused


class Stream(IterableDataset):
    def __iter__(self):
        yield from data()


class Counted(Stream):
    def __len__(self):
        return 23


class Words(Rows):
    def __getitem__(self, i):
        return {"x": self.tensors[0][i]}


def spoilt():
    x = data()
    x[17, 1] = math.nan
    return x


REFUSED = {
    "a stream": (Stream, ValueError, "of a known number.*got Stream.*__getitem__"),
    "a loader of a stream": (
        lambda: DataLoader(Stream(), batch_size=5),
        ValueError,
        "known number.*DataLoader of Stream, without a length.*__len__",
    ),
    "empty": (lambda: Rows(data(0)), ValueError, "at least one datum; got an empty dataset"),
    "an empty loader": (
        lambda: DataLoader(Rows(data(3)), batch_size=5, drop_last=True),
        ValueError,
        "at least one batch",
    ),
    "words": (lambda: Words(data()), TypeError, "tuples of tensors.*got dict.*__getitem__"),
    "words in a loader": (
        lambda: DataLoader(Words(data()), batch_size=5),
        TypeError,
        "tuples of tensors.*got dict",
    ),
    "nan": (lambda: Rows(spoilt()), ValueError, r"finite values in data\[12:18\].*\(5, 1\)"),
    "nan in a loader": (
        lambda: DataLoader(Rows(spoilt()), batch_size=5),
        ValueError,
        r"finite values in batch 3 of data.*\(2, 1\)",
    ),
    "an array": (lambda: data().numpy(), TypeError, "or a dataset of them; got ndarray"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_training(name):
    make, error, match = REFUSED[name]
    with pytest.raises(error, match=f"(?s)Expected.*{match}"):
        run(make())


def test_a_stream_with_a_length_can_be_loaded():
    result, _ = run(DataLoader(Counted(), batch_size=6))
    assert result.stopped == "all epochs"


def test_validation_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="validation data of the same shapes"):
        run(Rows(data()), validation=DataLoader(Rows(data()[:, :2]), batch_size=4))


def test_large_tensors_are_checked_in_parts(monkeypatch):
    monkeypatch.setattr("pyro_lvm.training.sources._CHECKED_AT_ONCE", 15)
    with pytest.raises(ValueError, match=r"finite values in data\[15:20\].*\(2, 1\)"):
        run(spoilt())
    run(data())
