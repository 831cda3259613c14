"""Compiled models as files: ``compiled.save("m.fxopt")``, ``fxopt.load("m.fxopt")``.

    m.fxopt   manifest.json         schema, versions, target, backend and its options, sizes and SHA-256 of what follows
              graph.json            the final graph and its signature, operators by name
              report.json           what the passes did
              weights.safetensors   constants that the engine does not hold itself; N:M sparsity and 4 bits packed
              payload.json          what the engine has to know beside its files
              payload/…             files of the engine (model.onnx and its weights, a shared library)

Reading needs neither the model's class nor its source and runs nothing from the file: no pickle, no code; operators
are looked up by name, conditions on sizes are checked to be arithmetic, shapes are inferred anew. A shared library,
which is code, is loaded only where ``allow_code=True`` says so. What a backend has no files for is lowered again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt import dynamic, registry
from fxopt.artifact.container import Container, write
from fxopt.artifact.graphs import decode_graph, encode_graph
from fxopt.artifact.reports import decode_report, encode_report
from fxopt.artifact.signatures import Sizes, decode_signature, encode_signature
from fxopt.artifact.tensors import Tensors
from fxopt.artifact.tensors import save as save_tensors
from fxopt.artifact.values import decode, encode
from fxopt.backend import Payload
from fxopt.capture import quiet_export
from fxopt.compiled import CompiledModel, Variant
from fxopt.errors import ArtifactError, FxoptError
from fxopt.lowering import hand_over
from fxopt.program import Program
from fxopt.report import Report
from fxopt.rewriter import infer
from fxopt.scratch import Scratch
from fxopt.signature import Leaf
from fxopt.target import Target

SUFFIX = ".fxopt"
SCHEMA = 1
_WEIGHTS, _GRAPH, _REPORT = "weights.safetensors", "graph.json", "report.json"
_FACTS, _PAYLOAD = "payload.json", "payload"


def save(variant: Variant, target: Target, path: Path) -> None:
    """Write *variant* to *path*, in one step.

    Raises:
        ArtifactError: part of it cannot be written down, or the file cannot be written.
    """
    payload = variant.executable.payload()
    program = variant.whole_program() if payload is None else variant.program
    sizes = program.signature.sizes([example for _, example in _examples(program)])
    graph = {
        "nodes": encode_graph(program.graph, program.constants),
        "signature": encode_signature(program.signature, sizes),
        "constants": _constants(program),
    }
    with tempfile.TemporaryDirectory(prefix="fxopt-") as scratch:
        weights = Path(scratch) / _WEIGHTS
        try:
            entries = save_tensors(program.tensors(), weights)
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: no room for its weights in {scratch}: {error}") from error
        members: dict[str, bytes | Path] = {_GRAPH: _text(graph), _REPORT: _text(encode_report(variant.report))}
        if payload is not None:
            members[_FACTS] = _text(encode(dict(payload.facts)))
            members |= {f"{_PAYLOAD}/{name}": file for name, file in payload.files.items()}
        write(path, _manifest(variant, target, payload, entries), {**members, _WEIGHTS: weights})


def _text(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode()


def _manifest(variant: Variant, target: Target, payload: Payload | None, entries: Any) -> dict[str, Any]:
    from fxopt import __version__

    return {
        "format": "fxopt artifact",
        "schema": SCHEMA,
        "versions": {"fxopt": __version__, "torch": torch.__version__.split("+")[0]},
        "target": {field.name: _plain(getattr(target, field.name)) for field in dataclasses.fields(target)},
        "backend": variant.backend,
        "options": {name: encode(value) for name, value in variant.options.items()},
        "passes": [record.spec for record in variant.report.passes if record.edits],
        "inputs": [f"{one.name}: {one}" for one in variant.program.signature.inputs],
        "outputs": [f"{one.name}: {one}" for one in variant.program.signature.outputs],
        "weights": entries,
        "payload": None if payload is None else {"code": payload.code},
    }


def _plain(value: Any) -> Any:
    """A field of a target; sets as sorted lists under a key of their own."""
    if isinstance(value, frozenset):
        return {"set": sorted((encode(item) for item in value), key=str)}
    return encode(value)


def _examples(program: Program) -> list[tuple[Leaf, Any]]:
    """Each input leaf, and a tensor without memory of the size it had in the example inputs, or its constant."""
    found = []
    for one, node in zip(program.signature.inputs, program.placeholders, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            value = torch.empty([_hint(size) for size in value.shape], dtype=value.dtype, device="meta")
        found.append((one, value))
    return found


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _constants(program: Program) -> dict[str, Any]:
    """Shape and dtype of each constant that is read, those that the engine holds included."""
    found = {}
    for node in program.graph.find_nodes(op="get_attr"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            found[str(node.target)] = [list(value.shape), encode(value.dtype)]
    return found


def load(path: str | os.PathLike[str], *, allow_code: bool = False, allow_ops: Collection[str] = ()) -> CompiledModel:
    """The compiled model in a file that ``CompiledModel.save`` wrote.

    Args:
        path: of the ``.fxopt`` file.
        allow_code: load machine code from the file (a shared library of the tvm backend), if you trust who made it.
        allow_ops: operator libraries, imported by you, whose operators the file may call beyond PyTorch's own.

    Raises:
        ArtifactError: there is no such file; it is damaged, cut off, altered, from a newer fxopt, made for a machine
            with features that this one lacks, or holds what no artifact may.
        BackendUnavailable: its engine is not installed.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArtifactError(f"load() wants the path of a file, such as 'model.fxopt', not {path!r:.80}")
    if isinstance(allow_ops, str):
        raise ArtifactError(f"allow_ops must be a list of libraries: [{allow_ops!r:.80}]")
    container = Container(Path(path))
    _check_schema(container)
    container.check()
    try:
        with torch.inference_mode(mode=False), torch.no_grad():
            return _load(container, allow_code=allow_code, allow_ops=allow_ops)
    except FxoptError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()[:1] or [""]
        raise ArtifactError(f"{path} holds no sound model: {type(error).__name__}: {text[0]:.200}") from error


def load_report(path: str | os.PathLike[str]) -> Report:
    """The report in a file that ``CompiledModel.save`` wrote; nothing else of it is loaded, and no engine is needed.

    Raises:
        ArtifactError: as for :func:`load`.
    """
    container = Container(Path(path))
    _check_schema(container)
    container.check()
    try:
        return decode_report(container.json(_REPORT))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{path} holds no sound report: {type(error).__name__}: {error}") from error


def _check_schema(container: Container) -> None:
    manifest, path = container.manifest, container.path
    if manifest.get("format") != "fxopt artifact" or type(manifest.get("schema")) is not int:
        raise ArtifactError(f"{path} is no fxopt artifact")
    if manifest["schema"] > SCHEMA:
        made_by = manifest.get("versions", {})
        raise ArtifactError(
            f"{path} was written by a newer fxopt ({str(made_by)[:80]}, schema {manifest['schema']}; this one reads up "
            f"to {SCHEMA}): update fxopt, or save the model again with this version"
        )


def _load(container: Container, *, allow_code: bool, allow_ops: Collection[str]) -> CompiledModel:
    manifest = container.manifest
    target = _target(manifest["target"])
    engine = registry.find_backend(manifest["backend"])
    engine.require()
    backend = engine.with_options({name: decode(value) for name, value in manifest["options"].items()})
    constants: dict[str, Any] = dict(Tensors(container.path, *container.place(_WEIGHTS), manifest["weights"]).all())
    program = _program(container.json(_GRAPH), constants, allow_ops)
    report = decode_report(container.json(_REPORT))
    payload = manifest["payload"]
    if payload is None:
        inputs = [torch.zeros_like(x, device="cpu") if one.is_tensor else x for one, x in _examples(program)]
        executable = hand_over(program, backend, target, inputs)
    elif payload["code"] and not allow_code:
        raise ArtifactError(
            f"{container.path} holds machine code for the {manifest['backend']} backend, which runs as you: if you "
            "trust where it comes from, load it with allow_code=True (commands: --allow-code)"
        )
    else:
        folder = Scratch()
        container.extract(_PAYLOAD, Path(folder.name))
        executable = backend.restore(folder, decode(container.json(_FACTS)), target)
    variant = Variant(program, executable, manifest["backend"], report, dict(manifest["options"]))
    return CompiledModel(target, variant=variant)


def _target(entry: Mapping[str, Any]) -> Target:
    known = {field.name for field in dataclasses.fields(Target)}
    if not set(entry) <= known:
        raise ArtifactError(f"its target has facts that this fxopt does not know: {sorted(set(entry) - known)}")
    return Target(**{name: _set(value) for name, value in entry.items()})


def _set(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"set"}:
        return frozenset(decode(item) for item in value["set"])
    return decode(value)


def _program(entry: Mapping[str, Any], constants: dict[str, Any], allow_ops: Collection[str]) -> Program:
    """The program of ``graph.json``, every value inferred from the operators."""
    graph = decode_graph(entry["nodes"], constants, allow_ops)
    sizes = Sizes(entry["signature"]["symbols"])
    program = Program(graph, constants, decode_signature(entry["signature"], sizes))
    mode = FakeTensorMode(shape_env=sizes.env, allow_non_fake_inputs=True)
    leaves = entry["signature"]["inputs"]
    if len(program.placeholders) != len(leaves):
        raise ArtifactError("its graph has other inputs than its signature")
    for node, one, leaf in zip(program.placeholders, program.signature.inputs, leaves, strict=True):
        with mode:
            shape = [sizes.size(size) for size in leaf.get("shape", ())]
            node.meta["val"] = torch.empty(shape, dtype=one.dtype, device=one.device) if one.is_tensor else one.value
    with quiet_export():
        for node in graph.nodes:
            if node.op == "get_attr":
                node.meta["val"] = _fake_constant(constants.get(str(node.target)), entry, node, mode)
            elif node.op == "call_function":
                node.meta["val"] = infer(node, mode)
    for node in graph.find_nodes(op="get_attr"):
        if isinstance(node.meta["val"], fx.GraphModule):
            del node.meta["val"]  # a branch is no value
    _check_results(program)
    return program


def _fake_constant(value: Any, entry: Mapping[str, Any], node: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, torch.Tensor):
        with mode:  # without what mode.from_tensor finds out of storages and views, which a file has none of
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    if value is not None:
        return value
    shape, dtype = entry["constants"][str(node.target)]  # of a constant that the engine holds
    with mode:
        return torch.empty([int(size) for size in shape], dtype=decode(dtype))


def _check_results(program: Program) -> None:
    """The outputs of the graph are those of the signature; the leaves of the latter get their shapes."""
    (results,), signature = program.output.args, program.signature
    split = len(signature.outputs)
    if not isinstance(results, tuple) or len(results) != split + len(signature.writebacks):
        raise ArtifactError("its graph gives other outputs than its signature")
    if signature.out_spec.num_leaves != split or signature.in_spec.num_leaves != len(signature.inputs):
        raise ArtifactError("its inputs or outputs are nested otherwise than its signature")
    for back in signature.writebacks:
        if back.constant is not None and not isinstance(program.constants.get(back.constant), torch.Tensor):
            raise ArtifactError(f"it writes to {back.constant!r:.80}, which it does not hold")
    outputs = [
        dynamic.leaf(one.name, getattr(result, "meta", {}).get("val"), None if hasattr(result, "meta") else result)
        for one, result in zip(signature.outputs, results[:split], strict=True)
    ]
    program.signature = dataclasses.replace(signature, outputs=tuple(outputs))
