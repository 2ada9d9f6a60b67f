"""Calls captured into CUDA graphs: small batches spend their time on launching kernels, and a graph is one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
WARM_UP = 2
"""Calls before the capture, in which kernels are compiled and tables made."""


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors


class GraphCache:
    """Functions of tensors, captured the first time that they are called under a key."""

    def __init__(self) -> None:
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool: tuple[int, int] | None = None
        """Shared, because no recording's outputs outlive its call."""

    def __call__(self, key: Hashable, function: Callable[[Tensors], Tensors], inputs: Tensors) -> dict[str, Tensor]:
        """``function(inputs)``, copied; ``key`` must tell apart all that decides shapes and the function's path.

        Whatever else the function reads (weights, tables) is read where it was when it was captured.
        """
        if key not in self._recordings:
            self._recordings[key] = self._record(function, inputs)
        recording = self._recordings[key]
        for name, tensor in recording.inputs.items():
            tensor.copy_(inputs[name])
        recording.graph.replay()
        return {name: tensor.clone() for name, tensor in recording.outputs.items()}

    def _record(self, function: Callable[[Tensors], Tensors], inputs: Tensors) -> _Recording:
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that render meanwhile may allocate memory.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function(own)
        self._pool = self._pool or graph.pool()
        return _Recording(graph, own, outputs)
