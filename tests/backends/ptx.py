"""PTX, executed by numpy: what a GPU would compute, on a machine without one.

All threads of all blocks of a kernel are lanes of arrays. Those that are furthest behind go first, so that threads
that took different branches meet again. An access to shared memory that another thread of the block has used since the
last barrier, and that only luck would order, raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = Any  # of numpy
_SHARED, _SPACE, _SEVERAL = 1 << 20, 40, 1 << 20  # buffers are told apart by the upper bits of an address
_TYPES: dict[str, Any] = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64,
    **{f"{kind}{8 * n}": np.dtype(f"{'i' if kind == 's' else 'u'}{n}") for kind in "bus" for n in (1, 2, 4, 8)},
}  # fmt: skip


_NOTHING = 0x7FC07FC1  # no number, in bits of 16 as of 32


class RaceError(RuntimeError):
    """Two threads use a word of shared memory, and no barrier stands between."""


class Kernel:
    """One ``.entry`` of a PTX file.

    Attributes:
        parameters: name and type of each.
        threads: along x, y and z.
    """

    def __init__(self, text: str, shared: Mapping[str, tuple[int, int]]) -> None:
        """*shared*: place and bytes of each array in shared memory."""
        head, _, body = text.partition("{")
        self.parameters = re.findall(r"\.param \.(\w+)(?: \.ptr\S*(?: \.\w+)*(?: \d+)?)? (\w+)", head)
        self.threads = [int(n) for n in re.findall(r"\d+", re.findall(r"\.maxntid ([^\n]*)", head)[0])]
        self.shared = shared
        self.local = sum(int(n) for n in re.findall(r"\.local \S+ \d+ \.b8\s+\w+\[(\d+)\]", body))
        self.code: list[tuple[str, bool, str, list[str]]] = []  # guard, its sense, operation, operands
        self.labels: dict[str, int] = {}
        for line in body.splitlines():
            line = re.sub(r"//.*", "", line).strip()
            line = (
                re.sub(r"^\{ \.reg \.b32 tmp; (.*) \}$", r"\1", line).replace("{tmp,", "{_,").replace(", tmp}", ", _}")
            )
            if label := re.match(r"(\$\w+):", line):
                self.labels[label[1]] = len(self.code)
            elif line.endswith(";") and not line.startswith("."):
                guard, sense, rest = re.match(r"(?:@(!?)(%p\d+)\s+)?(.*);", line).group(2, 1, 3)  # type: ignore[union-attr]
                operation, _, operands = rest.partition(" ")
                parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
                self.code.append((guard or "", sense != "!", operation, parts))
        self.targets = set(self.labels.values())


def kernels(ptx: str) -> dict[str, Kernel]:
    """The entries of a file by their names."""
    shared, place = {}, 0
    for name, size in re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\]", ptx):
        shared[name] = (place, int(size))
        place += -(-int(size) // 64) * 64
    parts = re.split(r"\.visible \.entry ", ptx)[1:]
    return {re.match(r"\w+", part)[0]: Kernel(part.split("\n}")[0], shared) for part in parts}  # type: ignore[index]


def launch(kernel: Kernel, arguments: Sequence[Array | int], grid: Sequence[int], block: Sequence[int]) -> None:
    """Run *kernel* on arrays, which it reads and writes, and numbers; *grid* blocks of *block* threads."""
    _Run(kernel, arguments, grid, block).run()


class _Run:
    def __init__(self, kernel: Kernel, arguments: Sequence[Any], grid: Sequence[int], block: Sequence[int]) -> None:
        assert np.prod(block) <= np.prod(kernel.threads)
        self.kernel = kernel
        per_block, blocks = int(np.prod(block)), int(np.prod(grid))
        self.lanes = per_block * blocks
        number, which = np.arange(self.lanes) % per_block, np.arange(self.lanes) // per_block
        self.block, self.thread = which, number
        self.special = {}
        for name, index, sizes in (("tid", number, block), ("ctaid", which, grid)):
            for axis, size in zip("xyz", sizes, strict=True):
                self.special[f"%{name}.{axis}"] = (index % size).astype(np.uint32)
                index = index // size
        for name, sizes in (("ntid", block), ("nctaid", grid)):
            self.special |= {
                f"%{name}.{a}": np.full(self.lanes, s, np.uint32) for a, s in zip("xyz", sizes, strict=True)
            }
        self.buffers = {
            i + 1: a.reshape(-1).view(np.uint8) for i, a in enumerate(arguments) if isinstance(a, np.ndarray)
        }
        self.given = {
            name: (np.uint64((i + 1) << _SPACE) if isinstance(a, np.ndarray) else a)
            for i, (a, (_, name)) in enumerate(zip(arguments, kernel.parameters, strict=True))
        }
        size = sum(-(-n // 64) * 64 for _, n in kernel.shared.values())
        self.memory = np.zeros((blocks, max(size, 1)), np.uint8)
        self.writers, self.readers = (np.full((blocks, max(size, 1)), -1) for _ in range(2))
        self.local = np.zeros((self.lanes, max(kernel.local, 1)), np.uint8)
        self.registers: dict[str, Array] = {}

    def run(self) -> None:
        code = self.kernel.code
        pc = np.zeros(self.lanes, np.int64)
        waiting = np.zeros(self.lanes, bool)
        while True:
            ready = (pc < len(code)) & ~waiting
            if not ready.any():
                if not waiting.any():
                    return
                self._release(waiting, pc)
                continue
            at = int(pc[ready].min())
            active = np.nonzero(ready & (pc == at))[0]
            while True:  # straight on, as long as nobody leaves or joins
                guard, sense, operation, operands = code[at]
                chosen = active
                if guard:
                    chosen = active[self.registers[guard][active] == sense]
                kind = operation.split(".")[0]
                if kind == "bra":
                    pc[active] = at + 1
                    pc[chosen] = self.kernel.labels[operands[0]]
                    break
                if kind in ("ret", "exit"):
                    pc[active] = at + 1
                    pc[chosen] = len(code)
                    break
                if operation == "bar.sync":
                    pc[chosen] = at + 1
                    waiting[chosen] = True
                    assert chosen is active
                    break
                if len(chosen):
                    self._step(operation, operands, chosen)
                at += 1
                if at in self.kernel.targets or at == len(code):
                    pc[active] = at
                    break

    def _release(self, waiting: Array, pc: Array) -> None:
        """All blocks whose threads have all come to their barrier."""
        where = np.full(self.block.max() + 1, -1)
        where[self.block[waiting]] = pc[waiting]
        assert (pc[waiting] == where[self.block[waiting]]).all(), "threads wait at different barriers"
        self.writers[self.block[waiting]] = -1
        self.readers[self.block[waiting]] = -1
        waiting[:] = False

    # Registers --------------------------------------------------------------------------------------------------------

    def _read(self, operand: str, kind: str, lanes: Array) -> Array:
        dtype = np.dtype(_TYPES[kind])
        if operand in self.special:
            return self.special[operand][lanes].astype(dtype)
        if operand.startswith("%"):
            if operand not in self.registers:  # nobody may depend on it
                return np.full(len(lanes), np.uint64(_NOTHING).astype(f"u{dtype.itemsize}")).view(dtype)
            value = self.registers[operand][lanes]
            if dtype == np.bool_ or value.dtype.itemsize == dtype.itemsize:
                return value if dtype == np.bool_ else value.view(dtype)
            return value.astype(f"u{dtype.itemsize}").view(dtype)
        if operand in self.kernel.shared:
            return np.full(len(lanes), (_SHARED << _SPACE) + self.kernel.shared[operand][0], np.uint64)
        if operand.startswith("__local_depot"):
            return np.zeros(len(lanes), np.uint64)
        return np.full(len(lanes), _number(operand, dtype))

    def _write(self, register: str, value: Array, lanes: Array) -> None:
        if register == "_":
            return
        bits = value if value.dtype == np.bool_ else np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
        width = {"%p": 0, "%r": 4, "%h": 2}.get(re.match(r"%[a-z]+", register)[0], 0)  # type: ignore[index]
        if register.startswith(("%rd", "%fd", "%SP")):
            width = 8
        elif register.startswith("%rs"):
            width = 2
        if width and bits.dtype.itemsize != width:
            bits = bits.astype(f"u{width}")
        if register not in self.registers:
            self.registers[register] = np.zeros(self.lanes, bits.dtype)
        self.registers[register][lanes] = bits

    # Instructions -----------------------------------------------------------------------------------------------------

    def _step(self, operation: str, operands: list[str], lanes: Array) -> None:
        name, *flags = operation.split(".")
        with np.errstate(all="ignore"):
            if name in ("ld", "st"):
                self._memory(name, flags, operands, lanes)
            elif name == "shfl":
                self._shuffle(flags[1], operands, lanes)
            elif name == "activemask":
                warp = self.block[lanes] * 64 + self.thread[lanes] // 32
                masks = np.zeros(int(warp.max()) + 1, np.uint32)
                np.bitwise_or.at(masks, warp, (1 << (self.thread[lanes] % 32)).astype(np.uint32))
                self._write(operands[0], masks[warp], lanes)
            elif name == "mov" and operands[1].startswith("{"):
                registers, half = operands[1].strip("{}").split(", "), np.dtype(_TYPES[flags[-1]]).itemsize // 2
                parts = [self._read(p, f"b{half * 8}", lanes) for p in registers]
                self._write(operands[0], np.stack(parts, -1).view(f"u{half * 2}")[:, 0], lanes)
            elif name == "mov" and operands[0].startswith("{"):
                half = np.dtype(_TYPES[flags[-1]]).itemsize // 2
                parts = self._read(operands[1], flags[-1], lanes).reshape(-1, 1).view(f"u{half}")
                for i, register in enumerate(operands[0].strip("{}").split(", ")):
                    self._write(register, parts[:, i], lanes)
            elif name == "cvta" or name == "mov":
                self._write(operands[0], self._read(operands[1], flags[-1], lanes), lanes)
            elif name == "cvt":
                self._convert(flags, operands, lanes)
            elif name == "selp":
                a, b = (self._read(o, flags[-1], lanes) for o in operands[1:3])
                self._write(operands[0], np.where(self._read(operands[3], "pred", lanes), a, b), lanes)
            elif name == "setp":
                a, b = (self._read(o, flags[-1], lanes) for o in operands[1:3])
                self._write(operands[0], _compare(flags[0], a, b), lanes)
            elif name in _SPECIAL:
                self._write(operands[0], _SPECIAL[name](self, flags, operands[1:], lanes), lanes)
            elif flags[-1] == "f16x2":
                values = [self._read(o, "b32", lanes).reshape(-1, 1).view(np.float16) for o in operands[1:]]
                self._write(
                    operands[0], _arithmetic(name, flags, *values).astype(np.float16).view(np.uint32)[:, 0], lanes
                )
            else:
                values = [self._read(o, flags[-1], lanes) for o in operands[1:]]
                self._write(operands[0], _arithmetic(name, flags, *values), lanes)

    def _convert(self, flags: list[str], operands: list[str], lanes: Array) -> None:
        to, source = flags[-2:]
        if to == "f16x2":
            high, low = (self._read(o, source, lanes).astype(np.float16) for o in operands[1:3])
            self._write(operands[0], np.stack([low, high], -1).view(np.uint32)[:, 0], lanes)
            return
        value = self._read(operands[1], source, lanes)
        rounding = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}
        for flag in flags[:-2]:
            if flag in rounding:
                value = rounding[flag](value)
        dtype = np.dtype(_TYPES[to])
        if value.dtype.kind == "f" and dtype.kind in "iu":  # saturates, NaN gives 0
            limits = np.iinfo(dtype)
            inside = np.nan_to_num(
                value.astype(np.float64), nan=0.0, posinf=float(limits.max), neginf=float(limits.min)
            )
            exact = np.clip(inside, float(limits.min), float(limits.max))
            wide = exact < float(limits.max)
            self._write(operands[0], np.where(wide, np.where(wide, exact, 0).astype(dtype), limits.max), lanes)
            return
        result = value.astype(dtype)
        signed = to[0] == "s" and operands[0].startswith(("%r", "%rd")) and dtype.itemsize < 8
        if signed:  # into a wider register with its sign
            width = 8 if operands[0].startswith("%rd") else 2 if operands[0].startswith("%rs") else 4
            result = result.astype(f"i{max(width, dtype.itemsize)}")
        self._write(operands[0], result, lanes)

    def _shuffle(self, mode: str, operands: list[str], lanes: Array) -> None:
        target = operands[0].partition("|")[0]
        value, step, clamp = (self._read(o, "b32", lanes).astype(np.int64) for o in operands[1:4])
        own = self.thread[lanes] % 32
        first = own & (clamp >> 8)
        source = {"down": own + step, "up": own - step, "idx": first | (step & ~(clamp >> 8) & 31)}[mode]
        last = first | (clamp & 31 & ~(clamp >> 8))
        source = np.where(source > last if mode != "up" else source < first, own, source)
        warp = self.block[lanes] * 64 + self.thread[lanes] // 32
        table = np.full((int(warp.max()) + 1, 32), -1, np.int64)
        table[warp, own] = value
        got = np.where(table[warp, source] < 0, _NOTHING, table[warp, source])  # of a thread that is not there
        self._write(target, got.astype(np.uint32), lanes)

    # Memory -----------------------------------------------------------------------------------------------------------

    def _memory(self, name: str, flags: list[str], operands: list[str], lanes: Array) -> None:
        kind = flags[-1]
        dtype = np.dtype(_TYPES[kind])
        place = operands[1] if name == "ld" else operands[0]
        base, _, offset = place.strip("[]").partition("+")
        if "param" in flags:
            self._write(operands[0], np.full(len(lanes), self._parameter(base, dtype)), lanes)
            return
        registers = (operands[0] if name == "ld" else operands[1]).strip("{}").split(", ")
        address = self._read(base, "b64", lanes) + np.uint64(int(offset or 0) % (1 << 64))
        for i, register in enumerate(registers):
            where = address + np.uint64(i * dtype.itemsize)
            if name == "ld":
                self._write(register, self._load(where, dtype, lanes, "local" in flags), lanes)
            else:
                value = self._read(register, kind, lanes)
                self._store(where, value, lanes, "local" in flags)

    def _parameter(self, name: str, dtype: Any) -> Any:
        given = self.given[name]
        return np.array([given]).astype(dtype)[0] if not isinstance(given, float) else np.float32(given).view(dtype)

    def _bytes(self, address: Array, dtype: Any) -> Array:
        at = (address & np.uint64((1 << _SPACE) - 1)).astype(np.int64)
        assert (at % dtype.itemsize == 0).all(), "misaligned"
        return at[:, None] + np.arange(dtype.itemsize)

    def _load(self, address: Array, dtype: Any, lanes: Array, local: bool) -> Array:
        at = self._bytes(address, dtype)
        if local:
            return self.local[lanes[:, None], at].view(dtype)[:, 0]
        spaces = (address >> np.uint64(_SPACE)).astype(np.int64)
        result = np.empty((len(lanes), dtype.itemsize), np.uint8)
        for space in np.unique(spaces):
            mine = spaces == space
            if space == _SHARED:
                self._note(self.readers, self.writers, at[mine], lanes[mine])
                result[mine] = self.memory[self.block[lanes[mine]][:, None], at[mine]]
            else:
                result[mine] = self.buffers[int(space)][at[mine]]
        return result.view(dtype)[:, 0]

    def _store(self, address: Array, value: Array, lanes: Array, local: bool) -> None:
        at, raw = self._bytes(address, value.dtype), np.ascontiguousarray(value)[:, None].view(np.uint8)
        if local:
            self.local[lanes[:, None], at] = raw
            return
        spaces = (address >> np.uint64(_SPACE)).astype(np.int64)
        for space in np.unique(spaces):
            mine = spaces == space
            if space == _SHARED:
                self._note(self.writers, self.readers, at[mine], lanes[mine])
                self._note(self.writers, self.writers, at[mine], lanes[mine])
                self.memory[self.block[lanes[mine]][:, None], at[mine]] = raw[mine]
            else:
                self.buffers[int(space)][at[mine]] = raw[mine]

    def _note(self, mine: Array, others: Array, at: Array, lanes: Array) -> None:
        """That the threads of *lanes* use the bytes *at*, which no other thread may be among *others* for."""
        block, thread = self.block[lanes][:, None], self.thread[lanes][:, None]
        before = others[block, at]
        known = mine[block, at]
        mine[block, at] = np.where((known >= 0) & (known != thread), _SEVERAL, thread)
        at_once = mine is others and (mine[block, at] != thread).any()
        if at_once or ((before >= 0) & (before != thread)).any():
            raise RaceError("RaceError: two threads use a word of shared memory without a barrier between")


def _number(text: str, dtype: Any) -> Any:
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16)).view(dtype) if dtype.itemsize == 4 else np.uint32(int(text[2:], 16))
    if text.startswith("0d"):
        return np.uint64(int(text[2:], 16)).view(dtype)
    value = int(text.rstrip("U"), 0)
    raw = np.uint64(value % (1 << 64)).astype(f"u{dtype.itemsize}" if dtype != np.bool_ else "u1")
    return raw != 0 if dtype == np.bool_ else raw.view(dtype)


def _compare(how: str, a: Array, b: Array) -> Array:
    nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(len(a), bool)
    if how in ("num", "nan"):
        return nan if how == "nan" else ~nan
    unordered = how.endswith("u") and how != "u" and len(how) == 3
    how = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how[:2], how[:2])
    compare: dict[str, Callable[..., Array]] = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal
    }  # fmt: skip
    result = compare[how](a, b)
    return result | nan if unordered else result & ~nan if a.dtype.kind == "f" else result


def _arithmetic(name: str, flags: list[str], *values: Array) -> Array:
    a = values[0]
    if name == "fma":
        wide = np.float64 if a.dtype != np.float64 else np.longdouble
        x, y, z = (v.astype(wide) for v in values)
        return (x * y + z).astype(a.dtype)
    if a.dtype.kind == "f" and name in ("min", "max"):
        return (np.fmin if name == "min" else np.fmax)(*values) if "NaN" not in flags else (
            np.minimum if name == "min" else np.maximum)(*values)  # fmt: skip
    if name in ("div", "rem") and a.dtype.kind != "f":
        quotient = np.trunc(a.astype(object) / values[1].astype(object)) if a.dtype.itemsize > 4 else None
        safe = np.where(values[1] == 0, 1, values[1])
        floor = np.floor_divide(a, safe)
        floor = floor + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype) if a.dtype.kind == "i" else floor
        del quotient
        return floor if name == "div" else a - floor * safe
    return _PLAIN[name](*values).astype(a.dtype)


def _shift(operate: Callable[..., Array]) -> Any:
    def run(self: _Run, flags: list[str], operands: list[str], lanes: Array) -> Array:
        a, by = self._read(operands[0], flags[-1], lanes), self._read(operands[1], "u32", lanes).astype(np.int64)
        bits = a.dtype.itemsize * 8
        full = np.where(by >= bits, bits - 1, by).astype(a.dtype)
        result = operate(a, full)
        gone = (by >= bits) & (a.dtype.kind != "i" or operate is np.left_shift)
        return np.where(gone, np.zeros_like(result), result)

    return run


def _multiply(self: _Run, flags: list[str], operands: list[str], lanes: Array) -> Array:
    """mul and mad of integers: the lower or the upper half of the product, or all of it; mul of floats."""
    kind = flags[-1]
    a, b = (self._read(o, kind, lanes) for o in operands[:2])
    if kind == "f16x2":
        x, y = (self._read(o, "b32", lanes).reshape(-1, 1).view(np.float16) for o in operands[:2])
        return (x * y).view(np.uint32)[:, 0]
    if a.dtype.kind == "f":
        return a * b
    if "wide" in flags:
        product = a.astype(f"{a.dtype.kind}{a.dtype.itemsize * 2}") * b.astype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
    elif "hi" in flags:
        whole = a.astype(object) * b.astype(object)
        product = np.array([int(v) >> (a.dtype.itemsize * 8) for v in whole]).astype(a.dtype)
    else:
        product = a * b
    if len(operands) > 2:
        product = product + self._read(operands[2], f"{kind[0]}{product.dtype.itemsize * 8}", lanes)
    return product


def _bit_field(self: _Run, flags: list[str], operands: list[str], lanes: Array) -> Array:
    a = self._read(operands[0], flags[-1], lanes)
    start, length = (self._read(o, "u32", lanes).astype(a.dtype) for o in operands[1:])
    bits = a.dtype.type(a.dtype.itemsize * 8)
    return (a << (bits - length - start)) >> (bits - length)


def _bytes_of_two(self: _Run, flags: list[str], operands: list[str], lanes: Array) -> Array:
    a, b, chosen = (self._read(o, "b32", lanes) for o in operands)
    given = np.stack([a, b], -1).view(np.uint8)
    picks = [(chosen >> np.uint32(4 * i)) & np.uint32(15) for i in range(4)]
    result = [np.take_along_axis(given, (p & 7)[:, None].astype(np.int64), 1)[:, 0] for p in picks]
    signs = [np.where(p & 8, np.where(r & 128, 255, 0), r).astype(np.uint8) for p, r in zip(picks, result, strict=True)]
    return np.ascontiguousarray(np.stack(signs, -1)).view(np.uint32)[:, 0]


_SPECIAL: dict[str, Any] = {
    "mul": _multiply,
    "mad": _multiply,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "bfe": _bit_field,
    "prmt": _bytes_of_two,
}
_PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "div": np.divide, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt,
    "rcp": np.reciprocal, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "rem": np.fmod,
}  # fmt: skip
