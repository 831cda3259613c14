"""Small versions of the models in PyTorch's own lists for Dynamo (benchmarks/dynamo), by the names that they have.

Random weights, thin layers and few of them, where the architecture lets us choose. Of the list of torchbench these are
the ones that torchvision has; the others are repositories of their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tools import models

Made = tuple[nn.Module, dict[str, torch.Tensor]]
"""A model in eval mode and keyword inputs."""

TORCHVISION = (
    "alexnet", "densenet121", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "resnet18", "resnet50",
    "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "vgg16",
)  # fmt: skip

_THIN = {"embed_dim": 48, "depth": 2, "num_heads": 3}
TIMM: Mapping[str, Mapping[str, Any]] = {
    "adv_inception_v3": {"side": 96, "model": "inception_v3"},
    "beit_base_patch16_224": {**_THIN, "img_size": 64},
    "convnextv2_nano": {"side": 64},
    "deit_base_distilled_patch16_224": {**_THIN, "img_size": 64},
    "deit_tiny_patch16_224": {**_THIN, "img_size": 64},
    "dm_nfnet_f0": {"side": 64},
    "ghostnet_100": {"side": 64},
    "inception_v3": {"side": 96},
    "mobilenetv2_100": {"side": 64},
    "mobilenetv3_large_100": {"side": 64},
    "mobilevit_s": {"side": 64},
    "nfnet_l0": {"side": 64},
    "repvgg_a2": {"side": 64},
    "swin_base_patch4_window7_224": {"img_size": 56, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)},
    "tf_efficientnet_b0": {"side": 64},
    "visformer_small": {"img_size": 64},
    "vit_base_patch14_dinov2": {**_THIN, "img_size": 56},
    "vit_base_patch16_siglip_256": {**_THIN, "img_size": 64},
}

# Names of the list that are no classes of transformers, and what they are.
_CLASSES = {
    "AllenaiLongformerBase": "LongformerForMaskedLM",
    "CamemBert": "CamembertForMaskedLM",
    "DistillGPT2": "GPT2LMHeadModel",
    "GoogleFnet": "FNetForMaskedLM",
    "T5Small": "T5ForConditionalGeneration",
    "YituTechConvBert": "ConvBertForMaskedLM",
    "meta-llama/Llama-3.2-1B": "LlamaForCausalLM",
    "google/gemma-2-2b": "Gemma2ForCausalLM",
    "google/gemma-3-4b-it": "Gemma3ForCausalLM",
    "openai/whisper-tiny": "WhisperForConditionalGeneration",
    "Qwen/Qwen3-0.6B": "Qwen3ForCausalLM",
    "mistralai/Mistral-7B-Instruct-v0.3": "MistralForCausalLM",
    "openai/gpt-oss-20b": "GptOssForCausalLM",
}
TRANSFORMERS = (
    "AlbertForMaskedLM", "AlbertForQuestionAnswering", "BartForCausalLM", "BartForConditionalGeneration",
    "BertForMaskedLM", "BertForQuestionAnswering", "BlenderbotForCausalLM", "BlenderbotForConditionalGeneration",
    "BlenderbotSmallForCausalLM", "BlenderbotSmallForConditionalGeneration", "DebertaV2ForMaskedLM",
    "DebertaV2ForQuestionAnswering", "DistilBertForMaskedLM", "DistilBertForQuestionAnswering", "ElectraForCausalLM",
    "ElectraForQuestionAnswering", "GPT2ForSequenceClassification", "GPTJForCausalLM", "GPTJForQuestionAnswering",
    "GPTNeoForCausalLM", "GPTNeoForSequenceClassification", "LayoutLMForMaskedLM", "LayoutLMForSequenceClassification",
    "M2M100ForConditionalGeneration", "MBartForCausalLM", "MBartForConditionalGeneration",
    "MT5ForConditionalGeneration", "MegatronBertForCausalLM", "MegatronBertForQuestionAnswering",
    "MobileBertForMaskedLM", "MobileBertForQuestionAnswering", "OPTForCausalLM", "PLBartForCausalLM",
    "PLBartForConditionalGeneration", "PegasusForCausalLM", "PegasusForConditionalGeneration", "RobertaForCausalLM",
    "RobertaForQuestionAnswering", "T5ForConditionalGeneration", "TrOCRForCausalLM", "XGLMForCausalLM",
    "XLNetLMHeadModel", *_CLASSES,
)  # fmt: skip

# What makes a configuration small, in the words of different authors.
_SMALL: Mapping[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embedding_size": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "n_inner": 96, "hidden_dim": 96, "d_ff": 96, "d_inner": 96, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "ffn_dim": 96, "d_kv": 16, "d_head": 16, "head_dim": 16, "rotary_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "max_source_positions": 32, "max_target_positions": 32,
    "word_embed_proj_dim": 64, "attention_window": [8, 8], "attention_types": [[["global", "local"], 1]],
    "window_size": 8, "sliding_window": 8, "use_sliding_window": True,
    "num_mel_bins": 16, "query_pre_attn_scalar": 16, "use_cache": False,
    "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2,
    "true_hidden_size": 32, "intra_bottleneck_size": 32,
}  # fmt: skip


def load(name: str) -> Made:
    """The model *name* of one of the three lists, small, with random, unsettled weights, and its inputs."""
    torch.manual_seed(0)
    make: Callable[[str], Made] = (
        _torchvision if name in TORCHVISION else functools.partial(_timm, **TIMM[name]) if name in TIMM else _hf
    )
    return make(name)


def _torchvision(name: str) -> Made:
    model, (image,) = models.load(name, small=True)
    return model, {"x": image}


def _timm(name: str, side: int = 0, model: str = "", **options: Any) -> Made:
    import timm

    made: nn.Module = timm.create_model(model or name, num_classes=10, **options)
    side = side or options["img_size"]
    models.unsettle(made.eval(), torch.randn(4, 3, side, side))
    return made, {"x": torch.randn(2, 3, side, side)}


def _hf(name: str) -> Made:
    import transformers

    kind: Any = getattr(transformers, _CLASSES.get(name, name))
    known = {*inspect.signature(kind.config_class.__init__).parameters, *vars(kind.config_class())}
    config = kind.config_class(**{key: value for key, value in _SMALL.items() if key in known})
    model = models.unsettle(kind(config).eval())
    tokens = torch.randint(3, 128, (2, 16))
    if "input_features" in inspect.signature(model.forward).parameters:
        return model, {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": tokens}
    inputs = {"input_ids": tokens}
    if config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = torch.randint(3, 128, (2, 8))
    return model, inputs
