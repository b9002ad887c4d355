"""Targets that a device sets: bytes exactly, seconds by a table, and the sizes that kernels like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import structure_models as zoo
import torch
from experts_models import make_moe
from lightning.pytorch.callbacks import ModelCheckpoint
from pruning_aware_models import batches, count, make_module, make_trainer
from safetensors.torch import load_file

from lightning_prune import PruningAwarePretraining, prune_structured
from lightning_prune.structure import device_goals
from lightning_prune.structure.device_goals import LatencyTable, default_multiples, latency_of
from lightning_prune.structure.planning import make_planner
from lightning_prune.structure.units import read_structure

ONE_SHOT: dict[str, Any] = {"saliency": "magnitude", "compensate": False, "progress": False}
# Seconds in proportion to weights from 100 on, and a microsecond a layer besides.
TABLE = LatencyTable((100, 100_000), (1e-7, 1e-4), 1e-6)


def seconds_of(model: Any) -> float:
    """A step by the table, counted on the tensors of a model: every matrix that multiplies a token, once."""
    layers = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    products = sum(1e-9 * m.weight.numel() for m in [*layers, model.lm_head])
    return products + 1e-6 * len(model.model.layers)


@pytest.mark.parametrize(
    ("dtype", "asked", "width"), [("float32", None, 4), ("bfloat16", None, 2), ("float32", "bfloat16", 2)]
)
def test_bytes_are_met_to_the_last_unit(dtype: str, asked: str | None, width: int, tmp_path: Path) -> None:
    model = zoo.make("llama").to(getattr(torch, dtype))
    allowed = round(0.8 * width * count(model))
    goal = {"bytes": allowed} | ({"dtype": asked} if asked else {})
    prune_structured(model, target=goal, types=("ffn",), **ONE_SHOT)
    model.to(getattr(torch, asked or dtype)).save_pretrained(tmp_path)
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "model.safetensors").values())
    unit = 3 * 3 * 48 * width  # one FFN channel of three layers with three matrices each
    assert allowed - unit < stored <= allowed


def test_seconds_are_met_to_the_last_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_goals, "_measured", lambda structure, batch, shapes: TABLE)
    model = zoo.make("llama")
    wanted = 0.8 * seconds_of(model)
    assert latency_of(read_structure(model), {}).seconds(read_structure(model).sizes) == pytest.approx(
        seconds_of(model)
    )
    report = prune_structured(model, target={"seconds_per_token": wanted}, types=("ffn",), **ONE_SHOT)
    unit = 1e-9 * 3 * 3 * 48
    assert wanted - unit < seconds_of(model) <= wanted
    assert report.sizes.intermediate_size == model.config.intermediate_size
    shallow = zoo.make("llama")
    prune_structured(shallow, target={"seconds_per_token": wanted, "batch": 4}, types=("layer",), **ONE_SHOT)
    assert len(shallow.model.layers) == 2
    assert seconds_of(shallow) <= wanted


@pytest.mark.parametrize(
    ("table", "share", "gone"),
    [
        (LatencyTable((1.0,), (0.0,), rest=1.0), 0.7, {"layer": 1}),  # only layers take time: FFN channels stay
        (LatencyTable((1.0, 1e6), (0.0, 1.0), rest=1.0), 0.7, {"layer": 1}),  # dearer a weight, cheaper a second
        (LatencyTable((1.0, 1e6), (0.0, 1.0)), 0.95, {"ffn": 5}),  # seconds in proportion to weights
    ],
)
def test_types_go_by_what_they_lose_for_the_time_they_save(table: LatencyTable, share: float, gone: Any) -> None:
    structure = read_structure(zoo.make("llama"))
    saliency = {"ffn": torch.ones(3, 28, dtype=torch.float64), "layer": torch.full((1, 3), 2.0, dtype=torch.float64)}
    goal = {"seconds_per_token": share * latency_of(structure, {}, table).seconds(structure.sizes)}
    planner = make_planner(structure, goal, ("ffn", "layer"), table=table)
    chosen, compared = planner.choose(saliency, structure.sizes)
    assert {t: len(places[0]) for t, places in chosen.items()} == gone
    assert compared["layer"] == 2.0  # mean saliencies of weights, as in the history


def test_a_table_between_and_beyond_its_sizes() -> None:
    table = LatencyTable((10, 20, 40), (1.0, 1.0, 3.0))
    assert [table.product(n) for n in (5, 10, 15, 30, 40, 80)] == [1.0, 1.0, 1.0, 2.0, 3.0, 6.0]
    assert LatencyTable.from_dict(table.to_dict()) == table
    for bad in (((), ()), ((1, 1), (1.0, 1.0)), ((1, 2), (2.0, 1.0)), ((1,), (1.0, 2.0))):
        with pytest.raises(ValueError, match="ascending"):
            LatencyTable(*bad)


def test_what_is_measured_leaves_the_model_alone_and_grows_with_it() -> None:
    model = zoo.make("gpt2").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    structure = read_structure(model)
    latency = latency_of(structure, {"batch": 2})
    full, fewer = structure.sizes, structure.sizes.without("layer", 1)
    assert 0 < latency.seconds(fewer) <= latency.seconds(full)
    assert latency.seconds(full.without("ffn", 20)) <= latency.seconds(full)
    assert model.training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_sizes_that_kernels_like_on_a_gpu() -> None:
    structure = read_structure(zoo.make("llama"))  # 48 and 28
    assert default_multiples(structure, 0.5, torch.device("cuda")) == {"hidden_size": 4, "intermediate_size": 2}
    assert default_multiples(structure, {"bytes": 9}, torch.device("cuda"))
    assert default_multiples(structure, {"intermediate_size": 9}, torch.device("cuda")) == {}
    assert default_multiples(structure, 0.5, torch.device("cpu")) == {}
    config = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 1}
    large = read_structure(zoo.make("mistral", **config, head_dim=64, num_key_value_heads=3))
    assert default_multiples(large, 0.5, torch.device("cuda")) == {"hidden_size": 64, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"bytes": 0}, r"'bytes'\]=0"),
        ({"bytes": 10, "hidden_size": 8}, "only 'dtype'"),
        ({"bytes": 10, "dtype": "int4"}, "one of float32"),
        ({"bytes": 10**9}, "which is no more; give fewer"),
        ({"bytes": 3}, r"target=\{'bytes': 3\}: each of the .* parameters takes 4 bytes, .*give more"),
        ({"byte": 3}, r"target=\{'byte': 3\} has \['byte'\]; .*num_experts\), or \{'bytes': .*'seconds_per_token'"),
        ({"dtype": "float32"}, r"has \['dtype'\]; it takes final sizes"),
        ({3: 4, "a": 1}, r"has \['3', 'a'\]"),
        ({}, "names nothing; it takes final sizes"),
        ({"bytes": 1000}, "leave at least"),
        ({"batch": 2}, "a time is"),
        ({"seconds_per_token": 0}, "above 0"),
        ({"seconds_per_token": 1e-3, "batch": 0}, "at least 1"),
        ({"seconds_per_token": 1.0}, "already"),
        ({"seconds_per_token": 1e-9}, "'layer' saves most"),
    ],
)
def test_goals_that_cannot_be_are_refused(target: Any, message: str) -> None:
    structure = read_structure(zoo.make("llama"))
    with pytest.raises(ValueError, match=message):
        make_planner(structure, target, ("ffn",), table=TABLE)


def test_a_time_is_not_predicted_of_experts() -> None:
    with pytest.raises(ValueError, match="mixture of experts"):
        latency_of(read_structure(make_moe("mixtral")), {"seconds_per_token": 1e-3})


def test_bytes_of_several_dtypes_need_one() -> None:
    model = zoo.make("llama").to(torch.bfloat16)
    model.model.norm.float()
    with pytest.raises(ValueError, match="of bfloat16, float32; say which"):
        make_planner(read_structure(model), {"bytes": 40_000}, ("ffn",))


def test_a_model_shrinks_to_bytes_while_it_trains() -> None:
    module = make_module()
    allowed = 4 * round(0.7 * count(module))
    make_trainer(PruningAwarePretraining({"bytes": allowed}, end=8)).fit(module, batches())
    assert 0.9 * allowed < 4 * count(module) <= allowed


def test_a_time_is_measured_once_and_resumed_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_goals, "_measured", lambda structure, batch, shapes: TABLE)
    module = make_module()
    goal = {"seconds_per_token": 0.8 * seconds_of(module.model)}
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    settings = {"target": goal, "end": 8, "types": ("attention", "ffn")}
    make_trainer(PruningAwarePretraining(**settings), save, enable_checkpointing=True).fit(module, batches())
    assert seconds_of(module.model) <= goal["seconds_per_token"]

    def again(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(device_goals, "_measured", again)
    resumed = make_module(seed=1)
    make_trainer(PruningAwarePretraining(**settings)).fit(resumed, batches(), ckpt_path=tmp_path / "step=4.ckpt")
    assert seconds_of(resumed.model) == seconds_of(module.model)
