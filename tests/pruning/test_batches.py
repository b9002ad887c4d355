"""Sizes, parts and padding of batches of every shape that users have."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding

from lightning_prune.pruning.batches import batch_size, form_of, padding_mask, samples, take, tensors_of, to_device

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 5), 3),
        (torch.zeros(()), None),
        ((torch.zeros(3, 5), torch.zeros(3)), 3),
        ([torch.zeros(3, 5), torch.zeros(4)], None),
        ({"x": torch.zeros(2, 5), "scale": torch.tensor(1.0)}, 2),
        # input_ids decide, whatever else is there
        ({"input_ids": torch.zeros(4, 7), "position_ids": torch.zeros(1, 7)}, 4),
        (UserDict(input_ids=torch.zeros(4, 7)), 4),
        (Pair(torch.zeros(2, 3), torch.zeros(2)), 2),
        ({"a": {"b": torch.zeros(6, 1)}}, 6),
        ("text", None),
        (None, None),
        ({}, None),
    ],
)
def test_batch_size(batch, size):
    assert batch_size(batch) == size


@dataclass
class Labelled:
    x: torch.Tensor
    y: torch.Tensor
    names: list[str]


class Graph:
    """What other libraries batch in their own way."""

    def __init__(self) -> None:
        self.x = torch.zeros(9, 3)


def tokens(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.long)


def detected(*counts: int) -> list[dict[str, torch.Tensor]]:
    return [{"boxes": torch.full((count, 4), float(i)), "classes": tokens(count)} for i, count in enumerate(counts)]


NOT_SEPARABLE: dict[str, Any] = {
    "image patches beside tokens": {
        "input_ids": tokens(4, 7),
        "attention_mask": tokens(4, 7),
        "pixel_values": torch.zeros(40, 12),
        "image_grid_thw": tokens(4, 3),
    },
    "texts and images of other numbers": {"input_ids": tokens(5, 7), "pixel_values": torch.zeros(2, 3, 8, 8)},
    "nodes and edges": {"x": torch.zeros(9, 3), "edge_index": tokens(2, 20), "batch": tokens(9)},
    "a graph and its labels": (Graph(), torch.zeros(4)),
    "time first": (torch.zeros(7, 4, 3), torch.zeros(4)),
    "one text without a batch": {"input_ids": tokens(12), "labels": tokens(12)},
    "packed texts": {"input_ids": tokens(12), "cu_seqlens": tokens(4), "max_seqlen": 5},
    "texts as a list": [{"input_ids": tokens(12), "labels": tokens(12)} for _ in range(3)],
    "images as a list": (tuple(torch.zeros(3, 8, 8) for _ in range(4)), detected(1, 2, 3, 4)),
    "samples as a list": [{"image": torch.zeros(3, 8, 8), "label": torch.tensor(1)} for _ in range(4)],
    "texts of several lengths": [tokens(5), tokens(7)],
    "packed sequence": (pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)]), torch.zeros(2)),
    "nested tensor": torch.nested.nested_tensor([torch.zeros(3, 2), torch.zeros(2, 2)], layout=torch.jagged),
    "sparse tensor": (torch.eye(4).to_sparse(), torch.zeros(4)),
    "two batches": ({"input_ids": tokens(4, 7)}, {"input_ids": tokens(2, 7)}),
    "as many views as samples": {"views": [torch.zeros(2, 5), torch.zeros(2, 5)], "label": torch.zeros(2)},
    "labels of another number": {"pixel_values": torch.zeros(4, 3, 8, 8), "labels": detected(1, 2, 3)},
}


@pytest.mark.parametrize("kind", NOT_SEPARABLE)
def test_a_batch_with_parts_of_unknown_samples_is_one_sample_and_is_never_cut(kind):
    batch = NOT_SEPARABLE[kind]
    assert batch_size(batch) is None
    with pytest.raises(ValueError, match="cannot be taken apart"):
        take(batch, 0, 1)
    got = list(samples([batch, batch, batch], 2))
    assert [size for _, size in got] == [1, 1]
    assert all(found is batch for found, _ in got)


def test_parts_with_one_item_a_sample_are_cut_with_the_tensors():
    batch = {
        "pixel_values": torch.arange(4.0)[:, None],
        "labels": detected(1, 2, 3, 4),
        "graphs": [Graph() for _ in range(4)],
        "array": np.arange(4),
        "scalar": np.float32(2),
        "position_ids": torch.zeros((), dtype=torch.long),
    }
    assert batch_size(batch) == 4
    cut = take(batch, 1, 3)
    assert [len(item["boxes"]) for item in cut["labels"]] == [2, 3]
    assert cut["graphs"] == batch["graphs"][1:3]
    assert cut["array"].tolist() == [1, 2]
    assert cut["scalar"] == 2
    two = [torch.arange(2), torch.arange(2)]  # inputs and labels of two samples
    assert [part.tolist() for part in take(two, 1, 2)] == [[1], [1]]
    pair = ({"input_ids": tokens(4, 7), "position_ids": tokens(1, 7)}, {"input_ids": tokens(4, 9)})
    assert [part["input_ids"].shape for part in take(pair, 0, 2)] == [(2, 7), (2, 9)]


def test_containers_keep_their_class():
    encoded = BatchEncoding({"input_ids": torch.arange(8).view(4, 2), "position_ids": tokens(1, 2)})
    cut = take(encoded, 1, 3)
    assert type(cut) is BatchEncoding
    assert cut.input_ids.tolist() == [[2, 3], [4, 5]]
    assert cut["position_ids"].shape == (1, 2)
    assert encoded["input_ids"].shape == (4, 2)
    ordered = OrderedDict(b=torch.arange(4), a=torch.arange(4))
    assert type(take(ordered, 0, 1)) is OrderedDict
    assert list(take(ordered, 0, 1)) == ["b", "a"]
    labeled = Labelled(torch.arange(4), torch.arange(4), ["a", "b", "c", "d"])
    part = take(labeled, 2, 4)
    assert (part.x.tolist(), part.y.tolist(), part.names) == ([2, 3], [2, 3], ["c", "d"])
    assert len(labeled.x) == 4
    meta = torch.device("meta")
    assert type(to_device(encoded, meta)) is BatchEncoding
    assert to_device(encoded, meta)["input_ids"].is_meta
    assert to_device(labeled, meta).x.is_meta
    assert not labeled.x.is_meta
    assert to_device(pack_sequence([torch.zeros(3, 2)]), torch.device("cpu")).data.shape == (3, 2)


def test_take_cuts_what_is_per_sample_and_leaves_the_rest():
    batch = {
        "input_ids": torch.arange(12).view(4, 3),
        "position_ids": torch.arange(3)[None],
        "texts": ["a", "b", "c", "d"],
        "nested": {"y": torch.arange(4)},
        "pair": (torch.arange(4), torch.tensor(1.5)),
        "name": "set",
    }
    cut = take(batch, 1, 3)
    assert cut["input_ids"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert cut["position_ids"].tolist() == [[0, 1, 2]]
    assert cut["texts"] == ["b", "c"]
    assert cut["nested"]["y"].tolist() == [1, 2]
    assert cut["pair"][0].tolist() == [1, 2]
    assert float(cut["pair"][1]) == 1.5
    assert cut["name"] == "set"
    assert batch["input_ids"].shape == (4, 3)


def test_take_keeps_types():
    cut = take(Pair(torch.arange(4), torch.arange(4)), 0, 1)
    assert isinstance(cut, Pair)
    assert cut.x.tolist() == [0]
    assert isinstance(take([torch.arange(4)], 0, 2), list)
    assert isinstance(take((torch.arange(4),), 0, 2), tuple)


def test_samples_cuts_the_last_batch_and_asks_for_no_more():
    asked = []

    def loader():
        for i in range(10):
            asked.append(i)
            yield torch.full((4, 2), i)

    got = list(samples(loader(), 10))
    assert [size for _, size in got] == [4, 4, 2]
    assert [len(batch) for batch, _ in got] == [4, 4, 2]
    assert asked == [0, 1, 2]


def test_samples_that_end_on_a_batch_do_not_run_the_loader_further():
    def loader():
        yield torch.zeros(4, 2)
        yield torch.zeros(4, 2)
        raise AssertionError("asked for a batch too many")

    assert [size for _, size in samples(loader(), 8)] == [4, 4]


def test_samples_of_unknown_size_count_one_and_empty_batches_none():
    assert [s for _, s in samples([{"text": "a"}, {"text": "b"}, {"text": "c"}], 2)] == [1, 1]
    assert [s for _, s in samples([torch.zeros(0, 3), torch.zeros(2, 3)], 5)] == [2]
    assert list(samples([torch.zeros(2, 3)], 0)) == []
    assert list(samples([], 3)) == []


def test_padding_mask():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = padding_mask({"input_ids": torch.zeros(2, 3), "attention_mask": mask})
    assert found.dtype == torch.bool
    assert found.tolist() == mask.bool().tolist()
    assert padding_mask({"attention_mask": torch.ones(2, 3)}) is None
    assert padding_mask({"attention_mask": torch.zeros(2, 1, 3, 3)}) is None
    assert padding_mask({"input_ids": torch.zeros(2, 3)}) is None
    assert padding_mask(torch.zeros(2, 3)) is None


def test_to_device_keeps_the_structure():
    batch = {"a": torch.zeros(2), "b": [torch.ones(2), "x"], "c": Pair(torch.zeros(1), 3), "d": None}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"].is_meta
    assert moved["b"][0].is_meta
    assert moved["b"][1] == "x"
    assert isinstance(moved["c"], Pair)
    assert moved["c"].x.is_meta
    assert moved["c"].y == 3
    assert moved["d"] is None
    assert not batch["a"].is_meta


# -- what a batch is made of


class Listed(Enum):
    """A member that compares as its value, and has no hash."""

    A = 1
    B = 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Listed) and self.value == other.value


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no name")


@dataclass
class Later:
    x: torch.Tensor
    cached: Any = field(init=False)


@pytest.mark.parametrize(
    "part",
    [
        Listed.A,
        {Unprintable(): torch.zeros(2)},
        {torch.zeros(2): torch.zeros(2)},
        {1, 2},
        np.dtype("f4"),
        np.zeros(2, dtype=[("a", "f4")]),
        Graph(),
        Later(torch.zeros(2, 3)),
        BatchEncoding({"input_ids": tokens(2, 3)}),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        pack_sequence([torch.zeros(3), torch.zeros(2)]),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_form_is_had_of_anything(part):
    forms = [form_of(batch) for batch in (part, [part, part], {"x": part}, {"x": [part]}, {"x": {"y": part}})]
    assert len(set(forms)) == 5
    assert form_of({"x": [part]}) == form_of({"x": [part, part]})


def test_forms_differ_where_a_module_may_treat_batches_apart():
    ids = tokens(2, 3)
    different = [
        {"ids": ids},
        {"ids": ids, "other": None},
        {"ids": ids, "other": ids},
        {"ids": ids, "other": ids.float()},
        {"ids": ids, "twice": True},
        {"ids": ids, "twice": False},
        {"ids": ids, "task": Listed.A},
        {"ids": ids, "task": Listed.B},
        [ids],
        [ids, ids],
        (ids, ids),
        {0: ids},
        {1: ids},
    ]
    assert len(set(map(form_of, different))) == len(different)
    alike = [{"ids": tokens(n, 3), "names": ["a"] * n, "boxes": detected(*range(n))} for n in (2, 3)]
    assert form_of(alike[0]) == form_of(alike[1])


def test_a_dataclass_may_lack_a_field():
    batch = Later(torch.zeros(2, 3))
    assert batch_size(batch) == 2
    assert [tuple(part.shape) for part in tensors_of(batch)] == [(2, 3)]
    cut = take(batch, 0, 1)
    assert cut.x.shape == (1, 3)
    assert not hasattr(cut, "cached")
    assert not hasattr(to_device(batch, torch.device("cpu")), "cached")
