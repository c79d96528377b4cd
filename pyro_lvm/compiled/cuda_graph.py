"""Functions as CUDA graphs, without Python between their kernels."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["CudaGraph", "on_cuda"]

Function = Callable[..., Sequence[Tensor]]
_WARM_UP = 3  # libraries set themselves up in their first calls


def on_cuda(
    function: Function,
    inputs: Sequence[Tensor],
    *,
    copied: Collection[int],
    undone: Callable[[], AbstractContextManager],
) -> Function:
    """A function as a `CudaGraph` if all of its arguments are on a CUDA device, else as it is.

    A number on the host would be for ever what it was when the graph was captured.
    """
    if not all(t.is_cuda for t in inputs):
        return function
    return CudaGraph(function, inputs, copied=copied, undone=undone)


class CudaGraph:
    """A function of tensors as a CUDA graph.

    A graph reads its arguments where they were when it was captured. Some are copied there in every
    call; the others, such as parameters, and large data that are given again and again, are read
    where they are, and if one of them is elsewhere than before, the function is captured once more.
    What is returned is the caller's to keep.

    Args:
        function: The function, which may change its arguments in place.
        inputs: Its arguments in the first call.
        copied: The positions of those that are copied.
        undone: Makes a context that puts back what the function changes, random numbers too:
            it is called to be captured.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        *,
        copied: Collection[int],
        undone: Callable[[], AbstractContextManager],
    ) -> None:
        self.function, self.copied, self.undone = function, copied, undone
        self._capture(inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """What the function returns for these arguments."""
        if any(inputs[i].data_ptr() != place for i, place in self.places.items()):
            self._capture(inputs)
        for i in self.copied:
            self.inputs[i].copy_(inputs[i])
        self.replay()
        return [output.clone() for output in self.outputs]

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [t.clone() if i in self.copied else t for i, t in enumerate(inputs)]
        # a parameter may be the same object with other memory, once its module was moved
        self.places = {i: t.data_ptr() for i, t in enumerate(inputs) if i not in self.copied}
        with self.undone():
            self.replay, self.outputs = _captured(self.function, self.inputs)


def _captured(function: Function, inputs: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    """What runs the function once more, and where its results are then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    return graph.replay, list(outputs)
