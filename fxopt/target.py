"""Targets: the machine that a model is compiled for, as a frozen set of facts.

A pass or a backend asks the target (``target.has("avx512_bf16")``), never the host, so that compiling for a
foreign machine gives the same graph as compiling on it. The facts themselves are in ``fxopt.machines``.

    x86                                      this host where it is one
    avx2   cortex-a76   sm_90                a machine of fxopt.targets()
    arm -mcpu=cortex-a76 -mattr=+i8mm        the same with a feature more; - for one less
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from fxopt import host
from fxopt.errors import InputError, SpecError, near_miss
from fxopt.machines import FAMILIES, Cpu, Family, closure


@dataclasses.dataclass(frozen=True)
class Target:
    """Facts about the machine a model will run on.

    Attributes:
        name: the kind of machine: ``"x86"``, ``"arm"``, ``"cuda"``.
        arch: machine architecture as ``platform.machine()`` spells it (``"x86_64"``, ``"aarch64"``).
        features: ISA features with a bearing on speed (``"avx512_bf16"``, ``"amx_bf16"``, ...).
        native_dtypes: floating dtypes with fast matmul kernels on this machine.
        backends: backend names in the order of preference; ``backend="auto"`` tries them.
        channel_multiple: how many channels its kernels compute at once: other counts are padded to it.
        fast_2_4: whether its matmul kernels compute weights with two zeros in each four faster than dense ones.
        cpu: which one of its kind, a name of :func:`targets`; "" where its features are all that is known.
        spelling: what the user wrote; ``str(target)``, and :meth:`from_string` makes the target of it again.
    """

    name: str
    arch: str
    features: frozenset[str] = frozenset()
    native_dtypes: frozenset[torch.dtype] = frozenset({torch.float32})
    backends: tuple[str, ...] = ("torch", "onnx")
    channel_multiple: int = 8
    fast_2_4: bool = False
    cpu: str = ""
    spelling: str = dataclasses.field(default="", compare=False)

    @staticmethod
    def from_string(text: str) -> Target:
        """The target that *text* describes: a name, then perhaps ``-mcpu=`` and ``-mattr=`` with features to switch.

        Features are comma-separated, each with + or -, in fxopt's spelling or LLVM's: ``-mattr=+dotprod,-bf16``.

        Raises:
            SpecError: *text* has another form, or a name or feature in it is unknown. InputError: it is no string.
        """
        if not isinstance(text, str):
            raise InputError(f"target must be a name or an fxopt.Target, not {type(text).__name__}")
        first, *options = text.split() or [""]
        family, cpu = _named(first)
        switches = ""
        given = set[str]()
        for option in options:
            key, separator, value = option.partition("=")
            if key not in _OPTIONS or not separator or not value:
                raise SpecError(
                    f"target {text!r}: {option!r} is neither -mcpu=NAME nor -mattr=+FEATURE,-FEATURE with features to "
                    "switch on and off"
                )
            if key in given or (key == "-mcpu" and cpu):
                raise SpecError(f"target {text!r} names {'a machine' if key == '-mcpu' else 'features'} twice")
            given.add(key)
            if key == "-mattr":
                switches = value
            else:
                cpu = _known(value, FAMILIES[family].cpus, f"machine of target {family}")
        return _make(family, cpu, switches, " ".join([first, *options]))

    def has(self, feature: str) -> bool:
        """Whether the machine has the ISA *feature*."""
        return feature in self.features

    @property
    def runs_here(self) -> bool:
        """Whether code for this target can run on this host."""
        return not self.obstacle

    @property
    def obstacle(self) -> str:
        """Why code for this target cannot run on this host; "" where it can."""
        if self.name == "cuda":
            return _gpu_obstacle(self.cpu)
        if host.arch() != self.arch:
            return f"this machine is {host.arch()}"
        missing = self.features - host.features(self.name) if self.name in FAMILIES else frozenset[str]()
        return f"this machine has no {', '.join(sorted(missing))}" if missing else ""

    @property
    def vector_bits(self) -> int:
        """Width of the widest vector registers of a CPU that code can be generated for: 128, 256 or 512."""
        known = FAMILIES[self.name].features if self.name in FAMILIES else {}
        return max([known[one].vector_bits for one in self.features if one in known], default=128)

    @property
    def narrow_int8(self) -> bool:
        """Whether int8 kernels add pairs of u8·s8 products in 16 bits, which saturate: weights then keep 7 bits.

        x86 without VNNI does (vpmaddubsw); NEON adds products in 32 bits.
        """
        return self.arch == "x86_64" and self.name != "cuda" and not self.features & {"avx512_vnni", "avx_vnni"}

    def int8_scheme(self, engine: str) -> str | None:
        """Name of the quantization scheme of *engine* on this machine; None for the engine's own."""
        return FAMILIES[self.name].schemes.get(engine) if self.name in FAMILIES else None

    @property
    def llvm(self) -> Mapping[str, str]:
        """``mtriple``, ``mcpu`` and ``mattr`` for code generators that stand on LLVM, such as TVM.

        Raises:
            SpecError: the target is of no kind that fxopt.targets() lists.
        """
        family = FAMILIES[_known(self.name, FAMILIES, "kind of target")]
        cpu = family.cpus.get(self.cpu) or _x86_level(self.features) if self.name == "x86" else self._preset(family)
        on = [f"+{text}" for name, one in family.features.items() if name in self.features for text in one.llvm]
        gone = [name for name in family.features if name in cpu.features - self.features]
        off = [f"-{text}" for name in gone for text in family.features[name].llvm]
        return MappingProxyType(
            {"mtriple": cpu.triple or family.triple, "mcpu": cpu.llvm, "mattr": ",".join([*on, *off])}
        )

    def _preset(self, family: Family) -> Cpu:
        return family.cpus[self.cpu or family.default]

    def __str__(self) -> str:
        return self.spelling or self.name


def resolve_target(target: str | Target) -> Target:
    """The :class:`Target` that the user named.

    Raises:
        SpecError: the name, or something in it, is unknown.
        InputError: neither a string nor a Target.
    """
    if isinstance(target, Target):
        return target
    return Target.from_string(target)


_OPTIONS = ("-mcpu", "-mattr")


def names() -> list[str]:
    """Of all kinds of machines, then of all machines."""
    return [*FAMILIES, *(cpu for family in FAMILIES.values() for cpu in family.cpus)]


def _named(text: str) -> tuple[str, str]:
    """Family and machine that the name *text* stands for; no machine for the name of a family."""
    if text in FAMILIES:
        return text, ""
    for name, family in FAMILIES.items():
        if text in family.cpus:
            return name, text
    hint = near_miss(text, names(), shown=FAMILIES)
    raise SpecError(f"unknown target {text!r}.{hint} Machines of each kind: fxopt.targets().")


def _known(text: str, known: Iterable[str], what: str) -> str:
    if text not in known:
        raise SpecError(f"unknown {what} {text!r}.{near_miss(text, known)}")
    return text


def _make(name: str, cpu: str, switches: str, spelling: str) -> Target:
    """The target of family *name*: its machine *cpu*, or this host, or the default; with features switched."""
    family = FAMILIES[name]
    arch = family.arch or host.arch()
    cpu = cpu or host.cpu(name)
    base = family.cpus[cpu].features if cpu else host.features(name)
    features = _switched(family, base, switches, spelling)
    dtypes = {dtype for one in features if (dtype := family.features[one].dtype) is not None}
    made = Target(
        name, arch, features, family.dtypes | dtypes, family.backends, fast_2_4="sparse" in features, cpu=cpu,
        spelling=spelling,
    )  # fmt: skip
    return dataclasses.replace(made, channel_multiple=max(family.channel_multiple, made.vector_bits // 32))


def _switched(family: Family, base: frozenset[str], switches: str, spelling: str) -> frozenset[str]:
    """*base* with the features of *switches* on or off, and what cannot be without them likewise."""
    features = set(base)
    aliases = {text: name for name, one in family.features.items() for text in (name, *one.llvm[:1])}
    for switch in switches.split(",") if switches else ():
        sign, text = switch[:1], switch[1:]
        if sign not in "+-" or not sign:
            raise SpecError(f"target {spelling!r}: {switch!r} in -mattr must be +FEATURE or -FEATURE")
        feature = aliases[_known(text, aliases, f"feature in target {spelling!r}:")]
        if sign == "+":
            features |= closure(family, feature)
        elif feature in family.always:
            raise SpecError(f"target {spelling!r}: every such machine has {feature}")
        else:
            features = {one for one in features if feature not in closure(family, one)}
    return frozenset(features)


def _gpu_obstacle(cpu: str) -> str:
    if not torch.cuda.is_available():
        return "no CUDA device is here"
    major, minor = torch.cuda.get_device_capability()
    older = (major, minor) < host.capability(cpu or "sm_0")
    return f"the CUDA device here is sm_{major}{minor}, which is older" if older else ""


def _x86_level(features: frozenset[str]) -> Cpu:
    """The highest level of x86 whose features are all among *features*."""
    fitting = [cpu for cpu in FAMILIES["x86"].cpus.values() if cpu.features <= features]
    return max(fitting, key=lambda cpu: len(cpu.features), default=Cpu(llvm="x86-64"))
