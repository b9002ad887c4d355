"""`PruningAwarePretraining` in a Trainer: targets, exactness of compaction, what training goes through, refusals."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from gpt2_config import GPT2
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from own_modules import FindAgain
from pruning_aware_models import SMALL, batches, count, fit, make_module, make_trainer, weights
from structure_models import exact_rms_norms
from tiny import make_tokens
from transformers import AutoModelForCausalLM
from versions import EMAWeightAveraging

from lightning_prune import CausalLM, CubicSchedule, PruningAwarePretraining, WeightPruning, prune
from lightning_prune.callbacks.checks import check_trainer, units_stay
from lightning_prune.callbacks.pruning_aware_pretraining import count_tokens
from lightning_prune.structure import read_structure, remove_units

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
ALL = ("attention", "ffn", "hidden")


def sizes_of(module: Any) -> dict[str, int]:
    return {name: getattr(module.model.config, name) for name in SIZES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "types"), [(0.6, ALL), (0.7, ("ffn",)), (14_000, ("ffn", "hidden")), (0.5, ("ffn", "layer"))]
)
def test_the_target_is_reached_and_the_model_is_ordinary(target: Any, types: tuple[str, ...], tmp_path: Path) -> None:
    before = count(make_module())
    callback = PruningAwarePretraining(target, types, end=10, compact_every=3, picture=str(tmp_path / "p.png"))
    module = fit(callback)
    wanted = target * before if isinstance(target, float) else target
    assert count(module.model) <= wanted
    assert "layer" in types or count(module.model) > wanted - 2000  # not further below than the last unit
    assert callback.history[-1].parameters == count(module.model)
    assert callback.history[-1].step <= 10
    assert callback.history[-1].tokens == callback.history[-1].step * 4 * 16
    assert (tmp_path / "p.png").exists()

    ids = make_tokens(2, 9, vocab=64)
    module.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(loaded(ids).logits, module.eval()(ids), rtol=1e-5, atol=1e-5)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert sizes_of(module) == {name: getattr(loaded.config, name) for name in SIZES}


def test_a_tested_checkpoint_is_not_that_of_another_module(tmp_path: Path) -> None:
    class Tested(CausalLM):
        def test_dataloader(self) -> Any:
            return batches(samples=4)

    callback, trainer = PruningAwarePretraining(0.7, end=4), make_trainer(max_steps=6)
    trainer.callbacks.append(callback)
    trainer.fit(make_module(), batches())
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    make_trainer(callback).test(Tested(config=SMALL), ckpt_path=tmp_path / "small.ckpt", verbose=False)
    alone = PruningAwarePretraining(0.7, end=4)
    module, expected = fit(callback, make_module(5), max_steps=6), fit(alone, make_module(5), max_steps=6)
    assert callback.history == alone.history
    assert all(torch.equal(p, expected.get_parameter(n)) for n, p in module.named_parameters())


def test_a_checkpoint_from_between_a_step_and_its_pruning_resumes_with_the_pruning(tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "between.ckpt")

    def run(*before: L.Callback, path: Path | None = None) -> CausalLM:
        module = make_module()
        callback = PruningAwarePretraining(0.7, every_n_steps=2, units_per_pruning=2, compact_every=2)
        trainer = make_trainer(*before, callback, max_steps=7, limit_train_batches=1)
        trainer.fit(module, batches(), ckpt_path=path)
        return module

    whole, resumed = weights(run(Save())), weights(run(path=tmp_path / "between.ckpt"))
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("finder", [0, 1])
def test_what_goes_back_to_a_checkpoint_in_the_midst_of_a_fit_changes_nothing(finder: int, tmp_path: Path) -> None:
    def twice(*finders: L.Callback) -> tuple[Any, PruningAwarePretraining]:
        """A fit that ends before the target, and one that goes on."""
        module, callback = make_module(), PruningAwarePretraining(0.6, end=20, second_order=True)
        both = [callback, *finders] if finder else [*finders, callback]
        for steps in (8, 24):
            trainer = make_trainer(*both, max_steps=steps, max_epochs=12, default_root_dir=tmp_path)
            trainer.fit(module, batches(samples=16))
        return module, callback

    module, callback = twice(FindAgain("learning_rate"))
    expected, alone = twice()
    assert callback.finished
    assert callback.history == alone.history
    assert all(torch.equal(p, expected.get_parameter(n)) for n, p in module.named_parameters())


def test_sizes_by_name() -> None:
    wanted = {"hidden_size": 24, "intermediate_size": 40, "num_key_value_heads": 1}
    module = fit(PruningAwarePretraining(wanted, end=8))
    assert sizes_of(module) == {**wanted, "num_attention_heads": 2, "num_hidden_layers": 2}


def test_units_per_pruning_and_rounding() -> None:
    callback = PruningAwarePretraining(0.8, ("ffn",), units_per_pruning=2, round_to=4, every_n_steps=2, start=1)
    module = fit(callback, max_steps=4)  # one pruning, after step 3
    assert [record.step for record in callback.history] == [0, 3]
    assert module.model.config.intermediate_size == 48 - 2 * 4


class Checked(PruningAwarePretraining):
    """Compares the logits before and after each compaction."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.differences: list[float] = []
        self.removed: set[str] = set()

    def _compact(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._shrinking.pending:
            ids = make_tokens(3, 11, vocab=64)
            self.removed |= set(self._shrinking.pending)
            with torch.no_grad():
                before = module.model(ids).logits
                super()._compact(trainer, module)
                self.differences.append(float((module.model(ids).logits - before).abs().max()))


GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: dict[str, Any] = {
    "llama": SMALL,
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 8},
    "gemma": {**SMALL, "model_type": "gemma", "head_dim": 8},
    "gpt2": GPT2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_compaction_changes_nothing_in_float64_after_real_steps(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After training steps with masks, momentum and weight decay: masked units must have stayed exactly zero."""
    exact_rms_norms(monkeypatch)
    module = make_module(config=FAMILIES[family]).double()
    types = ("ffn",) if family == "gpt2" else ALL
    wanted: Any = 0.8 if family == "gpt2" else {"hidden_size": 24, "intermediate_size": 40, "num_key_value_heads": 1}
    callback = Checked(wanted, types, end=10, compact_every=4)
    fit(callback, module, max_steps=11, precision="64-true")
    assert len(callback.differences) >= 2
    assert max(callback.differences) < 1e-9
    assert callback.removed == set(types)


def test_kfac_hooks_keep_no_graph_that_knows_the_old_shapes() -> None:
    """GPT-2's layers return views, whose history was held in a circle of references until it was collected."""
    gc.disable()
    try:
        callback = PruningAwarePretraining(0.8, ("ffn",), saliency="kfac", end=6, compact_every=2)
        module = fit(callback, make_module(config=GPT2), max_steps=8)
    finally:
        gc.enable()
    assert count(module) == callback.history[-1].parameters < 0.81 * callback.history[0].parameters


def test_training_is_that_of_a_model_masked_by_hand() -> None:
    """Against an independent loop: float64, taylor2 of FFN channels written out, AdamW, clipping, accumulation."""
    callback = PruningAwarePretraining({"intermediate_size": 46}, ("ffn",), every_n_steps=2, compact_every=1)
    module = make_module(lr_schedule="constant").double()
    twin: Any = copy.deepcopy(module.model)
    fit(callback, module, max_steps=5, precision="64-true", accumulate_grad_batches=2, gradient_clip_val=0.1)

    decayed = [p for n, p in twin.named_parameters() if p.dim() > 1 and "embed" not in n]
    others = [p for n, p in twin.named_parameters() if p.dim() == 1 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    loader = list(batches())
    saliency = [torch.zeros(48, dtype=torch.float64) for _ in range(2)]
    gone: list[list[int]] = [[], []]
    for step in range(5):
        optimizer.zero_grad()
        for batch in loader[2 * step : 2 * step + 2]:
            logits = twin(batch["input_ids"]).logits[:, :-1]
            (
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()) / 2
            ).backward()
        for place, layer in enumerate(twin.model.layers):
            for name, p in layer.mlp.named_parameters():
                term = (p.grad * p - 0.5 * p.grad**2 * p**2).abs().detach()
                saliency[place] += term.sum(0) if name == "down_proj.weight" else term.sum(1)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        if step in (1, 3):  # prunings after steps 2 and 4
            for place, layer in enumerate(twin.model.layers):
                order = [int(u) for u in saliency[place].argsort() if int(u) not in gone[place]]
                gone[place].append(order[0])
                for name, p in layer.mlp.named_parameters():
                    states = [optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]
                    for tensor in (p.data, *states):
                        tensor.t()[gone[place]] = 0 if name == "down_proj.weight" else tensor.t()[gone[place]]
                        if name != "down_proj.weight":
                            tensor[gone[place]] = 0
                saliency[place].zero_()
    assert sizes_of(module)["intermediate_size"] == 46
    for place, layer in enumerate(twin.model.layers):
        kept = [u for u in range(48) if u not in gone[place]]
        mine = module.model.model.layers[place].mlp
        torch.testing.assert_close(mine.gate_proj.weight, layer.mlp.gate_proj.weight[kept], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mine.down_proj.weight, layer.mlp.down_proj.weight[:, kept], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        module.model.model.embed_tokens.weight, twin.model.embed_tokens.weight, rtol=1e-9, atol=1e-12
    )


@pytest.mark.slow
def test_a_second_fit_goes_on_and_leaves_a_reached_target_alone() -> None:
    module, callback = make_module(), PruningAwarePretraining(0.7, ALL, units_per_pruning=2)
    fit(callback, module, max_steps=2)
    halfway = count(module.model)
    assert halfway > 0.7 * count(make_module().model)
    fit(callback, module, max_steps=40)
    small, records = count(module.model), len(callback.history)
    assert small <= 0.7 * count(make_module().model) < halfway  # of the first model, not of the half-way one
    fit(callback, module, max_steps=3)
    assert count(module.model) == small
    assert len(callback.history) == records
    fit(callback, other := make_module(seed=2), max_steps=2)  # another module begins anew
    assert callback.history[0].parameters == count(make_module().model) > count(other.model)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
        {"checkpointing": True},
    ],
    ids=["bf16-mixed", "bf16-true", "clipping and accumulation", "gradient checkpointing"],
)
def test_trains_under(settings: dict[str, Any]) -> None:
    module = make_module(gradient_checkpointing=settings.pop("checkpointing", False))
    callback = PruningAwarePretraining(0.6, ALL, end=6, compact_every=2)
    fit(callback, module, max_steps=7, **settings)
    assert count(module.model) == callback.history[-1].parameters <= 0.6 * count(make_module().model)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        module = make_module(gradient_checkpointing=checkpointing)
        fit(PruningAwarePretraining(0.7, ALL, end=5), module, max_steps=6)
        found.append(weights(module))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def test_averaged_weights_shrink_too() -> None:
    class Kept(EMAWeightAveraging):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.average = self._average_model.module
            super().on_train_end(trainer, pl_module)

    averaging = Kept(decay=0.5)
    callback = PruningAwarePretraining(0.6, ALL, end=6, compact_every=2)
    module = fit(callback, None, averaging, max_steps=8)
    assert {n: p.shape for n, p in averaging.average.named_parameters()} == {
        n: p.shape for n, p in module.named_parameters()
    }
    for name, p in averaging.average.named_parameters():  # what ends in the module is the average
        assert torch.equal(p, module.get_parameter(name)), name
    assert averaging.average.model.config.hidden_size == module.model.config.hidden_size


def test_logged_to_the_logger_and_the_progress_bar(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = PruningAwarePretraining(0.6, ALL, end=6)
    trainer = make_trainer(callback, max_steps=7, logger=logger, log_every_n_steps=1)
    trainer.fit(make_module(), batches())
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    header = text.splitlines()[0].split(",")
    for name in ("parameters", "tokens", "hidden_size", "intermediate_size", "saliency_ffn", "pruned_attention"):
        assert f"shrink/{name}" in header
    assert str(callback.history[-1].parameters) in text
    assert trainer.progress_bar_metrics["parameters_M"] == pytest.approx(callback.history[-1].parameters / 1e6)


def test_distillation_comes_from_the_source_and_stays_outside(tmp_path: Path) -> None:
    source = make_module(seed=4)
    source.save_pretrained(tmp_path / "source")
    callback = PruningAwarePretraining(0.7, end=4, distill_from=str(tmp_path / "source"), distill_weight=1.0)
    module = make_module()
    trainer = make_trainer(callback, max_steps=20)
    trainer.fit(module, batches())
    assert trainer.progress_bar_metrics["distillation"] > 0
    assert "training_step" not in module.__dict__
    assert not any("source" in name for name in module.state_dict())
    assert count(source.model) == count(make_module().model)


def test_training_that_is_too_short_ends_as_a_small_model_and_says_so() -> None:
    module = make_module()
    with pytest.warns(UserWarning, match="before the target"):
        fit(PruningAwarePretraining(0.5), module, max_steps=2)
    config = make_module().model.config.to_dict()
    now = module.model.config.to_dict()
    assert sum(config[name] != now[name] for name in SIZES) >= 1
    assert all(p.shape == q.shape for p, q in zip(module.parameters(), CausalLM(config=now).parameters(), strict=True))


def test_an_end_that_training_does_not_reach_is_said_at_the_start() -> None:
    with pytest.warns(UserWarning, match="end=5, but training ends at step 3 at the latest") as caught:
        fit(PruningAwarePretraining(0.9, ("ffn",), end=5), max_steps=3)
    assert str(caught[-1].message).endswith("before the target (0.9); train longer, or give an earlier end")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*but training ends at step")
        fit(PruningAwarePretraining(0.9, ("ffn",), end=3), max_steps=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "0.5"}, "target='0.5'"),
        ({"target": 0.5, "types": "ffn"}, "types must be a sequence"),
        ({"target": 0.5, "types": ["heads"]}, "types="),
        ({"target": 0.5, "saliency": "wanda"}, "saliency='wanda'"),
        ({"target": 0.5, "compact_every": 0}, "compact_every=0"),
        ({"target": 0.5, "round_to": 0}, "round_to=0"),
        ({"target": 0.5, "end": 5, "units_per_pruning": 2}, "exclude each other"),
        ({"target": 0.5, "attention_unit": "row"}, "attention_unit='row'"),
        ({"target": 0.5, "distill_from": "x", "distill_weight": 0.0}, "distill_weight=0.0"),
        ({"target": 0.5, "temperature": 0.0}, "temperature=0.0"),
        ({"target": 0.5, "picture": "curve.foo"}, r"picture=.curve\.foo. ends in .foo.; pictures are written as .*png"),
        ({"target": 0.5, "second_order_decay": 1.0}, "second_order_decay=1.0"),
    ],
)
def test_arguments_that_no_model_could_take(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PruningAwarePretraining(**arguments)


class Manual(CausalLM):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False


class Factored(CausalLM):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters())


class Inner(torch.optim.Optimizer):
    """Has another optimizer do its steps, whose states and groups are not its own."""

    def __init__(self, parameters: Any, slow: bool = False, copied: bool = False) -> None:
        own = list(parameters)
        super().__init__([p.detach().clone() for p in own] if copied else own, {"lr": 1e-3})
        self.inner = torch.optim.AdamW(self.param_groups[0]["params"], lr=1e-3)
        self.tables = {"dynamic": torch.linspace(-1, 1, 16)}  # as optimizers of 8 bits have, whatever the model
        self.slow = [[p.detach().clone() for p in own]] if slow else None

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def stepped_by(make: Any) -> CausalLM:
    module = make_module()
    module.configure_optimizers = lambda: make(module.parameters())
    return module


def test_an_optimizer_that_steps_another_shrinks_as_the_other_alone() -> None:
    alone, inside = stepped_by(lambda p: torch.optim.AdamW(p, lr=1e-3)), stepped_by(Inner)
    for module in (alone, inside):
        fit(PruningAwarePretraining(0.7, ("ffn", "hidden"), end=6, compact_every=2), module, max_steps=9)
    assert count(inside) < count(make_module())
    for name, value in weights(alone).items():
        assert torch.equal(value, weights(inside)[name]), name


class Slow(torch.optim.Optimizer):
    """Pulls weights towards slow copies, which are states of its own; or hides what it steps in a closure."""

    def __init__(self, optimizer: torch.optim.Optimizer, held: str = "attribute") -> None:
        super().__init__(optimizer.param_groups, {})
        kept = {
            "attribute": optimizer,
            "list": [optimizer],
            "mapping": {"fast": optimizer},
            "closure": lambda: optimizer,
        }
        self.optimizer = kept[held]
        self._inner = "step" if held == "attribute" else held

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        held: Any = self.optimizer
        if self._inner != "step":
            held = held[0] if self._inner == "list" else held["fast"] if self._inner == "mapping" else held()
        loss = held.step(closure)
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", p.detach().clone())
            p.copy_(slow.lerp_(p, 0.5))
        return loss


@pytest.mark.parametrize("held", ["attribute", "list", "mapping"])
def test_states_of_an_optimizer_and_of_those_it_steps_are_sliced(held: str) -> None:
    def shrunk(compact_every: int) -> Any:
        module = stepped_by(lambda p: Slow(torch.optim.AdamW(p, lr=1e-3), held))
        return fit(PruningAwarePretraining(0.7, ("ffn",), end=6, compact_every=compact_every), module, max_steps=6)

    masked, sliced = weights(shrunk(100)), weights(shrunk(1))  # the first is sliced when training has ended
    assert sum(p.numel() for p in sliced.values()) < count(make_module())
    for name, value in masked.items():
        torch.testing.assert_close(sliced[name], value, rtol=1e-6, atol=1e-7)


class Rows(torch.optim.SGD):
    """Keeps a number for each row, which cannot be sliced with it; with a lock inside nobody can copy it."""

    def __init__(self, parameters: Any, locked: bool = False, together: bool = False) -> None:
        super().__init__(parameters, lr=1e-3)
        self.lock, self.together = threading.Lock() if locked else None, together

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        parameters = self.param_groups[0]["params"]
        rows = {p: p.grad.abs().sum(-1, keepdim=True) for p in parameters}
        for p in parameters:
            self.state[p]["rows"] = [rows[p]] if self.together else rows[p]
        return loss


STATES: dict[str, tuple[Any, str]] = {
    "factored": (torch.optim.Adafactor, "Adafactor keeps the state 'row_var'"),
    "flat": (partial(torch.optim.LBFGS, max_iter=2), "LBFGS keeps the state 'd'"),
    "rows": (Rows, "Rows keeps the state 'rows' of .* with shape"),
    "a list": (partial(Rows, together=True), "Rows keeps the state 'rows' of .* as a list"),
    "an inner one": (lambda p: Slow(torch.optim.Adafactor(p), "list"), "Adafactor keeps the state 'row_var'"),
    "hidden": (lambda p: Slow(torch.optim.AdamW(p), "closure"), "Slow steps a AdamW that is not among its attributes"),
    "rescaled": (lambda p: torch.optim.ASGD(p), "ASGD keeps the state 'ax' .* how that follows is not known"),
}


@pytest.mark.parametrize("kind", STATES)
def test_states_that_cannot_be_sliced_are_refused_before_they_exist(kind: str) -> None:
    make, message = STATES[kind]
    module, random = stepped_by(make), torch.get_rng_state()
    before, trainer = weights(module), make_trainer(PruningAwarePretraining(0.5))
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, batches())
    assert trainer.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())
    assert all(p.grad is None for p in module.parameters())
    assert not any(optimizer.state for optimizer in trainer.optimizers)
    assert torch.equal(torch.get_rng_state(), random)


class Late(L.LightningModule):
    """Builds its model in `configure_model`, as Lightning advises for large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model: Any = None

    def configure_model(self) -> None:
        self.language_model = self.language_model or make_module().model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.language_model(batch["input_ids"], labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_may_be_built_in_configure_model(masked: bool, tmp_path: Path) -> None:
    def shrink(module: Late, steps: int, resume: Path | None = None) -> Late:
        settings = {"end": 3, "round_to": 4, "compact_every": 1, "distill_from": make_module(seed=4).model}
        others = [WeightPruning(score="magnitude", schedule=CubicSchedule(1, 4, 1))] if masked else []
        trainer = make_trainer(*others, PruningAwarePretraining(0.7, **settings), max_steps=steps)
        trainer.fit(module, batches(samples=4), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    built = Late()
    built.configure_model()
    shrink(built, 5)
    shrink(Late(), 2)
    for late in (shrink(Late(), 5), shrink(Late(), 5, tmp_path / "2.ckpt")):
        assert late.language_model.config.to_dict() == built.language_model.config.to_dict()
        assert late.language_model.config.hidden_size < 32 or late.language_model.config.intermediate_size < 48
        assert all(torch.equal(value, weights(built)[name]) for name, value in weights(late).items())


def test_a_model_that_is_never_built_is_missed() -> None:
    class Never(Late):
        def configure_model(self) -> None:
            self.head = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"Never holds 0 transformers models, one is needed: build it in __init__"):
        make_trainer(PruningAwarePretraining(0.7), max_steps=1).fit(Never(), batches())


def test_zeros_that_nothing_holds_are_told() -> None:
    def shrink(*others: L.Callback) -> None:
        module = make_module()
        prune(module.model, score="magnitude", sparsity=0.5)
        make_trainer(PruningAwarePretraining(0.9, ("ffn",), end=1), *others, max_steps=2).fit(module, batches())

    with pytest.warns(UserWarning, match=r"\.weight, \.\.\.\) have [\d,]+ zeros of pruned.*score='keep'"):
        shrink()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*zeros of pruned weights")
        shrink(WeightPruning(score="keep"))  # as it says
        fit(PruningAwarePretraining(0.9, ("ffn",), end=1), make_module(), max_steps=2)


def test_tokens_of_batches_in_a_batch_count() -> None:
    ids, real = torch.ones(2, 5, dtype=torch.int64), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert count_tokens({"a": {"input_ids": ids}, "b": [ids, ids]}) == 20
    assert count_tokens([{"input_ids": ids, "attention_mask": real}, (ids, "text")]) == 17
    assert count_tokens({"labels": ids, "input_ids": ids}) == 10
    assert count_tokens("text") == count_tokens({}) == 0


def test_prunings_without_finite_gradients_are_told_at_the_end() -> None:
    class Overflowing(CausalLM):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * torch.inf

    callback = PruningAwarePretraining(0.9, ("ffn",), end=2)
    with pytest.warns(UserWarning, match=r"\(0\.9\); 3 prunings were passed over, as no gradient.*finite"):
        fit(callback, Overflowing(config=SMALL), max_steps=3)


def test_a_module_that_was_shrunk_between_two_fits_is_refused() -> None:
    callback = PruningAwarePretraining({"intermediate_size": 40}, ("ffn",), end=2)
    fit(callback, module := make_module(), max_steps=2)
    remove_units(module.model, {"ffn": [[0]] * module.model.config.num_hidden_layers})
    with pytest.raises(ValueError, match=r"was changed in between.*with a new PruningAwarePretraining"):
        fit(callback, module, max_steps=4)


def test_gradients_of_an_earlier_fit_are_not_stepped_with_before_training() -> None:
    """By an optimizer that no attribute holds, of which there can be no copy."""
    module = stepped_by(STATES["hidden"][0])
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    before = weights(module)
    with pytest.raises(ValueError, match="not among its attributes"):
        make_trainer(PruningAwarePretraining(0.5)).fit(module, batches())
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())
    assert all(bool((p.grad == 1).all()) for p in module.parameters())


@pytest.mark.parametrize("skipped", [0, 2])
def test_states_of_an_optimizer_that_cannot_be_tried_are_refused_at_its_first_step(skipped: int) -> None:
    """Which a scaler of losses may leave out."""

    class Scaled(Rows):
        called = 0

        def step(self, closure: Any = None) -> Any:
            self.called += 1
            assert closure is not None
            return closure() if self.called <= skipped else super().step(closure)

    trainer = make_trainer(PruningAwarePretraining(0.5, start=5))
    with pytest.raises(ValueError, match="Scaled keeps the state 'rows'"):
        trainer.fit(stepped_by(partial(Scaled, locked=True)), batches())
    assert trainer.global_step == 1 + skipped


class Noting(torch.optim.SGD):
    """Keeps numbers for each weight that have nothing of its shape."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("norms", []).append(float(p.grad.norm()))
            state.update(betas=(0.9, 0.99), counts={"steps": torch.tensor(len(state["norms"]))})
        return loss


def test_numbers_that_an_optimizer_notes_of_each_weight_are_in_no_one_s_way() -> None:
    callback = PruningAwarePretraining(0.9, ("ffn",), end=2)
    fit(callback, stepped_by(partial(Noting, lr=1e-3)), max_steps=3)
    assert len(callback.history) > 1


REFUSALS: dict[str, tuple[Any, str]] = {
    "slow copies": (
        lambda: (stepped_by(partial(Inner, slow=True)), [], {}),
        "Inner keeps tensors in its attribute 'slow'",
    ),
    "masters": (lambda: (stepped_by(partial(Inner, copied=True)), [], {}), "Inner has no parameter of the model"),
    "manual": (lambda: (Manual(config=SMALL), [], {}), "manual optimization"),
    "SWA": (lambda: (make_module(), [StochasticWeightAveraging(1e-3)], {}), "StochasticWeightAveraging"),
    "optimizer": (lambda: (Factored(config=SMALL), [], {}), "Adafactor keeps the state"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_shrink_is_refused_before_anything_changes(case: str) -> None:
    make, message = REFUSALS[case]
    module, callbacks, settings = make()
    shapes = {n: p.shape for n, p in module.named_parameters()}
    with pytest.raises(ValueError, match=message):
        fit(PruningAwarePretraining(0.5), module, *callbacks, **settings)
    assert {n: p.shape for n, p in module.named_parameters()} == shapes
    assert "on_load_checkpoint" not in module.__dict__


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_flat_shards_are_refused(strategy: type) -> None:
    trainer: Any = SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=[], precision_plugin=None)
    with pytest.raises(ValueError, match=f"does not support {strategy.__name__}, whose shards hide the units"):
        check_trainer(trainer, PruningAwarePretraining(0.5))


@pytest.mark.parametrize(
    ("tensor", "scaler", "message"), [(2, None, "tensor_parallel_size=2"), (1, object(), "scaler")]
)
def test_shards_that_cannot_be_masked_are_refused(tensor: int, scaler: Any, message: str) -> None:
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: tensor)}  # type: ignore[assignment]
    plugin = SimpleNamespace(scaler=scaler)
    trainer: Any = SimpleNamespace(strategy=strategy, callbacks=[], precision_plugin=plugin, precision="16-mixed")
    with pytest.raises(ValueError, match=message):
        check_trainer(trainer, PruningAwarePretraining(0.5))


def test_a_strategy_of_shards_without_shards_is_refused() -> None:
    structure = read_structure(make_module())
    assert units_stay(structure, SimpleNamespace(), ("ffn",)) is False
    with pytest.raises(ValueError, match="call fully_shard in configure_model"):
        units_stay(structure, ModelParallelStrategy(), ("ffn",))


def test_frozen_and_compiled_models_are_refused() -> None:
    module = make_module()
    module.model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 parameters are frozen \(model.norm.weight"):
        fit(PruningAwarePretraining(0.5), module)
    fit(PruningAwarePretraining(0.9, ("ffn",), saliency="magnitude"), module)
    module = make_module()
    module.model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"is compiled \(torch.compile\)"):
        fit(PruningAwarePretraining(0.5), module)
    module = make_module()
    module.model = torch.compile(module.model, backend="eager")
    with pytest.raises(ValueError, match=r"is compiled \(torch.compile\)"):
        fit(PruningAwarePretraining(0.5), module)


@pytest.mark.parametrize("saliency", ["taylor2", "kfac"])
def test_frozen_parameters_that_no_saliency_reads_are_no_cause_to_refuse(saliency: str) -> None:
    def make() -> Any:
        module = make_module(config={**SMALL, "tie_word_embeddings": True})
        module.model.requires_grad_(False)
        for layer in module.model.model.layers:
            layer.mlp.requires_grad_(True)
        return module

    module = make()
    before = weights(module)
    fit(callback := PruningAwarePretraining(0.9, ("ffn",), end=2, saliency=saliency), module, max_steps=4)
    assert callback.finished
    assert module.model.config.intermediate_size < 48
    after = weights(module)
    kept = [name for name in before if "mlp" not in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    for types in (("ffn", "attention"), ("hidden",), ("layer",)):
        with pytest.raises(ValueError, match=r"parameters are frozen \(model"):
            fit(PruningAwarePretraining(0.9, types, saliency=saliency), make())


def test_parameters_that_are_frozen_while_training_are_refused_at_that_step() -> None:
    """They counted as zero, and so did the units that they are all of."""

    class Freezing(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                for layer in pl_module.model.model.layers:
                    layer.mlp.requires_grad_(False)

    with pytest.raises(ValueError, match=r"6 parameters are frozen \(model.layers.0.mlp"):
        fit(PruningAwarePretraining(0.9, ("ffn",), end=4), make_module(), Freezing(), max_steps=5)
    for how in ({"saliency": "magnitude"}, {"saliency": "kfac"}, {"types": ("attention",)}):
        callback = PruningAwarePretraining(0.9, **{"types": ("ffn",), "end": 4, **how})
        fit(callback, make_module(), Freezing(), max_steps=5)
        assert callback.finished


def test_gradients_that_no_optimizer_clears_are_refused() -> None:
    """They are the sums of all steps so far, by which units would be judged."""

    class Module(CausalLM):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for n, p in self.named_parameters() if "mlp" not in n], lr=1e-3)

    module = Module(config=SMALL)
    with pytest.raises(ValueError, match=r"needs the gradients of model.layers.0.mlp.*\(6 parameters.*AdamW does not"):
        fit(PruningAwarePretraining(0.9, ("ffn",)), module)
    for how in ({"types": ("attention",)}, {"types": ("ffn",), "saliency": "kfac"}):
        fit(PruningAwarePretraining(0.95, end=1, **how), Module(config=SMALL), max_steps=2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_masked_layers_with_biases_do_not_come_back(kind: str) -> None:
    """What a layer adds to the hidden states at its end is no product with another of its weights."""
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = {**GPT2, "n_layer": 4, **dropout}
    if kind == "llama":
        config = {**SMALL, "num_hidden_layers": 4, "attention_bias": True, "mlp_bias": True}
    found, losses = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses[-1].append(float(outputs["loss"]))
            if compact_every > 1 and "layer" in callback._now.pending:
                names = [n for i in callback._now.pending["layer"][0] for n in callback._now.structure.in_layer(i)]
                parameters = callback._now.structure.parameters()
                seen.append(any(bool(parameters[name].any()) for name in names))

    for compact_every in (1, 100):
        losses.append([])
        seen: list[bool] = []
        callback = PruningAwarePretraining(
            {"num_hidden_layers": 2}, ("layer",), every_n_steps=5, compact_every=compact_every
        )
        module = make_module(config=config)
        fit(callback, module, Watch(), max_steps=12, gradient_clip_val=0.5)
        found.append(weights(module))
    assert len(seen) > 3
    assert not any(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("saliency", ["taylor1", "taylor2"])
def test_a_scaled_loss_gives_the_saliencies_of_the_loss(saliency: str) -> None:
    """A fused optimizer gets gradients that are scaled still, and so they are when saliency is read from them.

    One with fused groups, or whose states a fused one has left, does not.
    """

    class InFloat32(MixedPrecision):
        def autocast_context_manager(self) -> Any:
            return contextlib.nullcontext()

    class Module(CausalLM):
        fused: bool | None = False

        def configure_optimizers(self) -> Any:
            if self.fused is None:
                return torch.optim.AdamW([{"params": list(self.parameters()), "fused": True}], lr=1e-3)
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=self.fused)

    found = []
    for fused, scaled in ((False, False), (False, True), (True, True), (None, True)):
        torch.manual_seed(0)
        module = Module(config=SMALL)
        module.fused = fused
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        settings = {"plugins": [InFloat32("16-mixed", "cpu", scaler)]} if scaled else {}
        callback = PruningAwarePretraining({"intermediate_size": 40}, ("ffn",), end=4, saliency=saliency)
        fit(callback, module, max_steps=5, **settings)
        found.append([record.saliency["ffn"] for record in callback.history[1:]])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)
    assert found[3] == pytest.approx(found[0], rel=1e-4)


def test_a_teacher_in_the_module_is_refused_with_a_way_that_works() -> None:
    module, teacher = make_module(), make_module(1).model
    module.teacher = teacher
    with pytest.raises(ValueError, match=r"2 transformers models \['model', 'teacher'\].*distill_from.*= \[other\]"):
        fit(PruningAwarePretraining(0.9, ("ffn",)), module)
    del module.teacher
    module.other = [make_module(2).model]
    fit(PruningAwarePretraining(0.9, ("ffn",), distill_from=teacher, end=2), module, max_steps=3)
    assert module.model.config.intermediate_size < 48 == teacher.config.intermediate_size


def test_what_may_read_hidden_channels_beside_the_model_is_named() -> None:
    module = make_module()
    module.value, module.scale = torch.nn.Linear(32, 1), torch.nn.Linear(5, 5)
    with pytest.warns(UserWarning, match=r"'value\.weight' \(1 parameters in all\).*Leave 'hidden' out of types"):
        fit(PruningAwarePretraining(0.9, ("hidden",), end=1), module, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Leave 'hidden' out of types")
        fit(PruningAwarePretraining(0.9, ("ffn",), end=1), module, max_steps=1)


def test_states_that_cannot_be_rescaled_are_refused_before_training() -> None:
    class Averaging(torch.optim.SGD):
        """Keeps a second copy of the weights, as optimizers without a schedule do."""

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p].setdefault("z", p.detach().clone())
            return loss

    class Module(CausalLM):
        def configure_optimizers(self) -> Any:
            return Averaging(self.parameters(), lr=0.1)

    module = Module(config=SMALL)
    with pytest.raises(ValueError, match=r"Averaging keeps the state 'z' of .*norm.*leave 'hidden' out of types"):
        fit(callback := PruningAwarePretraining(0.9, ("hidden",)), module)
    assert not callback.history
    assert not any(bool((p == 0).any()) for p in module.parameters())
    module = Module(config=SMALL)
    fit(PruningAwarePretraining(0.9, ("ffn",), end=2), module, max_steps=3)  # as it says
    assert module.model.config.intermediate_size < 48


def test_distilling_from_the_model_itself_or_another_vocabulary_is_refused() -> None:
    module = make_module()
    with pytest.raises(ValueError, match="is the model that is trained"):
        fit(PruningAwarePretraining(0.5, distill_from=module.model), module)
    other = make_module(config={**SMALL, "vocab_size": 65}).model
    with pytest.raises(ValueError, match="vocabulary of 65"):
        fit(PruningAwarePretraining(0.5, distill_from=other), module)
