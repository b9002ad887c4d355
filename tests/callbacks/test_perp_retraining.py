"""PERPRetraining in a Trainer: prune, retrain and merge in one fit, alone and beside WeightPruning."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from peft import LoraConfig, get_peft_model
from perp_models import halve, zeros
from perp_trainers import GPT2, LLAMA, Losses, loader, make_module, make_trainer, pruning
from tiny import snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from versions import WEIGHTS_ONLY

from lightning_prune import CausalLM, CubicSchedule, WeightPruning, prune
from lightning_prune.callbacks.perp_retraining import PERPRetraining
from lightning_prune.errors import CalibrationError
from lightning_prune.perp import SparsePeftModel, merge, trainable_share

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "bf16-true": {"trainer": {"precision": "bf16-true"}},
    "accumulate": {"trainer": {"accumulate_grad_batches": 2}},
    "clip": {"trainer": {"gradient_clip_val": 0.1}},
    "checkpointing": {"module": {"gradient_checkpointing": True}},
    "gpt2": {"config": GPT2},
    "scale_lora": {"perp": {"adapter": "scale_lora"}},
    "lora_prune": {"perp": {"adapter": "lora_prune"}},
    "hira": {"perp": {"adapter": "hira"}},
    "adapter on the head": {"perp": {"adapt_head": True}},
    "norms only": {"perp": {"adapter": None}},
    "gblm": {"pruning": {"score": "gblm"}},
    "kfac": {"pruning": {"score": "kfac"}},
    "wanda 2:4": {"pruning": {"score": "wanda", "sparsity": None, "pattern": "2:4"}},
    "sequential": {"pruning": {"score": "wanda", "sequential": True}},
    "sparsegpt": {"pruning": {"score": "sparsegpt"}},
    "some layers": {"pruning": {"targets": ["up_proj", "q_proj"]}},
}


@pytest.mark.few_fast(3)
@pytest.mark.parametrize(  # which callback comes first matters to no setting of its own
    ("name", "first"),
    [*((name, "pruning") for name in SETTINGS), *((name, "perp") for name in ("plain", "accumulate", "some layers"))],
)
def test_prune_retrain_and_merge_in_one_fit(name: str, first: str, tmp_path: Path) -> None:
    setting = SETTINGS[name]
    module = make_module(setting.get("config", LLAMA), **setting.get("module", {}))
    names = [n for n, _ in module.named_parameters()]
    pruner, perp, losses = pruning(**setting.get("pruning", {})), PERPRetraining(**setting.get("perp", {})), Losses()

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            optimizer = trainer.optimizers[0]
            for p in pl_module.parameters():
                if not p.requires_grad:
                    assert p.grad is None
                    assert p not in optimizer.state

    callbacks = [pruner, perp] if first == "pruning" else [perp, pruner]
    make_trainer(tmp_path, *callbacks, losses, Watch(), **setting.get("trainer", {})).fit(module, loader())
    assert sum(losses.values[-6:]) < sum(losses.values[:6])
    assert isinstance(module.model, GPT2LMHeadModel if name == "gpt2" else LlamaForCausalLM)
    assert [n for n, _ in module.named_parameters()] == names
    assert all(p.requires_grad for p in module.parameters())
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    assert pruner.masks.keys() <= set(names)
    for weight, mask in pruner.masks.items():
        value = module.get_parameter(weight).detach()
        assert not value.contiguous().view(torch.int32 if value.element_size() == 4 else torch.int16)[~mask].any()
        assert value[mask].count_nonzero() > 0.97 * int(mask.sum())


@pytest.mark.slow
def test_order_of_callbacks_makes_no_difference(tmp_path: Path) -> None:
    def run(first: str) -> dict[str, bytes]:
        module, callbacks = make_module(), [pruning(score="gblm"), PERPRetraining()]
        make_trainer(tmp_path, *(callbacks if first == "pruning" else callbacks[::-1])).fit(module, loader())
        return snapshot(module.model)

    assert run("pruning") == run("perp")


@pytest.mark.slow
def test_masks_of_gblm_are_those_without_adapters(tmp_path: Path) -> None:
    def masks(*others: L.Callback) -> dict[str, Tensor]:
        pruner = pruning(score="gblm")
        make_trainer(tmp_path, pruner, *others, max_epochs=1).fit(make_module(), loader())
        return pruner.masks

    alone, beside = masks(), masks(PERPRetraining())
    assert alone.keys() == beside.keys()
    assert all(torch.equal(mask, beside[name]) for name, mask in alone.items())


def test_model_pruned_before_needs_no_pruner(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, losses = make_module(), Losses()
    masks = halve(module.model)
    before = zeros(module.model)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, PERPRetraining(masks=masks), losses).fit(module, loader())
    assert "% of the model's (mask_lora, bias, norm, on weights of which 49.65% are pruned)" in caplog.text
    assert losses.values[-1] < losses.values[0]
    assert all(torch.equal(z, before[n]) for n, z in zeros(module.model).items())


@pytest.mark.slow
@pytest.mark.parametrize("pruner", [True, False])
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", None])
def test_resume_is_bit_identical(adapter: str | None, pruner: bool, tmp_path: Path) -> None:
    def run(path: Path, epochs: int, resume: Any = None) -> dict[str, bytes]:
        module = make_module(seed=0 if resume is None else 7)  # a resumed model starts from other weights
        if not pruner and resume is None:
            halve(module.model)
        perp = PERPRetraining(adapter=adapter, seed=0 if resume is None else 5)
        save = ModelCheckpoint(dirpath=path, filename="{epoch}", save_top_k=-1)
        callbacks = [perp, save, *([pruning(score="gblm")] if pruner else [])]
        make_trainer(path, *callbacks, max_epochs=epochs).fit(module, loader(), ckpt_path=resume, **WEIGHTS_ONLY)
        return snapshot(module.model)

    uninterrupted = run(tmp_path / "a", 4)
    checkpoint = tmp_path / "a" / "epoch=1.ckpt"
    assert torch.load(checkpoint, weights_only=True)["state_dict"].keys() == make_module().state_dict().keys()
    assert run(tmp_path / "b", 4, checkpoint) == uninterrupted


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    save = ModelCheckpoint(dirpath=tmp_path, filename="last")
    make_trainer(tmp_path, PERPRetraining(), pruning(), save, max_epochs=1).fit(make_module(), loader())
    for changes, message in (({"adapter": "scale_lora"}, "adapter='mask_lora'"), ({"lora_alpha": 8}, "lora_alpha=32")):
        trainer = make_trainer(tmp_path, PERPRetraining(**changes), pruning(), max_epochs=2)
        with pytest.raises(ValueError, match=f"made with {message}"):
            trainer.fit(make_module(), loader(), ckpt_path=tmp_path / "last.ckpt", **WEIGHTS_ONLY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"layers\.0\.mlp\.down_proj' has no adapter in this module and one in the"),
        ({"lora_options": {"exclude_modules": ["q_proj"]}}, r"layers\.0\.self_attn\.q_proj' has no adapter .* and one"),
        ({"target_modules": None}, r"layers\.0\.mlp\.gate_proj' has an adapter in this module and none in the"),
        ({"r": 3}, r"adapter of '.*down_proj' has the rank 3 in this module and 2 in the checkpoint.*the r, and"),
        ({"lora_options": {"rank_pattern": {"k_proj": 3}}}, r"k_proj' has the rank 3 in this module and 2 in the"),
        ({"lora_options": {"alpha_pattern": {"k_proj": 1}}}, r"k_proj' was scaled by 2, but .* scales it by 0\.5; use"),
    ],
    ids=str,
)
def test_resume_with_adapters_of_other_layers_ranks_or_scalings_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "k_proj", "down_proj"]}
    save = ModelCheckpoint(dirpath=tmp_path, filename="last")
    make_trainer(tmp_path, PERPRetraining(**options), pruning(), save, max_epochs=1).fit(make_module(), loader())
    trainer = make_trainer(tmp_path, PERPRetraining(**{**options, **changes}), pruning(), max_epochs=2)
    with pytest.raises(ValueError, match=message):
        trainer.fit(make_module(), loader(), ckpt_path=tmp_path / "last.ckpt", **WEIGHTS_ONLY)


def test_another_model_in_the_module_may_have_adapters_of_peft(tmp_path: Path) -> None:
    def run(resume: Any = None) -> dict[str, bytes]:
        module = make_module(seed=0 if resume is None else 7)
        module.other = get_peft_model(make_module(seed=3).model, LoraConfig(target_modules=["q_proj"]))
        save = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = [PERPRetraining(r=2), pruning(ignore=["other", "lm_head"]), save]
        make_trainer(tmp_path, *callbacks, max_epochs=2).fit(module, loader(), ckpt_path=resume)
        return snapshot(module.model)

    whole = run()
    assert run(tmp_path / "epoch=0.ckpt") == whole
    plain = make_module(seed=7)
    plain.other = get_peft_model(make_module(seed=3).model, LoraConfig(target_modules=["q_proj"]))
    make_trainer(tmp_path, PERPRetraining(r=2)).validate(plain, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert snapshot(plain.model) == whole


@pytest.mark.slow
def test_unmerged_fit_can_go_on_and_be_merged_later(tmp_path: Path) -> None:
    module, pruner = make_module(), pruning()
    make_trainer(tmp_path, pruner, PERPRetraining(merge=False)).fit(module, loader())
    assert isinstance(module.model, SparsePeftModel)
    assert 0 < trainable_share(module.model) < 1
    with pytest.raises(ValueError, match="made with r=16"):
        make_trainer(tmp_path, pruner, PERPRetraining(r=4)).fit(module, loader())
    masks = pruner.masks
    make_trainer(tmp_path, pruner, PERPRetraining()).fit(module, loader())
    assert isinstance(module.model, LlamaForCausalLM)
    assert [torch.equal(a, b) for a, b in zip(masks.values(), pruner.masks.values(), strict=True)] == [True] * 14


@pytest.mark.slow
def test_two_fits_with_the_same_callbacks(tmp_path: Path) -> None:
    module, pruner, perp = make_module(), pruning(), PERPRetraining()
    for _ in range(2):
        make_trainer(tmp_path, perp, pruner, max_epochs=1).fit(module, loader())
        assert isinstance(module.model, LlamaForCausalLM)
        assert all(not module.get_parameter(n)[~m].any() for n, m in pruner.masks.items())


def test_masks_of_a_tested_checkpoint_are_not_those_of_another_module(tmp_path: Path) -> None:
    class Tested(CausalLM):
        test_dataloader = staticmethod(loader)

    def pruned(seed: int) -> tuple[CausalLM, Any]:
        L.seed_everything(seed, verbose=False)
        module = Tested(config=LLAMA, learning_rate=1e-2, lr_schedule="constant")
        return module, prune(module.model, list(loader()), score="magnitude", sparsity=0.5, progress=False)

    perp, save = PERPRetraining(r=4), ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=1)
    make_trainer(tmp_path, perp, save, max_steps=1).fit(pruned(0)[0], loader())
    make_trainer(tmp_path, perp).test(pruned(0)[0], ckpt_path=tmp_path / "one.ckpt", verbose=False)
    module, masks = pruned(1)
    make_trainer(tmp_path, perp, max_steps=2).fit(module, loader())
    assert all(torch.equal(module.model.get_parameter(n) != 0, mask) for n, mask in masks.items())


@pytest.mark.slow
def test_interrupted_fit_leaves_the_adapters_on(tmp_path: Path) -> None:
    class Fail(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("power cut")

    module, pruner = make_module(), pruning()
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(tmp_path, pruner, PERPRetraining(), Fail()).fit(module, loader())
    assert isinstance(module.model, SparsePeftModel)
    make_trainer(tmp_path, pruner, PERPRetraining()).fit(module, loader())
    assert isinstance(module.model, LlamaForCausalLM)


class Thaw(L.Callback):
    """Makes everything trainable at the second epoch, as BackboneFinetuning does; without it no optimizer knows."""

    def __init__(self, in_optimizer: bool) -> None:
        self.in_optimizer = in_optimizer

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.model.requires_grad_(True)
            if self.in_optimizer:
                BaseFinetuning.unfreeze_and_add_param_group(pl_module.model, trainer.optimizers[0], lr=1e-2)


@pytest.mark.parametrize(("adapter", "beside"), [("mask_lora", False), ("mask_lora", True), (None, False)])
def test_what_unfreezes_pruned_weights_is_refused(adapter: str | None, beside: bool, tmp_path: Path) -> None:
    for in_optimizer in (False, True):
        module, others = make_module(), [pruning()] if beside else []
        if not beside:
            halve(module.model)
        before = zeros(module.model)
        trainer = make_trainer(tmp_path, PERPRetraining(adapter, r=2), *others, Thaw(in_optimizer), max_epochs=2)
        if in_optimizer:
            with pytest.raises(ValueError, match=r"q_proj(\.weight)?' is pruned and was frozen by PERPRetraining, but"):
                trainer.fit(module, loader())
            module.model = merge(module.model)
        else:
            trainer.fit(module, loader())
        if not beside:
            assert all(torch.equal(z, before[n]) for n, z in zeros(module.model).items())


def test_adapters_leave_the_random_state_alone(tmp_path: Path) -> None:
    class State(L.Callback):
        def on_fit_start(self, *args: Any) -> None:
            self.state = torch.get_rng_state()

    states = []
    for others in ([PERPRetraining()], []):
        state = State()
        module = make_module()
        halve(module.model)
        make_trainer(tmp_path, state, *others, max_epochs=1).fit(module, loader())
        states.append(state.state)
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter": "lora"}, "pass merge=False"),
        ({"adapter": "x"}, "must be one of"),
        ({"train": ("x",)}, "unknown part"),
        ({"r": 0}, "r=0"),
        ({"adapter": None, "target_modules": ["q_proj"]}, "leave them out"),
        ({"adapter": None, "train": ()}, "leaves nothing to train"),
        ({"adapter": None, "adapt_head": True}, "no adapter to put on the head"),
        ({"distill_from": "nowhere", "distill_weight": 1.5}, "distill_weight=1.5"),
        ({"distill_from": "nowhere", "temperature": 0}, "temperature=0"),
        ({"lora_options": {"use_dora": True}}, "use_dora=True is not supported"),
        ({"adapter": "scale_lora", "lora_alpha": 8}, "has no effect"),
        ({"reconstruct": {"step": 3}}, "unknown option 'step'"),
        ({"reconstruct": {"steps": 0}}, "steps=0"),
        ({"reconstruct": {"num_samples": 0}}, "num_samples=0"),
        ({"reconstruct": 3}, "must be True, False, or a mapping"),
        ({"adapter": "lora", "merge": False, "reconstruct": True}, "cannot be merged"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PERPRetraining(**arguments)


def model_parallel(tensor: int) -> ModelParallelStrategy:
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: tensor)}  # type: ignore[assignment]
    return strategy


@pytest.mark.parametrize(
    ("strategy", "arguments", "message"),
    [
        (
            FSDPStrategy(),
            {},
            r"does not support FSDPStrategy.*use strategy=ModelParallelStrategy\(tensor_parallel_size=1",
        ),
        # Made without its constructor, which needs the deepspeed package.
        (DeepSpeedStrategy.__new__(DeepSpeedStrategy), {}, r"does not support DeepSpeedStrategy"),
        (model_parallel(2), {}, r"ModelParallelStrategy\(tensor_parallel_size=2\).*use tensor_parallel_size=1"),
        (model_parallel(1), {"reconstruct": True}, r"which ModelParallelStrategy shards: pass reconstruct=False"),
        (DDPStrategy(start_method="fork"), {"merge": False}, r"start_method='fork'.*'ddp', or merge=True"),
    ],
)
def test_strategies_that_adapters_cannot_follow_are_refused(
    strategy: Strategy, arguments: dict[str, Any], message: str
) -> None:
    module = make_module()
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        PERPRetraining(**arguments).setup(SimpleNamespace(strategy=strategy, callbacks=[]), module, "fit")  # type: ignore[arg-type]
    assert snapshot(module) == before
    assert isinstance(module.model, LlamaForCausalLM)
    assert "configure_model" not in module.__dict__


def test_processes_of_their_own_end_with_the_layers_of_the_module_that_takes_their_weights() -> None:
    ddp, trainer = (
        SimpleNamespace(strategy=DDPStrategy(start_method=method), callbacks=[]) for method in ("popen", "spawn")
    )
    module, plain = make_module(), make_module()
    PERPRetraining(merge=False).setup(ddp, module, "fit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"merge=True\).*a module with, which takes none"):
        PERPRetraining().setup(trainer, module, "fit")  # type: ignore[arg-type]
    PERPRetraining(merge=False).setup(trainer, module, "fit")  # type: ignore[arg-type]
    PERPRetraining().setup(trainer, plain, "fit")  # type: ignore[arg-type]
    assert isinstance(plain.model, SparsePeftModel)


def test_a_model_made_in_configure_model_is_refused() -> None:
    class Module(CausalLM):
        def configure_model(self) -> None:
            self.model = LlamaForCausalLM(self.model.config)

    module, perp = Module(config=LLAMA), PERPRetraining()
    halve(module.model)
    perp.setup(SimpleNamespace(strategy=model_parallel(1), callbacks=[]), module, "fit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"configure_model of Module puts another module.*make the model in __init__"):
        module.configure_model()
    assert isinstance(module.model, SparsePeftModel)
    assert "configure_model" not in module.__dict__


def test_a_configuration_file_can_say_it() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PERPRetraining, "perp")
    values = {"adapter": "scale_lora", "train": ["norm", "head"], "r": 8, "lora_options": {"init_lora_weights": True}}
    perp = parser.instantiate_classes(parser.parse_object({"perp": values})).perp
    assert (perp.adapter, perp.train, perp.options["r"]) == ("scale_lora", ("norm", "head"), 8)


@pytest.mark.parametrize(
    ("arguments", "pruner", "message"),
    [
        ({}, None, "load a pruned model"),
        ({"attribute": "network"}, pruning(), "name the attribute"),
        ({"reconstruct": True}, pruning(schedule=CubicSchedule(start=0, end=4, every=1)), "comes before training"),
        ({"reconstruct": True}, None, "needs the weights from before pruning"),
        ({"reconstruct": True}, pruning(score="keep", sparsity=None), "never has the dense weights"),
        ({"masks": {}}, pruning(), "leave masks out"),
        ({"target_modules": ["qq_proj"]}, pruning(), "did you mean 'q_proj'"),
    ],
)
def test_what_does_not_fit_the_module_is_refused_before_anything_changes(
    arguments: dict[str, Any], pruner: WeightPruning | None, message: str, tmp_path: Path
) -> None:
    module = make_module()
    before = snapshot(module)
    callbacks = [PERPRetraining(**arguments), *([] if pruner is None else [pruner])]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, *callbacks).fit(module, loader())
    assert snapshot(module) == before
    assert isinstance(module.model, LlamaForCausalLM)


def test_a_recurrent_model_is_told_to_train_biases_and_norms(tmp_path: Path) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.LayerNorm(5), nn.LSTM(5, 4))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch)[0].square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module, data = Module(), DataLoader(torch.randn(8, 3, 5), batch_size=4)
    with pytest.raises(ValueError, match=r"no layer of Sequential that is pruned can get an adapter.*adapter=None"):
        make_trainer(tmp_path, pruning(), PERPRetraining()).fit(module, data)
    before = module.model[0].bias.detach().clone()
    make_trainer(tmp_path, pruning(), PERPRetraining(adapter=None)).fit(module, data)  # as it says
    assert not torch.equal(before, module.model[0].bias)
    assert (module.model[1].weight_hh_l0 == 0).sum() == 16 * 4 // 2


def test_an_attention_of_torch_is_scored_by_data_as_without_adapters(tmp_path: Path) -> None:
    """It multiplies with the output's matrix by itself, which has an adapter here."""

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.model = nn.TransformerEncoder(layer, 2)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return (self.model(batch) - batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    data = DataLoader(torch.randn(8, 3, 8, generator=torch.Generator().manual_seed(1)), batch_size=4)
    found, trained = [], []
    for beside in ([], [PERPRetraining(merge=False)]):
        pruner, module = pruning(score="gblm"), Module()
        make_trainer(tmp_path, pruner, *beside, max_epochs=1).fit(module, data)
        found.append(pruner.masks)
        trained += [p for n, p in module.named_parameters() if "out_proj.lora_B" in n]
    assert len(found[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))
    assert [bool(matrix.any()) for matrix in trained] == [True, True]


def test_a_second_attribute_for_a_part_of_the_model_is_refused_with_the_cure(tmp_path: Path) -> None:
    module = make_module()
    module.backbone = module.model.model
    before = snapshot(module)
    with pytest.raises(ValueError, match=r"backbone\.layers\.0.*make that a property which returns the part"):
        make_trainer(tmp_path, pruning(), PERPRetraining(r=4)).fit(module, loader())
    assert snapshot(module) == before


@pytest.mark.parametrize("how", [{"train": ("norm", "head")}, {"train": ("norm",), "adapt_head": True}])
def test_zeros_of_a_head_that_training_fills_are_told_of_once(how: dict[str, Any], tmp_path: Path) -> None:
    """`WeightPruning(score="keep")` tells of those in what is trained whole, and of none under an adapter."""
    module = make_module()
    halve(module.model)
    with torch.no_grad():
        module.model.lm_head.weight[:, ::2] = 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [WeightPruning(score="keep"), PERPRetraining(**how)]
        make_trainer(tmp_path, *callbacks, max_epochs=1).fit(module, loader(4))
    told = [
        text for warning in caught if re.search(r"1,024.*lm_head|lm_head.*1,024", text := str(warning.message), re.S)
    ]
    assert len(told) == 1, told


@pytest.mark.parametrize(
    ("pruners", "how"),
    [
        ([{"ignore": []}], {"train": ("head",), "adapter": None}),
        ([{}, {"targets": ["lm_head"], "ignore": []}], {"train": ("head",)}),
        ([{"ignore": []}], {"train": ("norm",), "adapt_head": True}),
    ],
    ids=str,
)
def test_zeros_of_a_head_that_is_pruned_are_no_news(pruners: list[Any], how: Any, tmp_path: Path) -> None:
    module = make_module()
    with torch.no_grad():
        module.model.lm_head.weight[:, ::2] = 0.0
    if len(pruners) > 1:  # adapters go on all that is pruned, but a head that is trained whole
        how = {**how, "target_modules": ["q_proj", "up_proj"]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [*(pruning(**settings) for settings in pruners), PERPRetraining(**how)]
        make_trainer(tmp_path, *callbacks, max_epochs=1).fit(module, loader(4))
    assert not [str(w.message) for w in caught if "fills zeros" in str(w.message)]
    assert int((module.model.lm_head.weight == 0).sum()) >= 1024  # as was promised


@pytest.mark.slow
def test_what_an_error_names_for_ignore_is_found_without_adapters(tmp_path: Path) -> None:
    """Mamba multiplies with the weight of dt_proj by itself, past the adapter."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "state_size": 4, "time_step_rank": 2}
    config = {"model_type": "mamba", "vocab_size": 64, "num_hidden_layers": 1, **sizes}

    def fit(**ignore: list[str]) -> CausalLM:
        module = make_module(config)
        callbacks = [pruning(score="wanda", **ignore), PERPRetraining()]
        make_trainer(tmp_path, *callbacks, max_epochs=1).fit(module, loader(4))
        return module

    with pytest.raises(CalibrationError, match=r"dt_proj.* is also used outside .*'matmul'") as caught:
        fit()
    named = re.findall(r"'([^']*)'(?= to `ignore`| for all blocks)", str(caught.value))
    assert named == [f"backbone.layers.{which}.mixer.dt_proj" for which in "0*"]
    for name in named:
        assert zeros(fit(ignore=[name]).model)
