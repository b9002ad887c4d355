"""`prune` as a whole: exact totals, exact zeros, nothing else changed, and nothing changed at all on failure."""

import copy
import math
import os
import re
from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from experts_models import make_moe
from tiny import LAYERS, make_llama, make_tokens, snapshot
from torch import nn

from lightning_prune import ALPS, CalibrationError, apply_masks, hold_masks, prune
from lightning_prune.pruning.pipeline import run_plan
from lightning_prune.pruning.plan import make_plan
from lightning_prune.pruning.running import causal_lm_loss
from lightning_prune.pruning.settings import PruningSettings, make_score

SCORES = ["magnitude", "random", "wanda", "gradient", "gblm", "kfac"]


def total(masks):
    return sum(m.numel() for m in masks.values())


def pruned(masks):
    return sum(int((~m).sum()) for m in masks.values())


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).view(*tensor.shape, -1)


def check_only_masked(model, before, masks):
    """+0.0 where the mask is False, the same bits everywhere else, in every parameter of the model."""
    for name, parameter in model.named_parameters():
        old, new = bits(before[name]), bits(parameter)
        mask = masks.get(name, torch.ones(parameter.shape, dtype=torch.bool))
        assert torch.equal(new, old.masked_fill(~mask[..., None], 0)), name


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- every score with every pattern --------------------


@pytest.mark.few_fast(36)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("where", ["row", "layer", "global", "2:4", "4:8", "1:4"])
def test_counts_are_exact_and_nothing_else_changes(llama, tokens, score, where):
    before = parameters(llama)
    sparsity = 0.37
    if ":" in where:
        masks = prune(llama, [tokens(3, 8)], score, pattern=where, num_samples=3)
        n, m = map(int, where.split(":"))
        assert all((mask.view(mask.shape[0], -1, m).sum(-1) == n).all() for mask in masks.values())
    else:
        allocation = "uniform" if where != "global" else None
        masks = prune(llama, [tokens(3, 8)], score, sparsity, group=where, allocation=allocation, num_samples=3)
        if where == "global":
            assert pruned(masks) == math.floor(sparsity * total(masks))
        for mask in masks.values():
            if where == "row":
                assert ((~mask).sum(1) == math.floor(sparsity * mask.shape[1])).all()
            elif where == "layer":
                assert int((~mask).sum()) == math.floor(sparsity * mask.numel())
    assert list(masks) == list(LAYERS)
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == llama.get_parameter(name).shape
        assert mask.is_contiguous()
    check_only_masked(llama, before, masks)


@pytest.mark.few_fast(12)
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("where", [None, "2:4", "4:8", "1:4"])
@pytest.mark.parametrize(
    ("score", "update"),
    [("sparsegpt", None), ("wanda", "obs"), ("kfac", "obs"), ("random", "exact"), ("gblm", "alps"), ("kfac", "alps")],
)
def test_updates_keep_exact_counts_and_exact_zeros(llama, tokens, score, update, where, sequential):
    before = parameters(llama)
    how = {"sparsity": 0.37} if where is None else {"pattern": where}
    masks = prune(llama, [tokens(3, 8)], score, update=update, sequential=sequential, num_samples=3, **how)
    changed = 0
    for name, parameter in llama.named_parameters():
        if name not in masks:
            assert torch.equal(bits(parameter), bits(before[name]))
            continue
        mask = masks[name]
        assert (bits(parameter)[~mask] == 0).all()
        assert (parameter[mask] != 0).all()
        changed += int((parameter != before[name])[mask].sum())
        if where:
            n, m = map(int, where.split(":"))
            assert (mask.view(mask.shape[0], -1, m).sum(-1) == n).all()
        elif score in ("sparsegpt", "gblm"):  # ALPS compares within the layer where the score does within the row
            assert int((~mask).sum()) == math.floor(0.37 * mask.numel())
    assert changed > 0
    if where is None and score == "kfac":
        assert pruned(masks) == math.floor(0.37 * total(masks))


def assert_nearly_exact(new, weight, hessian, mask):
    """Ten iterations leave at most a hundredth of what can be gained over the mask alone."""
    hessian = naive.damped(hessian)
    best, ours, masked = (
        np.einsum("ij,jk,ik->", w - weight, hessian, w - weight)
        for w in (naive.exact(weight, hessian, mask), new, weight * mask)
    )
    assert best <= ours * (1 + 1e-9) <= best + 0.01 * (masked - best)


@pytest.mark.parametrize("update", ["obs", "exact"])
def test_an_update_keeps_the_mask_of_the_score(reference, update):
    plain, updated = copy.deepcopy(reference.model), copy.deepcopy(reference.model)
    first = prune(plain, [reference.ids], "wanda", 0.6, num_samples=5)
    second = prune(updated, [reference.ids], "wanda", 0.6, num_samples=5, update=update)
    assert all(torch.equal(first[n], second[n]) for n in LAYERS)
    for name in LAYERS:
        weight = torch.from_numpy(reference.weights[name])
        hessian = torch.from_numpy(reference.statistics[name]["hessian"])
        new = updated.get_parameter(name).detach()
        if update == "obs":
            expected, _ = naive.sparsegpt(weight.numpy(), hessian.numpy(), mask=first[name].numpy())
            np.testing.assert_allclose(new.numpy(), expected, rtol=0, atol=2e-3 * np.abs(expected).max())
        else:
            assert_nearly_exact(new.numpy(), weight.numpy(), hessian.numpy(), first[name].numpy())
        errors = [
            float(((weight - w) @ hessian * (weight - w)).sum()) for w in (new, plain.get_parameter(name).detach())
        ]
        assert errors[0] < errors[1], name


@pytest.mark.few_fast(3)
@pytest.mark.parametrize(  # each score, and each place with a score of either kind
    ("where", "score"),
    [
        *(("row", score) for score in ("magnitude", "wanda", "gradient", "gblm", "kfac")),
        *((where, score) for where in ("layer", "2:4") for score in ("wanda", "kfac")),
    ],
)
def test_alps_weighs_as_the_score_does(reference, score, where):
    """Whatever the score has beside the weight weighs; input norms are those of the damped Hessian."""
    model = copy.deepcopy(reference.model)
    how = {"pattern": where} if ":" in where else {"sparsity": 0.6, "group": where, "allocation": "uniform"}
    masks = prune(model, [reference.ids], score, num_samples=5, update="alps", **how)
    for name in LAYERS:
        weight, statistics = reference.weights[name], reference.statistics[name]
        hessian = naive.damped(statistics["hessian"])
        ones = naive.score(score, np.ones_like(weight), statistics | {"input_norm": np.sqrt(np.diag(hessian))})
        select = {
            "layer": lambda s: naive.layer_mask(s, math.floor(0.6 * s.size)),
            "row": lambda s: naive.row_mask(s, s.shape[0] * math.floor(0.6 * s.shape[1])),
            "2:4": lambda s: naive.nm_mask(s, 2, 4),
        }[where]
        expected, _ = naive.alps(weight, hessian, ones, select)
        assert (masks[name].numpy() != expected).mean() < 2e-3, name
        new = model.get_parameter(name).detach().numpy()
        assert_nearly_exact(new, weight, statistics["hessian"], masks[name].numpy())


def test_hyper_parameters_of_alps(reference):
    masks = [
        prune(copy.deepcopy(reference.model), [reference.ids], "wanda", num_samples=5, update=update)
        for update in ("alps", ALPS(), ALPS(iterations=1))
    ]
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in LAYERS)
    assert not all(torch.equal(masks[0][n], masks[2][n]) for n in LAYERS)
    for wrong in ({"rho": 0.0}, {"rho": math.inf}, {"rho": math.nan}, {"every": 0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="rho must be a finite number > 0"):
            ALPS(**wrong)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "kfac", "sparsegpt"])
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_the_ends_of_the_range(llama, tokens, score, sparsity):
    before = snapshot(llama)
    masks = prune(llama, [tokens(3, 8)], score, sparsity, num_samples=3)
    assert pruned(masks) == sparsity * total(masks)
    if sparsity == 0.0:
        assert snapshot(llama) == before
    else:
        assert all((bits(llama.get_parameter(name)) == 0).all() for name in masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", [{"score": "gblm"}, {"score": "kfac", "update": "alps"}, {"score": "sparsegpt"}])
def test_other_precisions(dtype, how, tokens):
    model = make_llama().to(dtype)
    masks = prune(model, [tokens(4, 8)], num_samples=4, **how)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert weight.dtype == dtype
        assert (bits(weight)[~mask] == 0).all()
        assert torch.isfinite(weight).all()
    assert pruned(masks) == total(masks) // 2


def test_defaults(llama, tokens):
    twin = copy.deepcopy(llama)
    found = prune(llama, [tokens(4, 8)], num_samples=4)
    same = prune(
        twin,
        [tokens(4, 8)],
        score="kfac",
        sparsity=0.5,
        group="layer",
        allocation="kfac",
        gamma=0.7,
        num_samples=4,
        ignore=["lm_head"],
    )
    assert all(torch.equal(found[n], same[n]) for n in LAYERS)
    assert snapshot(llama) == snapshot(twin)


def test_kfac_needs_no_loss_where_the_factor_of_a_row_cancels():
    """In N:M groups its mask is Wanda's, so a module without a loss will do, and no backward runs."""
    models = [nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).requires_grad_(False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    how = {"pattern": "2:4", "targets": [nn.Linear], "num_samples": 6, "progress": False}
    found, expected = (prune(m, [x], score, **how) for m, score in zip(models, ("kfac", "wanda"), strict=True))
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    with pytest.raises(ValueError, match="needs a loss"):
        prune(models[0], [x], "kfac", 0.5, targets=[nn.Linear], num_samples=6, progress=False)


@pytest.mark.parametrize("score", ["random", "gblm", "kfac", "sparsegpt"])
def test_runs_are_reproducible(score, tokens):
    first, second = make_llama(), make_llama()
    torch.manual_seed(5)
    masks = prune(first, [tokens(4, 8)], score, num_samples=4)
    torch.manual_seed(6)
    again = prune(second, [tokens(4, 8)], score, num_samples=4)
    assert all(torch.equal(masks[n], again[n]) for n in LAYERS)
    assert snapshot(first) == snapshot(second)


def test_seeds_of_random_masks():
    first, second = (prune(make_llama(), score="random", seed=s) for s in (0, 1))
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], second["model.layers.0.mlp.up_proj.weight"])


def test_masks_apply_to_a_copy(llama, tokens):
    twin = copy.deepcopy(llama)
    apply_masks(twin, prune(llama, [tokens(4, 8)], "wanda", num_samples=4))
    assert snapshot(twin) == snapshot(llama)


def test_keep_takes_the_zeros_that_are_there(llama):
    dense = snapshot(llama)
    with pytest.raises(ValueError, match="none of the 14 layers has one"):
        prune(llama, score="keep")
    assert snapshot(llama) == dense
    masks = prune(llama, score="magnitude", sparsity=0.3)
    before = snapshot(llama)
    kept = prune(llama, score="keep")
    assert all(torch.equal(masks[n], kept[n]) for n in masks)
    assert snapshot(llama) == before


@pytest.mark.parametrize("update", [None, "exact", "alps"])
def test_gpt2_and_convolutions(update):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    before = parameters(model)
    masks = prune(model, [make_tokens(3, 9, 32)], "gblm", pattern="2:4", num_samples=3, update=update)
    assert len(masks) == 8
    for mask in masks.values():  # stored (in, out): groups run down the columns
        assert (mask.t().reshape(mask.shape[1], -1, 4).sum(-1) == 2).all()
    check_only_masked(model, parameters(model) if update else before, masks)

    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))
    before, images = parameters(model), torch.randn(4, 8, 6, 6)
    masks = prune(
        model,
        [images],
        "gblm",
        pattern="2:4",
        num_samples=4,
        loss_fn=lambda m, b: m(b).square().mean(1),
        update=update,
    )
    assert masks["0.weight"].shape == (6, 8, 3, 3)
    groups = masks["0.weight"].view(6, 2, 4, 3, 3)  # along the input channels
    assert (groups.sum(2) == 2).all()
    check_only_masked(model, parameters(model) if update else before, masks)
    if update == "exact":
        # The convolution's outputs on what it was fitted to are nearer to the dense ones than those of the mask alone.
        weights = {"dense": before["0.weight"], "mask": before["0.weight"] * masks["0.weight"], "ours": model[0].weight}
        outputs = {name: nn.functional.conv2d(images, weight) for name, weight in weights.items()}
        errors = {name: float((y - outputs["dense"]).detach().square().sum()) for name, y in outputs.items()}
        assert errors["ours"] < 0.9 * errors["mask"]


def test_lora_prunes_the_base_layers_alone(llama, tokens):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(llama, config)
    before, flags = parameters(model), [p.requires_grad for p in model.parameters()]
    for how in ({"score": "gblm"}, {"score": "wanda", "sequential": True}, {"score": "kfac"}):
        masks = prune(model, [tokens(3, 8)], sparsity=0.5, num_samples=3, **how)
        assert len(masks) == 14
        assert sum("base_layer" in name for name in masks) == 4
        assert not any("lora" in name for name in masks)
        check_only_masked(model, before, masks)
        assert [p.requires_grad for p in model.parameters()] == flags
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])


def test_compiled_model_gives_the_masks_of_the_plain_one(tokens):
    plain, wrapped = make_llama(), make_llama()
    expected = prune(plain, [tokens(3, 8)], "kfac", num_samples=3)
    found = prune(torch.compile(wrapped, backend="eager"), [tokens(3, 8)], "kfac", num_samples=3)
    assert list(found) == list(expected)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("score", ["wanda", "kfac"])
def test_inference_mode_changes_no_mask(score):
    def layers():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def loss(model, batch):
        return model(batch).square().sum(1)

    data = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    expected = prune(layers(), [data], score, loss_fn=loss, progress=False)
    model = layers()
    with torch.inference_mode():
        made, unusable = data.clone(), layers()
        inside = prune(model, [made], score, loss_fn=loss, progress=False)
    outside = prune(layers(), [made], score, loss_fn=loss, progress=False)
    for name, mask in expected.items():
        assert torch.equal(inside[name], mask)
        assert torch.equal(outside[name], mask)
    model(data).sum().backward()  # it can be trained on
    with pytest.raises(ValueError, match=r"'0' was made under torch\.inference_mode"):
        prune(unusable, [data], score, loss_fn=loss, progress=False)


@pytest.mark.parametrize(
    "how",
    [
        {"score": "random"},
        {"score": "kfac"},
        {"score": "gblm"},
        {"score": "wanda", "update": "exact"},
        {"score": "sparsegpt", "sequential": True},
    ],
    ids=str,
)
def test_the_default_device_is_not_where_the_package_computes(how, tokens):
    """With the default ``cuda`` that notebooks set; on ``meta`` nothing could be computed."""
    expected, model, data = make_llama(), make_llama(), [tokens(3, 8)]
    masks = prune(expected, data, num_samples=3, progress=False, **how)
    with torch.device("meta"):
        found = prune(model, data, num_samples=3, progress=False, **how)
    assert found == masks
    assert snapshot(model) == snapshot(expected)


@pytest.mark.parametrize("how", [{"score": "magnitude"}, {"update": "exact"}, {"sequential": True}], ids=str)
def test_an_autocast_around_the_call_meets_the_pruned_weights(how, tokens):
    """It keeps the weights that it has cast, and knows of no change to them."""
    data, models = [{"input_ids": tokens(3, 8)}], (make_llama(), make_llama())
    for model, kept in zip(models, (True, False), strict=True):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kept), torch.no_grad():
            model(**data[0])
            prune(model, data, num_samples=3, progress=False, **{"score": "wanda", **how})
            assert torch.is_autocast_cache_enabled() == kept
            after = model(**data[0]).logits
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert torch.equal(after, model(**data[0]).logits)
    assert snapshot(models[0]) == snapshot(models[1])


def test_norms_of_inference_mode_are_refused_where_they_are_in_the_way(llama, tokens):
    """Frozen ones are in nobody's way without a backward pass; a copy, as the message says, can be used."""
    norm = llama.model.layers[1].input_layernorm
    with torch.inference_mode():
        norm.weight = nn.Parameter(norm.weight.clone())
    before = snapshot(llama)
    for score, frozen in (("magnitude", False), ("kfac", False), ("kfac", True)):
        norm.weight.requires_grad_(not frozen) if frozen else None
        with pytest.raises(ValueError, match=r"'model\.layers\.1\.input_layernorm\.weight' was made under .*deepcopy"):
            prune(llama, [tokens(3, 8)], score, num_samples=3, progress=False)
    assert snapshot(llama) == before
    prune(llama, [tokens(3, 8)], "wanda", num_samples=3, progress=False)
    copied = copy.deepcopy(llama).requires_grad_(True)
    prune(copied, [tokens(3, 8)], "kfac", num_samples=3, progress=False)
    copied(tokens(3, 8)).logits.sum().backward()


def test_sequential_with_gradients_needs_batches_that_can_be_read_twice(llama, tokens):
    before = snapshot(llama)
    with pytest.raises(ValueError, match=r"generator can be read once.*pass a list or a DataLoader"):
        prune(llama, (b for b in tokens(3, 8).split(1)), "gblm", sequential=True, num_samples=3)
    assert snapshot(llama) == before


# -- schedules --------------------


@pytest.mark.few_fast(5)
@pytest.mark.parametrize("score", ["magnitude", "wanda", "kfac", "sparsegpt", "gblm"])
@pytest.mark.parametrize("update", [None, "obs", "alps"])
def test_masks_of_growing_sparsity_are_nested(score, update, tokens):
    if score == "sparsegpt" and update:
        pytest.skip("updates by itself")
    model = make_llama()
    settings = PruningSettings(
        make_score(score), sparsity=0.6, update=update, num_samples=3, ignore=("lm_head",), progress=False
    )
    plan = make_plan(model, settings)
    masks = None
    for fraction in (0.2, 0.7, 1.0):
        new = run_plan(plan, model, [tokens(3, 8)], fraction=fraction, previous=masks)
        for name in LAYERS:
            if masks is not None:
                assert not (new[name] & ~masks[name]).any(), (fraction, name)
            assert (bits(model.get_parameter(name))[~new[name]] == 0).all()
        masks = new
    assert pruned(masks) <= 0.6 * total(masks)
    assert pruned(masks) >= 0.58 * total(masks)


# -- refused before anything changes --------------------


class Untouched:
    """Batches that nobody may ask for."""

    def __iter__(self):
        raise AssertionError("calibration started")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.5}, ValueError, "sparsity=1.5 must be a number in [0, 1]"),
        ({"sparsity": -0.1}, ValueError, "sparsity=-0.1 must be a number in [0, 1]"),
        ({"sparsity": "half"}, ValueError, "sparsity='half' must be a number in [0, 1]"),
        ({"sparsity": math.nan}, ValueError, "sparsity=nan must be a number in [0, 1]"),
        ({"sparsity": True}, ValueError, "sparsity=True must be a number in [0, 1]"),
        ({"score": "gbml"}, ValueError, "score='gbml' is unknown"),
        ({"score": 3}, TypeError, "score=3 must be one of"),
        ({"group": "rows"}, ValueError, "group='rows' must be one of"),
        ({"pattern": "2-4"}, ValueError, "pattern='2-4' is neither"),
        ({"pattern": "4:2"}, ValueError, "pattern='4:2' is neither"),
        (
            {"pattern": "3:5"},
            ValueError,
            "pattern='3:5': the 64 inputs of 'model.layers.0.self_attn.q_proj.weight' do not divide by 5",
        ),
        (
            {"pattern": "32:64"},
            ValueError,
            "the 96 inputs of 'model.layers.0.mlp.down_proj.weight' do not divide by 64",
        ),
        (
            {"pattern": "2:4", "sparsity": 0.6},
            ValueError,
            "pattern='2:4' prunes 0.5000 of the weights, but sparsity=0.6: leave sparsity out",
        ),
        ({"pattern": "2:4", "allocation": "kfac"}, ValueError, "every layer: leave allocation='kfac' out"),
        ({"pattern": "2:4", "group": "layer"}, ValueError, "leave group='layer' out"),
        ({"allocation": "olw"}, ValueError, "allocation='olw' is unknown"),
        ({"allocation": {"q_prj": 0.5}}, ValueError, "pattern 'q_prj' matches no target"),
        ({"allocation": "owl", "group": "global"}, ValueError, "group='global' decides the layers' sparsities itself"),
        ({"update": "gptq"}, ValueError, "update='gptq' must be one of None, 'obs', 'exact', 'alps', or an ALPS"),
        ({"score": "random", "update": "alps"}, ValueError, "update='alps' needs a score that is abs(W) times a fac"),
        ({"score": "sparsegpt", "update": "obs"}, ValueError, "here group=None and update='obs'. Leave them out"),
        ({"score": "sparsegpt", "group": "row"}, ValueError, "no group, no update"),
        ({"score": "keep", "sparsity": 0.5, "group": "row"}, ValueError, "leave sparsity=0.5, group='row' out"),
        ({"num_samples": 0}, ValueError, "num_samples=0 must be an integer >= 1"),
        ({"num_samples": 1.5}, ValueError, "num_samples=1.5 must be an integer >= 1"),
        ({"alpha": -1}, ValueError, "alpha=-1 must be"),
        ({"gamma": math.nan}, ValueError, "gamma=nan must be"),
        ({"grad_norm": "max"}, ValueError, "grad_norm='max' must be"),
        ({"gradient_dtype": "float16"}, ValueError, "gradient_dtype='float16' must be"),
        ({"targets": "q_proj"}, TypeError, "targets must be a sequence, got the string 'q_proj'"),
        ({"targets": ["q_prj"]}, ValueError, "targets='q_prj' matches no layer"),
        ({"ignore": ["lm_heed"]}, ValueError, "ignore='lm_heed' matches no layer"),
        ({"ignore": ["model", "lm_head"]}, ValueError, "nothing to prune"),
        ({"score": "magnitude", "sequential": True}, ValueError, "changes nothing for score='magnitude'"),
        ({"score": "gradient", "sequential": True}, ValueError, "changes nothing for score='gradient'"),
        ({"score": "wanda", "sequential": True, "group": "global"}, ValueError, "cannot compare globally"),
        ({"score": "wanda", "sequential": True, "ignore": []}, ValueError, "'lm_head.weight' lie outside"),
        ({"batches": None}, ValueError, "score='kfac' needs calibration data: pass batches"),
    ],
)
def test_bad_arguments_are_refused_before_anything_happens(llama, arguments, error, message):
    before = snapshot(llama)
    with pytest.raises(error, match=re.escape(message)):
        prune(llama, **{"batches": Untouched(), **arguments})
    assert snapshot(llama) == before


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_advice_to_ignore_layers_is_right_to_the_letter(llama_factory, family):
    """Whoever passes the list of the message prunes the rest, and no head."""
    model = llama_factory(intermediate_size=98) if family == "llama" else make_moe(family)
    if family == "mixtral":
        for block in model.model.layers:
            experts = block.mlp.experts
            experts.down_proj = nn.Parameter(experts.down_proj.detach()[..., :22].clone())
    ignore = []
    for _ in model.model.layers:
        with pytest.raises(ValueError, match="do not divide by 4") as refusal:
            prune(model, None, "magnitude", pattern="2:4", **({"ignore": ignore} if ignore else {}))
        ignore.append(re.search(r"add '(.*?)' to `ignore`", str(refusal.value))[1])
    masks = prune(model, None, "magnitude", pattern="2:4", ignore=ignore)
    assert masks
    assert not any("lm_head" in name or "down_proj" in name for name in masks)


def test_tied_embeddings_are_refused_and_can_be_ignored(llama_factory, tokens):
    model = llama_factory(tie_word_embeddings=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'lm_head' is tied to 'model\.embed_tokens'"):
        prune(model, Untouched(), ignore=[])
    assert snapshot(model) == before
    assert set(prune(model, [tokens(2, 8)], num_samples=2)) == set(LAYERS)


def test_two_parameters_in_one_memory_are_refused_and_one_of_them_can_be_ignored():
    """A decoder that is the transposed encoder by ``.data``: both would have the zeros of both masks."""
    model = nn.ModuleDict({"encoder": nn.Linear(8, 6), "decoder": nn.Linear(6, 8)})
    model["decoder"].weight = nn.Parameter(model["encoder"].weight.data.t())
    before = model["encoder"].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'decoder\.weight' and 'encoder\.weight' are two parameters in the same"):
        prune(model, score="random", progress=False)
    assert torch.equal(model["encoder"].weight, before)
    masks = prune(model, score="random", ignore=["decoder"], progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    with hold_masks(model, masks, optimizer):
        for _ in range(3):
            model["decoder"](model["encoder"](torch.randn(2, 8))).square().sum().backward()
            optimizer.step()
    assert torch.equal(model["decoder"].weight != 0, masks["encoder.weight"].t())


def test_parameters_beside_each_other_in_one_memory_are_pruned():
    """Pieces of one flat tensor, and two halves of a matrix, whose elements lie between each other."""
    flat, matrix = torch.randn(48), torch.randn(6, 16)
    model = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 6), nn.Linear(8, 6)])
    parts = [flat[:24].view(3, 8), flat[24:].view(3, 8), matrix[:, :8], matrix[:, 8:]]
    for layer, part in zip(model, parts, strict=True):
        layer.weight = nn.Parameter(part)
    masks = prune(model, score="random", progress=False)
    assert all(torch.equal(model[i].weight != 0, masks[f"{i}.weight"]) for i in range(4))


@pytest.mark.parametrize("score", ["wanda", "gblm"])
def test_too_few_samples_warn_once_block_by_block_too(llama, tokens, score):
    with pytest.warns(UserWarning, match="ended after 3") as told:
        prune(llama, [tokens(3, 8)], score, sequential=True, num_samples=9, progress=False)
    assert [str(w.message) for w in told] == ["calibration data ended after 3 of num_samples=9"]


def test_sequential_without_blocks_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="Sequential names no decoder blocks"):
        prune(model, Untouched(), "wanda", sequential=True)


@pytest.mark.parametrize("other", ["layers.1.mlp.up_proj", "layers.0"])
def test_weights_of_several_blocks_cannot_be_pruned_block_by_block(llama_factory, tokens, other):
    """They would be pruned by what they meet in the first; all at once both uses count."""
    model = llama_factory()
    one = model.get_submodule("model.layers.0.mlp.up_proj")
    if other == "layers.0":
        model.model.layers[1] = model.model.layers[0]
    else:
        model.get_submodule(f"model.{other}").weight = one.weight
    before, batches = snapshot(model), [tokens(2, 8)]
    with pytest.raises(
        ValueError, match=r"layers\.0\..*weight of several blocks \(model\.layers\.0, model\.layers\.1\)"
    ):
        prune(model, batches, score="wanda", sequential=True, num_samples=2, progress=False)
    assert snapshot(model) == before
    assert "model.layers.0.mlp.up_proj.weight" in prune(model, batches, score="wanda", num_samples=2, progress=False)


# -- failures half way --------------------


class Broken:
    """Batches that fail in the middle, each time they are read."""

    def __init__(self, ids, error, after=2):
        self.ids, self.error, self.after = ids, error, after

    def __iter__(self):
        for i, row in enumerate(self.ids.split(1)):
            if i == self.after:
                raise self.error
            yield row


PLANS = [
    {"score": "gblm"},
    {"score": "kfac"},
    {"score": "wanda"},
    {"score": "sparsegpt"},
    {"score": "wanda", "update": "obs"},
    {"score": "wanda", "sequential": True},
    {"score": "sparsegpt", "sequential": True},
    {"score": "kfac", "sequential": True, "update": "alps"},
]


@pytest.mark.few_fast(8)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_a_loader_that_raises_changes_nothing(llama, tokens, plan, error):
    llama.train()
    before, state = snapshot(llama), torch.get_rng_state()
    with pytest.raises(type(error)) as caught:
        prune(llama, Broken(tokens(4, 8), error), num_samples=4, **plan)
    assert caught.value is error
    assert snapshot(llama) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in llama.modules())
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_no_batches_change_nothing(llama, plan):
    before = snapshot(llama)
    with pytest.raises(CalibrationError, match="calibration saw no sample"):
        prune(llama, [], **plan)
    assert snapshot(llama) == before


@pytest.mark.parametrize("score", ["gblm", "kfac", "gradient"])
def test_a_loss_that_turns_nan_changes_nothing(llama, tokens, score):
    before, calls = snapshot(llama), []

    def loss_fn(model, batch):
        calls.append(1)
        return causal_lm_loss(model, batch) * (math.nan if len(calls) == 3 else 1)

    with pytest.raises(CalibrationError, match="not finite"):
        prune(llama, list(tokens(4, 8).split(1)), score, loss_fn=loss_fn, num_samples=4)
    assert snapshot(llama) == before


@pytest.mark.parametrize("plan", PLANS[2:], ids=str)
def test_activations_that_turn_nan_change_nothing(llama, tokens, plan):
    """In the second block, so that a walk has pruned the first one by then."""
    handle = llama.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda m, args: (args[0] * math.nan,))
    before = snapshot(llama)
    with pytest.raises(CalibrationError):
        prune(llama, [tokens(4, 8)], num_samples=4, **plan)
    handle.remove()
    assert snapshot(llama) == before


@pytest.mark.parametrize("how", [{"update": "obs"}, {"sequential": True}, {"update": "obs", "sequential": True}])
def test_an_interrupt_in_a_score_after_some_layers_are_pruned(llama, tokens, how):
    class Interrupting:
        name, statistics, group, allocation = "mine", frozenset({"input_norm"}), "row", "uniform"
        elementwise = False
        left = 9

        def __call__(self, weight, statistics, name):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return weight.abs()

    before = snapshot(llama)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, [tokens(4, 8)], Interrupting(), num_samples=4, **how)
    assert snapshot(llama) == before


# -- a real model --------------------


@pytest.mark.slow
@pytest.mark.skipif("LIGHTNING_PRUNE_SMOLLM2" not in os.environ, reason="LIGHTNING_PRUNE_SMOLLM2 names no .gguf file")
def test_smollm2():
    from transformers import AutoModelForCausalLM

    path = Path(os.environ["LIGHTNING_PRUNE_SMOLLM2"])
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    names = ["model.layers.0.self_attn.k_proj", "model.layers.14.mlp.down_proj", "model.layers.29.self_attn.q_proj"]
    layers = {f"{name}.weight": name for name in names}
    ids = make_tokens(2, 64, model.config.vocab_size)
    stats = naive.statistics(model, [{"input_ids": row[None]} for row in ids], layers)
    weights = {name: model.get_parameter(name).detach().clone() for name in layers}
    for score in ("wanda", "gblm", "kfac"):
        masks = prune(
            model, [{"input_ids": ids}], score, 0.5, targets=names, allocation="uniform", num_samples=2, progress=False
        )
        for name, mask in masks.items():
            values = naive.score(score, weights[name].double().numpy(), stats[name])
            axis = "layer" if score == "kfac" else "row"
            expected = next(iter(naive.masks({"w": values}, 0.5, axis).values()))
            # float32 against float64 through up to 30 layers: ties are wider than one rounding.
            assert naive.near_ties(values, expected, mask.numpy(), axis, 2e-4), (score, name)
            assert (mask.numpy() != expected).mean() < 1e-3, (score, name)
            with torch.no_grad():
                model.get_parameter(name).copy_(weights[name])
