"""The graph as it was after a pass, kept small: what pages and tools that show it later need, and no tensors.

A snapshot is the fxir text, and what the text leaves out: the name of each call, which stays the same from pass to pass
where the text renumbers; its multiply-accumulates; and the line of the user's model that it came from. Compressed, the
1,600 calls of a large model take some 30 KB.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from typing import Any

from fxopt import cost
from fxopt.dump import dump
from fxopt.errors import ArtifactError
from fxopt.program import Program, source_line

_MOST_BYTES = 2**28  # of a snapshot, unpacked


@dataclasses.dataclass(frozen=True)
class Graph:
    """An unpacked snapshot; the last three run parallel to the calls of the text.

    Attributes:
        text: fxir.
        names: of the calls.
        macs: multiply-accumulates of each on the example inputs.
        sources: ``file:line`` of the user's code, or "".
    """

    text: str
    names: list[str]
    macs: list[int]
    sources: list[str]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A graph at one point of a compile.

    Attributes:
        data: JSON, compressed by zlib; see :func:`pack`.
    """

    data: bytes

    @staticmethod
    def of(program: Program, title: str) -> Snapshot:
        """*program* as it is now, under the heading *title*."""
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        lines = dict[str, str]()  # by trace: finding the line in one takes long, and many calls share one
        sources = []
        for node in calls:
            trace = node.meta.get("stack_trace") or ""
            if trace not in lines:
                lines[trace] = source_line(node)
            sources.append(lines[trace])
        places = {source: i for i, source in enumerate(dict.fromkeys(sources))}
        return Snapshot(
            pack(
                {
                    "text": dump(program, title),
                    "names": [node.name for node in calls],
                    "macs": [cost.node_macs(node) for node in calls],
                    "lines": list(places),
                    "sources": [places[source] for source in sources],
                }
            )
        )

    def open(self) -> Graph:
        """What was recorded.

        Raises:
            ArtifactError: it came from a file that holds something else.
        """
        entry = unpack(self.data)
        try:
            lines = entry["lines"]
            graph = Graph(entry["text"], entry["names"], entry["macs"], [lines[i] for i in entry["sources"]])
            sound = isinstance(graph.text, str) and len(graph.names) == len(graph.macs) == len(graph.sources)
            sound = sound and all(isinstance(word, str) for word in [*graph.names, *graph.sources])
            sound = sound and all(type(number) is int for number in graph.macs)
        except (KeyError, TypeError, IndexError) as error:
            raise ArtifactError(f"a recorded graph lacks a part: {error}") from error
        if not sound:
            raise ArtifactError("a recorded graph has parts that do not fit together")
        return graph

    def to_text(self) -> str:
        """The snapshot in characters of base64."""
        return base64.b64encode(self.data).decode()

    @staticmethod
    def from_text(text: object) -> Snapshot | None:
        """The snapshot behind :meth:`to_text`; None of None."""
        return None if text is None else Snapshot(base64.b64decode(str(text), validate=True))


def pack(value: Any) -> bytes:
    """*value* as JSON, compressed."""
    return zlib.compress(json.dumps(value, separators=(",", ":"), allow_nan=False).encode(), 9)


def unpack(data: bytes) -> Any:
    """What :func:`pack` wrote.

    Raises:
        ArtifactError: it wrote no such thing, or it unfolds into more than any model needs.
    """
    opened = zlib.decompressobj()
    try:
        text = opened.decompress(data, _MOST_BYTES)
        if opened.unconsumed_tail or not opened.eof:
            raise ArtifactError("what was recorded is cut off, or larger than it can be")
        return json.loads(text)
    except (zlib.error, ValueError) as error:
        raise ArtifactError(f"what was recorded cannot be read: {error}") from error
