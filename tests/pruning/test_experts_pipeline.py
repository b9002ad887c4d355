"""Every way to prune experts, against the same model with its experts written out as Linear layers, in float64."""

import naive
import numpy as np
import pytest
import torch
from experts_models import EXPERTS, WORDS, linear_of, make_moe, write_out
from torch import nn

from lightning_prune import prune

SAMPLES = [
    {"input_ids": torch.randint(1, WORDS, (1, length), generator=torch.Generator().manual_seed(length))}
    for length in (15, 9, 12, 16)
]


def by_linear_layer(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of parameters under the names that they have in the written-out model, as ``[out, in]``."""
    found = {}
    for name, tensor in tensors.items():
        if "experts" not in name:
            found[name] = tensor
            continue
        transposed = getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
        for index, matrix in enumerate(tensor):
            found[f"{linear_of(name)}.{index}.weight"] = matrix.t() if transposed else matrix
    return found


HOW = {
    "kfac uniform": {"score": "kfac", "allocation": "uniform"},
    "kfac": {"score": "kfac"},
    "kfac global": {"score": "kfac", "group": "global"},
    "gradient": {"score": "gradient"},
    "gblm row": {"score": "gblm", "alpha": 10.0},
    "owl": {"score": "wanda", "allocation": "owl"},
    "mapping": {"score": "wanda", "allocation": {"*.experts.*.1": 0.75, "self_attn": 0.25}},
    "2:4": {"score": "kfac", "pattern": "2:4"},
    "sparsegpt": {"score": "sparsegpt"},
    "sparsegpt 2:4 sequential": {"score": "sparsegpt", "pattern": "2:4", "sequential": True},
    "wanda sequential": {"score": "wanda", "sequential": True},
    "gblm sequential": {"score": "gblm", "sequential": True},
    "obs": {"score": "kfac", "update": "obs"},
    "exact": {"score": "kfac", "update": "exact"},
    "exact sequential": {"score": "wanda", "update": "exact", "sequential": True},
    "alps sequential": {"score": "kfac", "update": "alps", "sequential": True},
    "alps 2:4": {"score": "wanda", "update": "alps", "pattern": "2:4"},
    "magnitude obs sequential": {"score": "magnitude", "update": "obs", "sequential": True},
}


# Both layouts, one without and one with biases.
TRANSPOSED = ["kfac", "gblm row", "mapping", "2:4", "sparsegpt 2:4 sequential", "obs", "exact sequential", "alps 2:4"]
CASES = [*(("mixtral", how) for how in HOW), *(("gpt_oss", how) for how in TRANSPOSED)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), CASES)
def test_experts_are_pruned_as_linear_layers_are(family: str, how: str) -> None:
    model = make_moe(family)
    written = write_out(model, family)
    options = {"num_samples": len(SAMPLES), "progress": False, **HOW[how]}
    mapping = options.get("allocation")
    renamed = {"*.experts.*.1.weight": 0.75, "self_attn": 0.25} if isinstance(mapping, dict) else mapping
    masks = prune(model, SAMPLES, **options)
    expected = prune(written, SAMPLES, **{**options, "allocation": renamed})
    found = by_linear_layer(model, masks)
    assert found.keys() == expected.keys()
    assert sum("experts" in name for name in found) == 2 * 2 * EXPERTS
    assert any(0 < int(mask.sum()) < mask.numel() for name, mask in found.items() if "experts" in name)
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name
    weights = by_linear_layer(model, {name: model.get_parameter(name).detach() for name in masks})
    for name, weight in weights.items():
        torch.testing.assert_close(weight, written.get_parameter(name).detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_sparsegpt_block_by_block_against_the_formula(family: str) -> None:
    model = make_moe(family)
    written = write_out(model, family)
    linear = [name for name, module in written.named_modules() if isinstance(module, nn.Linear)]
    blocks = [
        [n for n in linear if n.startswith(f"model.layers.{i}.") and not n.endswith((".gate", ".router"))]
        for i in range(2)
    ]

    def prune_layer(name: str, weight: np.ndarray, statistics: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return naive.sparsegpt(weight, statistics["hessian"], sparsity=0.5)

    expected, kept = naive.sequential(written, SAMPLES, blocks, prune_layer)
    masks = prune(model, SAMPLES, "sparsegpt", sequential=True, num_samples=len(SAMPLES), progress=False)
    found = by_linear_layer(model, masks)
    weights = by_linear_layer(model, {name: model.get_parameter(name).detach() for name in masks})
    assert found.keys() == kept.keys()
    for name, mask in kept.items():
        assert np.array_equal(found[name].numpy(), mask), name
        torch.testing.assert_close(weights[name], expected.get_parameter(name).detach(), rtol=1e-6, atol=1e-8)
