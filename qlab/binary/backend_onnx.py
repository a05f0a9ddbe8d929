"""The exported ONNX model in onnxruntime, as a backend: the certificate then says whether another runtime gives the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlab.binary.backends import Backend, Observe
from qlab.binary.floats import inexact
from qlab.binary.graph import Graph
from qlab.binary.onnx import build
from qlab.errors import QlabError

__all__ = ["OnnxRuntime"]


class OnnxRuntime(Backend):
    """A packed graph as onnxruntime computes its ONNX form, node by node, with graph optimisations off.

    Args:
        graph: a checked graph.

    Raises:
        InputError: a part of the graph cannot be said in ONNX.
        QlabError: onnx or onnxruntime is missing.
    """

    name: ClassVar[str] = "onnxruntime"

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.device = torch.device("cpu")
        self.promised = not inexact(graph)
        self._session = _session(graph)

    def run(self, x: Tensor, observe: Observe | None = None) -> Tensor:
        """Return the output for a batch of inputs (N, ...) in float32.

        Args:
            x: the batch.
            observe: called with every step and the values it gave once all have run; bits are +-1, channels first, as in the
                simulation, but flattened pictures have no padding.
        """
        if observe is None:
            return _run(self._session, ["output"], x)[0]
        names = [name for step in self.graph.steps for name in step.outputs]
        values = dict(zip(names, _run(_session(self.graph, names), names, x), strict=True))
        for step in self.graph.steps:
            observe(step, tuple(values[name] for name in step.outputs))
        return values[self.graph.output]


def _session(graph: Graph, watched: Sequence[str] = ()) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise QlabError("this backend needs onnxruntime, which is not installed: pip install 'qlab[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    model = build(graph, watched).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(session: Any, names: list[str], x: Tensor) -> list[Tensor]:
    return [torch.from_numpy(y) for y in session.run(names, {"input": x.detach().cpu().contiguous().numpy()})]
