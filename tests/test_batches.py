"""Sizes, parts and padding of batches of every shape that users have."""

from collections import UserDict, namedtuple

import pytest
import torch

from lightning_prune.batches import batch_size, padding_mask, samples, take, to_device

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
