"""Which layers the options of LoRA name: what PEFT would find, whatever is compiled, and what is told of the rest."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from experts_models import make_moe
from perp_models import halve, pruned
from tiny import make_llama, snapshot
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.perp import add_adapters, merge
from lightning_prune.perp.layers import sparse_layers
from lightning_prune.perp.options import select_parameters

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def names_of(model: nn.Module) -> set[str]:
    """The layers with an adapter in the first block, without the name of the block, and others by their whole name."""
    found = {name for name, _ in sparse_layers(model)}
    return {name.removeprefix("model.layers.0.") for name in found if "layers.1." not in name}


def told(make: Callable[[], nn.Module], **options: Any) -> tuple[set[str], list[str]]:
    """What gets an adapter, and what is warned of."""
    plain = make()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = add_adapters(plain, r=2, **options)
    return names_of(model), [str(w.message) for w in seen if "activation_checkpointing" not in str(w.message)]


def mixture() -> nn.Module:
    model = make_moe("mixtral")
    prune(model, score="magnitude", progress=False)
    return model


EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


@pytest.mark.parametrize(
    ("make", "options", "found", "left_out"),
    [
        (
            mixture,
            {"target_modules": ".*experts.*"},
            EXPERTS,
            r"target_modules: '\.\*experts\.\*' also matches .* left out: "
            r"'model\.layers\.0\.mlp\.experts\.act_fn' \(SiLUActivation, and 1 more\)",
        ),
        (
            pruned,
            {"target_modules": r".*\.layers\..*\.mlp\..*"},
            {f"mlp.{name}" for name in MLP},
            r"left out: 'model\.layers\.0\.mlp\.act_fn' \(SiLUActivation, and 1 more\)$",
        ),
        (
            pruned,
            {"target_modules": ".*layers.0.*"},
            {f"{'mlp' if name in MLP else 'self_attn'}.{name}" for name in LINEAR},
            r"'model\.layers\.0\.mlp\.act_fn' \(SiLUActivation\), 'model\.layers\.0\.input_layernorm' "
            r"\(LlamaRMSNorm, and 1 more\)$",
        ),
    ],
    ids=["experts", "mlp", "block"],
)
def test_what_takes_no_adapter_is_left_out_beside_what_does(
    make: Callable[[], nn.Module], options: dict[str, Any], found: set[str], left_out: str
) -> None:
    names, (text,) = told(make, **options)
    assert names == found
    assert re.search(left_out, text)


def test_what_only_names_such_is_refused() -> None:
    for chosen in (["mlp"], ".*norm", ["q_proj", "input_layernorm"], ".*act_fn"):
        model = pruned()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"' is a Llama\w+; adapters go with|is a SiLUActivation; adapters go"):
            add_adapters(model, target_modules=chosen)
        assert snapshot(model) == before
        assert not dict(sparse_layers(model))


def test_names_that_match_nothing_are_told() -> None:
    names, (text,) = told(pruned, target_modules=["q_proj", "k_prj"])
    assert names == {"self_attn.q_proj"}
    assert text == "target_modules: 'k_prj' matches no layer that can get an adapter"
    for excluded in (["mlp"], ["q_prj"]):  # a name is that of a module, not of what is in it
        names, (text,) = told(pruned, exclude_modules=excluded)
        assert len(names) == 7
        assert text.startswith(f"exclude_modules: {excluded[0]!r} matches no layer that can get an adapter; a regular")
        assert f"'.*{excluded[0]}.*'" in text
    narrowed = {"exclude_modules": ["q_proj"], "layers_to_transform": [0]}
    chosen = ["q_proj", "k_proj", "layers.1.mlp.up_proj"]
    assert told(pruned, target_modules=chosen, **narrowed) == ({"self_attn.k_proj"}, [])
    assert told(pruned, exclude_modules=".*mlp.*") == ({f"self_attn.{name}" for name in LINEAR - MLP}, [])
    assert told(pruned, exclude_modules=["lm_head", "q_proj"])[1] == []  # a layer that could have one


def test_warnings_are_at_the_line_that_asked() -> None:
    with pytest.warns(UserWarning, match="match") as seen:
        add_adapters(pruned(), target_modules=["q_proj", ".x"], exclude_modules=["mlp"], rank_pattern={"y": 3})
    assert {w.filename for w in seen if "match" in str(w.message)} == {__file__}
    assert len(seen) >= 3


def test_warnings_are_those_of_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"target_modules": ["q_proj", "k_prj"], "rank_pattern": {"x": 3}, "exclude_modules": ["mlp"]}
    for rank, count in ((0, 3), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        assert len(told(pruned, **options)[1]) == count


class Biased(nn.Module):
    """With biases under all the names that torch gives them, and none beside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.lstm = nn.LSTM(8, 4, 2, bidirectional=True, batch_first=True, proj_size=0)
        self.gru = nn.GRUCell(8, 8)
        self.up = nn.ConvTranspose1d(8, 8, 1)
        self.tables = nn.ParameterDict({name: torch.randn(8) for name in ("dt_bias", "pos_bias_u", "bias_table")})
        self.tables["e_score_correction_bias"] = torch.randn(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.lstm(self.attention(x, x, x)[0])[0]
        x = self.up(x.mT).mT + self.tables["dt_bias"] * self.tables["pos_bias_u"]
        return self.gru(x.flatten(0, 1))


def test_every_bias_is_trained() -> None:
    torch.manual_seed(0)
    model = Biased()
    prune(model, score="magnitude", targets=["first"], progress=False)
    names, x = [name for name, _ in model.named_parameters()], torch.randn(2, 3, 8)
    expected = {n for n in names if re.search(r"bias(_[uvk]|_[ih]h\w*)?$", n) and "correction" not in n}
    assert len(expected) == 1 + 4 + 8 + 2 + 1 + 2
    assert set(select_parameters(model, ("bias",))) == expected
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = add_adapters(model, r=2, train=("bias",))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(x).square().sum().backward()
    optimizer.step()
    after = dict(merge(model).named_parameters())
    assert {n for n in names if not torch.equal(after[n], before[n])} - {"first.weight"} == expected


@pytest.mark.parametrize("part", ["all", "some"])
def test_zeros_of_biases_do_not_look_pruned(part: str) -> None:
    def make() -> nn.Module:
        model = make_moe("gpt_oss")
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                parameter.data[..., :: 1 if part == "all" else 2] = 0.0
        prune(model, score="magnitude", progress=False)
        return model

    assert told(make)[1] == []


def compiled_blocks() -> nn.Module:
    model = pruned()
    for place in range(2):
        model.model.layers[place] = torch.compile(model.model.layers[place], backend="eager")
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*layers\.0\.self_attn\.q_proj|.*k_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj", "k_proj"]},
        {"target_modules": "model.layers.0.mlp.up_proj"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0\.self_attn\.q_proj"},
        {"exclude_modules": ["model.layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"rank_pattern": {"layers.0.mlp.up_proj": 3}},
    ],
    ids=str,
)
def test_names_are_those_without_what_compiling_adds(options: dict[str, Any]) -> None:
    def ranks(plain: nn.Module) -> dict[str, int]:
        layers = sparse_layers(add_adapters(plain, **{"r": 2, **options}))
        return {name: len(layer.matrices()[0]) for name, layer in layers}

    assert ranks(compiled_blocks()) == ranks(pruned())


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.first, model.second = nn.Linear(8, 8), nn.Linear(8, 8)
    prune(model, score="magnitude", progress=False)
    return model


@pytest.mark.parametrize(
    "chosen", [{}, {"target_modules": ["first"]}, {"target_modules": ".*first"}, {"target_modules": ".*"}], ids=str
)
def test_a_layer_that_was_compiled_alone_is_refused_by_its_name(chosen: dict[str, Any]) -> None:
    model = two_layers()
    model.first = torch.compile(model.first, backend="eager")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"products of 'first' were given to torch\.compile alone, and would go on"):
        add_adapters(model, train=(), **chosen)
    assert snapshot(model) == before
    assert not dict(sparse_layers(model))
    for others in ({"exclude_modules": ["first"]}, {"exclude_modules": ".*first"}, {"target_modules": ["second"]}):
        adapted = add_adapters(model, train=(), r=2, **others)
        assert names_of(adapted) == {"second"}
        merge(adapted)


@pytest.mark.parametrize("targets", [["first"], ["fir*"]], ids=str)
def test_pruning_names_a_layer_that_was_compiled_alone(targets: list[str]) -> None:
    for argument in ("targets", "ignore"):
        model = nn.Sequential()
        model.first, model.second = torch.compile(nn.Linear(8, 8), backend="eager"), nn.Linear(8, 8)
        masks = prune(model, score="magnitude", progress=False, **{argument: targets})
        assert set(masks) == {"first.weight" if argument == "targets" else "second.weight"}


@torch.no_grad()
def test_a_layer_that_compiles_in_place_trains_and_merges() -> None:
    x = torch.randn(3, 8)
    for chosen in (["first"], ".*first"):
        model = two_layers()
        model.first.compile(backend="eager")
        model = add_adapters(model, train=(), r=2, target_modules=chosen)
        ((name, layer),) = sparse_layers(model)
        assert name == "first"
        before = model(x)
        layer.matrices()[1].add_(1.0)
        after = model(x)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(merge(model)(x), after)


def test_the_model_may_be_compiled_as_a_whole() -> None:
    model = make_llama()
    halve(model)
    adapted = add_adapters(torch.compile(model, backend="eager"), r=2, target_modules=["model.layers.0.mlp.up_proj"])
    assert names_of(adapted) == {"mlp.up_proj"}
