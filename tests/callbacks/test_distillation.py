"""The divergence against a float64 loop, and the wrapped training step against the sum written out."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from perp_trainers import LLAMA, loader, make_trainer, pruning
from tiny import make_llama, make_tokens, snapshot
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, DynamicCache, T5Config, T5ForConditionalGeneration

from lightning_prune import CausalLM, LinearSchedule, OneShot, PERPRetraining, PruningAwarePretraining
from lightning_prune.callbacks.distillation import Distillation, logits_divergence
from lightning_prune.schedules import ShrinkSchedule


def naive_divergence(student: Tensor, teacher: Tensor, temperature: float, keep: Tensor) -> float:
    total, count = 0.0, 0
    for b in range(student.shape[0]):
        for t in range(student.shape[1]):
            if not keep[b, t]:
                continue
            s = [math.exp(x / temperature) for x in student[b, t].tolist()]
            p = [math.exp(x / temperature) for x in teacher[b, t].tolist()]
            s, p = [x / sum(s) for x in s], [x / sum(p) for x in p]
            total += sum(a * math.log(a / c) for a, c in zip(p, s, strict=True)) * temperature**2
            count += 1
    return total / count


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_the_formula(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    everything = logits_divergence(student, teacher, temperature)
    assert float(everything) == pytest.approx(naive_divergence(student, teacher, temperature, torch.ones(2, 3)))
    masked = logits_divergence(student, teacher, temperature, keep)
    assert float(masked) == pytest.approx(naive_divergence(student, teacher, temperature, keep))


def test_other_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="same vocabulary"):
        logits_divergence(torch.zeros(1, 2, 4), torch.zeros(1, 2, 5))


class Module(L.LightningModule):
    def __init__(self, as_dict: bool, through: bool = True) -> None:
        super().__init__()
        self.model, self.as_dict, self.through = make_llama(), as_dict, through

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> object:
        if not self.through:
            return torch.zeros(())
        loss = self.model(batch, labels=batch).loss
        return {"loss": loss, "other": 1} if self.as_dict else loss


@pytest.mark.parametrize("as_dict", [False, True])
def test_the_wrapped_step_returns_the_mixed_loss_and_its_gradient(as_dict: bool) -> None:
    module, source, ids = Module(as_dict), make_llama(seed=3), make_tokens(2, 7)
    distillation = Distillation(source, weight=0.25, temperature=2.0)
    plain = module.training_step(ids)
    distillation.begin(module, module.model)
    output = module.training_step(ids, 0)
    loss = output["loss"] if as_dict else output
    loss.backward()
    found = module.model.lm_head.weight.grad.clone()
    distillation.end()

    module.zero_grad()
    logits = module.model(ids).logits
    own = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    p = (source(ids).logits.detach() / 2).softmax(-1)
    divergence = (p * (p.log() - (logits / 2).log_softmax(-1))).sum(-1).mean() * 4
    expected = 0.75 * own + 0.25 * divergence
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, module.model.lm_head.weight.grad)
    torch.testing.assert_close(distillation.last, divergence.detach())
    assert all(p.grad is None for p in source.parameters())
    assert "training_step" not in module.__dict__
    again = module.training_step(ids)
    torch.testing.assert_close(again["loss"] if as_dict else again, plain["loss"] if as_dict else plain)
    assert not any(name.startswith("source") for name in module.state_dict())


def test_the_source_leaves_the_students_cache_of_keys_and_values_alone() -> None:
    module, source, ids = Module(False), make_llama(seed=3), make_tokens(2, 7)
    takes = inspect.signature(module.model.forward).parameters
    name, cache = "cache" if "cache" in takes else "past_key_values", DynamicCache(config=module.model.config)
    module.training_step = lambda *_: module.model(ids, labels=ids, use_cache=True, **{name: cache}).loss  # type: ignore[method-assign]
    distillation = Distillation(source, weight=1.0)
    distillation.begin(module, module.model)
    loss = module.training_step(ids)
    distillation.end()
    torch.testing.assert_close(loss, logits_divergence(module.model(ids).logits, source(ids).logits, 1.0))
    assert cache.get_seq_length() == 7


class Distilled(CausalLM):
    """Its own training step returns what `distill_from` is to make of the plain one."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        ids = batch["input_ids"]
        with torch.no_grad():
            p = (SOURCE(ids).logits / 2).log_softmax(-1)
        q = (self.model(input_ids=ids, use_cache=False).logits.float() / 2).log_softmax(-1)
        return 0.75 * loss + 0.25 * 4 * (p.exp() * (p - q)).sum(-1).mean()


def retrained(kind: str, distilled: bool, path: Path, **trainer: Any) -> tuple[dict[str, bytes], L.Trainer]:
    """The weights after a fit with `distill_from`, or with a module that distills by itself."""
    L.seed_everything(0, verbose=False)
    module = (CausalLM if distilled else Distilled)(config=LLAMA, learning_rate=1e-2, lr_schedule="constant")
    options = {"distill_from": copy.deepcopy(SOURCE), "distill_weight": 0.25, "temperature": 2.0} if distilled else {}
    schedule = LinearSchedule(0, 2, 2) if "schedule" in kind else None
    if kind.startswith("masked"):
        # A later update scores by the module's own loss, which Distilled has not: by weights alone both are the same.
        callbacks: list[L.Callback] = [pruning(schedule=schedule, **options)]
    else:
        callbacks = [PERPRetraining(**options), pruning(schedule=schedule)]
    fitter = make_trainer(path, *callbacks, max_epochs=1, **trainer)
    fitter.fit(module, loader())
    assert "training_step" not in module.__dict__
    assert not module.model._forward_hooks
    return snapshot(module.model), fitter


SOURCE = make_llama(seed=3, **{name: value for name, value in LLAMA.items() if name != "model_type"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "trainer"),
    [
        ("perp", {}),
        ("perp with a schedule", {"accumulate_grad_batches": 2}),
        ("perp", {"precision": "bf16-mixed"}),
        ("masked", {}),
        ("masked with a schedule", {"accumulate_grad_batches": 2}),
    ],
    ids=str,
)
def test_distill_from_is_a_step_that_mixes_the_losses(kind: str, trainer: dict[str, Any], tmp_path: Path) -> None:
    found, fitter = retrained(kind, True, tmp_path, **trainer)
    expected, _ = retrained(kind, False, tmp_path, **trainer)
    assert fitter.progress_bar_metrics["distillation"] > 0
    for name, value in expected.items():
        if "inv_freq" not in name:
            own, reference = (torch.frombuffer(bytearray(v), dtype=torch.float32) for v in (found[name], value))
            # Adam divides by gradients that rounding changes: under autocast a few weights go elsewhere.
            close = torch.isclose(own, reference, rtol=1e-2, atol=2e-3 if trainer.get("precision") else 1e-5)
            assert float(close.float().mean()) >= (0.9 if trainer.get("precision") else 1.0), name


def test_scores_are_those_of_the_modules_own_loss(tmp_path: Path) -> None:
    found = []
    for source in (None, copy.deepcopy(SOURCE)):
        L.seed_everything(0, verbose=False)
        module = CausalLM(config=LLAMA, learning_rate=1e-12, lr_schedule="constant")
        pruner = pruning(score="gblm", schedule=OneShot(2), distill_from=source, distill_weight=1.0)
        make_trainer(tmp_path, pruner, max_steps=3).fit(module, loader())
        found.append(pruner.masks)
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


class Stepwise(L.LightningModule):
    """Scored by its training step."""

    def __init__(self) -> None:
        super().__init__()
        L.seed_everything(0, verbose=False)
        self.model = CausalLM(config=LLAMA).model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch, labels=batch["input_ids"]).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_scores_are_of_the_own_loss_whichever_callback_distills(tmp_path: Path) -> None:
    source, runs = copy.deepcopy(SOURCE), []
    source.register_forward_hook(lambda *_: runs.append(1))
    shrinker = PruningAwarePretraining(0.9, types=("ffn",), end=1, distill_from=source)
    pruner = pruning(score="gblm", schedule=OneShot(2))
    make_trainer(tmp_path, shrinker, pruner, max_steps=3).fit(Stepwise(), loader())
    assert pruner.finished
    assert len(runs) == 3  # once a training step


def test_two_callbacks_do_not_distill_at_once(tmp_path: Path) -> None:
    source = copy.deepcopy(SOURCE)
    callbacks = (PERPRetraining(distill_from=source), pruning(distill_from=source))
    with pytest.raises(ValueError, match="give it to one of them"):
        make_trainer(tmp_path, *callbacks).fit(CausalLM(config=LLAMA), loader())


class Manual(CausalLM):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("source", "module", "message"),
    [
        ("other", CausalLM, "a vocabulary of 128, the model one of 64"),
        ("itself", CausalLM, "is the model that is trained"),
        ("source", Manual, "use automatic optimization"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_training(
    source: str, module: type[CausalLM], message: str, tmp_path: Path
) -> None:
    student = module(config=LLAMA)
    before = snapshot(student.model)
    sources = {"other": make_llama(), "itself": student.model, "source": SOURCE}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, PERPRetraining(distill_from=sources[source]), pruning()).fit(student, loader())
    assert snapshot(student.model) == before


class OfItsOwn(L.LightningModule):
    def __init__(self, model: Any, embeds: bool = False) -> None:
        super().__init__()
        self.model, self.embeds = model, embeds

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if self.embeds:
            return self.model(inputs_embeds=self.model.get_input_embeddings()(batch["input_ids"])).logits.mean()
        return self.model(**batch).loss


def bert(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=128, num_labels=3, **sizes)).eval()


def t5(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=128, **sizes)).eval()


@pytest.mark.parametrize("make", [bert, t5])
def test_the_source_is_given_what_the_model_is_given(make: Any) -> None:
    student, source, ids = make(0), make(1), make_tokens(2, 5)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    if make is bert:
        batch |= {"token_type_ids": torch.tensor([[0, 0, 1, 1, 1]] * 2), "labels": torch.tensor([2, 0])}
        keep = torch.ones(2, 1, dtype=torch.bool)
    else:
        keep = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
        batch["labels"] = make_tokens(2, 3, seed=4).masked_fill(~keep, -100)
    with torch.no_grad():
        mine, theirs = (m(**batch).logits.view(2, keep.shape[1], -1) for m in (student, source))
        own = float(student(**batch).loss)
    module, distillation = OfItsOwn(student), Distillation(source, 0.25, 2.0)
    distillation.begin(module, student)
    expected = 0.75 * own + 0.25 * naive_divergence(mine, theirs, 2.0, keep)
    assert float(module.training_step(batch, 0)) == pytest.approx(expected, rel=1e-5)


def test_embeddings_of_the_models_own_are_refused() -> None:
    module = OfItsOwn(make_llama(), embeds=True)
    Distillation(make_llama(seed=3)).begin(module, module.model)
    with pytest.raises(ValueError, match=r"with inputs_embeds, which are of its own.*call it with input_ids"):
        module.training_step({"input_ids": make_tokens(1, 4)}, 0)


def test_a_step_that_does_not_call_the_model_is_an_error() -> None:
    module = Module(False, through=False)
    distillation = Distillation(make_llama(seed=3), 0.5, 1.0)
    distillation.begin(module, module.model)
    with pytest.raises(ValueError, match="did not call the language model"):
        module.training_step(make_tokens(1, 4), 0)


def test_schedule_without_end() -> None:
    schedule = ShrinkSchedule(start=4, every=3)
    assert [step for step in range(15) if schedule.due(step)] == [7, 10, 13]
    assert schedule.goal(7, 1000, 400) == 400


def test_schedule_with_end_arrives_there() -> None:
    schedule = ShrinkSchedule(start=2, end=10, every=3)
    assert [step for step in range(11) if schedule.due(step)] == [5, 8, 10]
    assert [schedule.goal(s, 1000, 200) for s in (5, 8, 10, 12)] == [700, 400, 200, 200]
    assert schedule.due(11)  # what is still too large then goes at once


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "start=-1"),
        ({"every": 0}, "every_n_steps=0"),
        ({"units": 0}, "units_per_pruning=0"),
        ({"units": 1.5}, "units_per_pruning=1.5"),
        ({"start": 5, "end": 5}, "end=5"),
    ],
)
def test_schedule_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShrinkSchedule(**settings)
