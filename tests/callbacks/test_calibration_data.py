"""Where calibration batches come from, and that neither the training data nor the module shows that it happened."""

from __future__ import annotations

import collections
import copy
import io
import itertools
import queue
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import CombinedLoader
from tiny import make_llama
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchmetrics import MeanMetric
from transformers import T5Config, T5ForConditionalGeneration

from lightning_prune import LinearSchedule, OneShot, WeightPruning, prune
from lightning_prune.callbacks import traces
from lightning_prune.callbacks.calibration_data import _silent

warnings.filterwarnings("ignore", module="lightning")

SAMPLES = 24


class Numbered(L.LightningModule):
    """Notes the samples that training steps see; a sample's first feature is its number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Watch(L.Callback):
    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Tensor, batch_idx: int) -> None:
        self.batches.append(copy.deepcopy(batch))


def rows(count: int = SAMPLES) -> Tensor:
    values = torch.rand(count, 4, generator=torch.Generator().manual_seed(2))
    values[:, 0] = torch.arange(count)
    return values


def fit(data: Any, *callbacks: L.Callback, module: L.LightningModule | None = None, **options: Any) -> list[Tensor]:
    """Train; returns the batches that training saw."""
    watch = Watch()
    settings = {"max_epochs": 2, "limit_train_batches": 5, "logger": False, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, watch],
        **settings,
    )
    L.seed_everything(3, verbose=False)
    trainer.fit(Numbered() if module is None else module, data)
    return watch.batches


def pruning(seen: list[Tensor] | None = None, **options: Any) -> WeightPruning:
    """Prunes nothing by default, and notes the batches that it calibrates on."""

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        if seen is not None:
            seen.append(batch.clone())
        return module.net(batch).square().sum(-1).reshape(-1)

    settings = {"score": "gblm", "sparsity": 0.0, "num_samples": 8, "loss_fn": loss, "progress": False, **options}
    return WeightPruning(**settings)


def numbers(batches: list[Tensor]) -> list[int]:
    return [int(n) for batch in batches for n in batch[..., 0].reshape(-1)]


class Fresh(IterableDataset):
    """Starts anew with every iterator."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from rows()


class Onwards(IterableDataset):
    """Goes on where it was left, as a reader of a long text does."""

    def __init__(self) -> None:
        self.position = 0
        self.buffer: collections.deque[Tensor] = collections.deque()

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            if not self.buffer:
                self.buffer.extend(rows()[[self.position % SAMPLES, (self.position + 1) % SAMPLES]])
                self.position += 2
            yield self.buffer.popleft()


class Chunks(Onwards):
    """Makes its batches itself."""

    def __iter__(self) -> Iterator[Tensor]:
        samples = super().__iter__()
        while True:
            yield torch.stack([next(samples), next(samples)])


class Reader(IterableDataset):
    """Cannot be copied, but says where it is."""

    def __init__(self) -> None:
        self.file = io.TextIOWrapper(io.BytesIO("".join(f"{i}\n" for i in range(SAMPLES)).encode()))

    def __iter__(self) -> Iterator[Tensor]:
        while line := self.file.readline():
            yield rows()[int(line)]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.file.tell()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.file.seek(state["at"])


class Noisy(Dataset):
    """Augments with a random generator of its own, and counts."""

    def __init__(self) -> None:
        self.random, self.numpy, self.torch = random.Random(1), np.random.default_rng(1), torch.Generator()
        self.served, self.order = 0, []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        self.served += 1
        self.order.append(index)
        noise = self.random.random() + float(self.numpy.random()) + torch.rand((), generator=self.torch)
        return rows()[index] + torch.tensor([0.0, float(noise), self.served, len(self.order)])


class Rows(Dataset):
    """Takes an index, or a list of them."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: Any) -> Tensor:
        return rows()[index]


class EveryThird(Sampler):
    """A user's own, with a state: each epoch begins elsewhere."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        yield from range(self.epoch % 2 * 3, SAMPLES, 3)

    def __len__(self) -> int:
        return SAMPLES // 3


class Pairs(Sampler):
    """Batches of a sample and its partner; has no length, and no end."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            first = int(torch.randint(SAMPLES // 2, (), generator=self.generator))
            yield [first, first + SAMPLES // 2]


class Batches:
    """No DataLoader, but Lightning takes it."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter((rows() + torch.tensor([0.0, self.passes, 0, 0])).split(4))

    def __len__(self) -> int:
        return SAMPLES // 4


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(9)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(rows(), 4, shuffle=True),
    "with a generator": lambda: DataLoader(rows(), 4, shuffle=True, generator=seeded()),
    "noisy": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "subset": lambda: DataLoader(rows(), 4, sampler=SubsetRandomSampler(range(12), generator=seeded())),
    "weighted": lambda: DataLoader(rows(), 4, sampler=WeightedRandomSampler([1.0] * 12 + [0.0] * 12, 20)),
    "own sampler": lambda: DataLoader(rows(), 4, sampler=EveryThird()),
    "own batches": lambda: DataLoader(rows(), batch_sampler=Pairs()),
    "given batches": lambda: DataLoader(rows(), batch_sampler=BatchSampler(EveryThird(), 4, False)),
    "dataset of batches": lambda: DataLoader(rows().split(4), batch_size=None, shuffle=True),
    "sampler of batches": lambda: DataLoader(
        Rows(), batch_size=None, sampler=BatchSampler(RandomSampler(Rows()), 4, False)
    ),
    "stream": lambda: DataLoader(Fresh(), 4),
    "stream that goes on": lambda: DataLoader(Onwards(), 4),
    "stream that says where it is": lambda: DataLoader(Reader(), 4),
    "stream of batches": lambda: DataLoader(Chunks(), batch_size=None),
    "no loader": Batches,
}


@pytest.mark.few_fast(8)
@pytest.mark.parametrize("kind", LOADERS)
def test_training_sees_the_batches_that_it_would_see_without(kind: str) -> None:
    expected = fit(LOADERS[kind]())
    seen: list[Tensor] = []
    got = fit(LOADERS[kind](), pruning(seen))
    assert len(expected) == len(got) > 1
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert seen
    assert {batch.shape[1:] for batch in seen} == {batch.shape[1:] for batch in got}


class Sharded:
    """Another part of the data with every call of the hook, in an order of a generator of its own."""

    shard = 0

    def train_dataloader(self) -> DataLoader:
        self.dice = getattr(self, "dice", np.random.default_rng(0))
        self.shard += 1
        self.part = [int(i) for i in self.dice.permutation(6) + 6 * (self.shard - 1)]
        return DataLoader(Part(self), 2)


class Part(Dataset):
    """Reads which samples are its own from the one who made it, when it is asked for them."""

    def __init__(self, maker: Any) -> None:
        self.maker = maker

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return rows()[self.maker.part[index]]


class ShardedData(Sharded, L.LightningDataModule):
    pass


class ShardedModule(Sharded, Numbered):
    pass


@pytest.mark.parametrize("where", ["module", "data module"])
@pytest.mark.parametrize("schedule", [None, LinearSchedule(0, 6, 3)])
def test_a_hook_that_makes_another_loader_every_time_makes_the_same_for_training(where: str, schedule: Any) -> None:
    def data_and_module() -> tuple[Any, Any]:
        return (None, ShardedModule()) if where == "module" else (ShardedData(), Numbered())

    data, module = data_and_module()
    expected = fit(data, module=module, reload_dataloaders_every_n_epochs=1)
    assert [sorted(numbers(expected[i : i + 3])) for i in (0, 3)] == [[*range(6)], [*range(6, 12)]]
    seen: list[Tensor] = []
    data, module = data_and_module()
    pruner = pruning(seen, sparsity=0.5, schedule=schedule, score="wanda", num_samples=6)
    got = fit(data, pruner, module=module, reload_dataloaders_every_n_epochs=1)
    assert numbers(got) == numbers(expected)
    assert (module if where == "module" else data).shard == 2
    assert sorted(numbers(seen)[:6]) == [*range(6)] if schedule is None else seen


def test_what_a_loader_hook_draws_for_good_is_named() -> None:
    class Turns(L.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.turns = itertools.cycle([rows(), rows()])

        def train_dataloader(self) -> DataLoader:
            return DataLoader(next(self.turns), 4)

    with pytest.warns(UserWarning, match=r"train_dataloader of Turns.*Turns\.turns \(cycle\).*cannot be undone"):
        fit(Turns(), pruning())


@pytest.mark.parametrize("kind", ["shuffled", "noisy", "weighted", "stream that goes on", "no loader"])
def test_updates_in_the_middle_of_training_take_nothing_from_it(kind: str) -> None:
    expected = fit(LOADERS[kind]())
    seen: list[Tensor] = []
    got = fit(LOADERS[kind](), pruning(seen, sparsity=0.5, schedule=LinearSchedule(0, 6, 3), score="wanda"))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert len(numbers(seen)) >= 2 * 8


def test_the_draw_from_a_plain_loader_is_a_permutation_by_the_seed() -> None:
    seen: list[Tensor] = []
    for shuffle in (True, False):
        seen.clear()
        fit(DataLoader(rows(), 4, shuffle=shuffle), pruning(seen, seed=5, score="wanda"))
        assert numbers(seen) == torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5))[:8].tolist()


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        ("subset", range(12)),
        ("weighted", range(12)),
        ("own sampler", range(0, SAMPLES, 3)),
        ("given batches", range(0, SAMPLES, 3)),
    ],
)
def test_samples_that_training_leaves_out_are_not_calibrated_on(kind: str, allowed: range) -> None:
    seen: list[Tensor] = []
    fit(LOADERS[kind](), pruning(seen, num_samples=8, score="wanda"))
    assert len(numbers(seen)) >= 5
    assert set(numbers(seen)) <= set(allowed)
    if kind == "subset":
        assert len(set(numbers(seen))) == 8  # without replacement


def test_batches_stay_as_the_batch_sampler_composes_them() -> None:
    seen: list[Tensor] = []
    fit(LOADERS["own batches"](), pruning(seen, score="wanda"))
    assert [b - a for a, b in (numbers([batch]) for batch in seen)] == [SAMPLES // 2] * 4


@pytest.mark.parametrize("kind", ["dataset of batches", "sampler of batches"])
def test_batches_of_a_loader_without_batching_are_those_of_training(kind: str) -> None:
    seen: list[Tensor] = []
    fit(LOADERS[kind](), pruning(seen, score="wanda", num_samples=12))
    assert [batch.shape for batch in seen] == [(4, 4)] * 3
    assert len(set(numbers(seen))) == 12


@pytest.mark.parametrize("kind", ["with a generator", "noisy", "stream that goes on", "stream that says where it is"])
def test_the_training_loader_itself_can_be_given_for_calibration(kind: str) -> None:
    expected = fit(LOADERS[kind]())
    loader, seen = LOADERS[kind](), []
    got = fit(loader, pruning(seen, calibration=loader))
    assert seen
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("where", ["another loader", "a data module's loader"])
def test_a_dataset_that_training_reads_too_is_as_it_was(where: str) -> None:
    class Data(L.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.noisy = Noisy()

        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.noisy, 4, shuffle=True)

    expected = fit(LOADERS["noisy"]())
    data, seen = Data(), []
    pruner = pruning(seen, calibration=data.train_dataloader(), sparsity=0.5, schedule=LinearSchedule(0, 6, 3))
    got = fit(data if where == "a data module's loader" else data.train_dataloader(), pruner)
    assert len(seen) > 1
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.slow  # processes
def test_workers_that_training_reads_from_are_not_calibration_s() -> None:
    def shuffled(persistent: bool) -> DataLoader:
        generator = torch.Generator().manual_seed(4)
        return DataLoader(rows(), 4, shuffle=True, generator=generator, num_workers=1, persistent_workers=persistent)

    expected = fit(shuffled(False), max_epochs=1)
    loader, seen = shuffled(True), []
    schedule = LinearSchedule(0, 4, 2)
    got = fit(loader, pruning(seen, calibration=loader, sparsity=0.5, schedule=schedule, score="wanda"), max_epochs=1)
    assert len(seen) == 2 * 2  # pruned at steps 2 and 4
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


class Held(IterableDataset):
    """Reads what nothing can read twice."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.source


def test_streams_that_can_be_read_only_once_are_refused_before_a_sample_is_lost() -> None:
    for wrap in (lambda stream: DataLoader(Held(stream), 4), lambda stream: stream):
        stream = (row for row in rows())
        with pytest.raises(
            ValueError, match=r"generator.*training would miss what calibration reads: pass calibration="
        ):
            fit(wrap(stream), pruning())
        assert int(next(stream)[0]) == 0
    files = DataLoader(Reader(), 4)
    with pytest.raises(ValueError, match=r"LinearSchedule.*while training reads its stream.*pass calibration="):
        fit(files, pruning(schedule=LinearSchedule(0, 4, 2)))
    assert files.dataset.file.tell() == 0


def test_several_loaders_are_refused_with_advice() -> None:
    for loaders in ([DataLoader(rows(), 4), DataLoader(rows(), 4)], {"a": DataLoader(rows(), 4)}):
        with pytest.raises(ValueError, match=r"not one DataLoader: pass calibration="):
            fit(loaders, pruning())


@pytest.mark.parametrize("kind", [dict, list, CombinedLoader])
def test_several_loaders_given_for_calibration_are_refused_before_anything_is_pruned(kind: Any) -> None:
    loaders: Any = {"a": DataLoader(rows(), 4), "b": DataLoader(rows(), 4)}
    loaders = list(loaders.values()) if kind is list else kind(loaders)
    module = Numbered()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=rf"calibration={kind.__name__} holds several loaders.*zip\("):
        fit(DataLoader(rows(), 4), pruning(calibration=loaders, sparsity=0.5), module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_generator_that_would_run_dry_is_refused_before_it_is_read() -> None:
    batches = iter(rows().split(4))
    with pytest.raises(ValueError, match=r"can be read once.*more than one update.*pass a list or a DataLoader"):
        fit(DataLoader(rows(), 4), pruning(calibration=batches, schedule=LinearSchedule(0, 4, 2)))
    assert int(next(batches)[0, 0]) == 0
    seen: list[Tensor] = []
    fit(DataLoader(rows(), 4), pruning(seen, calibration=batches, score="wanda"))  # once is enough for one update
    assert numbers(seen) == list(range(4, 12))

    tokens = ({"input_ids": torch.randint(0, 128, (2, 8))} for _ in range(4))
    model = make_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"batches=generator can be read once.*sequential=True.*pass a list"):
        prune(model, tokens, score="gblm", sequential=True, num_samples=4)
    assert len(list(tokens)) == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- traces ----------------------------------------------------------------------------------------------------------


@dataclass
class Meter:
    total: float = 0.0
    by_class: dict[str, list[float]] = field(default_factory=dict)


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Traceful(Numbered):
    """A training step that leaves traces of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.nested = {"loss": [], "by": {"epoch": [[0.0]]}}
        self.groups: Any = collections.defaultdict(list)
        self.counter = collections.Counter(a=2)
        self.last: Any = collections.deque([1, 2], maxlen=3)
        self.running = torch.zeros(3)
        self.pair = (torch.zeros(2), [1])
        self.array = np.zeros(3)
        self.meter, self.slotted = Meter(), Slotted()
        self.loose = [MeanMetric()]
        self.metric = MeanMetric()
        self.seen = {1}
        self.dice, self.numpy, self.legacy = random.Random(2), np.random.default_rng(2), np.random.RandomState(2)
        self.torch_dice = torch.Generator().manual_seed(2)
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.teacher = nn.Linear(4, 6).requires_grad_(False)
        self.hidden = [nn.Linear(4, 6).requires_grad_(False)]
        self.center = nn.Parameter(torch.zeros(3))
        self.best: Any = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) + (self.queue.sum() + self.pointer) * 0
        self.nested["loss"].append(1.0)
        self.nested["by"]["epoch"][0].append(2.0)
        self.nested["new"] = {}
        self.groups["x"].append(1)
        self.counter["b"] += 1
        self.last.append(3)
        self.running += 1
        self.pair[0].add_(1)
        self.pair[1].append(2)
        self.array[0] += 1
        self.meter.total += 1
        self.meter.by_class.setdefault("a", []).append(1.0)
        self.slotted.count += 1
        self.loose[0].update(1.0)
        self.metric.update(1.0)
        self.seen.add(2)
        self.dice.random(), self.numpy.random(), self.legacy.rand()
        torch.rand(1, generator=self.torch_dice)
        torch.rand(1), random.random(), np.random.rand()
        self.queue = torch.cat([self.queue[1:], torch.ones(1)])  # another tensor under the same name
        self.pointer += 1
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net[0].weight, 0.5)
            self.teacher.bias.data = self.teacher.bias.data * 0.5 + 1
            own, other = [p.data for p in self.hidden[0].parameters()], list(self.net[0].parameters())
            torch._foreach_lerp_(own, other, 0.5)
            self.center[0] = 5.0
        self.best = loss.detach()
        self.late = 1
        return loss


def described(module: Traceful) -> dict[str, Any]:
    tensors = [*module.state_dict().values(), module.running, module.pair[0]]
    tensors += list(module.hidden[0].parameters()) + list(module.loose[0].metric_state.values())
    return {
        "tensors": [t.detach().clone().tolist() for t in [*tensors, *module.metric.metric_state.values()]],
        "plain": copy.deepcopy([module.nested, module.counter, module.last, module.seen, module.pair[1], module.best]),
        "groups": dict(module.groups),
        "objects": [copy.deepcopy(module.meter), module.slotted.count, module.array.tolist()],
        "updates": [module.metric._update_count, module.loose[0]._update_count],
        "dice": [copy.deepcopy(d).random() for d in (module.dice, module.numpy)]
        + [copy.deepcopy(module.legacy).rand(), module.torch_dice.get_state().tolist()],
        "late": hasattr(module, "late"),
        "storages": [p.data_ptr() for p in module.parameters()] + [module.queue.data_ptr()],
    }


@pytest.mark.parametrize("score", ["wanda", "gblm"])
def test_nothing_of_a_training_step_stays(score: str) -> None:
    module = Traceful()
    before = described(module)
    found: dict[str, Any] = {}
    global_states: list[Any] = []

    class Look(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            found.update(described(module))
            global_states.append((torch.rand(1).item(), random.random(), np.random.rand()))

    options = {"loss_fn": None, "num_samples": 4, "score": score, "ignore": ["teacher"]}
    fit(DataLoader(rows(), 4), pruning(**options), Look(), module=module)
    for name, value in before.items():
        assert found[name] == value, name
    assert described(module) != before  # training itself does leave them
    fit(DataLoader(rows(), 4), Look(), module=Traceful())
    assert global_states[0] == global_states[1]


@pytest.mark.parametrize("score", ["wanda", "gblm"])
def test_learning_rates_and_what_is_trained_are_what_they_were(score: str) -> None:
    class Steering(Numbered):
        """Steps its schedulers, lowers its rate and freezes as it goes, in the training step."""

        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(4, 3).requires_grad_(False)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            for scheduler in self.lr_schedulers():
                scheduler.step()
            group = self.optimizers().param_groups[0]
            group["momentum"] *= 0.5
            group["seen"] = 1
            self.net[0].bias.requires_grad_(False)
            self.extra.bias.requires_grad_(True)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)
            decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            both = [decay, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]
            chained = torch.optim.lr_scheduler.ChainedScheduler(both)
            return [optimizer], [chained, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    found: list[Any] = []

    class Look(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            optimizer = trainer.optimizers[0]
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            states = [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
            found.append((groups, states, [p.requires_grad for p in pl_module.parameters()]))

    fit(DataLoader(rows(), 4), Look(), module=Steering(), limit_train_batches=1)
    fit(DataLoader(rows(), 4), pruning(loss_fn=None, score=score), Look(), module=Steering(), limit_train_batches=1)
    assert found[0] == found[1]
    assert found[0][0][0]["momentum"] == 0.9


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("schedule", [None, OneShot(1)])
def test_what_a_step_optimizes_by_itself_is_as_it_was(how: dict[str, bool], schedule: Any) -> None:
    """Parameters in containers, and an optimizer of its own for them, before its first step and after."""

    class Inner(Numbered):
        def __init__(self) -> None:
            super().__init__()
            self.prototypes = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
            self.bank = {name: nn.Parameter(torch.zeros(3)) for name in "ab"}
            self.inner = [torch.optim.Adam([*self.prototypes, *self.bank.values()], 0.1, **how)]

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            for parameter in (*self.prototypes, *self.bank.values()):
                parameter.grad = torch.ones(3)
            self.inner[0].step()
            return super().training_step(batch, batch_idx)

    found: list[Any] = []

    class Look(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.on_train_batch_end(trainer, pl_module)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            values = [p.tolist() for p in (*pl_module.prototypes, *pl_module.bank.values())]
            state = {
                i: {k: v.tolist() for k, v in of.items()} for i, of in pl_module.inner[0].state_dict()["state"].items()
            }
            found.append((values, state))

    for pruner in ([], [pruning(loss_fn=None, score="wanda", sparsity=0.5, schedule=schedule)]):
        found.append("fit")
        fit(DataLoader(rows(), 4), *pruner, Look(), module=Inner(), max_steps=2)
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    assert len(found) == 8


def test_a_step_that_ends_training_where_a_loss_is_small_does_not_end_it_in_calibration() -> None:
    class Content(Numbered):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if len(batch) == 1:  # as those of single samples are
                self.trainer.should_stop = True
            return super().training_step(batch, batch_idx)

    seen = fit(DataLoader(rows(), 4), pruning(loss_fn=None, sparsity=0.5), module=Content(), max_epochs=1)
    assert len(seen) == 5


class Distilling(L.LightningModule):
    """Reads hidden states, for which transformers registers hooks in the first forward pass that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_llama()
        self.found: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        out = self.model(**batch, labels=batch["input_ids"], output_hidden_states=True)
        self.found.append(len(out.hidden_states))
        return out.loss + out.hidden_states[1].square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("score", ["wanda", "kfac"])
def test_hooks_that_a_step_registers_once_are_there_once(score: str) -> None:
    ids = torch.randint(4, 60, (8, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row} for row in ids]
    module = Distilling()
    layers = module.model.model.layers
    called: list[nn.Module] = []
    layers[0].register_forward_hook(lambda layer, *_: called.append(layer))
    fit(DataLoader(data, 2), pruning(loss_fn=None, score=score, num_samples=2), module=module)
    assert set(module.found) == {1 + len(layers)}
    called.clear()
    module.training_step({"input_ids": ids}, 0)
    assert len(called) == 1  # what was registered before is there still


def test_what_cannot_be_put_back_is_named() -> None:
    class Drawing(Numbered):
        def __init__(self) -> None:
            super().__init__()
            self.turns = itertools.cycle([1.0, 2.0])
            self.sources = {"unlabeled": (row for row in rows())}
            self.outbox = queue.Queue()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * next(self.turns)

    with pytest.warns(UserWarning, match=r"cannot be undone") as caught:
        fit(DataLoader(rows(), 4), pruning(loss_fn=None), module=Drawing())
    text = next(str(w.message) for w in caught if "cannot be undone" in str(w.message))
    assert all(
        re.search(part, text) for part in (r"Drawing\.turns \(cycle\)", r"sources \(generator\)", r"outbox \(Queue\)")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        fit(DataLoader(rows(), 4), pruning(loss_fn=None), module=Numbered())


def test_what_is_too_large_to_remember_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_MOST_ITEMS", 50)
    module = Numbered()
    module.table, module.few = list(range(60)), [1]
    state = traces.State({"Numbered": module})
    assert state.unknown == {"Numbered.table": "more than 50 items"}
    module.few.append(2)
    state.put_back()
    assert module.few == [1]


def test_modules_of_torchscript_are_put_back() -> None:
    module = Numbered()
    module.norm = torch.jit.script(nn.BatchNorm1d(4))  # counts batches and averages them
    before = copy.deepcopy(module.norm.state_dict())

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        return module.net(module.norm.train()(batch)).square().sum(-1)

    found: dict[str, Tensor] = {}

    class Look(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            found.update(copy.deepcopy(module.norm.state_dict()))

    pruner = pruning(loss_fn=loss, score="wanda", sparsity=0.5)
    fit(DataLoader(rows(), 4), pruner, Look(), module=module, limit_train_batches=1)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.03)
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_a_loss_that_writes_to_a_pruned_weight_is_refused_and_the_weight_is_as_it_was() -> None:
    class Clipped(Numbered):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            for parameter in self.net.parameters():
                parameter.data.clamp_(-0.01, 0.01)
            return super().training_step(batch, batch_idx)

    module = Clipped()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"writes to Clipped\.net\.0\.weight.*being pruned.*hook"):
        fit(DataLoader(rows(), 4), pruning(loss_fn=None), module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# -- what a training step meets --------------------------------------------------------------------------------------


class Prepared(Numbered):
    """Needs what a hook makes."""

    hook = "on_train_start"

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.factor


def _make_factor(self: Prepared, *args: Any) -> None:
    self.factor = 2.0


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"])
def test_a_step_that_needs_what_hooks_make_is_told_so_and_what_to_do(hook: str) -> None:
    module = type("Hooked", (Prepared,), {hook: _make_factor})()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"AttributeError.*'factor'.*before.*on_train_start.*OneShot\(1\)"):
        fit(DataLoader(rows(), 4), pruning(loss_fn=None), module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    later = pruning(loss_fn=None, sparsity=0.5, schedule=OneShot(1))
    fit(DataLoader(rows(), 4), later, module=type("Hooked", (Prepared,), {hook: _make_factor})())
    assert later.sparsity == pytest.approx(0.5, abs=0.03)


def test_a_model_that_returns_no_loss_in_evaluation_mode_is_told_so() -> None:
    class Detector(Numbered):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            found = {"loss": super().training_step(batch, batch_idx)} if self.net.training else [batch]
            return found.get("loss")

    for schedule in (None, OneShot(1)):
        with pytest.raises(
            RuntimeError, match=r"AttributeError.*'get'.*evaluation mode.*loss_fn=f\(module, batch\).*train"
        ):
            fit(DataLoader(rows(), 4), pruning(loss_fn=None, schedule=schedule), module=Detector())

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        module.net.train()
        return module.training_step(batch, 0)

    module, pruner = Detector(), pruning(loss_fn=loss, sparsity=0.5)
    fit(DataLoader(rows(), 4), pruner, module=module)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.03)


def test_a_step_finds_what_it_finds_in_training() -> None:
    found: list[Any] = []

    class Curious(Numbered):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"x": batch["x"] * 2, "by": ["before"]}

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return {"x": batch["x"] * 3, "by": [*batch["by"], "transfer"]}

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"x": batch["x"] * 5, "by": [*batch["by"], "after"]}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("a", 1.0), self.log_dict({"b": 2.0})
            rates = self.optimizers().param_groups[0]["lr"], self.lr_schedulers().get_last_lr()
            found.append((batch["by"], self.current_epoch, self.trainer.training, rates))
            return super().training_step(batch["x"], batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]

    data = [{"x": row} for row in rows()]
    fit(
        DataLoader(data, 4), pruning(loss_fn=None, score="wanda"), module=Curious(), max_epochs=1, limit_train_batches=1
    )
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert found[0][0] == ["before", "transfer", "after"]


@pytest.mark.parametrize("score", ["wanda", "gblm"])
def test_a_step_finds_its_logger_which_logs_nothing(score: str, tmp_path: Any) -> None:
    class Logged(CSVLogger):
        """With what loggers of other programs have."""

        def log_image(self, **image: Any) -> None:
            images.append(image)

    folders: list[Any] = []
    images: list[Any] = []

    class Drawing(Numbered):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            found = next(logger for logger in self.trainer.loggers if isinstance(logger, CSVLogger))
            assert isinstance(self.logger, Logged)
            folders.append((found.log_dir, self.trainer.log_dir, self.logger.save_dir, found.name, found.version))
            self.logger.log_image(key="a")
            self.logger.log_metrics({"direct": 1.0}, step=0)
            if self.calibrating:
                with found.experiment.train() as run:
                    run.config["a"].update({"b": list(run.history)})
            found.experiment.log_metrics({"written": 1.0})
            return super().training_step(batch, batch_idx)

    class Look(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.calibrating = False
            found = trainer.logger
            assert found is logger
            assert (found.experiment.metrics, images) == ([], [])

    module, logger = Drawing(), Logged(tmp_path)
    module.calibrating = True
    pruner = pruning(loss_fn=None, sparsity=0.5, score=score)
    fit(DataLoader(rows(), 4), pruner, Look(), module=module, logger=logger, max_steps=1)
    assert len(folders) > 2
    assert set(folders) == {
        (str(tmp_path / "lightning_logs" / "version_0"),) * 2 + (str(tmp_path), "lightning_logs", 0)
    }
    assert len(images) == 1


class Alone(Logger):
    """A logger with slots, one for all, whose class says what every class of loggers is called."""

    __slots__ = ("_run",)
    classes: ClassVar[dict[str, Any]] = {}
    only: ClassVar[Any] = None

    def __new__(cls, run: str) -> Any:
        Alone.only = Alone.only or object.__new__(Alone)
        return Alone.only

    def __init__(self, run: str) -> None:
        self._run, self.lines = run, list[Any]()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        Alone.classes[cls.__name__] = cls

    name = version = property(lambda self: self._run)  # type: ignore[assignment]

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.lines.append(args)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.lines.append(args)


class Twin(Alone):
    """Of a class that is known by its name."""


class MadeUp:
    """Has every method that it is asked for."""

    name = "run"

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.lines.append(name)


def test_loggers_of_any_class_are_silent() -> None:
    alone, twin, made_up = Alone("run"), object.__new__(Twin), MadeUp()
    twin._run, twin.lines = "run", []
    twin.log_metrics = lambda *args, **kwargs: twin.lines.append(args)
    for logger in (alone, twin, made_up):
        silent = _silent(logger)
        silent.log_metrics({"a": 1.0}, step=0)
        silent.experiment.add_image("a")
        assert logger.lines == []
        if logger is not made_up:
            assert (type(silent).__name__, silent.name) == (type(logger).__name__, "run")
            assert isinstance(silent, type(logger))
    assert Alone.classes == {"Twin": Twin}


class Counting:
    """Hooks on batches that count, with names of arguments of their own."""

    counts: list[int]
    rows: int

    def on_before_batch_transfer(self, batch: Any, index: int) -> Any:
        self.counts[0] += 1
        self.rows = self.rows + len(batch)
        return batch

    def on_after_batch_transfer(self, batch: Any, index: int) -> Any:
        self.counts.append(index)
        return batch


@pytest.mark.parametrize("where", ["module", "data module"])
def test_hooks_on_batches_leave_no_trace(where: str) -> None:
    def counting(cls: Any, **members: Any) -> Any:
        made: Any = type("Own", (Counting, cls), members)()
        made.counts, made.rows = [0], 0
        return made

    found = []
    for pruner in ([], [pruning(loss_fn=None, score="wanda")]):
        data = counting(L.LightningDataModule, train_dataloader=lambda _: DataLoader(rows(), 4))
        module = counting(Numbered) if where == "module" else Numbered()
        trainer = L.Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=pruner,
        )  # fmt: skip
        trainer.fit(module, data if where == "data module" else DataLoader(rows(), 4))
        own = module if where == "module" else data
        found.append((list(own.counts), own.rows))
    assert found[0] == found[1]
    assert found[0] == ([2, 0, 0], 8)


def test_a_step_that_takes_anything_gets_the_index_as_in_training() -> None:
    class Wrapped(Numbered):
        def training_step(self, *args: Any) -> Tensor:
            batch, index = args
            assert isinstance(index, int)
            return super().training_step(batch, index)

    pruner = pruning(loss_fn=None, sparsity=0.5)
    fit(DataLoader(rows(), 4), pruner, module=Wrapped())
    assert pruner.sparsity == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("score", ["wanda", "gradient"])
def test_a_step_is_told_which_batch_it_is_given(score: str) -> None:
    told: list[tuple[int, int]] = []

    class Counted(Numbered):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 0:
                told.append((int(batch[0, 0]) // 4, batch_idx))
            return super().training_step(batch, batch_idx)

    data = rows().split(4)
    pruner = pruning(loss_fn=None, score=score, sparsity=0.5, calibration=data, num_samples=SAMPLES)
    fit(DataLoader(rows(), 4), pruner, module=Counted(), max_steps=1)
    *calibration, first_of_training = told
    assert first_of_training[1] == 0
    assert {batch for batch, _ in calibration} == set(range(SAMPLES // 4))
    assert all(batch == index for batch, index in calibration)


@pytest.mark.parametrize("shared", [False, True])  # a tensor that all batches have
def test_a_step_is_told_which_batch_it_is_given_where_batches_wait_for_several_stacks(shared: bool) -> None:
    told: list[tuple[int, int]] = []

    class Translating(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = T5ForConditionalGeneration(
                T5Config(
                    vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
                )
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch = batch[1] if isinstance(batch, list) else batch
            if not self.training and len(batch) == 2:  # not one that shows the order of the stacks alone
                told.append((int(batch[0, 0]) - 1, batch_idx))
            return self.model(input_ids=batch, labels=batch).loss

        configure_optimizers = Numbered.configure_optimizers

    data: list[Any] = [torch.full((2, 5), 1 + i) for i in range(3)]
    if shared:
        data = [[weights, batch] for weights in (torch.ones(2),) for batch in data]
    pruner = WeightPruning("wanda", sparsity=0.5, sequential=True, num_samples=6, calibration=data)
    fit(DataLoader(torch.ones(8, 5, dtype=torch.long), 4), pruner, module=Translating())
    assert len(told) >= 6
    assert {batch for batch, _ in told} == {0, 1, 2}
    assert all(batch == index for batch, index in told)


def test_a_step_that_passes_over_a_batch_gives_inputs_but_no_gradient() -> None:
    class Passing(Numbered):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if bool((batch[:, 0] < 8).any()) else loss

    masks = []
    for module in (Passing(), Numbered()):
        pruner = pruning(loss_fn=None, score="wanda", sparsity=0.5, calibration=rows().split(4))
        fit(DataLoader(rows(), 4), pruner, module=module)
        masks.append(pruner.masks)
    assert masks[0] == masks[1]
    with pytest.raises(RuntimeError, match=r"loss of a calibration batch is None.*without gradients \(wanda"):
        fit(DataLoader(rows(), 4), pruning(loss_fn=None, calibration=rows().split(4)), module=Passing())
