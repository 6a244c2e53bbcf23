"""Architectures as other libraries ship them, of random weights: what to build, and what to call it with."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from models import Call
from torch import nn
from written import Case, Inputs, images


def library(name: str) -> Any:
    """The module of this name. Of torchvision its Python will do, if the rest was compiled for another torch."""
    try:
        import_module("torchvision")
    except RuntimeError:
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        for operation in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operation}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    return import_module(name)


def torchvision(name: str, size: int = 64, part: str = "models", **options: Any) -> Case:
    def build() -> tuple[nn.Module, Inputs]:
        return getattr(library(f"torchvision.{part}"), name)(**options), images(size)

    return build


def _torchvision_resnet(**options: Any) -> tuple[nn.Module, Inputs]:
    """One bottleneck in each stage."""
    resnet = library("torchvision.models.resnet")
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], **options), images(64)


def timm(name: str, size: int = 64, **options: Any) -> Case:
    return lambda: (library("timm").create_model(name, pretrained=False, **options), images(size))


def timm_class(part: str, name: str, **options: Any) -> Case:
    return lambda: (getattr(library(f"timm.models.{part}"), name)(**options), images(64))


def _mixer(ratio: Any, **layers: str) -> Case:
    """timm's mixers differ in layers of these names, and in their widths relative to the channels."""

    def build() -> tuple[nn.Module, Inputs]:
        mixers = library("timm.models.mlp_mixer")
        chosen = {role: getattr(mixers, name) for role, name in layers.items()}
        return mixers.MlpMixer(
            img_size=64, patch_size=16, num_blocks=2, embed_dim=32, mlp_ratio=ratio, **chosen
        ), images(64)

    return build


def segmentation(name: str) -> Case:
    def build() -> tuple[nn.Module, Inputs]:
        model = getattr(library("segmentation_models_pytorch"), name)
        return model("timm-mobilenetv3_small_minimal_100", encoder_weights=None, classes=3), images(64)

    return build


# transformers: the calls that users make without further arguments; decoders then return their caches

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 99, **VISION}
PATCHES = {"image_size": 32, "patch_size": 8}
BART = {"vocab_size": 99, "d_model": 32, "max_position_embeddings": 64, "activation_function": "relu"} | {
    f"{part}_{what}": n
    for part in ("encoder", "decoder")
    for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def transformers(model: str, inputs: Any, **options: Any) -> Case:
    """`model` is the name of a class; its configuration's begins alike."""

    def build() -> tuple[nn.Module, Inputs]:
        found = getattr(library("transformers"), model)
        return found(found.config_class(**options)), inputs

    return build


def texts(model: str, *, masked: bool = False, **options: Any) -> Case:
    inputs = {"input_ids": IDS, **({"attention_mask": PADDED} if masked else {})}
    return transformers(model, inputs, **options)


def sequences(model: str, **options: Any) -> Case:
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    return transformers(model, inputs, decoder_start_token_id=1, pad_token_id=0, eos_token_id=2, **options)


def pictures(model: str, **options: Any) -> Case:
    return transformers(model, {"pixel_values": PIXELS}, **options)


GPT2: dict[str, Any] = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"activation_function": "relu", "bos_token_id": 1, "eos_token_id": 2}
OPT = {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32} | {
    name: n for name, n in TEXT.items() if name != "intermediate_size"
}
LLAMA = {**TEXT, "num_key_value_heads": 2}
SPEECH = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2} | {
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}


# torch_geometric


def graph(name: str, **options: Any) -> Case:
    """A whole network."""
    return lambda: (getattr(library("torch_geometric.nn"), name)(8, 12, 2, 3, **options), _graph())


def graph_layers(name: str, **options: Any) -> Case:
    """Two layers with a ReLU between them."""

    def build() -> tuple[nn.Module, Inputs]:
        layer = getattr(library("torch_geometric.nn"), name)
        model = Call(
            lambda m, x, edges: m.second(F.relu(m.first(x, edges)), edges),
            first=layer(8, 12, **options),
            second=layer(12, 3, **options),
        )
        return model, _graph()

    return build


def graph_classifier() -> tuple[nn.Module, Inputs]:
    library_ = library("torch_geometric.nn")
    model = Call(
        lambda m, x, edges, batch: m.head(library_.global_max_pool(F.relu(m.layer(x, edges)), batch)),
        layer=library_.GraphConv(8, 12),
        head=nn.Linear(12, 3),
    )
    return model, (*_graph(), torch.tensor([0, 0, 0, 1, 1, 1]))


def _graph() -> Inputs:
    """Features of nodes, and edges."""
    return torch.randn(6, 8), torch.randint(0, 6, (2, 20))


SHIPPED: dict[str, dict[str, Case]] = {
    "torchvision": {
        "ResNet-18": torchvision("resnet18"),
        "ResNeXt": lambda: _torchvision_resnet(groups=32, width_per_group=2),
        "WideResNet": lambda: _torchvision_resnet(width_per_group=128),
        "DenseNet": torchvision("DenseNet", growth_rate=8, block_config=(2, 3), num_init_features=16),
        "SqueezeNet": torchvision("squeezenet1_1"),
        "MobileNet-v2": torchvision("mobilenet_v2", width_mult=0.25),
        "MobileNet-v3": torchvision("mobilenet_v3_small", width_mult=0.5),
        "MnasNet": torchvision("mnasnet0_5"),
        "ShuffleNet-v2": torchvision("shufflenet_v2_x0_5"),
        "EfficientNet": torchvision("efficientnet_b0"),
        "RegNet-Y": torchvision("regnet_y_400mf"),
        "Swin": torchvision(
            "SwinTransformer", patch_size=[4, 4], embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=[4, 4]
        ),
    },
    "timm": {
        "ViT": timm("vit_tiny_patch16_224", img_size=64, depth=2),
        "DeiT, distilled": timm("deit_tiny_distilled_patch16_224", img_size=64, depth=2),
        "BEiT": timm("beit_base_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=4),
        "CaiT": timm("cait_xxs24_224", img_size=64, depth=2),
        "Swin": timm(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 4)
        ),
        "Mixer": _mixer((0.5, 4.0)),
        "gMLP": _mixer(4, block_layer="SpatialGatingBlock", mlp_layer="GatedMlp"),
        "ResMLP": _mixer(4, block_layer="ResBlock", norm_layer="Affine"),
        "PoolFormer": timm_class("metaformer", "MetaFormer", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)),
        "ConvMixer": timm_class("convmixer", "ConvMixer", dim=32, depth=2, act_layer=nn.ReLU),
        "ConvNeXt": timm("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)),
        "EfficientNet-Lite": timm("efficientnet_lite0"),
        "MobileNet-v1": timm("mobilenetv1_100"),
        "MobileNet-v4": timm("mobilenetv4_conv_small_050"),
        "Res2Net": timm("res2net50_26w_4s", layers=(1, 1, 1, 1)),
        "ResNeSt": timm("resnest14d", channels=(16, 24, 32, 40)),
        "SE-ResNet": timm("seresnet18", layers=(1, 1, 1, 1), channels=(16, 24, 32, 40)),
        "SK-ResNet": timm("skresnet18", layers=(1, 1, 1, 1), channels=(16, 24, 32, 40)),
        "ResNet-v2": timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(32, 48, 64, 96), stem_chs=16),
        "Sequencer (LSTM)": timm(
            "sequencer2d_s",
            layers=(1, 1),
            patch_sizes=(4, 2),
            embed_dims=(16, 16),
            hidden_sizes=(8, 8),
            mlp_ratios=(2, 2),
        ),
    },
    "segmentation_models_pytorch": {name: segmentation(name) for name in ("FPN", "DeepLabV3Plus")},
    "transformers": {
        "OPT": texts("OPTForCausalLM", **OPT),
        "OPT, padded": texts("OPTForCausalLM", masked=True, **OPT),
        "OPT without its cache": transformers("OPTForCausalLM", {"input_ids": IDS, "use_cache": False}, **OPT),
        "GPT-2 with ReLU": texts("GPT2LMHeadModel", **GPT2),
        "GPT-2 with ReLU, padded": texts("GPT2LMHeadModel", masked=True, **GPT2),
        "Llama": texts("LlamaForCausalLM", **LLAMA),
        "Llama, padded": texts("LlamaForCausalLM", masked=True, **LLAMA),
        "BERT with ReLU": texts("BertForSequenceClassification", **TEXT, hidden_act="relu"),
        "BERT with ReLU, padded": texts("BertForSequenceClassification", masked=True, **TEXT, hidden_act="relu"),
        "T5": sequences("T5ForConditionalGeneration", **T5),
        "T5, padded": transformers(
            "T5ForConditionalGeneration",
            {"input_ids": IDS, "decoder_input_ids": IDS, "attention_mask": PADDED},
            **T5,
            decoder_start_token_id=0,
        ),
        "ViT with ReLU": pictures("ViTForImageClassification", **VISION, **PATCHES, hidden_act="relu"),
        "BART with ReLU": sequences("BartForConditionalGeneration", **BART),
        "Marian with ReLU": sequences("MarianMTModel", **BART),
        "CLIP": transformers(
            "CLIPModel",
            {"input_ids": IDS, "pixel_values": PIXELS},
            text_config={**TEXT, "max_position_embeddings": 64},
            vision_config={**VISION, **PATCHES},
            projection_dim=16,
        ),
    },
    "torch_geometric": {
        **{name: graph(name) for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN")},
        "GATv2": graph("GAT", v2=True),
        "GCN, batch norm, jumping knowledge": graph("GCN", norm="batch_norm", jk="cat"),
        "ChebConv": graph_layers("ChebConv", K=3),
        "GraphConv": graph_layers("GraphConv"),
        "TransformerConv": graph_layers("TransformerConv"),
        "GraphConv and pooling": graph_classifier,
    },
}

# of these the time of trace is of interest: they are as large as people train them
LARGE: dict[str, Case] = {
    "ResNet-50": torchvision("resnet50", 224),
    "ViT-B/16": timm("vit_base_patch16_224", 224),
}
