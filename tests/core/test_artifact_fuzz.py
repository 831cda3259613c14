"""Ten thousand damaged and forged files: each loads or is refused by one error; nothing crashes, hangs or writes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import FxoptError
from tests.core.test_artifact import members, sealed

_FILES = 10_000
_EACH = 2_500  # files for one process, which a crash would end
_SECONDS = 900  # for these


def _models() -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))
    x = torch.randn(2, 2, 4, 4)
    return [
        (conv, (x,), {"backend": "torch", "dynamic_shapes": ({0: "n"},)}),
        (conv, (x,), {"backend": "torch", "passes": "insert-fake-quant", "calibration": [(x,)] * 4}),
        (nn.Linear(16, 16), (torch.randn(1, 16),), {"backend": "torch", "passes": "sparsify-2-4"}),
        (conv, (x,), {"backend": "onnx"}),
    ]


def _bytes_changed(content: bytes, chance: random.Random) -> bytes:
    """*content* with a few bytes other, cut out, doubled or cut off."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        size = chance.choice([1, 1, 2, 8, 64])
        match chance.randrange(4):
            case 0:
                data[at : at + size] = chance.randbytes(size)
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case _:
                del data[chance.randrange(len(data) // 2, len(data) + 1) :]
        data = data or bytearray(b"x")
    return bytes(data)


_ODD: list[Any] = [
    None, True, 0, -1, 2**62, 2**64, 1e300, "", "x", "aten.add.Tensor", "aten.zeros.default", "aten.view.default", [],
    {}, [[]],
    {"node": 0}, {"node": -1}, {"float": "nan"}, {"dtype": "int8"}, {"tuple": []}, {"complex": [1]}, [1, 2, 3],
]  # fmt: skip


def _value_changed(value: Any, chance: random.Random) -> Any:
    """JSON with one value somewhere in it other, gone, or in another's place."""
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        one = stack.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else []
        places += [(one, key) for key in keys]
        stack += [one[key] for key in keys]
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(places)
        other, at = chance.choice(places)
        if key not in (range(len(holder)) if isinstance(holder, list) else holder):
            continue
        match chance.randrange(3):
            case 0:
                holder[key] = chance.choice(_ODD)
            case 1 if isinstance(holder, dict):
                del holder[key]
            case _ if not isinstance(other, list) or at < len(other):
                holder[key] = json.loads(json.dumps(other.get(at) if isinstance(other, dict) else other[at]))
            case _:
                pass
    return value


def _forged(parts: dict[str, bytes], path: Path, chance: random.Random) -> None:
    """One file: raw damage, or a change within whose checksums are right."""
    if chance.random() < 0.2:
        path.write_bytes(_bytes_changed(sealed(path, parts).read_bytes(), chance))
        return
    name = chance.choice([name for name in parts if not name.startswith("payload/weights")])
    changed = dict(parts)
    if name.endswith(".json") and chance.random() < 0.8:
        value = _value_changed(json.loads(parts[name]), chance)
        changed[name] = json.dumps(value).encode()
    else:
        changed[name] = _bytes_changed(parts[name], chance)
    try:
        sealed(path, changed)
    except (ValueError, TypeError):  # a manifest that is no JSON object cannot be sealed
        path.write_bytes(_bytes_changed(sealed(path, parts).read_bytes(), chance))


def assert_is_clear(error: FxoptError) -> None:
    assert str(error)


def fuzz(seed: int, count: int, folder: Path) -> int:
    """Load *count* files; gives how many loaded."""
    chance, loaded = random.Random(seed), 0
    wholes = []
    for number, (model, inputs, arguments) in enumerate(_models()):
        torch.manual_seed(0)
        path = folder / f"whole-{number}.fxopt"
        fxopt.compile(model, example_inputs=inputs, **arguments).save(path)
        wholes.append(members(path))
        path.unlink()
    path = folder / "m.fxopt"
    for _ in range(count):
        _forged(chance.choice(wholes), path, chance)
        try:
            fxopt.load(path)
            loaded += 1
        except FxoptError as error:
            assert_is_clear(error)
        assert [file.name for file in folder.iterdir()] == ["m.fxopt"]
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(_FILES // _EACH))
def test_forged_files(seed: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.core.test_artifact_fuzz",
        str(seed),
        str(_EACH),
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = int(done.stdout.split()[-1])
    assert 0 < loaded < _EACH // 2  # a change of a name does no harm; most do


if __name__ == "__main__":
    sys.stdout.write(f"{fuzz(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))}\n")
