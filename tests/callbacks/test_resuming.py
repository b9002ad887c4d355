"""Checkpoints of a shrinking model: resumed at any point = uninterrupted; loaded without the callback = ordinary."""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pruning_aware_models import SMALL, batches, make_module, make_trainer, weights
from tiny import make_tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralForCausalLM
from versions import EMAWeightAveraging

from lightning_prune import CausalLM, PERPRetraining, PruningAwarePretraining, WeightPruning
from lightning_prune.callbacks.resuming import updating_hyper_parameters
from lightning_prune.checkpoints.export import export
from lightning_prune.structure.removal import remove_units

# Epochs of three steps; prunings at 2, 4, ...: the checkpoints lie before the first, between two, after a compaction.
SETTINGS: dict[str, Any] = {"target": {"hidden_size": 27, "intermediate_size": 40}, "types": ("ffn", "hidden")}
SETTINGS |= {"every_n_steps": 2, "start": 3, "compact_every": 2, "units_per_pruning": 3}
EPOCHS = 6


def run(folder: Path, epochs: int, resume: Path | None = None, *others: L.Callback, **settings: Any) -> Any:
    callback = PruningAwarePretraining(**{**SETTINGS, **settings})
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    module = make_module(seed=0 if resume is None else 9)  # other weights, as large as at first
    trainer = make_trainer(callback, saver, *others, max_steps=-1, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, batches(samples=12), ckpt_path=resume)
    return module, callback


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"second_order": True, "second_order_every": 2},
        {"target": {"num_hidden_layers": 1, "intermediate_size": 40}, "types": ("ffn", "layer"), "second_order": True},
        {"target": 0.7, "types": ("attention", "ffn", "hidden"), "end": 12, "units_per_pruning": 1},
        {"saliency_decay": 0.8},
        {"saliency_decay": 0.8, "saliency": "kfac", "second_order": True},
    ],
    ids=["variant A", "variant B", "layers, variant B", "along a line", "running mean", "running kfac, variant B"],
)
def test_resume_is_bit_identical_before_between_and_after_compactions(settings: dict[str, Any], tmp_path: Path) -> None:
    whole, first = run(tmp_path, EPOCHS, **settings)
    seen = set()
    for epoch in (0, 1, 2, 4):
        path = tmp_path / f"epoch={epoch}.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]["PruningAwarePretraining"]["shrinking"]
        small = state["sizes"] != state["first"]
        seen.add((bool(state["history"][1:]), small, bool(state["pending"])))
        resumed, second = run(tmp_path / f"from-{epoch}", EPOCHS, path, **settings)
        assert weights(resumed).keys() == weights(whole).keys()
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(resumed)[name]), (epoch, name)
        assert second.history == first.history
        assert second.tokens == first.tokens
    assert (False, False, False) in seen  # nothing pruned yet
    assert any(small for _, small, _ in seen)


@pytest.mark.slow
def test_all_query_heads_of_a_group_but_one_can_go(tmp_path: Path) -> None:
    """After which there is no unit of that kind, while others go on going."""
    target = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 40}
    settings = {"target": target, "types": ("attention", "ffn"), "attention_unit": "head"}
    whole, first = run(tmp_path, EPOCHS, **settings)
    assert whole.model.config.num_attention_heads == 2
    for epoch in (2, 4):
        resumed, second = run(tmp_path / f"from-{epoch}", EPOCHS, tmp_path / f"epoch={epoch}.ckpt", **settings)
        assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
        assert second.history == first.history


def test_the_checkpoints_of_a_run_cover_masked_units(tmp_path: Path) -> None:
    """The test above is worth what its checkpoints are."""
    run(tmp_path, 3)
    states = [torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["callbacks"] for epoch in range(3)]
    found = [state["PruningAwarePretraining"]["shrinking"] for state in states]
    assert [bool(state["pending"]) for state in found] == [False, True, True]
    assert found[1]["sizes"] == found[1]["first"] != found[2]["sizes"]


def test_averaged_weights_resume_too(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, 4, None, EMAWeightAveraging(decay=0.5))
    resumed, _ = run(tmp_path / "rest", 4, tmp_path / "epoch=2.ckpt", EMAWeightAveraging(decay=0.5))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_checkpoint_is_validated_beside_an_average(tmp_path: Path) -> None:
    run(tmp_path, 3, None, EMAWeightAveraging(decay=0.5))
    small, found = CausalLM.load_from_checkpoint(tmp_path / "epoch=2.ckpt", weights_only=True), []
    for module, path in ((make_module(seed=9), tmp_path / "epoch=2.ckpt"), (small, None)):
        trainer = make_trainer(PruningAwarePretraining(**SETTINGS), EMAWeightAveraging(decay=0.5))
        found += trainer.validate(module, batches(samples=12), ckpt_path=path, verbose=False)
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_checkpoint_loads_without_the_callback_with_its_sizes(tmp_path: Path) -> None:
    """27 hidden channels and 4 heads: no configuration of Llama, so a Mistral of the same weights."""
    whole, _ = run(tmp_path, EPOCHS)
    assert whole.model.config.hidden_size == 27
    ids = make_tokens(2, 9, vocab=64)
    loaded = CausalLM.load_from_checkpoint(tmp_path / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)
    assert isinstance(loaded.model, MistralForCausalLM)
    torch.testing.assert_close(loaded.eval()(ids), whole.eval()(ids), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "loaded")
    whole.save_pretrained(tmp_path / "whole")
    export(tmp_path / f"epoch={EPOCHS - 1}.ckpt", tmp_path / "exported")
    for folder in ("loaded", "whole", "exported"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(model(ids).logits, whole(ids), rtol=1e-6, atol=1e-6)
    # and with masks in it
    half = CausalLM.load_from_checkpoint(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert half.model.config.hidden_size * half.model.config.intermediate_size < 32 * 48
    # one can go on training it as it is
    make_trainer(max_steps=2).fit(loaded, batches())


@pytest.mark.slow
def test_a_shrunk_module_resumes_and_evaluates(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, EPOCHS)
    loaded = CausalLM.load_from_checkpoint(tmp_path / "epoch=2.ckpt", weights_only=True)
    trainer = make_trainer(PruningAwarePretraining(**SETTINGS), max_steps=-1, max_epochs=EPOCHS)
    trainer.fit(loaded, batches(samples=12), ckpt_path=tmp_path / "epoch=2.ckpt")
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(loaded)[name]), name
    module = make_module(seed=9)
    validator = make_trainer(PruningAwarePretraining(**SETTINGS))
    (measured,) = validator.validate(module, batches(), ckpt_path=tmp_path / "epoch=5.ckpt", verbose=False)
    (expected,) = make_trainer().validate(whole, batches(), verbose=False)
    assert measured["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)


class RatesByLayer(CausalLM):
    """A group for each layer, and a schedule that counts groups."""

    def configure_optimizers(self) -> Any:
        parts = [*self.model.model.layers, nn.ModuleList([self.model.model.embed_tokens, self.model.model.norm])]
        groups = [{"params": list(part.parameters()), "lr": 1e-3 * place} for place, part in enumerate(parts, 1)]
        optimizer = torch.optim.AdamW(groups)
        shrinking = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) for _ in range(2)]
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, shrinking, [4])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_groups_of_layers_that_are_gone_need_not_be_made_again(tmp_path: Path) -> None:
    def run_by_layer(resume: Path | None = None) -> Any:
        torch.manual_seed(0 if resume is None else 9)
        module = RatesByLayer(config=SMALL, lr_schedule="constant")
        callback = PruningAwarePretraining({"num_hidden_layers": 1}, ("layer",), end=2, compact_every=1)
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(callback, saver, max_steps=-1, max_epochs=2, enable_checkpointing=True)
        trainer.fit(module, batches(samples=12), ckpt_path=resume)
        return module, [group["lr"] for group in trainer.optimizers[0].param_groups if group["params"]]

    whole, rates = run_by_layer()
    small = RatesByLayer.load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    trainer = make_trainer(max_steps=-1, max_epochs=2)
    trainer.fit(small, batches(samples=12), ckpt_path=tmp_path / "epoch=0.ckpt")  # the callback has done its work
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == rates
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert sum(not group["params"] for group in saved["optimizer_states"][0]["param_groups"]) == 1
    resumed, resumed_rates = run_by_layer(tmp_path / "epoch=0.ckpt")
    assert resumed_rates == rates
    assert len(rates) == 2
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
        assert torch.equal(value, weights(small)[name]), name


class WithSizes(L.LightningModule):
    """A module that is no CausalLM: sizes as hyper-parameters."""

    def __init__(self, hidden_size: int = 32, intermediate_size: int = 48, rms_norm_eps: float = 1e-6, heads: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.language_model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=1,
                num_attention_heads=heads, num_key_value_heads=1, rms_norm_eps=rms_norm_eps, head_dim=16,
            )
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.language_model(batch["input_ids"], labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_hyper_parameters_of_any_module_are_kept_up_to_date(tmp_path: Path) -> None:
    module = WithSizes()
    callback = PruningAwarePretraining({"hidden_size": 20, "intermediate_size": 41}, ("ffn", "hidden"), end=4)
    trainer = make_trainer(callback, max_steps=5, accumulate_grad_batches=2)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = WithSizes.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    epsilon = module.language_model.config.rms_norm_eps
    assert dict(loaded.hparams) == {
        "hidden_size": 20,
        "intermediate_size": 41,
        "heads": 2,
        "rms_norm_eps": epsilon,
    }
    ids = make_tokens(1, 6, vocab=64)
    torch.testing.assert_close(loaded.language_model(ids).logits, module.language_model(ids).logits, rtol=0, atol=0)


class WithConfiguration(L.LightningModule):
    """A module whose hyper-parameters hold the configuration, a mapping or an object, and that of a teacher."""

    training_step, configure_optimizers = WithSizes.training_step, WithSizes.configure_optimizers

    def __init__(self, config: Any, teacher: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = AutoConfig.for_model(**config) if isinstance(config, dict) else config
        self.language_model = AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["mapping", "object"])
def test_configurations_among_hyper_parameters_become_those_of_the_small_model(kind: str, tmp_path: Path) -> None:
    """A Llama that has become a Mistral has other defaults (eight key/value heads), and another head_dim."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
    plain = {"model_type": "llama", **sizes, "num_hidden_layers": 1, "num_attention_heads": 4}
    teacher = {**plain, "hidden_size": 32}  # of another model, and alike in the size that goes first

    def shrink(resume: Path | None = None, steps: int = 5) -> tuple[Any, Any]:
        given = plain if kind == "mapping" else AutoConfig.for_model(**plain)
        module = WithConfiguration(given, teacher)
        callback = PruningAwarePretraining({"hidden_size": 14, "intermediate_size": 9}, ("ffn", "hidden"), end=4)
        trainer = make_trainer(callback, max_steps=steps)
        trainer.fit(module, batches(), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module, WithConfiguration.load_from_checkpoint(tmp_path / f"{steps}.ckpt", weights_only=False)

    ids = make_tokens(1, 6, vocab=64)
    for resume, steps in ((None, 5), (tmp_path / "5.ckpt", 6)):  # in the resumed one nothing is left to slice
        if resume is not None and kind == "object":  # which Lightning does not resume, as it would have to be unpickled
            continue
        module, loaded = shrink(resume, steps)
        assert type(loaded.language_model) is MistralForCausalLM
        assert loaded.hparams["teacher"] == teacher
        torch.testing.assert_close(loaded.language_model(ids).logits, module.language_model(ids).logits, rtol=0, atol=0)


def test_hyper_parameters_of_a_users_own_are_left_alone() -> None:
    class Own(WithSizes):
        def __init__(self, **others: Any) -> None:
            super().__init__()
            self.save_hyperparameters({"hidden_size": 32, "rms_norm_eps": 1e-6, **others})

    others = {
        "arguments": Namespace(model_type="llama", hidden_size=32),
        "kind": LlamaConfig,
        "unnamed": {"model_type": None},
        "spread": {"model_type": "llama", "hidden_size": torch.tensor([32, 32])},
        "bos_token_id": torch.tensor([1, 2]),
        "intermediate_size": torch.tensor([48, 48]),
        "use_cache": 1,  # equal to True
        "layers": (32, None),
        "nothing": None,
    }
    module = Own(**others)
    make_trainer(PruningAwarePretraining({"hidden_size": 20}, ("hidden",), end=1), max_steps=2).fit(module, batches())
    found = dict(module.hparams)
    assert found.pop("hidden_size") == 20
    assert found.pop("rms_norm_eps") == module.language_model.config.rms_norm_eps
    assert found.pop("heads") == 2
    assert found.keys() == others.keys()
    assert all(found[name] is value for name, value in others.items())


def test_a_failure_after_the_model_has_shrunk_leaves_hyper_parameters_of_its_sizes() -> None:
    module = WithSizes()

    def fail() -> None:
        with updating_hyper_parameters(module):
            remove_units(module, {"ffn": [torch.arange(8)]})
            raise RuntimeError("afterwards")

    with pytest.raises(RuntimeError, match="afterwards"):
        fail()
    assert module.hparams["intermediate_size"] == module.language_model.config.intermediate_size == 40


@pytest.mark.parametrize("others", [[], [WeightPruning(score="magnitude")]], ids=["a CausalLM", "WeightPruning"])
def test_a_large_module_without_the_callback_is_told_what_it_lacks(others: list[Any], tmp_path: Path) -> None:
    kind = WithSizes if others else CausalLM

    def large() -> Any:
        return WithSizes() if others else make_module()

    trainer = make_trainer(PruningAwarePretraining({"hidden_size": 20}, ("hidden",), end=1), *others, max_steps=2)
    trainer.fit(large(), batches())
    trainer.save_checkpoint(path := tmp_path / "small.ckpt")
    message = (
        rf"shrunk: '.*embed_tokens.* has \(\d+, 20\) there, \(\d+, 32\) here.*{kind.__name__}.load_from_checkpoint"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(*others, max_steps=3).fit(large(), batches(), ckpt_path=path)
    small = kind.load_from_checkpoint(path, weights_only=True)  # as it says
    make_trainer(*others, max_steps=3).fit(small, batches(), ckpt_path=path)


def test_a_trainer_that_runs_twice_tells_it_too(tmp_path: Path) -> None:
    """PERPRetraining stands between it and the strategy, and takes what stands there off before each run."""
    trainer = make_trainer(PruningAwarePretraining({"hidden_size": 20}, ("hidden",), end=1), max_steps=2)
    trainer.fit(make_module(), batches())
    trainer.save_checkpoint(path := tmp_path / "small.ckpt")
    other = make_trainer(PERPRetraining())
    other.validate(make_module(), batches(), verbose=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shrunk: '.*embed_tokens.* there, .* here.*load_from_checkpoint"):
            other.validate(make_module(), batches(), ckpt_path=path, verbose=False)


def test_sizes_that_hyper_parameters_lack_are_named(tmp_path: Path) -> None:
    class Fewer(WithSizes):
        def __init__(self, hidden_size: int = 32) -> None:
            super().__init__(hidden_size)
            self.save_hyperparameters()
            del self._hparams["intermediate_size"], self._hparams["rms_norm_eps"], self._hparams["heads"]

    keeping = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_steps": 1}
    callback = PruningAwarePretraining({"hidden_size": 20}, ("ffn", "hidden"), end=1)
    with pytest.warns(UserWarning, match=r"Fewer do not say the sizes of its model \(rms_norm_eps\), so"):
        make_trainer(callback, **keeping).fit(Fewer(), batches())


def test_a_module_whose_hyper_parameters_say_no_sizes_is_told_how_its_checkpoints_load(tmp_path: Path) -> None:
    class Named(L.LightningModule):
        training_step, configure_optimizers = WithSizes.training_step, WithSizes.configure_optimizers
        validation_step = WithSizes.training_step

        def __init__(self, model: str = "tiny") -> None:
            super().__init__()
            self.save_hyperparameters()
            self.language_model = WithSizes().language_model

    def shrink(module: L.LightningModule, **settings: Any) -> L.Trainer:
        trainer = make_trainer(PruningAwarePretraining({"hidden_size": 20}, ("hidden",), end=2), **settings)
        trainer.fit(module, batches())
        return trainer

    keeping = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_steps": 3}
    with pytest.warns(UserWarning, match=r"Named do not say the sizes.*\.validate\(Named\(\.\.\.\), ckpt_path=path\)"):
        shrink(module := Named(), **keeping).save_checkpoint(tmp_path / "small.ckpt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        Named.load_from_checkpoint(tmp_path / "small.ckpt")
    way = make_trainer(PruningAwarePretraining({"hidden_size": 20}, ("hidden",)))  # as it says
    way.validate(loaded := Named(), batches(), ckpt_path=tmp_path / "small.ckpt", verbose=False)
    ids = make_tokens(1, 6, vocab=64)
    torch.testing.assert_close(loaded.language_model(ids).logits, module.language_model(ids).logits, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*do not say the sizes")
        shrink(WithSizes(), **keeping)
        shrink(Named(), max_steps=3)  # no checkpoints


def test_weights_alone_of_a_shrunk_model_say_how_they_load(tmp_path: Path) -> None:
    callback = PruningAwarePretraining({"intermediate_size": 20}, ("ffn",), end=1)
    trainer = make_trainer(callback, max_steps=2)
    trainer.fit(make_module(), batches())
    trainer.save_checkpoint(path := tmp_path / "small.ckpt", weights_only=True)
    way = make_trainer(PruningAwarePretraining({"intermediate_size": 20}, ("ffn",)))
    with pytest.raises(ValueError, match=r"weights alone .*\(20, 32\) there, \(48, 32\) here.*load_from_checkpoint"):
        way.validate(make_module(), batches(), ckpt_path=path, verbose=False)
    small = CausalLM.load_from_checkpoint(path, weights_only=True)  # as it says
    assert way.validate(small, batches(), verbose=False) == trainer.validate(
        trainer.lightning_module, batches(), verbose=False
    )


def test_other_settings_and_other_models_are_refused(tmp_path: Path) -> None:
    run(tmp_path, 3)
    with pytest.raises(ValueError, match="made with saliency='taylor2'"):
        run(tmp_path / "a", 4, tmp_path / "epoch=1.ckpt", saliency="taylor1")
    module = make_module(config={**SMALL, "intermediate_size": 20})
    with pytest.raises(ValueError, match="cannot shrink to"):
        make_trainer(PruningAwarePretraining(**SETTINGS), max_steps=20).fit(
            module, batches(), ckpt_path=tmp_path / "epoch=2.ckpt"
        )
