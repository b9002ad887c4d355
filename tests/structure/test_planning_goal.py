"""Targets, steps of units and their weights, counted on real models."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import make_llama
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_prune.structure.planning import make_planner
from lightning_prune.structure.units import read_structure

ALL = ("attention", "ffn", "hidden", "layer")


def parameters(**changes: Any) -> int:
    return sum(p.numel() for p in make_llama(**changes).parameters())


def test_final_parameters_of_each_kind_of_target() -> None:
    structure = read_structure(make_llama())
    total = parameters()
    assert make_planner(structure, 0.5, ALL).final == total // 2
    assert make_planner(structure, 60_000, ALL).final == 60_000
    wanted = {"hidden_size": 48, "intermediate_size": 40}
    assert make_planner(structure, wanted, ALL).final == parameters(hidden_size=48, intermediate_size=40, head_dim=16)


@pytest.mark.parametrize("unit_type", ALL)
def test_weights_of_a_unit_are_what_a_model_without_it_lacks(unit_type: str) -> None:
    """Counted on models that are built with the sizes, so that the arithmetic cannot agree with itself."""
    smaller = {
        "attention": {"num_attention_heads": 2, "num_key_value_heads": 1},
        "ffn": {"intermediate_size": 95},
        "hidden": {"hidden_size": 60},  # four channels: Llama wants its heads to divide it
        "layer": {"num_hidden_layers": 1},
    }[unit_type]
    planner = make_planner(read_structure(make_llama()), 0.5, ALL)
    lost = parameters() - parameters(head_dim=16, **smaller)
    places = {"attention": 2, "ffn": 2, "hidden": 4, "layer": 1}[unit_type]
    assert planner.unit_weights(unit_type, planner.first) == lost // places


def test_sizes_go_down_to_multiples() -> None:
    structure = read_structure(make_llama(intermediate_size=90))
    planner = make_planner(structure, 0.3, ALL, round_to=16)
    sizes = planner.first
    steps = []
    while count := planner.next_units("ffn", sizes):
        steps.append(count)
        sizes = sizes.without("ffn", count)
    assert steps == [10, 16, 16, 16, 16]
    assert sizes.intermediate_size == 16
    assert planner.next_units("attention", sizes) == 1


def test_a_mapping_stops_every_type_at_its_size() -> None:
    structure = read_structure(make_llama())
    planner = make_planner(structure, {"intermediate_size": 94, "num_key_value_heads": 1}, ALL)
    sizes = planner.first
    assert planner.next_units("hidden", sizes) == planner.next_units("layer", sizes) == 0
    assert not planner.reached(sizes)
    sizes = sizes.without("ffn", 2).without("attention", 1)
    assert planner.next_units("ffn", sizes) == planner.next_units("attention", sizes) == 0
    assert planner.reached(sizes)


@pytest.mark.parametrize(
    ("target", "types", "round_to", "message"),
    [
        (0.01, ("ffn",), 1, "leave at least"),
        ({"hidden_size": 32}, ("ffn",), 1, "not in types"),
        ({"hidden_size": 40}, ("hidden",), 16, "no multiple of round_to=16"),
        (1.5, ("ffn",), 1, "share of all parameters"),
        (0.5, ("heads",), 1, "types="),
    ],
)
def test_targets_that_cannot_be(target: Any, types: tuple[str, ...], round_to: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_planner(read_structure(make_llama()), target, types, round_to)


def test_architectures_that_cannot_lose_heads_one_by_one() -> None:
    gpt2 = read_structure(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2)))
    with pytest.raises(ValueError, match="takes head_dim for"):
        make_planner(gpt2, 0.5, ("attention", "ffn"))
    assert make_planner(gpt2, 0.9, ("ffn",)).final
    biased = read_structure(make_llama(attention_bias=True))
    with pytest.raises(ValueError, match="it has biases"):
        make_planner(biased, 0.5, ("hidden",))
