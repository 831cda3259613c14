"""prune-channels on architectures that nobody prepared for it: exact under a mask, trainable, and worth it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt import cost
from tests.passes.models import Model
from tests.passes.pruned_models import cleaned, half_of
from tools import models

Loaded = tuple[nn.Module, tuple[Any, ...]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Ops this small take longer where threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def image(side: int, *more: int) -> tuple[torch.Tensor]:
    """Two random images, so that batch norms can train."""
    return (torch.randn(2, 3, *more, side, side),)


def unsettled(model: nn.Module, inputs: tuple[Any, ...], read: Callable[..., Any] | None = None) -> Loaded:
    """*model* with weights that all matter; *read* calls it for the outputs to compare."""
    if read is not None:
        model = Model(lambda m, *x: read(m.part, *x), part=model)
    return models.unsettle(model.eval(), *inputs), inputs


def from_timm(name: str, side: int, **options: Any) -> Loaded:
    """A model of timm."""
    model = importlib.import_module("timm").create_model(name, num_classes=7, **options)
    return unsettled(model, image(side))


def from_torchvision(name: str, inputs: tuple[Any, ...], read: Callable[..., Any] | None = None) -> Loaded:
    """A model of torchvision; *read* calls the part of it that is of interest."""
    model = models.torchvision_models().get_model(
        name, weights=None, **{"weights_backbone": None} if "_fpn" in name or "lraspp" in name else {}
    )
    return unsettled(model, inputs, read)


_SIZES = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip


def from_transformers(name: str, **options: Any) -> Loaded:
    """A small text model of transformers."""
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **options})
    return unsettled(getattr(transformers, f"{name}Model")(config), (torch.randint(5, 512, (2, 16)),))


def levels(model: nn.Module, x: torch.Tensor) -> Any:
    """What a detector's backbone finds at each scale."""
    return tuple(model.get_submodule("backbone")(x).values())


FEW: dict[str, Any] = {"num_key_value_heads": 2, "use_cache": False}
ZOO: dict[str, tuple[Callable[[], Loaded], float]] = {
    # what remains of the MACs at most, with half of every group removed
    "convnextv2": (lambda: from_timm("convnextv2_atto", 64), 0.30),
    "efficientvit": (lambda: from_timm("efficientvit_b0", 64), 0.40),
    "levit": (lambda: from_timm("levit_128s", 224), 0.25),
    "mobilevit": (lambda: from_timm("mobilevit_xxs", 64), 0.30),
    "mixer": (lambda: from_timm("mixer_s32_224", 224), 0.30),
    "res2net": (lambda: from_timm("res2net50_26w_4s", 64), 0.30),
    "resnest": (lambda: from_timm("resnest14d", 64), 0.30),
    "ghostnet": (lambda: from_timm("ghostnet_050", 64), 0.40),
    "poolformer": (lambda: from_timm("poolformer_s12", 64), 0.30),
    "edgenext": (lambda: from_timm("edgenext_xx_small", 64), 0.30),
    "hrnet": (lambda: from_timm("hrnet_w18_small", 64), 0.30),
    "davit": (lambda: from_timm("davit_tiny", 64), 0.25),
    "cait": (lambda: from_timm("cait_xxs24_224", 96, img_size=96), 0.25),
    "volo": (lambda: from_timm("volo_d1_224", 96, img_size=96), 0.25),
    "lraspp": (lambda: from_torchvision("lraspp_mobilenet_v3_large", image(64), lambda m, x: m(x)["out"]), 0.30),
    "fasterrcnn": (lambda: from_torchvision("fasterrcnn_mobilenet_v3_large_fpn", image(64), levels), 0.36),
    "raft": (
        lambda: from_torchvision("raft_small", image(128) * 2, lambda m, a, b: m(a, b, num_flow_updates=2)[-1]), 0.30,
    ),
    "video": (lambda: from_torchvision("r3d_18", image(32, 4), lambda m, x: m(x)), 0.30),
    "shufflenet": (lambda: from_torchvision("shufflenet_v2_x1_0", image(64)), 0.36),
    "deberta": (
        lambda: from_transformers("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8,
                                  hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        0.40,
    ),
    "albert": (lambda: from_transformers("Albert", embedding_size=32), 0.40),
    "mistral": (lambda: from_transformers("Mistral", **FEW), 0.40),
    "qwen2": (lambda: from_transformers("Qwen2", **FEW), 0.40),
    "gemma2": (lambda: from_transformers("Gemma2", head_dim=16, **FEW), 0.40),
    "bloom": (lambda: from_transformers("Bloom", use_cache=False), 0.42),
    "falcon": (
        lambda: from_transformers("Falcon", new_decoder_architecture=True, num_kv_heads=2, use_cache=False), 0.45,
    ),
    "mamba": (lambda: from_transformers("Mamba", state_size=8, use_cache=False), 0.50),
}  # fmt: skip
FAST = ("qwen2",)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_third_party_models(name: str) -> None:
    torch.manual_seed(0)
    load, most = ZOO[name]
    model, inputs = load()
    dense, flat = cleaned(model, inputs)
    half_of(dense, [flat], least=0)
    small = half_of(dense, [flat], norms=True)
    assert cost.macs(small) / cost.macs(dense) < most
    prepared = fxopt.prepare(model, inputs, passes="prune-channels")
    outputs = [x for x in pytree.tree_leaves(prepared(*inputs)) if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.stack([x.square().mean() for x in outputs]).sum().backward()
    gradients = [p.grad for p in prepared.parameters() if p.requires_grad]
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    assert sum(g is not None for g in gradients) > 0.9 * len(gradients)
