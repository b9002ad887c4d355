"""PERPRetraining in a LightningModule of the user's own: its checkpoints load as the module without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from perp_models import halve
from perp_trainers import make_trainer, pruning
from tiny import make_llama, make_tokens, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader
from versions import WEIGHTS_ONLY, WeightAveraging

from lightning_prune import PERPRetraining, WeightPruning, load_merged_state
from lightning_prune.perp import SparsePeftModel, merge

IDS = make_tokens(4, 12)


class Own(L.LightningModule):
    """With a transformers model under a name of its own, something beside it, and a hook that reads checkpoints."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = make_llama()
        self.beside = nn.Linear(width, width)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(input_ids=batch, labels=batch).loss)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.net(input_ids=batch, labels=batch).loss)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(input_ids=batch).logits

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=1e-2)


class Seen(L.Callback):
    """Logits of the module that trains, by step."""

    def __init__(self) -> None:
        self.logits: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.logits[trainer.global_step] = logits(pl_module.net)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits.clone()


def loader(samples: int = 24) -> DataLoader:
    return DataLoader(make_tokens(24, 12)[:samples].repeat(24 // samples, 1), batch_size=4)


def perp(**kwargs: Any) -> PERPRetraining:
    return PERPRetraining(**{"attribute": "net", "r": 4, **kwargs})


def fit(path: Path, *others: L.Callback, **saving: Any) -> tuple[L.Trainer, Own, WeightPruning, Seen]:
    """A fit of four steps whose checkpoints are ``step=N.ckpt``."""
    module, pruner, seen = Own(), pruning(), Seen()
    save = ModelCheckpoint(dirpath=path, filename="{step}", every_n_train_steps=2, **{"save_top_k": -1, **saving})
    callbacks = [pruner, *(others or [perp()]), seen, save]
    trainer = make_trainer(path, *callbacks, max_epochs=-1, max_steps=4, limit_val_batches=0)
    trainer.fit(module, loader(1))  # the same everywhere, so that a resumed fit may begin anywhere
    return trainer, module, pruner, seen


@pytest.mark.slow
@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_load_as_the_model_that_trained(weights_only: bool, tmp_path: Path) -> None:
    trainer, module, pruner, seen = fit(tmp_path, save_weights_only=weights_only)
    loaded = Own.load_from_checkpoint(tmp_path / "step=2.ckpt", weights_only=True)
    torch.testing.assert_close(logits(loaded.net), seen.logits[2], rtol=0, atol=0)
    assert not torch.equal(seen.logits[2], logits(module.net))
    weights = dict(loaded.named_parameters())
    assert pruner.masks
    for name, mask in pruner.masks.items():
        assert not weights[name].detach().view(torch.int32)[~mask].any()
    assert list(torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]) == list(Own().state_dict())

    # In the Trainer that trained it, whose module is merged, and in another one.
    path = tmp_path / "step=2.ckpt"
    for runner, own in ((trainer, module), (make_trainer(tmp_path), Own())):
        found = runner.predict(own, loader(), ckpt_path=path, **WEIGHTS_ONLY)
        assert torch.equal(found[0], trainer.predict(loaded, loader())[0])
        tested = runner.test(own, loader(), ckpt_path=path, **WEIGHTS_ONLY, verbose=False)
        assert tested == trainer.test(loaded, loader(), verbose=False)


@pytest.mark.slow
def test_best_is_tested_after_the_fit(tmp_path: Path) -> None:
    module = Own()
    save = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", filename="best")
    trainer = make_trainer(tmp_path, pruning(), perp(), save, max_epochs=2)
    trainer.fit(module, loader(), loader())
    found = trainer.validate(module, loader(), ckpt_path="best", **WEIGHTS_ONLY, verbose=False)[0]["val_loss"]
    assert found == pytest.approx(float(save.best_model_score), rel=1e-6)
    assert trainer.test(module, loader(), ckpt_path="best", **WEIGHTS_ONLY, verbose=False)


@pytest.mark.slow
def test_a_full_checkpoint_is_resumed_to_the_bit_and_one_of_weights_is_refused(tmp_path: Path) -> None:
    _, whole, _, _ = fit(tmp_path / "whole")
    for name, weights_only in (("full", False), ("weights", True)):
        fit(tmp_path / name, save_weights_only=weights_only)
        resumed = Own()
        trainer = make_trainer(tmp_path, pruning(), perp(), max_epochs=-1, max_steps=4, limit_val_batches=0)
        run = lambda: trainer.fit(resumed, loader(1), ckpt_path=tmp_path / name / "step=2.ckpt", **WEIGHTS_ONLY)  # noqa: B023, E731
        if weights_only:
            with pytest.raises(ValueError, match=r"PERPRetraining.*save_weights_only=True.*without ckpt_path"):
                run()
        else:
            run()
            assert snapshot(resumed) == snapshot(whole)


def test_a_checkpoint_of_the_merged_model_cannot_be_resumed_with_adapters(tmp_path: Path) -> None:
    trainer, module, _, _ = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert snapshot(Own.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=True)) == snapshot(module)
    again = make_trainer(tmp_path, pruning(), perp(), max_epochs=-1, max_steps=6)
    with pytest.raises(ValueError, match="after the merge"):
        again.fit(Own(), loader(), ckpt_path=tmp_path / "after.ckpt", **WEIGHTS_ONLY)


@pytest.mark.slow
@pytest.mark.parametrize("weights_only", [False, True])
def test_adapters_that_stay_on(weights_only: bool, tmp_path: Path) -> None:
    trainer, module, _, seen = fit(tmp_path, perp(merge=False), save_weights_only=weights_only)
    assert isinstance(module.net, SparsePeftModel)
    trainer.save_checkpoint(tmp_path / "by hand.ckpt", weights_only=weights_only)
    for name, step in (("step=2", 2), ("by hand", 4)):
        loaded = Own.load_from_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
        assert torch.equal(logits(loaded.net), seen.logits[step])
    if weights_only:
        with pytest.raises(ValueError, match="holds a model without the adapters"):
            trainer.test(module, loader(), ckpt_path=tmp_path / "step=2.ckpt", **WEIGHTS_ONLY)
        return
    trainer.test(module, loader(), ckpt_path=tmp_path / "step=2.ckpt", **WEIGHTS_ONLY, verbose=False)
    assert torch.equal(logits(module.net), seen.logits[2])
    assert isinstance(module.net, SparsePeftModel)


class Average(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(avg_fn=lambda average, current, count: (average + current) / 2)


@pytest.mark.slow
def test_averages_are_merged(tmp_path: Path) -> None:
    _, module, pruner, seen = fit(tmp_path, perp(), Average())
    loaded = Own.load_from_checkpoint(tmp_path / "step=4.ckpt", weights_only=True)
    stored = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    unmerged = stored["callbacks"]["PERPRetraining"]["unmerged"]
    layer = "net.base_model.model.model.layers.1.mlp.up_proj"
    a, b = (unmerged[f"{layer}.lora_{m}.default.weight"].double() for m in "AB")
    mask = pruner.masks["net.model.layers.1.mlp.up_proj.weight"]
    expected = unmerged[f"{layer}.base_layer.weight"].double() + mask * 2 * (b @ a)
    found = loaded.net.get_parameter("model.layers.1.mlp.up_proj.weight").double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(b.float(), stored["current_model_state"][f"{layer}.lora_B.default.weight"])
    assert not torch.equal(logits(loaded.net), seen.logits[4])
    assert snapshot(module) == snapshot(loaded)  # the fit ends with the average too
    for name, mask in pruner.masks.items():
        assert not module.get_parameter(name).detach().view(torch.int32)[~mask].any()

    resumed = Own()
    callbacks = [pruning(), perp(), Average()]
    trainer = make_trainer(tmp_path, *callbacks, max_epochs=-1, max_steps=4, limit_val_batches=0)
    trainer.fit(resumed, loader(1), ckpt_path=tmp_path / "step=2.ckpt", **WEIGHTS_ONLY)
    assert snapshot(resumed) == snapshot(module)


def test_an_average_that_would_lack_the_adapters_is_refused(tmp_path: Path) -> None:
    for other in (Average(), StochasticWeightAveraging(swa_lrs=1e-2)):
        module = Own()
        with pytest.raises(ValueError, match="put PERPRetraining before it"):
            make_trainer(tmp_path, pruning(), other, perp()).fit(module, loader())
        assert not isinstance(module.net, SparsePeftModel)


class Stop(L.Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("power cut")


@pytest.mark.slow
def test_names_of_masks_are_those_of_the_module_whatever_happens(tmp_path: Path) -> None:
    def is_held() -> bool:
        weights = dict(module.named_parameters())
        return bool(pruner.masks) and all(not weights[name][~mask].any() for name, mask in pruner.masks.items())

    module, pruner = Own(), pruning()
    plain = [name for name, _ in module.named_parameters()]
    save = ModelCheckpoint(dirpath=tmp_path, filename="cut", save_on_exception=True)
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(tmp_path, pruner, perp(), Stop(), save).fit(module, loader())
    assert is_held()
    module.net = merge(module.net)
    assert set(pruner.masks) < set(plain)
    assert is_held()
    make_trainer(tmp_path, pruner, max_epochs=1).fit(module, loader())  # without adapters
    assert set(pruner.masks) < set(plain)
    assert is_held()

    (path,) = tmp_path.glob("*.ckpt")
    assert list(torch.load(path, weights_only=True)["state_dict"]) == list(Own().state_dict())
    stored = torch.load(path, weights_only=True)["callbacks"][pruner.state_key]
    assert set(stored["masks"]) < set(plain)
    assert load_merged_state(path).keys() == Own().state_dict().keys()


@pytest.mark.slow
def test_compiled_and_checkpointed_modules_have_the_same_checkpoints(tmp_path: Path) -> None:
    module, save = Own(), ModelCheckpoint(dirpath=tmp_path, filename="x", save_weights_only=True)
    module.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.compile(backend="eager")
    make_trainer(tmp_path, pruning(), perp(), save, max_epochs=1).fit(module, loader())
    assert snapshot(Own.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)) == snapshot(module)


def test_two_callbacks_and_adapters_of_ones_own_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    module = Own()
    halve(module.net)
    before = snapshot(module)
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(tmp_path, perp(), perp()).fit(module, loader())
    module.net = get_peft_model(module.net, LoraConfig(target_modules=["q_proj"]))
    for callbacks in ([perp()], [perp(), pruning()]):
        with pytest.raises(ValueError, match="has adapters already"):
            make_trainer(tmp_path, *callbacks).fit(module, loader())
    inside = Own()
    inside.net.model.layers[0] = get_peft_model(inside.net.model.layers[0], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters already"):
        make_trainer(tmp_path, perp(), pruning()).fit(inside, loader())
    assert snapshot(module.net.unload()) == {k.removeprefix("net."): v for k, v in before.items() if "net." in k}
