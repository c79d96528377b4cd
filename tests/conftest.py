"""What every test starts from: one seed, an empty param store, Pyro's validation on."""

import pyro
import pytest
import torch

torch.set_num_threads(1)  # tensors here are small, and threads that share a busy core stall


def pytest_generate_tests(metafunc):
    """The same test on the CPU and on a CUDA device if there is one."""
    if "device" in metafunc.fixturenames:
        cuda = pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        )
        metafunc.parametrize("device", ["cpu", cuda])


@pytest.fixture(autouse=True)
def _fresh_pyro():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()


@pytest.fixture
def float64():
    """Run a test in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
