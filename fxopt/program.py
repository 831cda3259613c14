"""A captured model: a flat torch.fx graph, the tensors it refers to, and how its inputs and outputs are structured.

The graph is functional ATen. Placeholders are the leaves of the user's inputs in order; a ``get_attr`` node names a
key of ``constants`` (one node for each key, so a tied weight is a node with several users); the output is one flat
tuple: the user's output leaves, then one tensor for each of ``signature.writebacks``. Every node carries its value
as a FakeTensor in ``meta["val"]``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from fxopt.signature import Signature

# Key of ``node.meta`` under which a backend notes, in its own copy, the name that a node had before lowering.
ORIGIN = "fxopt_origin"


@dataclasses.dataclass
class Program:
    """The unit that passes rewrite and backends lower.

    Attributes:
        graph: the computation.
        constants: tensor (or, for higher-order ops, sub-GraphModule) by ``get_attr`` target.
        signature: input and output structure.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    signature: Signature

    def copy(self) -> Program:
        """An independent graph over the same tensors."""
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.graph, values, return_output_node=True)
        assert isinstance(result, tuple)
        output = graph.output(result[0])
        output.meta = dict(self.output.meta)
        return Program(graph, dict(self.constants), self.signature)

    @property
    def output(self) -> fx.Node:
        """The output node; its only argument is the flat tuple of results."""
        return self.graph.output_node()

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in order."""
        return list(self.graph.find_nodes(op="placeholder"))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The constants that are tensors."""
        return {name: value for name, value in self.constants.items() if isinstance(value, torch.Tensor)}

    def nbytes(self) -> int:
        """Bytes of all constants, shared storage counted once."""
        storages = [part.untyped_storage() for t in self.tensors().values() for part in _dense_parts(t)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def numel(self) -> int:
        """Number of parameters of the model, statistics and quantized weights included."""
        stored = (torch.int8, torch.uint8)
        return sum(t.numel() for t in self.tensors().values() if t.is_floating_point() or t.dtype in stored)

    def to_module(self) -> fx.GraphModule:
        """The program as a GraphModule: flat inputs in, flat tuple out. Tensors are shared, not copied."""
        root = {name: value.detach() if _is_tensor(value) else value for name, value in self.constants.items()}
        return fx.GraphModule(root, self.copy().graph, class_name="FxoptGraph")

    def remove_dead(self) -> int:
        """Erase nodes nobody uses and constants no node names; returns how many nodes went."""
        from fxopt.ops import is_pure

        removed = 0
        for node in reversed(self.graph.nodes):
            if not node.users and (node.op == "get_attr" or (node.op == "call_function" and is_pure(node))):
                self.graph.erase_node(node)
                removed += 1
        used = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        used |= {back.constant for back in self.signature.writebacks if back.constant is not None}
        for name in set(self.constants) - used:
            del self.constants[name]
        return removed


def _dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself, or the ones that a sparse tensor consists of."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def source_line(node: fx.Node) -> str:
    """``file.py:12`` of the user's code that made *node*: the innermost frame outside torch, or ""."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    own = [f for f in frames if "/torch/" not in f.replace("\\", "/")] or frames
    if not own:
        return ""
    path, _, rest = own[-1].removeprefix('File "').partition('", line ')
    return f"{path}:{rest.split(',')[0]}"
