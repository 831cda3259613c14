"""Targets as facts: how they are named, what follows from their features, and that what they say is decided by."""

from __future__ import annotations

import copy
import pickle
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import host, registry
from fxopt.machines import FAMILIES, closure
from fxopt.passes.insert_fake_quant import scheme
from fxopt.target import resolve_target
from tests.passes.models import chain

X = torch.linspace(-1, 1, 8).reshape(2, 4)
PRESETS = [str(target) for target in fxopt.targets()]
SPELLINGS = [
    *PRESETS,
    "arm -mcpu=cortex-a76 -mattr=+dotprod",
    "arm -mcpu=raspberry-pi-5",
    "arm -mattr=+dotprod,+bf16",
    "cortex-a76 -mattr=-dotprod,+i8mm",
    "x86 -mattr=-avx512f",
    "x86 -mcpu=avx512 -mattr=+avx512_vnni",
    "cuda -mcpu=sm_90",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_spelling_round_trips(text: str) -> None:
    target = fxopt.Target.from_string(text)
    assert str(target) == text
    assert fxopt.Target.from_string(str(target)) == target
    assert resolve_target(text) == target
    assert pickle.loads(pickle.dumps(target)) == copy.deepcopy(target) == target


def test_other_spellings_of_one_machine_are_equal() -> None:
    parse = fxopt.Target.from_string
    assert parse("arm -mcpu=cortex-a76 -mattr=+dotprod") == parse("cortex-a76") == parse("arm  -mcpu=cortex-a76")
    assert parse("avx512 -mattr=+avx512vnni").features == parse("avx512-vnni").features
    assert str(parse(" arm   -mcpu=cortex-a76 ")) == "arm -mcpu=cortex-a76"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cortex-a67", r"unknown target 'cortex-a67'\. Did you mean 'cortex-a\d\d'\? Known: arm, cuda, x86\."),
        ("neoverse-n3", r"Did you mean 'neoverse-n\d'"),
        ("", r"unknown target ''\. Known: arm, cuda, x86\..*fxopt\.targets\(\)"),
        (
            "arm -mcpu=cortex-a7",
            r"unknown machine of target arm 'cortex-a7'\. Did you mean 'cortex-a7\d'\? Known: apple",
        ),
        ("arm -mcpu=avx2", "unknown machine of target arm 'avx2'"),
        ("arm -mattr=+dotprd", r"unknown feature in target 'arm .*': 'dotprd'\. Did you mean 'dotprod'\?"),
        ("arm -mattr=+avx2", "unknown feature .* 'avx2'"),
        ("arm -mattr=dotprod", r"'dotprod' in -mattr must be \+FEATURE or -FEATURE"),
        ("arm -mattr=+dotprod,", r"'' in -mattr must be \+FEATURE"),
        ("arm -mattr=-neon", "every such machine has neon"),
        ("arm -march=armv8", "'-march=armv8' is neither -mcpu=NAME nor -mattr="),
        ("arm -mcpu=", "'-mcpu=' is neither"),
        ("x86 avx2", "'avx2' is neither -mcpu"),
        ("cortex-a76 -mcpu=cortex-a72", "names a machine twice"),
        ("arm -mattr=+bf16 -mattr=+i8mm", "names features twice"),
    ],
)
def test_what_is_unknown_has_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(fxopt.SpecError, match=message) as caught:
        fxopt.compile(nn.ReLU(), target=text)
    assert "\n" not in str(caught.value)


def test_features_bring_and_take_along_what_belongs_to_them() -> None:
    assert resolve_target("sse4.2 -mattr=+amx_int8").features >= {"avx2", "avx512f", "amx_tile", "amx_int8"}
    assert resolve_target("amx -mattr=-avx512f").features == {"sse4_2", "avx2"}
    assert resolve_target("neoverse-v1 -mattr=-fp16").features == {"neon", "dotprod", "bf16", "i8mm"}
    assert resolve_target("arm -mattr=+sve").features == {"neon", "fp16", "sve"}
    assert resolve_target("arm -mattr=+sve,-sve").features == {"neon", "fp16"}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tables_fit_together(name: str) -> None:
    family = FAMILIES[name]
    assert set(family.backends) <= set(registry.available("fxopt.backends"))
    assert family.default in family.cpus
    assert set(family.schemes.values()) <= set(scheme.SCHEMES)
    for cpu in family.cpus.values():
        assert family.always <= cpu.features
        assert all(closure(family, feature) <= cpu.features for feature in cpu.features)
    used = frozenset[str]().union(*(cpu.features for cpu in family.cpus.values()))
    assert used | {"avx_vnni"} >= set(family.features), "a feature that no machine has"


@pytest.mark.parametrize(
    ("text", "bits", "channels", "narrow", "low"),
    [
        ("sse4.2", 128, 8, True, set()),
        ("avx2", 256, 8, True, set()),
        ("avx2 -mattr=+avx_vnni", 256, 8, False, set()),
        ("avx512", 512, 16, True, set()),
        ("avx512-vnni", 512, 16, False, set()),
        ("avx512 -mattr=+avx512_bf16", 512, 16, True, {torch.bfloat16}),
        ("amx", 512, 16, False, {torch.bfloat16, torch.float16}),
        ("cortex-a72", 128, 8, False, set()),
        ("cortex-a76", 128, 8, False, {torch.float16}),
        ("neoverse-v1", 128, 8, False, {torch.bfloat16, torch.float16}),
        ("sm_75", 128, 8, False, {torch.float16}),
        ("sm_80", 128, 8, False, {torch.bfloat16, torch.float16}),
    ],
)
def test_facts_follow_from_features(text: str, bits: int, channels: int, narrow: bool, low: set[torch.dtype]) -> None:
    target = resolve_target(text)
    assert (target.vector_bits, target.channel_multiple, target.narrow_int8) == (bits, channels, narrow)
    assert target.native_dtypes == {torch.float32, *low}
    assert target.fast_2_4 is (text == "sm_80")


@pytest.mark.parametrize(
    ("text", "triple", "cpu", "attributes"),
    [
        ("avx2", "x86_64-linux-gnu", "x86-64-v3", "+sse4.2,+avx2,+fma,+f16c"),
        ("avx512 -mattr=-avx512f", "x86_64-linux-gnu", "x86-64-v4", "-avx512f"),
        ("cortex-a76", "aarch64-linux-gnu", "cortex-a76", "+neon,+dotprod,+fullfp16"),
        ("cortex-a76 -mattr=-dotprod", "aarch64-linux-gnu", "cortex-a76", "-dotprod"),
        ("apple-m1", "arm64-apple-macosx", "apple-m1", "+neon"),
        ("raspberry-pi-4", "aarch64-linux-gnu", "cortex-a72", "+neon"),
        ("arm", "aarch64-linux-gnu", "generic", "+neon"),
        ("sm_90", "nvptx64-nvidia-cuda", "sm_90", ""),
    ],
)
def test_what_llvm_is_told(text: str, triple: str, cpu: str, attributes: str) -> None:
    told = resolve_target(text).llvm
    if host.arch() != "aarch64" or text != "arm":
        assert (told["mtriple"], told["mcpu"]) == (triple, cpu)
    assert set(attributes.split(",")) <= set(told["mattr"].split(","))


def test_a_target_by_hand_has_its_level_for_llvm() -> None:
    assert fxopt.Target("x86", "x86_64", frozenset({"sse4_2", "avx2", "avx512_vnni"})).llvm["mcpu"] == "x86-64-v3"
    assert fxopt.Target("x86", "x86_64").llvm["mcpu"] == "x86-64"
    with pytest.raises(fxopt.SpecError, match="unknown kind of target 'mine'"):
        _ = fxopt.Target("mine", "sparc").llvm


@pytest.mark.parametrize("text", [text for text in SPELLINGS if resolve_target(text).name != "cuda"])
def test_llvm_has_the_same_features_in_its_tables(text: str) -> None:
    tvm = pytest.importorskip("tvm", reason="TVM brings LLVM's tables")
    target = resolve_target(text)
    told: dict[str, Any] = dict(target.llvm)
    assert tvm.target.codegen.llvm_is_valid_cpu(told["mcpu"], told["mtriple"])
    machine = tvm.target.Target({"kind": "llvm", **told, "mattr": told["mattr"].split(",")})
    known = {str(name) for name in tvm.target.codegen.llvm_get_cpu_features(machine)}
    features = FAMILIES[target.name].features
    assert {name for name, one in features.items() if known.issuperset(one.llvm)} == target.features


def test_the_schemes_of_engines() -> None:
    choose = scheme.choose
    assert choose("auto", resolve_target("sm_80"), "onnx") is scheme.TENSORRT
    assert choose("auto", resolve_target("cortex-a76"), "onnx") is scheme.ONNXRUNTIME
    assert choose("auto", resolve_target("avx512-vnni"), "onnx") is scheme.ONNXRUNTIME
    narrow = choose("auto", resolve_target("avx2"), "onnx")
    assert (narrow.name, narrow.weight.qmax) == ("onnxruntime", 63)


def test_this_host_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {
        "x86_64": "flags\t: sse4_2 ssse3 popcnt cx16 avx2 fma f16c bmi1 bmi2 movbe abm avx512f avx512_vnni avx_vnni",
        "aarch64": "Features\t: fp asimd evtstrm fphp asimdhp asimddp",
    }
    expected = {"x86_64": {"sse4_2", "avx2", "avx_vnni"}, "aarch64": {"neon", "fp16", "dotprod"}}
    monkeypatch.setattr(host, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    for machine, name in (("x86_64", "x86"), ("aarch64", "arm")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{lines[machine]}\n")
        host.features.cache_clear()
        host.cpu.cache_clear()
        assert resolve_target(name).features == expected[machine], "no AVX-512 without bw, cd, dq and vl"
        assert resolve_target(name).runs_here
    (tmp_path / "cpuinfo").unlink()
    host.features.cache_clear()
    assert resolve_target("arm").features == {"neon"}
    monkeypatch.undo()
    host.features.cache_clear()
    host.cpu.cache_clear()


def test_a_machine_with_more_than_this_host_is_foreign() -> None:
    own, other = ("x86", "amx") if host.arch() == "x86_64" else ("arm", "neoverse-v2")
    assert resolve_target(own).runs_here
    if not resolve_target(other).features <= resolve_target(own).features:
        model = fxopt.compile(chain(nn.Linear(4, 4)), target=other, example_inputs=(X,), backend="torch")
        with pytest.raises(fxopt.BackendUnavailable, match=f"compiled for target '{other}'"):
            model(X)


def test_compile_takes_every_spelling() -> None:
    model = chain(nn.Linear(4, 4), nn.ReLU())
    for text in ("cortex-a76", "arm -mcpu=cortex-a76 -mattr=+i8mm", "x86 -mattr=-avx2", "sm_75"):
        compiled = fxopt.compile(model, target=text, example_inputs=(X,), backend="torch")
        assert str(compiled.target) == compiled.report.target == text
        assert f"target={text}" in repr(compiled)
        assert f"for {text} on torch" in str(compiled.report)


def test_cast_precision_says_which_dtype_there_is() -> None:
    with pytest.warns(UserWarning, match="target cortex-a76 has no native bf16 .*; it has fp16"):
        fxopt.compile(
            nn.Linear(4, 4), target="cortex-a76", example_inputs=(X,), passes="cast-precision", backend="onnx"
        )


def test_the_list_reads_as_a_table() -> None:
    listed = fxopt.targets()
    assert [str(one) for one in listed[:3]] == ["x86", "arm", "cuda"]
    assert len(listed) == len(set(PRESETS))
    assert all(isinstance(one, fxopt.Target) for one in listed)
    shown = repr(listed)
    for text in ("sse4.2", "cortex-a76", "raspberry-pi-5", "apple-m1", "sm_100", "dotprod", "7 bits"):
        assert text in shown
