"""What a CUDA graph reads: shown on the CPU by a stand-in for the graph, and on a device if any."""

from contextlib import contextmanager

import pytest
import torch

from pyro_lvm.compiled import cuda_graph
from pyro_lvm.compiled.cuda_graph import CudaGraph


def on_the_cpu(function, inputs):
    """The same as a graph: results and arguments stay where they are."""
    outputs = list(function(*inputs))

    def replay():
        for output, new in zip(outputs, function(*inputs), strict=True):
            output.copy_(new)

    return replay, outputs


@pytest.fixture
def graph(device, monkeypatch):
    """A step: a parameter goes up by some rows of the data; captured, with what it changes."""
    captured = []
    capture = on_the_cpu if device == "cpu" else cuda_graph._captured
    monkeypatch.setattr(
        cuda_graph, "_captured", lambda *args: (captured.append(1), capture(*args))[1]
    )
    p = torch.zeros((), device=device)

    def step(p, rows, data):
        p.add_(data.index_select(0, rows).sum())
        return [p * 1.0]

    @contextmanager
    def undone():
        before = p.clone()
        yield
        p.copy_(before)

    data, rows = torch.arange(5.0, device=device), torch.tensor([0, 1], device=device)
    return CudaGraph(step, [p, rows, data], copied=[1], undone=undone), p, data, captured


def test_rows_are_copied_and_data_read_where_they_are(graph, device):
    run, p, data, captured = graph
    assert p == 0  # capturing changes nothing
    (first,) = run(p, torch.tensor([1, 2], device=device), data)
    (second,) = run(p, torch.tensor([4, 4], device=device), data)
    assert (float(first), float(second), float(p)) == (3.0, 11.0, 11.0)
    assert run.inputs[2] is data
    data.fill_(100.0)  # in place: the graph sees it
    assert run(p, torch.tensor([0, 3], device=device), data)[0] == 211.0
    assert len(captured) == 1


def test_other_data_are_captured_anew(graph, device):
    run, p, data, captured = graph
    run(p, torch.tensor([1, 2], device=device), data)
    (result,) = run(p, torch.tensor([1, 1], device=device), data + 10)
    assert (float(result), float(p)) == (25.0, 25.0)  # one step, whatever capturing ran
    assert len(captured) == 2
