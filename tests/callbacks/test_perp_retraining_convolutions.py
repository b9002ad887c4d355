"""PERPRetraining of vision models: convolutions' adapters through prune, train, checkpoint, resume and merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from convolution_models import LABELS, make_images, make_vision
from lightning.pytorch.callbacks import ModelCheckpoint
from perp_trainers import Losses, make_trainer, pruning
from tiny import snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from versions import WEIGHTS_ONLY

from lightning_prune import LinearSchedule, PERPRetraining, WeightPruning, load_merged_state
from lightning_prune.perp.convolutions import SparseConvolution
from lightning_prune.perp.layers import sparse_layers

IMAGES = make_images(16)


class Block(nn.Module):
    """Two convolutions and a residual, as torchvision and timm have them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=4, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.GroupNorm(2, outputs)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn1(self.conv1(x)).relu())
        return (self.bn2(y) + self.downsample(x)).relu()


class Residual(nn.Module):
    """A plain module, without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.classifier = nn.Linear(16, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layer1(self.conv1(x).relu()).mean((2, 3)))


class Vision(L.LightningModule):
    """A classifier in the attribute `net`: a plain module, or a family of transformers."""

    def __init__(self, family: str = "plain") -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = Residual() if family == "plain" else make_vision(family).train()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return y if isinstance(y, Tensor) else y.logits

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, labels = batch
        return nn.functional.cross_entropy(self(x), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES["pixel_values"], IMAGES["labels"]), batch_size=4)


@torch.no_grad()
def outputs(module: nn.Module) -> Tensor:
    mode = module.training
    y = module.eval()(IMAGES["pixel_values"].to(next(module.parameters()).dtype))
    module.train(mode)
    return y


class Seen(L.Callback):
    """Outputs of the module that trains, by step, and the convolutions whose adapters were trained in the last."""

    def __init__(self) -> None:
        self.outputs: dict[int, Tensor] = {}
        self.convolutions: set[str] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.outputs[trainer.global_step] = outputs(pl_module)
        layers = {n: layer for n, layer in sparse_layers(pl_module.net) if isinstance(layer, SparseConvolution)}
        self.convolutions = {name for name, layer in layers.items() if layer.matrices()[1].any()}


def fit(folder: Path, family: str, *others: L.Callback, pruner: WeightPruning | None = None, resume: Path | None = None,
        saving: dict[str, Any] | None = None, perp: dict[str, Any] | None = None, module: Vision | None = None,
        **trainer: Any) -> tuple[Vision, WeightPruning, Seen, Losses]:  # fmt: skip
    module, seen, losses = module or Vision(family), Seen(), Losses()
    pruner = pruner or pruning(ignore=["classifier"])
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=8, save_top_k=-1, **(saving or {}))
    callbacks = [pruner, PERPRetraining(**{"r": 4, "attribute": "net", **(perp or {})}), *others, seen, losses, save]
    make_trainer(folder, *callbacks, **{"max_epochs": 4, **trainer}).fit(module, loader(), ckpt_path=resume)
    return module, pruner, seen, losses


def assert_held(module: nn.Module, masks: dict[str, Tensor]) -> None:
    assert any(mask.dim() == 4 for mask in masks.values())
    for name, mask in masks.items():
        weight = module.get_parameter(name).detach()
        assert not weight[~mask].view(torch.int32).any(), name  # +0.0


@pytest.mark.parametrize("family", ["plain", "resnet", "convnext"])
@pytest.mark.parametrize("schedule", [None, LinearSchedule(0, 12, 4)], ids=["at once", "schedule"])
def test_a_whole_life(schedule: LinearSchedule | None, family: str, tmp_path: Path) -> None:
    def pruner() -> WeightPruning:
        given = {} if schedule is None else {"schedule": schedule}
        return pruning(score="wanda", num_samples=4, ignore=["classifier"], **given)

    module, pruned, seen, losses = fit(tmp_path, family, pruner=pruner())
    convolutions = {n for n, m in module.net.named_modules() if isinstance(m, nn.Conv2d)}
    assert seen.convolutions == convolutions
    assert sum(losses.values[-4:]) < sum(losses.values[:4])
    assert_held(module, pruned.masks)
    assert not [name for name, _ in module.named_parameters() if "base_layer" in name or "lora_" in name]

    path = tmp_path / "step=8.ckpt"
    middle = Vision.load_from_checkpoint(path, **WEIGHTS_ONLY)
    torch.testing.assert_close(outputs(middle), seen.outputs[8], rtol=0, atol=0)
    assert all(torch.equal(tensor, middle.state_dict()[name]) for name, tensor in load_merged_state(path).items())
    resumed, again, _, _ = fit(tmp_path / "again", family, pruner=pruner(), resume=path)
    assert snapshot(resumed) == snapshot(module)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in pruned.masks.items())


@pytest.mark.parametrize("family", ["plain", "convnext"])
@pytest.mark.parametrize(
    "trainer",
    [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}],
    ids=["bf16-mixed", "bf16-true", "accumulated and clipped"],
)
def test_precisions_and_clipping(trainer: dict[str, Any], family: str, tmp_path: Path) -> None:
    module, pruned, seen, losses = fit(tmp_path, family, **trainer)
    assert seen.convolutions
    assert sum(losses.values[-4:]) < sum(losses.values[:4])
    for name, mask in pruned.masks.items():
        weight = module.get_parameter(name).detach().float()
        assert not weight[~mask].view(torch.int32).any(), name


@pytest.mark.parametrize("adapter", ["scale_lora", "hira", "lora_prune"])
def test_other_variants(adapter: str, tmp_path: Path) -> None:
    module, pruned, seen, losses = fit(tmp_path, "plain", perp={"adapter": adapter, "train": ("norm",)})
    assert seen.convolutions
    assert sum(losses.values[-4:]) < sum(losses.values[:4])
    assert_held(module, pruned.masks)


def test_a_convolution_that_a_score_leaves_dense_gets_no_adapter(tmp_path: Path) -> None:
    """sparsegpt of grouped ones."""
    module, pruned, seen, _ = fit(tmp_path, "plain", pruner=pruning(score="sparsegpt", num_samples=4))
    grouped = {n for n, m in module.net.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert len(grouped) == 2
    assert seen.convolutions == {name.removeprefix("net.").removesuffix(".weight") for name in pruned.masks}
    assert not seen.convolutions & grouped
    assert all(torch.equal(module.net.get_submodule(n).weight, Vision().net.get_submodule(n).weight) for n in grouped)


def test_weights_only_and_a_model_pruned_before(tmp_path: Path) -> None:
    first, masks, _, _ = fit(tmp_path / "first", "plain")
    keeping = WeightPruning(score="keep", progress=False)
    for name, callbacks in {"alone": [], "beside": [keeping]}.items():
        module, seen = copy.deepcopy(first), Seen()
        save = ModelCheckpoint(dirpath=tmp_path / name, every_n_train_steps=4, save_weights_only=True)
        perp = PERPRetraining(r=2, attribute="net")
        make_trainer(tmp_path, *callbacks, perp, seen, save, max_steps=4).fit(module, loader())
        assert_held(module, masks.masks)
        assert len(seen.convolutions) == 7
        loaded = Vision.load_from_checkpoint(save.best_model_path, **WEIGHTS_ONLY)
        assert snapshot(loaded) == snapshot(module)


def test_a_module_that_is_its_own_model_is_told_to_put_it_into_an_attribute(tmp_path: Path) -> None:
    class Own(Vision):
        def __init__(self) -> None:
            super().__init__()
            net, self.net = self.net, None
            for name, child in net.named_children():
                self.add_module(name, child)

    with pytest.raises(ValueError, match=r"attribute='model'.*of 'conv1', 'layer1', 'classifier'.*into one module"):
        make_trainer(tmp_path, pruning(), PERPRetraining(r=2)).fit(Own(), loader())
