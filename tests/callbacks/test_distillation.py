"""The divergence against a float64 loop, and the wrapped training step against the sum written out."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from tiny import make_llama, make_tokens
from torch import Tensor

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
