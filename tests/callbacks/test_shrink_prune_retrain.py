"""`PruningAwarePretraining`, `WeightPruning` and `PERPRetraining` in one Trainer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from experts_models import make_moe
from lightning.pytorch.callbacks import ModelCheckpoint
from pruning_aware_models import batches, count, make_module, make_trainer, weights
from versions import WeightAveraging

from lightning_prune import (
    ELSA,
    CausalLM,
    LinearSchedule,
    OneShot,
    PERPRetraining,
    PruningAwarePretraining,
    WeightPruning,
)

# Sizes that shrink by 4 and stay multiples of 4, in groups of which 2:4 masks keep 2.
TARGET = {"intermediate_size": 32, "hidden_size": 24, "num_key_value_heads": 1}


def shrinker(**changes: Any) -> PruningAwarePretraining:
    settings = {"end": 6, "round_to": 4, "compact_every": 2}
    return PruningAwarePretraining(TARGET, **{**settings, **changes})


def pruner(**changes: Any) -> WeightPruning:
    return WeightPruning(**{"score": "magnitude", "sparsity": 0.5, "progress": False, **changes})


def retrainer() -> PERPRetraining:
    return PERPRetraining(r=2)


def linear_weights(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {name: p for name, p in weights(module).items() if p.dim() == 2 and "layers" in name}


def assert_two_of_four(weight: torch.Tensor) -> None:
    kept = (weight != 0).view(weight.shape[0], -1, 4).sum(-1)
    assert bool((kept == 2).all())


def assert_half_of_each_row(weight: torch.Tensor) -> None:
    """A row that had more of its pruned weights in what stays keeps them."""
    zeros = (weight == 0).sum(1)
    assert bool((zeros >= weight.shape[1] // 2).all())
    assert int(zeros.sum()) <= 0.56 * weight.numel()


@pytest.mark.few_fast(2)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_small_sparse_and_retrained_in_any_order(order: tuple[int, ...]) -> None:
    callbacks = [shrinker(), pruner(sparsity=None, pattern="2:4", schedule=OneShot(8)), retrainer()]
    module, seen = make_module(), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            seen.append((trainer.global_step, count(module), trained))

    make_trainer(*(callbacks[i] for i in order), Watch(), max_steps=12).fit(module, batches())
    config = module.model.config
    assert (config.intermediate_size, config.hidden_size, config.num_key_value_heads) == (32, 24, 1)
    for weight in linear_weights(module).values():
        assert_two_of_four(weight)
    steps = {step: (size, trained) for step, size, trained in seen}
    assert steps[8][0] == steps[8][1] == count(module)  # everything is trained until masks are there
    assert steps[9][1] < steps[9][0]  # then adapters and norms alone
    assert all(p.requires_grad for p in module.parameters())  # merged


def test_a_mixture_loses_experts_and_those_that_stay_are_pruned_and_retrained() -> None:
    L.seed_everything(0, verbose=False)
    config = make_moe("mixtral").config.to_dict() | {"initializer_range": 0.2, "vocab_size": 64}
    module, seen = CausalLM(config=config, learning_rate=1e-2, lr_schedule="constant"), []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(sum("experts" in name and "lora_A" in name for name, _ in module.named_parameters()))

    shrink = PruningAwarePretraining({"num_experts": 3}, types=("expert",), end=4, round_to=1)
    prune = pruner(schedule=OneShot(6))
    make_trainer(shrink, prune, retrainer(), Watch(), max_steps=10).fit(module, batches())
    assert seen == [0] * 6 + [2 * 2] * 4
    experts = {name: mask for name, mask in prune.masks.items() if "experts" in name}
    assert len(experts) == 4
    for name, mask in experts.items():
        weight = module.get_parameter(name).detach()
        assert len(weight) == 3
        assert not weight[~mask].view(torch.int32).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"group": "layer", "score": "wanda"},
        {"sparsity": None, "pattern": "2:4"},
        {"schedule": LinearSchedule(2, 8, 3)},
    ],
    ids=["rows", "layers, Wanda", "2:4", "gradual"],
)
@pytest.mark.parametrize(
    "shrink", [{}, {"second_order": True}, {"types": ("attention", "ffn", "hidden", "layer")}], ids=str
)
def test_masks_are_sliced_with_the_weights_and_completed(settings: dict[str, Any], shrink: dict[str, Any]) -> None:
    module, prune = make_module(), pruner(**{"group": "row", **settings} if "pattern" not in settings else settings)
    dead: list[int] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:  # masks fit the weights, and hold, at every step
            parameters = dict(module.named_parameters())
            for name, mask in prune.masks.items():
                assert mask.shape == parameters[name].shape
                assert not bool(parameters[name][~mask].any())
            dead.append(sum(int((~m).sum()) for m in prune.masks.values()))

    callback = shrinker(**shrink)
    if "layer" in callback.types:
        callback.target = {**TARGET, "num_hidden_layers": 1}
    make_trainer(prune, callback, Watch(), max_steps=10).fit(module, batches())
    assert module.model.config.intermediate_size == 32
    assert callback.finished
    assert prune.finished
    for weight in linear_weights(module).values():
        if "pattern" in settings:
            assert_two_of_four(weight)
        elif "group" not in settings:
            assert_half_of_each_row(weight)
        else:
            assert weight.numel() // 2 <= int((weight == 0).sum()) <= 0.56 * weight.numel()
    assert dead[0] or "schedule" in settings


def trio(variant: str) -> list[L.Callback]:
    if variant == "masks later":
        return [retrainer(), shrinker(saliency="kfac"), pruner(schedule=OneShot(7))]
    return [pruner(sparsity=None, pattern="2:4"), retrainer(), shrinker(second_order=True, second_order_every=1)]


_DONE: dict[str, tuple[CausalLM, Path]] = {}
STEPS = {"max_steps": -1, "max_epochs": 12, "accumulate_grad_batches": 2}  # an epoch is one step of two batches


def whole_run(variant: str, folder: Path) -> tuple[CausalLM, Path]:
    """The uninterrupted training, made once, and the folder of its checkpoints."""
    if variant not in _DONE:
        save = ModelCheckpoint(folder.parent / variant.replace(" ", "_"), "{epoch}", save_top_k=-1, every_n_epochs=1)
        module = make_module()
        make_trainer(*trio(variant), save, enable_checkpointing=True, **STEPS).fit(module, batches(2, 4))
        _DONE[variant] = module, Path(save.dirpath or "")
    return _DONE[variant]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["masks later", "masks from the start"])
@pytest.mark.parametrize("at", [3, 6, 7, 8, 10])
def test_resume_is_bit_identical_at_any_step(variant: str, at: int, tmp_path: Path) -> None:
    whole, folder = whole_run(variant, tmp_path)
    resumed = make_module(seed=1)
    trainer = make_trainer(*trio(variant), **STEPS)
    trainer.fit(resumed, batches(2, 4), ckpt_path=folder / f"epoch={at - 1}.ckpt")
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


class Own(PERPRetraining):
    """A subclass of a user's own."""


def test_a_subclass_resumes_as_the_class_does(tmp_path: Path) -> None:
    def fit(*others: L.Callback, **how: Any) -> CausalLM:
        module = make_module()
        callbacks = [shrinker(end=2, compact_every=1), pruner(schedule=OneShot(3)), Own(r=2), *others]
        make_trainer(*callbacks, max_steps=6, limit_train_batches=1).fit(module, batches(), **how)
        return module

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "own.ckpt")

    whole, resumed = fit(Save()), fit(ckpt_path=tmp_path / "own.ckpt")
    assert all(torch.equal(weight, weights(resumed)[name]) for name, weight in weights(whole).items())


def test_a_checkpoint_of_the_retraining_loads_small_and_merged(tmp_path: Path) -> None:
    module = CausalLM.load_from_checkpoint(whole_run("masks later", tmp_path)[1] / "epoch=9.ckpt", map_location="cpu")
    assert module.model.config.hidden_size == 24
    for name, weight in linear_weights(module).items():
        assert int((weight == 0).sum()) == weight.numel() // 2, name


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [shrinker(), retrainer()], "needs the masks of a WeightPruning"),
        (lambda: [shrinker(), pruner(), PERPRetraining(reconstruct=True)], "leave reconstruct out"),
        (lambda: [shrinker(), pruner(), PERPRetraining(masks={})], "leave masks out"),
        (lambda: [shrinker(), pruner(), PERPRetraining("lora", merge=False)], "adapter='lora' cannot be merged"),
        (lambda: [shrinker(), pruner(), retrainer(), WeightAveraging()], "adapters come later"),
        (lambda: [shrinker(round_to=1), pruner(sparsity=None, pattern="2:4")], "use round_to=4"),
        (lambda: [shrinker(round_to=8), pruner(sparsity=None, pattern="8:16")], "no multiple|multiples of 16"),
        (lambda: [shrinker(), pruner(update="obs")], "prunes once"),
        (lambda: [shrinker(end=None), pruner(score="sparsegpt", schedule=OneShot(9))], "prunes once"),
        (lambda: [shrinker(), pruner(schedule=ELSA(9, 3))], "shrink in a fit of its own"),
        (lambda: [shrinker(distill_from=make_module().model), pruner(distill_from=make_module().model)], "one of them"),
        (lambda: [shrinker(types=("layer",)), pruner(ignore=["lm_head", "layers.1"])], "names layers"),
        (lambda: [shrinker(types=("layer",)), pruner(targets=["layers.1"], schedule=OneShot(9))], "sure to leave 1"),
        (lambda: [pruner(), PruningAwarePretraining(0.3, ("ffn",), end=6)], "choose a larger target"),
    ],
)
def test_what_cannot_be_beside_each_other_is_refused(callbacks: Any, message: str) -> None:
    module = make_module()
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        make_trainer(*callbacks()).fit(module, batches())
    assert all(torch.equal(w, before[n]) for n, w in weights(module).items())


@pytest.mark.slow
def test_what_never_began_is_said() -> None:
    module = make_module()
    with pytest.warns(UserWarning, match="no adapters were trained"):
        make_trainer(shrinker(), pruner(schedule=OneShot(9)), retrainer(), max_steps=8).fit(module, batches())
    assert all(p.requires_grad for p in module.parameters())
