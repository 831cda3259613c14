"""An exported ONNX model on disk, and how to call whatever runs it.

folder/model.onnx   the graph and its smallest tensors
folder/weights      everything else, mapped into memory by the engine: no second copy, and no limit of 2 GB
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxopt.backend import Payload
from fxopt.backends import _onnx_packed
from fxopt.backends._onnx_bounds import Bound
from fxopt.errors import ArtifactError, BackendUnavailable, UnsupportedOp
from fxopt.scratch import Scratch

if TYPE_CHECKING:
    import onnx_ir

SINGLE_FILE_LIMIT = 2_000_000_000  # bytes; a protobuf message must stay below 2 GiB
MODEL, WEIGHTS = "model.onnx", "weights"
EMBEDDED = 1024  # bytes; smaller tensors stay in the graph, where shape inference can read them


@dataclasses.dataclass(frozen=True)
class Interface:
    """How the flat inputs and outputs of a program map to those of its ONNX graph.

    Attributes:
        inputs: (position among the flat inputs, name in the graph) of each tensor input.
        outputs: for each flat output, its position among the graph's outputs, or None for a constant.
        constants: for each flat output the value of a constant one, else None.
        scalars: positions of flat outputs that are Python numbers.
        bounds: which integers an input may hold, by its name.
    """

    inputs: tuple[tuple[int, str], ...]
    outputs: tuple[int | None, ...]
    constants: tuple[Any, ...]
    scalars: frozenset[int]
    bounds: Mapping[str, Bound]

    def feed(self, inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The graph's inputs by name, as plain contiguous tensors.

        Raises:
            InputError: one holds an integer out of its bounds.
        """
        feed = {name: inputs[i].detach().contiguous() for i, name in self.inputs}
        for name, bound in self.bounds.items():
            bound.check(name, feed[name])
        return feed

    def collect(self, results: Sequence[torch.Tensor]) -> list[Any]:
        """The flat outputs from the graph's."""
        flat = [c if at is None else results[at] for at, c in zip(self.outputs, self.constants, strict=True)]
        for i in self.scalars:
            flat[i] = flat[i].item()
        return flat


class OnnxFile:
    """An exported model on disk, in a folder of its own that goes when this object does.

    Attributes:
        path: the graph; its weights lie beside it.
        interface: how to call it.
        origins: "op at file:line" of the user's code for each ONNX node name.
        sources: name of the program's node for each ONNX node name; empty for a file of an artifact.
        transposed: names of the weights that lie transposed in the file.
    """

    def __init__(
        self,
        model: onnx_ir.Model,
        interface: Interface,
        origins: Mapping[str, str],
        sources: Mapping[str, str],
        transposed: Set[str],
    ) -> None:
        """Write *model*.

        Raises:
            UnsupportedOp: onnx.checker refuses it. BackendUnavailable: there is no room for its file.
        """
        import onnx
        import onnx_ir

        self._take(Scratch(), interface, origins, sources, transposed)
        try:
            onnx_ir.save(model, self.path, external_data=WEIGHTS, size_threshold_bytes=EMBEDDED)
        except OSError as error:
            folder = self.path.parent
            raise BackendUnavailable(f"the ONNX file cannot be written to {folder}: {error}. Set TMPDIR?") from error
        try:
            onnx.checker.check_model(str(self.path), full_check=True)
        except Exception as error:
            why = f"the exported ONNX graph is not valid: {self.explain(error)}"
            raise UnsupportedOp(why, self.blamed(str(error), why)) from error

    def _take(
        self,
        folder: tempfile.TemporaryDirectory[str],
        interface: Interface,
        origins: Mapping[str, str],
        sources: Mapping[str, str],
        transposed: Set[str],
    ) -> None:
        self._folder = folder
        self.path = Path(folder.name) / MODEL
        self.interface = interface
        self.origins = origins
        self.sources = sources
        self.transposed = transposed

    def payload(self) -> Payload:
        """The files, weights with N:M sparsity packed, and the interface in plain values."""
        fields = {field.name: getattr(self.interface, field.name) for field in dataclasses.fields(Interface)}
        facts = {
            **fields,
            "scalars": sorted(self.interface.scalars),
            "bounds": {name: dataclasses.astuple(bound) for name, bound in self.interface.bounds.items()},
            "origins": dict(self.origins),
            "transposed": sorted(self.transposed),
        }
        files = {file.name: file for file in self.path.parent.iterdir()}
        if WEIGHTS in files:
            self._scratch = Scratch()
            facts["packed"] = _onnx_packed.pack(self.path, files[WEIGHTS], Path(self._scratch.name))
            if facts["packed"] is not None:
                del files[WEIGHTS]
                files |= {file.name: file for file in Path(self._scratch.name).iterdir()}
        return Payload(files, facts)

    @classmethod
    def restored(cls, folder: tempfile.TemporaryDirectory[str], facts: Mapping[str, Any]) -> OnnxFile:
        """The file whose :meth:`payload` had these *facts*, from anyone.

        Raises:
            ArtifactError: it is no ONNX file, or takes its weights from elsewhere than the one file beside it; its
                packed weights do not fit.
        """
        file = cls.__new__(cls)
        interface = Interface(
            tuple(facts["inputs"]),
            tuple(facts["outputs"]),
            tuple(facts["constants"]),
            frozenset(facts["scalars"]),
            {name: Bound(*bound) for name, bound in facts["bounds"].items()},
        )
        file._take(folder, interface, facts["origins"], {}, frozenset(facts["transposed"]))
        if facts.get("packed") is not None:
            _onnx_packed.unpack(Path(folder.name), file.path.with_name(WEIGHTS), facts["packed"])
        _refuse_elsewhere(file.path)
        return file

    def weights(self) -> set[str]:
        """Names of the weights of which :meth:`constant` has the values."""
        import onnx

        from fxopt.backends._onnx_quantized_ops import TRANSPOSED

        stored = onnx.load(self.path, load_external_data=False).graph.initializer
        return {tensor.name.removesuffix(TRANSPOSED) for tensor in stored}

    def nbytes(self) -> int:
        """Bytes of graph and weights."""
        return sum(file.stat().st_size for file in self.path.parent.iterdir())

    def constant(self, name: str) -> torch.Tensor:
        """The weight that the program called *name*.

        Raises:
            KeyError: the file holds no such weight.
        """
        import onnx_ir

        from fxopt.backends._onnx_quantized_ops import TRANSPOSED

        stored = onnx_ir.load(self.path).graph.initializers
        if name not in stored and f"{name}{TRANSPOSED}" in stored:
            return self.constant(f"{name}{TRANSPOSED}").T.contiguous()
        value = stored[name].const_value
        assert value is not None
        if value.dtype == onnx_ir.DataType.INT4:
            result = torch.from_numpy(value.numpy().astype("int8"))
        else:
            flat = torch.frombuffer(bytearray(value.tobytes()), dtype=_torch_dtype(value.dtype))
            result = flat.reshape(value.shape.numpy())
        return result.T.contiguous() if name in self.transposed else result

    def save(self, path: Path) -> None:
        """Write the model to *path*: one file, or above 2 GB *path* and ``path.data`` beside it. All or nothing.

        Raises:
            ArtifactError: not an .onnx path, or it cannot be written.
        """
        if path.suffix != ".onnx":
            raise ArtifactError(
                f"the ONNX backends write .onnx files, not {path.suffix or path.name!r}; .fxopt is for all"
            )
        try:
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as staging:
                _copy(self.path, Path(staging) / path.name, single=self.nbytes() <= SINGLE_FILE_LIMIT)
                for file in sorted(Path(staging).iterdir(), reverse=True):  # the weights first
                    file.replace(path.parent / file.name)
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error}") from error

    def explain(self, error: Exception) -> str:
        """What an engine's *error* says first, or is about, and the user's ops that the ONNX nodes in it stand for."""
        text = str(error).strip().replace(str(self.path), self.path.name) or type(error).__name__
        line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", text.splitlines()[0])
        unconverted = re.search(r"Conversion is failed for: (.+)", text)  # OpenVINO says it in its last line
        line = f"it does not convert {unconverted[1]}" if unconverted else line
        names = dict.fromkeys(word for word in re.findall(r"[\w.]+", text) if word in self.origins)
        return line + "".join(f" [{where}]" for where in dict.fromkeys(self.origins[name] for name in names))

    def blamed(self, text: str, why: str) -> dict[str, str]:
        """*why*, by the name of each node of the program that *text*, of an engine, names in its own words."""
        return {self.sources[word]: why for word in re.findall(r"[\w.]+", text) if word in self.sources}


def _refuse_elsewhere(path: Path) -> None:
    """Raises ArtifactError where the ONNX file *path* names any file but the one of its weights."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ArtifactError(f"its ONNX file cannot be read: {error}") from error
    for tensor in onnx.external_data_helper._get_all_tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value != WEIGHTS:
                raise ArtifactError(f"its ONNX file takes weights from {entry.value!r:.80}, which is not its own")


def _copy(source: Path, target: Path, *, single: bool) -> None:
    if single:
        import onnx

        onnx.save(onnx.load(source), target)
    else:
        import onnx_ir

        onnx_ir.save(onnx_ir.load(source), target, external_data=f"{target.name}.data", size_threshold_bytes=EMBEDDED)


def _torch_dtype(dtype: Any) -> torch.dtype:
    from torch.onnx._internal.exporter import _core

    return next(ours for ours, theirs in _core._TORCH_DTYPE_TO_ONNX.items() if theirs == dtype)
