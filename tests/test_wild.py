"""Models of other libraries, as these make them: traced, verified, and trained for a step. Skipped where they lack."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gsgd.torch import GSGD, trace, verify

IDS = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS)
PADDED = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
GRAPH = (torch.randn(6, 8), torch.randint(0, 6, (2, 20)))


def check(model: nn.Module, inputs: Any) -> int:
    """How many units are found, in silence."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the (traced|model)")
        net = trace(model, inputs)
    verify(model, net, inputs)
    optimizer = GSGD(model, lr=0.01, network=net)
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    y = out if isinstance(out, torch.Tensor) else out.logits
    before = [p.detach().clone() for p in model.parameters()]
    y.square().mean().backward()
    optimizer.step()
    assert not all(map(torch.equal, before, model.parameters()))
    return net.num_units


SIZE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
              "activation_function": "relu", "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"intermediate_size": 64, "num_key_value_heads": 2, **SIZE}),
    "opt": ("OPTForCausalLM", "OPTConfig",
            {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, **SIZE}),
    "bert": ("BertForSequenceClassification", "BertConfig", {"intermediate_size": 64, "hidden_act": "relu", **SIZE}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers(name: str, attention: str) -> None:
    """With and without a mask; the caches that decoders return pin the values of attention."""
    transformers = pytest.importorskip("transformers")
    model_name, config_name, options = TRANSFORMERS[name]
    config = getattr(transformers, config_name)(**options, attn_implementation=attention)
    found = []
    for more in ({}, {"attention_mask": ONES}, {"attention_mask": PADDED}, {"use_cache": False}):
        if name == "bert" and "use_cache" in more:
            continue
        torch.manual_seed(0)
        found.append(check(getattr(transformers, model_name)(config), {"input_ids": IDS, **more}))
    assert len(set(found[:3])) == 1
    assert found[0] >= 128  # the FFNs
    assert len(found) == 3 or found[3] > found[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vit(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    size = {name: x for name, x in SIZE.items() if name != "vocab_size"}
    config = transformers.ViTConfig(
        **size, intermediate_size=64, hidden_act="relu", image_size=32, patch_size=8, attn_implementation=attention
    )
    torch.manual_seed(0)
    assert check(transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}) >= 128


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"attention_mask": PADDED}])
def test_t5(more: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    assert check(model, {"input_ids": IDS, "decoder_input_ids": IDS, **more}) >= 256


GRAPHS: dict[str, Callable[[Any], nn.Module]] = {
    name: lambda g, name=name: getattr(g, name)(8, 12, 2, 3) for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN")
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GRAPHS)
def test_graph_networks(name: str) -> None:
    library = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    assert check(GRAPHS[name](library), GRAPH) >= 12
