"""Small models of convolutions, and a convolution written out."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LABELS = 4


def make_vision(family: str, seed: int = 0) -> nn.Module:
    """A classifier of images ``[B, 3, 32, 32]`` in evaluation mode."""
    import transformers as hf

    sizes: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1]}
    torch.manual_seed(seed)
    model: nn.Module = {
        "resnet": lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, layer_type="basic", num_labels=LABELS, **sizes)
        ),
        "convnext": lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(num_stages=2, patch_size=2, num_labels=LABELS, layer_scale_init_value=0.5, **sizes)
        ),
        # which pads by itself, as a convolution's stride says
        "mobilenet": lambda: hf.MobileNetV1ForImageClassification(
            hf.MobileNetV1Config(depth_multiplier=0.25, classifier_dropout_prob=0.0, num_labels=LABELS)
        ),
    }[family]()
    return model.eval()


def make_short_convolution(seed: int = 0) -> nn.Module:
    """A language model with a depthwise convolution in one block and attention in the other."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    config = Lfm2Config(**sizes, **heads, layer_types=["conv", "full_attention"], conv_L_cache=4, initializer_range=0.3)
    return Lfm2ForCausalLM(config).eval()


def make_images(samples: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Images whose class can be seen: which channel, or none, is lighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % LABELS
    images = torch.randn(samples, 3, 32, 32, generator=generator)
    images += F.one_hot(labels, LABELS)[:, :3, None, None]
    return {"pixel_values": images, "labels": labels}


def naive_convolution(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a convolution of any dimension gives for a batch, a sum over the places of its kernel."""
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    padding, stride, dilation = layer.padding, layer.stride, layer.dilation
    assert not isinstance(padding, str)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, [side for size in reversed(padding) for side in (size, size)], mode=mode)
    spans = [d * (size - 1) + 1 for d, size in zip(dilation, layer.kernel_size, strict=True)]
    steps = [(size - span) // s + 1 for size, span, s in zip(x.shape[2:], spans, stride, strict=True)]
    outputs = len(weight) // layer.groups
    rows = []
    for group in range(layer.groups):
        inputs = x[:, group * weight.shape[1] : (group + 1) * weight.shape[1]]
        w = weight[group * outputs : (group + 1) * outputs]
        y = x.new_zeros(len(x), outputs, *steps)
        for place in product(*map(range, layer.kernel_size)):
            seen = tuple(
                slice(p * d, p * d + (count - 1) * s + 1, s)
                for p, d, s, count in zip(place, dilation, stride, steps, strict=True)
            )
            y = y + torch.einsum("bi...,oi->bo...", inputs[(..., *seen)], w[(..., *place)])
        rows.append(y)
    y = torch.cat(rows, 1)
    return y if layer.bias is None else y + layer.bias.view(-1, *[1] * len(steps))
