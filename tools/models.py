"""The third-party models that tests, zoo and benchmarks share: torchvision's classifiers and transformers' encoders.

Weights are random (nothing is downloaded) and then unsettled: parameters that an initialiser leaves constant (zero
heads, unit scales) get noise, and batch norms take statistics from an input. Otherwise half of a model would multiply
by one and add zero, and comparing it with eager would prove little.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Loaded = tuple[nn.Module, tuple[torch.Tensor, ...]]
"""A model in eval mode and one set of positional example inputs."""


def declare_torchvision_operators() -> None:
    """Makes torchvision importable although the wheel's compiled operators do not load beside a CPU torch.

    torchvision registers shape functions for ``nms`` and ``qnms`` while it is imported; declaring the two first is
    enough for every model builder. transformers imports torchvision by itself where it is installed.
    """
    if "torchvision" in sys.modules or _KEPT:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


# transformers imports torchao where it is installed, which tries kernels of other machines, with a warning for each.
logging.getLogger("torchao").setLevel(logging.ERROR)
_KEPT: list[Any] = []  # a Library takes its declarations back when it is collected
declare_torchvision_operators()


def torchvision_models() -> ModuleType:
    """The module ``torchvision.models``."""
    return importlib.import_module("torchvision.models")


def torchvision_names() -> list[str]:
    """Names of all of torchvision's classification builders."""
    models = torchvision_models()
    return sorted(models.list_models(module=models))


def _image_options(name: str, small: bool) -> tuple[int, dict[str, Any]]:
    """Side length of the input image in pixels, and builder options, for the torchvision builder *name*."""
    if name.startswith("vit_"):
        side = (98 if name == "vit_h_14" else 96) if small else 224
        return side, {"image_size": side}
    if name == "maxvit_t":  # its windows are laid out for 224 pixels
        return 224, {}
    if name == "inception_v3":
        return (96 if small else 299), {"init_weights": False}
    if name == "googlenet":
        return (96 if small else 224), {"init_weights": False}
    return (96 if small else 224), {}


def _torchvision(name: str, small: bool) -> Loaded:
    side, options = _image_options(name, small)
    model: nn.Module = torchvision_models().get_model(name, weights=None, **options)
    inputs = (torch.randn(1, 3, side, side),)
    return unsettle(model.eval(), torch.randn(4, 3, side, side)), inputs


def _tokens(vocabulary: int, length: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, vocabulary, (1, length)),)


def _bert(**options: Any) -> Loaded:
    import transformers

    config = transformers.BertConfig(**options)
    return transformers.BertModel(config).eval(), _tokens(config.vocab_size, 128)


def _small_bert() -> Loaded:
    model, inputs = _bert(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return model, (inputs[0][:, :16],)


def _small_gpt2() -> Loaded:
    import transformers

    config = transformers.GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64, use_cache=False)
    return transformers.GPT2LMHeadModel(config).eval(), _tokens(512, 16)


def _small_llama() -> Loaded:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval(), _tokens(512, 16)


def _small_t5_encoder() -> Loaded:
    import transformers

    config = transformers.T5Config(vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config).eval(), _tokens(512, 16)


def _small_vit() -> Loaded:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    return transformers.ViTModel(config).eval(), (torch.randn(1, 3, 32, 32),)


def _small_swin() -> Loaded:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    return transformers.SwinModel(config).eval(), (torch.randn(1, 3, 32, 32),)


def _small_whisper_encoder() -> Loaded:
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        num_mel_bins=16, d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128,
        max_source_positions=32,
    )  # fmt: skip
    return WhisperEncoder(config).eval(), (torch.randn(1, 16, 64),)


_TRANSFORMERS: dict[str, Callable[[], Loaded]] = {
    "bert": _small_bert,
    "gpt2": _small_gpt2,
    "llama": _small_llama,
    "t5-encoder": _small_t5_encoder,
    "hf-vit": _small_vit,
    "hf-swin": _small_swin,
    "whisper-encoder": _small_whisper_encoder,
}


def transformers_names() -> list[str]:
    """Names of the small transformers configurations."""
    return list(_TRANSFORMERS)


def load(name: str, *, small: bool = False) -> Loaded:
    """The model *name* with random, unsettled weights, and one set of example inputs.

    Args:
        name: a torchvision classification builder, a small transformers configuration
            (:func:`transformers_names`), or ``"bert-base"`` with 128 tokens.
        small: take 96-pixel images where the model allows it.

    Raises:
        KeyError: the name is none of these.
    """
    torch.manual_seed(0)
    if name == "bert-base":
        return _bert()
    if name in _TRANSFORMERS:
        model, inputs = _TRANSFORMERS[name]()
        return unsettle(model, *inputs), inputs
    if name in torchvision_names():
        return _torchvision(name, small)
    raise KeyError(f"unknown model {name!r}; known: bert-base, {', '.join(_TRANSFORMERS)}, and torchvision's builders")


@torch.no_grad()
def unsettle(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """Gives *model* (in eval mode) parameters and batch-norm statistics that all matter; returns it.

    A batch norm divides by the root mean square of what it sees here and subtracts a little. It does not subtract
    the mean: random networks that do are chaotic, and in the deepest even two ways to add up fp32 numbers then
    differ by more than 1e-4.

    Args:
        model: changed in place.
        inputs: what the statistics are taken from.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    if norms:
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return model


def _take_statistics(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Sets the running statistics of *norm* from its input, f32[N,C,...]."""
    assert isinstance(norm, _BatchNorm)
    if norm.running_var is None or norm.running_mean is None:
        return
    power = inputs[0].square().mean([d for d in range(inputs[0].dim()) if d != 1])
    norm.running_var.copy_(power.clamp(min=0.1 * float(power.mean()) + 1e-6))  # silent channels stay quiet
    norm.running_mean.copy_(0.1 * torch.randn_like(power) * norm.running_var.sqrt())


@torch.no_grad()
def with_outliers(model: nn.Module, seed: int, *inputs: torch.Tensor, channels: int = 3) -> nn.Module:
    """Gives the norms of a transformer a few channels 20 to 50 times as large as the others; returns the model.

    The channels are the same in every norm, as in trained language models (Dettmers et al., LLM.int8(), 2022). Weights
    that read a norm shrink by as much, so that what the other channels say still matters: without that the large
    channels would be all of the signal, and nothing would be lost by rounding the rest away.

    Args:
        model: changed in place; layer norms and RMS norms over the last dim.
        seed: of the choice of channels and factors.
        inputs: positional inputs of a forward that finds the readers, linears and convolutions; without any, only the
            norms change, all of them. With inputs, norms that nothing of the kind reads stay as they are.
        channels: how many become large.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ and getattr(m, "weight", None) is not None]
    readers = _readers(model, norms, inputs) if inputs else {norm: [] for norm in norms}
    chosen: dict[int, torch.Tensor] = {}
    for norm, linears in readers.items():
        width = int(norm.weight.numel())
        if width not in chosen:
            chosen[width] = torch.randperm(width, generator=generator)[:channels]
        factor = torch.ones(width)
        factor[chosen[width]] = 20 + 30 * torch.rand(channels, generator=generator)
        for parameter in norm.parameters(recurse=False):
            parameter.mul_(factor)
        for linear in linears:
            linear.weight.div_(_over_inputs(linear, factor))
    return model


def _is_conv(module: nn.Module) -> bool:
    """Whether *module* is a plain or depthwise convolution of images."""
    return isinstance(module, nn.Conv2d) and module.groups in (1, module.in_channels)


def _over_inputs(reader: nn.Module, factor: torch.Tensor) -> torch.Tensor:
    """*factor*, one for each input channel, in a shape that broadcasts to the weight of *reader*."""
    if isinstance(reader, nn.Conv2d):
        return factor[:, None, None] if reader.groups == 1 else factor[:, None, None, None]
    return factor if isinstance(reader, nn.Linear) else factor[:, None]  # transformers' Conv1D is [in, out]


def _readers(model: nn.Module, norms: list[Any], inputs: tuple[torch.Tensor, ...]) -> dict[Any, list[Any]]:
    """The linears and convs that read each norm; norms that none reads are left out."""
    made: list[tuple[Any, torch.Tensor]] = []
    found: dict[Any, list[Any]] = {}

    def enter(linear: nn.Module, args: tuple[Any, ...]) -> None:
        norm = next((n for n, y in reversed(made) if y.data_ptr() == args[0].data_ptr()), None)
        if norm is not None:
            found.setdefault(norm, []).append(linear)

    def leave(norm: nn.Module, _args: object, output: torch.Tensor) -> None:
        made.append((norm, output))  # kept alive: no later tensor takes its address

    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    linears = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") or _is_conv(m)]
    hooks = [m.register_forward_pre_hook(enter) for m in linears if uses[id(m.weight)] == 1]  # not tied ones
    hooks += [norm.register_forward_hook(leave) for norm in norms]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return found
