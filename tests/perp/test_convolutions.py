"""Adapters of convolutions: against sums over the kernel written out in float64, and a whole life."""

from __future__ import annotations

import copy
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convolution_models import make_images, make_short_convolution, make_vision, naive_convolution
from safetensors.torch import load_file
from substituted import EXACT, adapted, check_fold, check_merge_in_place, combined
from tiny import make_tokens, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_prune import prune
from lightning_prune.perp import (
    adapter_masks,
    add_adapters,
    load_adapter,
    merge,
    reconstruct,
    save_adapter,
    set_masks,
    trainable_share,
)
from lightning_prune.perp.convolutions import SparseConvolution
from lightning_prune.perp.layers import sparse_layers

FAMILIES = ["resnet", "convnext", "mobilenet"]
IMAGES = make_images()
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(6, 8, 3, padding=1),
    "1d depthwise": lambda: nn.Conv1d(6, 6, 4, padding=3, groups=6),
    "2d": lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "2d circular": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular", bias=False),
    "2d pointwise": lambda: nn.Conv2d(6, 8, 1),
    "2d grouped": lambda: nn.Conv2d(6, 9, 3, stride=2, groups=3),
    "2d depthwise": lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6, dilation=2),
    "3d": lambda: nn.Conv3d(6, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 1)),
    "3d grouped": lambda: nn.Conv3d(6, 4, 2, groups=2),
}


def halved(layer: nn.Module) -> nn.Sequential:
    """One pruned layer in float64, in a model."""
    model = nn.Sequential(layer).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(layer.weight.shape, generator=generator) < 0.5, 0.0)
    return model


def pruned_vision(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = make_vision(family)
    prune(model, score="magnitude", progress=False)
    return model.to(dtype)


def logits(model: nn.Module) -> Tensor:
    """In evaluation mode."""
    mode = model.training
    with torch.no_grad():
        y: Tensor = model.eval()(pixel_values=IMAGES["pixel_values"].to(next(model.parameters()).dtype)).logits
    model.train(mode)
    return y


def train(model: nn.Module, steps: int = 8, lr: float = 1e-2, autocast: bool = False) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    images = {**IMAGES, "pixel_values": IMAGES["pixel_values"].to(next(model.parameters()).dtype)}
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.train()(**images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def moved(model: nn.Module) -> nn.Module:
    """The same, with adapters that are no longer at their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in sparse_layers(model):
            _, b = layer.matrices()
            b += 0.3 * torch.randn(b.shape, generator=generator, dtype=b.dtype)
    return model


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("adapter", [*EXACT, "lora_prune", "lora"])
def test_a_step_and_the_merge_are_those_of_a_convolution_written_out_in_float64(adapter: str, kind: str) -> None:
    plain = halved(LAYERS[kind]())
    reference = copy.deepcopy(plain)[0]
    scaled = adapter not in ("scale_lora", "hira")
    options: dict[str, Any] = {"lora_alpha": 9} if scaled else {}
    model = moved(
        add_adapters(plain, adapter, r=3, train=(), target_modules=["0"], init_lora_weights="gaussian", **options)
    )
    ((_, layer),) = sparse_layers(model)
    assert isinstance(layer, SparseConvolution)
    w = reference.weight.detach().flatten(1)
    assert [m.shape for m in layer.matrices()] == [(3, w.shape[1]), (len(w), 3)]
    leaves = [matrix.detach().clone().requires_grad_() for matrix in layer.matrices()]
    matrix = combined(adapter, w, *leaves, 3.0)
    x = torch.randn(2, 6, *[7] * (reference.weight.dim() - 2), dtype=torch.float64).requires_grad_()
    other = x.detach().clone().requires_grad_()
    y, expected = model(x), naive_convolution(reference, other, matrix.view(reference.weight.shape))
    torch.testing.assert_close(y, expected)
    gradient = torch.randn(expected.shape, dtype=torch.float64)
    y.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, other.grad)
    for own, leaf in zip(layer.matrices(), leaves, strict=True):
        torch.testing.assert_close(own.grad, leaf.grad)
    assert layer.base_weight.grad is None
    if adapter == "lora":
        with pytest.raises(ValueError, match="adapter='lora' cannot be merged"):
            merge(model)
        return
    y, kept = model(x), w != 0
    merged = merge(model)
    assert type(merged[0]) is type(reference)
    weight = merged[0].weight.detach().flatten(1)
    torch.testing.assert_close(weight, matrix.detach() * kept)
    assert not weight[~kept].view(torch.int64).any()  # +0.0
    if adapter in EXACT:
        assert torch.equal(merged(x), y)


@pytest.mark.parametrize("adapter", [*EXACT, "lora_prune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_the_merge_keeps_zeros(family: str, adapter: str) -> None:
    plain = pruned_vision(family)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = add_adapters(plain, adapter, r=4)
    losses = train(model)
    assert losses[-1] < losses[0]
    y, masks = logits(model), adapter_masks(model)
    pruned = {name for name, weight in before.items() if weight.dim() > 1 and not weight.all()}
    assert masks.keys() == pruned
    assert sum(before[name].dim() == 4 for name in masks) >= 4
    merged = merge(model)
    assert merged is plain
    assert {n for n, _ in merged.named_parameters()} == before.keys()
    for name, mask in masks.items():
        weight = merged.get_parameter(name).detach()
        assert torch.equal(mask, before[name] != 0)
        assert not weight[~mask].view(torch.int32).any(), name
        assert not torch.equal(weight, before[name]), name
    assert torch.equal(logits(merged), y) == (adapter != "lora_prune")


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_images_are_trained(family: str) -> None:
    model = add_adapters(pruned_vision(family), r=2, train=("norm",))
    plain = model.get_base_model()
    trained = {name for name, p in plain.named_parameters() if p.requires_grad and "lora_" not in name}
    norms = {
        f"{path}.{name}"
        for path, module in plain.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))
        for name in ("weight", "bias")
    }
    assert norms
    assert trained == norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_and_in_bfloat16_the_merged_model_is_the_same(family: str, dtype: torch.dtype) -> None:
    model = add_adapters(pruned_vision(family, dtype), r=4)
    assert all(m.dtype == torch.float32 for _, layer in sparse_layers(model) for m in layer.matrices())
    losses = train(model, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
    assert losses[-1] < losses[0]
    model = merge(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_last_stays(when: str, family: str) -> None:
    plain = pruned_vision(family)
    if when == "before":
        plain = plain.to(memory_format=torch.channels_last)
    model = add_adapters(plain, r=4)
    if when == "after":
        model = model.to(memory_format=torch.channels_last)
    strides = {name: p.stride() for name, p in plain.named_parameters()}
    seen = []
    for _, layer in sparse_layers(model):
        if isinstance(layer, SparseConvolution):
            assert layer.weight_with_adapter().stride() == layer.base_weight.stride()
            seen.append(layer.base_weight.is_contiguous())
    assert not all(seen)
    losses = train(model)
    assert losses[-1] < losses[0]
    y, masks = logits(model), adapter_masks(model)
    merged = merge(model)
    assert torch.equal(logits(merged), y)
    names = {name.replace("base_layer.", "") for name in strides if "lora_" not in name}
    assert {name: merged.get_parameter(name).stride() for name in names} == {
        name.replace("base_layer.", ""): stride for name, stride in strides.items() if "lora_" not in name
    }
    assert all(not merged.get_parameter(name)[~mask].any() for name, mask in masks.items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["resnet", "convnext"])
@pytest.mark.parametrize("adapter", ["mask_lora", "signed"])
def test_compiled_it_trains_the_same(adapter: str, family: str) -> None:
    losses = []
    for compiled in (False, True):
        plain = pruned_vision(family, torch.float64)
        torch.manual_seed(0)
        model = add_adapters(plain, adapter, r=2)
        losses.append(train(torch.compile(model, backend="aot_eager") if compiled else model, 4))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_merge_in_place_gives_the_bits_back() -> None:
    plain = pruned_vision("convnext")
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = moved(add_adapters(plain, r=2, train=()))
    check_merge_in_place(model, weights, logits)


@pytest.mark.parametrize("init", [True, False])
def test_fold_begins_anew_from_the_merged_weights(init: bool) -> None:
    model = moved(add_adapters(pruned_vision("resnet", torch.float64), r=2, init_lora_weights=init))
    check_fold(model, logits)


def test_masks_say_what_is_kept_where_a_kept_weight_is_zero() -> None:
    plain = make_vision("resnet")
    masks = prune(plain, score="magnitude", progress=False)
    name = next(name for name, mask in masks.items() if mask.dim() == 4)
    place = tuple(masks[name].nonzero()[7].tolist())
    with torch.no_grad():
        plain.get_parameter(name)[place] = 0.0
    model = add_adapters(plain, masks=masks)
    assert all(torch.equal(mask, masks[n]) for n, mask in adapter_masks(model).items())
    assert merge(moved(model)).get_parameter(name)[place] != 0
    model = add_adapters(plain, masks=masks)
    with pytest.raises(ValueError, match=rf"{name!r} are pruned by the mask but are not zero"):
        set_masks(model, {name: torch.zeros_like(masks[name])})


# -- which of them, and their ranks


def test_convolutions_are_selected_by_their_names() -> None:
    plain = pruned_vision("convnext")
    kinds = {name: type(module).__name__ for name, module in plain.named_modules()}
    every = {n for n, kind in kinds.items() if kind in ("Conv2d", "Linear") and n != "classifier"}
    convolutions = {name for name in every if kinds[name] == "Conv2d"}
    assert adapted(plain) == every
    assert adapted(plain, target_modules="all-linear") == every - convolutions
    depthwise = {name for name in every if name.endswith("dwconv")}
    assert len(depthwise) == 2
    assert adapted(plain, target_modules=["dwconv"]) == depthwise
    assert adapted(plain, exclude_modules=["dwconv"]) == every - depthwise
    assert adapted(plain, target_modules=r".*stages\.0.*dwconv") == {n for n in depthwise if "stages.0" in n}
    with pytest.raises(ValueError, match=r"target_modules=\['dwcon'\].*did you mean 'dwconv'"):
        add_adapters(plain, target_modules=["dwcon"])


def test_a_plain_module_keeps_its_own_names() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    prune(plain, score="magnitude", progress=False)
    model = moved(add_adapters(plain))
    assert {name for name, _ in sparse_layers(model)} == {"0", "2"}
    x = torch.randn(2, 3, 8, 8)
    y = model.eval()(x)
    merged = merge(model)
    assert torch.equal(merged(x), y)
    assert [type(module) for module in merged] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_rank_is_at_most_that_of_the_kernel(rslora: bool) -> None:
    """With the scaling of the rank that was asked for."""
    plain = pruned_vision("mobilenet")
    model = add_adapters(plain, r=16, use_rslora=rslora, rank_pattern={"pointwise.convolution": 3})
    seen = set()
    for name, layer in sparse_layers(model):
        a, b = layer.matrices()
        asked = 3 if "pointwise.convolution" in name else 16
        assert a.shape[0] == b.shape[1] == min(asked, b.shape[0], a.shape[1]), name
        assert layer.combining()["scaling"] == pytest.approx(32 / (asked**0.5 if rslora else asked))
        seen.add(a.shape[0])
    assert {8, 9} <= seen


def test_ranks_and_scalings_by_pattern() -> None:
    options = {"rank_pattern": {"dwconv": 5, r"stages\.1\..*dwconv": 3}, "alpha_pattern": {"dwconv": 7}}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(rank|alpha)_pattern")
        model = add_adapters(pruned_vision("convnext"), r=2, **options)
    with pytest.warns(UserWarning, match=r"alpha_pattern: \['dwcon'\] match no layer"):
        add_adapters(pruned_vision("convnext"), rank_pattern={"dwconv": 3}, alpha_pattern={"dwcon": 5, "pwconv1": 7})
    found = {name: (layer.matrices()[0].shape[0], layer.combining()["scaling"]) for name, layer in sparse_layers(model)}
    for name, (rank, scaling) in found.items():
        assert (rank, scaling) == ((5, 7 / 5) if name.endswith("dwconv") else (2, 2.0)), name


def test_what_is_trained_is_counted() -> None:
    """r (K + O) of a kernel with K numbers a row."""
    model = add_adapters(pruned_vision("convnext"), r=2, train=(), target_modules=["dwconv"])
    own = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    count = 2 * ((49 + 8) + (49 + 16))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert trainable_share(model) == pytest.approx(count / own)


# -- what multiplies with the weight by itself


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_a_state_space_that_reads_the_weight_has_the_adapter(family: str) -> None:
    import transformers as hf

    if family == "mamba":
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}
        torch.manual_seed(0)
        plain: nn.Module = hf.MambaForCausalLM(hf.MambaConfig(initializer_range=0.3, **sizes)).eval()
    else:
        plain = make_short_convolution()
    name = "conv1d" if family == "mamba" else "conv.conv"
    masks = prune(plain, score="magnitude", targets=[name], progress=False)
    model = moved(add_adapters(plain, masks=masks, target_modules=[name]))
    assert {layer.weight_name(name) for name, layer in sparse_layers(model)} == masks.keys()
    ids = torch.arange(5)[None]

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            done = model.generate(
                ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        return done.sequences, torch.stack(done.logits)

    y = run(model)
    with model.disable_adapter():
        assert not torch.equal(run(model)[1], y[1])
    merged = merge(model).requires_grad_(False)  # torch chooses a convolution's kernel by that
    assert all(torch.equal(one, other) for one, other in zip(run(merged), y, strict=True))


# -- files


@pytest.mark.parametrize("adapter", ["mask_lora", "lora", "signed"])
def test_an_adapter_that_was_saved_is_the_same(adapter: str, tmp_path: Path) -> None:
    plain = pruned_vision("mobilenet")
    other = copy.deepcopy(plain)
    model = add_adapters(plain, adapter, r=12, rank_pattern={"conv_stem.convolution": 5})
    train(model, 2)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(other, tmp_path)
    again = dict(sparse_layers(loaded))
    for name, layer in sparse_layers(model):
        assert all(torch.equal(x, y) for x, y in zip(layer.matrices(), again[name].matrices(), strict=True))
        assert layer.combining() == again[name].combining()
    assert all(torch.equal(mask, adapter_masks(loaded)[name]) for name, mask in adapter_masks(model).items())
    assert torch.equal(logits(loaded), logits(model))  # with BatchNorm's running averages
    dense = make_vision("mobilenet")
    before = snapshot(dense)
    with pytest.raises(ValueError, match="are not zero"):
        load_adapter(dense, tmp_path)
    assert snapshot(dense) == before


def test_an_adapter_of_other_convolutions_is_refused(tmp_path: Path) -> None:
    save_adapter(add_adapters(pruned_vision("resnet"), r=2), tmp_path)
    other = pruned_vision("convnext")
    with pytest.raises(ValueError, match="belongs to another model"):
        load_adapter(other, tmp_path)
    assert not [module for module in other.modules() if hasattr(module, "base_layer")]


# -- what cannot be


def standardized() -> nn.Module:
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    return WeightStandardizedConv2d(4, 4, 3)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (lambda: nn.Conv2d(4, 4, 3), {"adapter": "lora_prune", "lora_dropout": 0.1}, r"lora_dropout=0\.1 must be 0"),
        (lambda: nn.ConvTranspose2d(4, 4, 3), {}, "'second' is a ConvTranspose2d; adapters go with"),
        (lambda: nn.LazyConv2d(4, 3), {}, "'second' has no shape yet"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), {}, "'second' is not a plain parameter"),
        (lambda: nn.utils.weight_norm(nn.Conv1d(4, 4, 3)), {}, "'second' is not a plain parameter"),
        (standardized, {}, r"'second' \(WeightStandardizedConv2d\) makes other numbers of its weight's zeros"),
        (lambda: nn.Conv2d(4, 4, 3, device="meta"), {}, "'second' has no data here"),
        (lambda: torch.compile(nn.Conv2d(4, 4, 3), backend="eager"), {}, "'second' were given to torch.compile"),
    ],
    ids=["dropout", "transposed", "lazy", "weight_norm", "old weight_norm", "standardized", "meta", "compiled"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:Lazy modules:UserWarning")
def test_what_cannot_be_adapted_is_refused_by_its_name(
    layer: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = nn.Sequential(OrderedDict(first=nn.Conv2d(3, 4, 1), second=layer()))
    model.first.weight.data[0] = 0.0
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        add_adapters(model, **{"target_modules": ["first", "second"], **options})
    assert [type(module) for module in model.modules()] == kinds
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_layers_beside_parametrized_ones_are_adapted(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), wrap(nn.Conv2d(4, 4, 3)), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    with pytest.raises(ValueError, match="the weight of '1' is not a plain parameter"):
        prune(plain, score="magnitude", progress=False)
    masks = prune(plain, score="magnitude", ignore=["1"], progress=False)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model, x = moved(add_adapters(plain, r=2, train=())), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert [name for name, _ in sparse_layers(model)] == ["0", "3"]
    model(x).square().sum().backward()
    y = model.eval()(x)
    merged = merge(model)
    assert torch.equal(merged(x), y)
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert changed == masks.keys() == {"0.weight", "3.weight"}
    assert not any(merged.get_parameter(name).detach()[~mask].any() for name, mask in masks.items())


class Codebook(nn.Module):
    """Vectors that follow what they stand for, as buffers; of one more nothing is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.randn(8, 4))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.movedim(1, -1).reshape(-1, 4).detach()
        nearest = torch.cdist(flat, self.vectors).argmin(1)
        if self.training:
            sums = torch.zeros_like(self.vectors).index_add_(0, nearest, flat)
            self.vectors.lerp_(sums / torch.bincount(nearest, minlength=8)[:, None].clamp(min=1), 0.1)
        found = self.vectors[nearest].view(x.movedim(1, -1).shape).movedim(-1, 1)
        return x + (found - x).detach()


def test_a_saved_adapter_has_all_that_training_changed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), Codebook(), parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)]
    plain = nn.Sequential(*layers, nn.Conv2d(4, 2, 1)).train()
    prune(plain, score="magnitude", ignore=["2"], progress=False)
    other, x = copy.deepcopy(plain).eval(), torch.randn(2, 3, 8, 8)
    model = moved(add_adapters(plain, r=2))
    for _ in range(3):
        model.train()(x)
    expected = model.eval()(x)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(other, tmp_path).eval()(x), expected)
    (file,) = tmp_path.glob("perp_adapter-*")
    names = load_file(file).keys()
    assert {"1.vectors", "3.running_mean"} < names
    assert "1.scratch" not in names


def test_parts_of_a_sequence_are_found_with_adapters() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    prune(plain, score="magnitude", progress=False)
    model, x = moved(add_adapters(plain, r=2)), torch.randn(2, 3, 5, 5)
    y = x
    for part in model:
        y = part(y)
    assert torch.equal(y, model(x))
    assert model[0] is plain[0]
    assert not torch.equal(model[:1](x), plain[0].base_layer(x))
    with pytest.raises(TypeError, match="not subscriptable"):
        add_adapters(pruned_vision("resnet"), r=2)[0]


def test_a_shared_convolution_is_refused() -> None:
    convolution = nn.Conv2d(4, 4, 3)
    plain = nn.Sequential(convolution, nn.ReLU(), convolution)
    prune(plain, score="magnitude", progress=False)
    with pytest.raises(ValueError, match=re.escape("the weight of '0' is also that of others")):
        add_adapters(plain)


# -- block by block


@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "signed"])
def test_reconstruct_fits_convolutions_through_their_adapters(adapter: str) -> None:
    model = make_short_convolution()
    dense = copy.deepcopy(model)
    masks = prune(model, score="magnitude", progress=False)
    (name,) = (name for name, mask in masks.items() if mask.dim() == 3)
    before = model.get_parameter(name).detach().clone()
    batches = [{"input_ids": make_tokens(2, 12, vocab=64, seed=seed)} for seed in range(3)]
    options = {"steps": 30, "learning_rate": 5e-3, "num_samples": 6, "progress": False, "r": 4}
    done = reconstruct(model, batches, dense, masks, adapter=adapter, **options)
    assert done.after < done.before
    assert not [module for module in model.modules() if hasattr(module, "base_layer")]
    assert not torch.equal(model.get_parameter(name), before)
    for weight, mask in masks.items():
        assert not model.get_parameter(weight).detach()[~mask].view(torch.int32).any(), weight


@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_reconstruct_goes_through_blocks_of_images(family: str) -> None:
    model = make_vision(family)
    dense = copy.deepcopy(model)
    masks = prune(model, score="magnitude", progress=False)
    batches = [{"pixel_values": IMAGES["pixel_values"]}]
    done = reconstruct(model, batches, dense, masks, steps=20, num_samples=8, progress=False, r=4)
    assert done.after < done.before
    assert all(not model.get_parameter(name).detach()[~mask].view(torch.int32).any() for name, mask in masks.items())
