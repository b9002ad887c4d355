"""No callback touches weights after the strategy's teardown, which here takes them away for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from accelerate import cpu_offload
from lightning.pytorch.strategies import SingleDeviceStrategy
from pruning_aware_models import batches, make_module, make_trainer
from torch import nn

from lightning_prune import PERPRetraining, PruningAwarePretraining, SparsityMonitor, WeightPruning


def tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.model.named_buffers(prefix="model")]


class MovesAway(SingleDeviceStrategy):
    """Keeps a copy of the weights as they are at its teardown, and leaves none of their numbers behind."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.left: dict[str, torch.Tensor] = {}

    def teardown(self) -> None:
        super().teardown()
        module = self.lightning_module
        assert module is not None
        self.left = {name: tensor.detach().clone() for name, tensor in tensors(module)}
        module.model.to("meta")  # not its metrics, which Lightning moves itself


class Failing(L.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("a batch that fails")


class Reviving(L.Callback):
    """Writes dense weights when training ends, as weight averaging does."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for p in pl_module.parameters():
            p.data.add_(1.0)


CALLBACKS: dict[str, Callable[[], list[L.Callback]]] = {
    "pruning": lambda: [WeightPruning(score="magnitude", sparsity=0.5, progress=False)],
    "monitor": lambda: [WeightPruning(score="magnitude", progress=False), SparsityMonitor(1, history=False)],
    "perp": lambda: [WeightPruning(score="magnitude", progress=False), PERPRetraining()],
    "perp first": lambda: [PERPRetraining(), WeightPruning(score="magnitude", progress=False)],
    "shrinking": lambda: [PruningAwarePretraining(target=0.9, end=2, second_order=True, second_order_every=1)],
    "distilling": lambda: [PruningAwarePretraining(target=0.9, end=2, distill_from=make_module(1).model)],
}


def zeros_share(weights: dict[str, torch.Tensor]) -> float:
    chosen = [w for n, w in weights.items() if "_proj" in n and n.endswith("weight")]
    return sum(int((w == 0).sum()) for w in chosen) / sum(w.numel() for w in chosen)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_fit_that_ends_has_touched_all_it_touches_before(name: str) -> None:
    module, strategy, callbacks = make_module(), MovesAway(), CALLBACKS[name]()
    trainer = make_trainer(*callbacks, strategy=strategy, max_steps=4)
    trainer.fit(module, batches())
    assert "teardown" not in strategy.__dict__
    assert not any("lora" in n or "base_layer" in n for n in strategy.left)  # merged by then
    pruner = next((c for c in callbacks if isinstance(c, WeightPruning)), None)
    if pruner is not None:
        assert zeros_share(strategy.left) == pytest.approx(0.5, abs=1e-3)
        assert all(mask.device.type == "cpu" and mask.dtype == torch.bool for mask in pruner.masks.values())
        assert not any(o._optimizer_step_post_hooks or o._optimizer_step_pre_hooks for o in trainer.optimizers)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_fit_that_raises_lets_go(name: str) -> None:
    module, strategy, callbacks = make_module(), MovesAway(), CALLBACKS[name]()
    trainer = make_trainer(*callbacks, Failing(), strategy=strategy, max_steps=4)
    with pytest.raises(RuntimeError, match="a batch that fails"):
        trainer.fit(module, batches())
    assert "teardown" not in strategy.__dict__
    assert not {"training_step", "configure_model"} & module.__dict__.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not any(o._optimizer_step_post_hooks or o._optimizer_step_pre_hooks for o in trainer.optimizers)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_fit_that_never_trains_lets_go(name: str) -> None:
    module, strategy, callbacks = make_module(), MovesAway(), CALLBACKS[name]()
    trainer = make_trainer(*callbacks, strategy=strategy, max_steps=0)
    trainer.fit(module, batches())
    assert "teardown" not in strategy.__dict__
    assert "training_step" not in module.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not any(o._optimizer_step_post_hooks or o._optimizer_step_pre_hooks for o in trainer.optimizers)


@pytest.mark.parametrize("name", ["pruning", "perp", "shrinking"])
def test_two_fits_in_a_row_with_the_weights_away_in_between(name: str) -> None:
    module, callbacks = make_module(), CALLBACKS[name]()
    first, second = MovesAway(), MovesAway()
    make_trainer(*callbacks, strategy=first, max_steps=3).fit(module, batches())
    module.model.to_empty(device="cpu")
    module.model.tie_weights()
    with torch.no_grad():
        for parameter, tensor in tensors(module):
            tensor.copy_(first.left[parameter])
    make_trainer(*callbacks, strategy=second, max_steps=3).fit(module, batches())
    if name != "shrinking":
        assert zeros_share(second.left) == pytest.approx(0.5, abs=1e-3)
        for weight, before in ((second.left[n], w) for n, w in first.left.items() if "_proj" in n):
            assert not bool((weight[before == 0] != 0).any())  # the masks of the first fit hold in the second


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [0, 1])
def test_what_other_callbacks_write_at_the_end_is_pruned_too(order: int) -> None:
    strategy, callbacks = MovesAway(), [WeightPruning(score="magnitude", progress=False), Reviving()]
    make_trainer(*(callbacks if order else callbacks[::-1]), strategy=strategy, max_steps=2).fit(
        make_module(), batches()
    )
    assert zeros_share(strategy.left) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("name", ["pruning", "perp", "perp first", "shrinking"])
def test_offloaded_weights_are_refused_and_nothing_else_is_said(name: str) -> None:
    module = make_module()
    cpu_offload(module.model, torch.device("cpu"))
    trainer = make_trainer(*CALLBACKS[name](), max_steps=1)
    with pytest.raises(ValueError, match=r"weight of 'model\.model\.embed_tokens' is offloaded.*without device_map"):
        trainer.fit(module, batches())
    assert "teardown" not in vars(trainer.strategy)


def test_weights_without_values_are_refused_and_nothing_else_is_said() -> None:
    module = make_module()
    module.model.to("meta")
    with pytest.raises(ValueError, match="parameters of CausalLM have no values yet"):
        make_trainer(PERPRetraining(), max_steps=1).fit(module, batches())
