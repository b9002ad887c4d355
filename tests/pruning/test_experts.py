"""Experts whose weights are 3-D parameters, against models in which each expert is made of Linear layers."""

import copy
import warnings

import pytest
import torch
from experts_models import EXPERTS, WORDS, linear_of, make_moe, write_out
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_prune import CalibrationError, prune
from lightning_prune.naming import plain_name
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import ALL_STATISTICS
from lightning_prune.pruning.targets import ExpertTarget, find_targets

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "llama4"]
LENGTHS = [9, 6, 9, 4]


def padded_batches(size: int) -> list[dict[str, torch.Tensor]]:
    """Samples of different lengths, padded on the right, in batches of `size`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return [
        {"input_ids": (ids * mask)[i : i + size], "attention_mask": mask[i : i + size].long()}
        for i in range(0, len(LENGTHS), size)
    ]


def naive_statistics(model: nn.Module, family: str) -> dict[str, dict[str, torch.Tensor]]:
    """Statistics of every written-out layer, from one backward a sample without its padding."""
    written = write_out(model, family)
    layers = {n: m for n, m in written.named_modules() if ".first." in n or ".second." in n}
    sums = {name: {} for name in layers}

    def add(name, key, value):
        sums[name][key] = sums[name].get(key, 0.0) + value

    for batch, length in zip(padded_batches(1), LENGTHS, strict=True):
        rows = {name: ([], []) for name in layers}
        handles = []
        for name, layer in layers.items():

            def see(_, args, output, name=name, rows=rows):
                rows[name][0].append(args[0].detach())
                output.register_hook(rows[name][1].append)

            handles.append(layer.register_forward_hook(see))
        written.zero_grad()
        ids = batch["input_ids"][:, :length]
        logits = written(input_ids=ids).logits
        nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            if not rows[name][0]:
                continue
            x, delta = torch.cat(rows[name][0]), torch.cat(rows[name][1])
            add(name, "input_norm", x.square().sum(0))
            add(name, "hessian", x.t() @ x)
            add(name, "output_grad_norm", delta.square().sum(0))
            add(name, "gradient_l1", layer.weight.grad.abs())
            add(name, "gradient_l2", layer.weight.grad.square())
    n = len(LENGTHS)
    for found in sums.values():
        if found:
            found["input_norm"] = (found["input_norm"] / n).sqrt()
            found["output_grad_norm"] = (found["output_grad_norm"] / n).sqrt()
            found["gradient_l2"] = found["gradient_l2"].sqrt()
            found["hessian"] = found["hessian"] / n
    return sums


@pytest.mark.few_fast(6)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_written_out_experts(family: str, size: int) -> None:
    model = make_moe(family)
    expected = naive_statistics(model, family)
    targets = [t for t in find_targets(model) if isinstance(t, ExpertTarget)]
    assert len(targets) == 2 * 2 * EXPERTS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect(model, padded_batches(size), targets, ALL_STATISTICS, num_samples=4, progress=False)
    reached = 0
    for target in targets:
        known = expected[linear_of(target.name)]
        for key, value in known.items():
            # Llama 4's router rounds to float32, whatever the model's dtype.
            close = {"rtol": 1e-4, "atol": 1e-6} if family == "llama4" else {"rtol": 1e-9, "atol": 1e-12}
            torch.testing.assert_close(found[target.name].get(key), value, **close)
            reached += 1
    assert reached > 0.7 * 5 * len(targets)


@pytest.mark.few_fast(2)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_statistics_of_experts_with_adapters_of_peft_are_those_of_the_merged_model(family: str, size: int) -> None:
    """PEFT puts the sum of weight and adapter in the weight's place while the experts run (``target_parameters``)."""
    model = with_adapters(make_moe(family))
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    expected = naive_statistics(merged, family)
    targets = [t for t in find_targets(model) if isinstance(t, ExpertTarget)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as that another weight than the stored one is used
        found = collect(model, padded_batches(size), targets, ALL_STATISTICS, num_samples=4, progress=False)
    for target in targets:
        known = expected[linear_of(plain_name(target.name))]
        assert known
        for key, value in known.items():
            close = {"rtol": 1e-4, "atol": 1e-6} if family == "llama4" else {"rtol": 1e-9, "atol": 1e-12}
            torch.testing.assert_close(found[target.name].get(key), value, **close)


def with_adapters(model: nn.Module) -> nn.Module:
    """Adapters that change what is computed, on the experts, on a Linear, and on a Linear's weight as a parameter."""
    parameters = ["experts.gate_up_proj", "experts.down_proj", "q_proj.weight"]
    config = LoraConfig(r=2, target_modules=["k_proj"], target_parameters=parameters, init_lora_weights=False)
    return get_peft_model(model, config).double()


@pytest.mark.parametrize(
    "settings",
    [
        {"score": "gblm"},
        {"score": "wanda"},
        {"score": "kfac", "sequential": True},
        {"score": "kfac", "update": "exact", "sequential": True},
        {"score": "sparsegpt"},
    ],
)
def test_experts_with_adapters_of_peft_are_pruned(settings: dict) -> None:
    model = with_adapters(make_moe("mixtral"))
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    masks = prune(model, padded_batches(2), sparsity=0.5, num_samples=4, progress=False, **settings)
    weights = dict(model.named_parameters())
    assert {plain_name(name) for name in masks} == set(prune(make_moe("mixtral"), score="magnitude", progress=False))
    for name, mask in masks.items():
        assert torch.equal(weights[name] != 0, mask), name
    assert all(torch.equal(weights[name], adapter) for name, adapter in adapters.items())


def test_a_penalty_on_a_weight_with_an_adapter_is_still_seen() -> None:
    model = with_adapters(make_moe("mixtral"))
    weight = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")

    def loss_fn(model: nn.Module, batch: dict) -> torch.Tensor:
        return model(**batch, labels=batch["input_ids"]).loss + weight.square().sum()

    with pytest.raises(CalibrationError, match=r"used outside its layer.*merge it first \(merge_and_unload\)"):
        prune(model, padded_batches(1), "gradient", 0.5, loss_fn=loss_fn, num_samples=4, progress=False)


def reference_mask(scores: torch.Tensor, sparsity: float, group: str) -> torch.Tensor:
    rows = scores if group == "row" else scores.reshape(1, -1)
    kept = torch.ones_like(rows, dtype=torch.bool)
    lowest = rows.argsort(dim=1, stable=True)[:, : int(sparsity * rows.shape[1])]
    return kept.scatter_(1, lowest, False).view(scores.shape)


@pytest.mark.few_fast(6)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "gblm", "kfac"])
def test_masks_are_those_of_written_out_experts(family: str, score: str) -> None:
    model = make_moe(family)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    statistics = naive_statistics(model, family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = prune(model, padded_batches(2), score, 0.5, allocation="uniform", alpha=10.0, progress=False)
    compared = 0
    for name, mask in masks.items():
        if "experts" not in name:
            continue
        assert mask.shape == weights[name].shape
        assert torch.equal(dict(model.named_parameters())[name] != 0, mask)
        for e in range(EXPERTS):
            known = statistics[linear_of(f"{name}.{e}")]
            if not known:
                continue
            turn = (lambda m: m) if family == "mixtral" else (lambda m: m.t())
            weight = turn(weights[name][e])
            scores = {
                "magnitude": lambda w, k: w.abs(),
                "wanda": lambda w, k: w.abs() * k["input_norm"],
                "gblm": lambda w, k: w.abs() * (k["input_norm"] + 10.0 * k["gradient_l2"]),
                "kfac": lambda w, k: w.abs() * k["input_norm"] * k["output_grad_norm"][:, None] ** 0.7,
            }[score](weight, known)
            group = "layer" if score in ("magnitude", "kfac") else "row"
            assert torch.equal(turn(mask[e]), reference_mask(scores, 0.5, group)), (name, e)
            compared += 1
    assert compared > 0.7 * 2 * 2 * EXPERTS


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_n_m_runs_along_the_inputs(family: str) -> None:
    model = make_moe(family)
    masks = prune(model, padded_batches(2), "wanda", pattern="2:4", num_samples=4, progress=False)
    for name, mask in masks.items():
        if "experts" in name:
            along = mask if family == "mixtral" else mask.transpose(1, 2)  # [E, O, I]
            assert bool((along.unflatten(-1, (-1, 4)).sum(-1) == 2).all()), name


@pytest.mark.few_fast(3)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("score", ["wanda", "kfac", "gblm"])
def test_every_implementation_gives_the_same_masks(family: str, score: str) -> None:
    found = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = make_moe(family).float()
        model.set_experts_implementation(implementation)
        found.append(prune(model, padded_batches(2), score, 0.5, num_samples=4, progress=False))
        assert model.config._experts_implementation == implementation
        assert not any("forward" in vars(module) for module in model.modules())
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


def silence(model: nn.Module, expert: int, layer: int = 0) -> None:
    """No token is routed to one expert of a layer: its row of the router points away from all of them."""
    mlp = model.model.layers[layer].mlp
    with torch.no_grad():
        mlp.gate.weight[expert] = 0.0

        def away(_, __, output):
            logits, scores, index = output
            other = (index == expert).long()
            return logits, scores, (index + other) % EXPERTS

        mlp.gate.register_forward_hook(away)


@pytest.mark.parametrize("score", ["wanda", "gblm", "kfac", "sparsegpt"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(score: str) -> None:
    model = make_moe("mixtral")
    silence(model, 1)
    weight = model.model.layers[0].mlp.experts.gate_up_proj[1].detach().clone()
    with pytest.warns(UserWarning, match=r"routed to 2 of the experts' matrices .*gate_up_proj.1"):
        masks = prune(model, padded_batches(2), score, 0.5, num_samples=4, allocation="uniform", progress=False)
    mask = masks["model.layers.0.mlp.experts.gate_up_proj"][1]
    group = "row" if score in ("wanda", "gblm") else "layer"
    assert torch.equal(mask, reference_mask(weight.abs(), 0.5, group))


@pytest.mark.parametrize("ignore", [(), ("*self_attn*",)])
def test_a_token_that_rounding_sends_to_another_expert_in_a_batch_does_not_keep_it_whole(ignore: tuple) -> None:
    """Products are rounded otherwise for another number of rows, and some experts see few of them."""
    model, tokens = make_moe("mixtral"), 24
    silence(model, 1, layer=1)

    def moved(_, __, output):
        _, _, index = output
        if len(index) > tokens:
            index[20, 0] = 1

    model.model.layers[1].mlp.gate.register_forward_hook(moved)
    ids = torch.randint(1, WORDS, (4, tokens), generator=torch.Generator().manual_seed(1))
    how = {"loss_fn": lambda m, b: m(input_ids=b, labels=b).loss, "ignore": ("lm_head", *ignore), "progress": False}
    with pytest.warns(UserWarning, match="routed to") as told:
        prune(model, [ids], "gblm", 0.5, num_samples=4, **how)
    assert not [warning for warning in told if "taken apart" in str(warning.message)]


@pytest.mark.parametrize("score", ["wanda", "gblm"])
def test_experts_without_tokens_are_told_of_once_block_by_block(score: str) -> None:
    """The sweep of the dense model (gblm) and the walk each find them, in two blocks."""
    model = make_moe("mixtral")
    for layer in range(2):
        silence(model, 1, layer)
    with pytest.warns(UserWarning, match="routed to") as told:
        prune(model, padded_batches(2), score, 0.5, num_samples=4, sequential=True, progress=False)
    messages = [str(warning.message) for warning in told if "routed to" in str(warning.message)]
    assert len(messages) == 1
    assert "routed to 4 of the experts' matrices" in messages[0]


def test_layers_whose_experts_no_sample_reaches_are_refused() -> None:
    model = make_moe("mixtral")
    model.model.layers[0].mlp.forward = lambda hidden: hidden
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CalibrationError, match=r"reached 'model.layers.0.mlp.experts.gate_up_proj'"):
        prune(model, padded_batches(2), "wanda", 0.5, num_samples=4, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_selection_by_name_and_type() -> None:
    model = make_moe("mixtral")
    everything = {t.parameter for t in find_targets(model)}
    assert len(everything) == 2 * (4 + 2)

    def chosen(*selection, **options) -> set[str]:
        return {t.parameter for t in find_targets(model, *selection, **options)}

    experts = {n for n in everything if "experts" in n}
    assert chosen(ignore=["experts", "lm_head"]) == everything - experts
    assert chosen(["gate_up_proj"]) == {n for n in everything if "gate_up" in n}
    assert chosen(["MixtralExperts"]) == chosen(["experts"]) == experts


@pytest.mark.parametrize("score", ["wanda", "kfac"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_experts_with_other_numbers_in_their_weights_place_are_named_once(family: str, score: str) -> None:
    model, ids = make_moe(family), torch.randint(1, WORDS, (4, 9))
    name = next(name for name, p in model.named_parameters() if name.endswith("experts.gate_up_proj"))
    stored = model.get_parameter(name)
    outputs, inputs = (2, 1) if family != "mixtral" else (1, 2)  # dimensions
    changes = {  # and whether it makes a difference between the weights of a row, and of a layer
        "as it is": (1.0, False, False),
        "rows": (torch.linspace(1, 4, stored.shape[outputs]).unsqueeze(2 - outputs), False, True),
        "columns": (torch.linspace(1, 4, stored.shape[inputs]).unsqueeze(2 - inputs), True, True),
    }
    for factor, in_rows, in_layers in changes.values():

        def loss(model: nn.Module, batch: torch.Tensor, factor: float | torch.Tensor = factor) -> torch.Tensor:
            weights = {name: model.get_parameter(name) * factor}
            return torch.func.functional_call(model, weights, (batch,)).logits.square().flatten(1).mean(1)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            prune(make_moe(family), [ids, ids], score, loss_fn=loss, num_samples=8, progress=False)
        found = [str(w.message) for w in said if "as it is stored" in str(w.message)]
        assert len(found) == (in_rows if score == "wanda" else in_layers)
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        assert all(text.startswith(f"{name!r} ({kind})") and f"add {name!r} to `ignore`" in text for text in found)
