"""Removing experts: the model computes what it did with a router that may not choose them, and is an ordinary one."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from experts_models import EXPERTS, WORDS, WrittenOut, make_moe, write_out
from lightning.pytorch.callbacks import ModelCheckpoint
from pruning_aware_models import batches, make_trainer, weights
from tiny import make_tokens, snapshot
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_prune import CalibrationError, CausalLM, PruningAwarePretraining, prune_structured
from lightning_prune.structure import mask_units, read_structure, remove_units, save_plain

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"]
IDS = make_tokens(3, 11, vocab=WORDS)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def routers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("Router")]


def route(router: nn.Module, normalized: bool | None, gone: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The families' formulas, with logits of minus infinity; `normalized` None: a softmax over the chosen ones."""
    scores = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.t() + getattr(router, "bias", 0.0)
    scores[:, gone] = -torch.inf
    if normalized is None:
        top, index = scores.topk(router.top_k, dim=-1)
        return scores, top.softmax(-1), index
    top, index = scores.float().softmax(-1).topk(router.top_k, dim=-1)
    return scores, (top / top.sum(-1, keepdim=True) if normalized else top).to(scores.dtype), index


def without_choosing(model: nn.Module, family: str, gone: list[Tensor]) -> nn.Module:
    masked = copy.deepcopy(model)
    normalized = {"mixtral": True, "gpt_oss": None}.get(family, getattr(model.config, "norm_topk_prob", False))
    for router, experts in zip(routers(masked), gone, strict=True):
        router.forward = partial(route, router, normalized, experts)
    return masked


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_is_never_chosen_in_float64(family: str, tmp_path: Path) -> None:
    model = make_moe(family)
    gone = [torch.tensor([2]), torch.tensor([0])]
    dense, expected = logits(model), logits(without_choosing(model, family, gone))
    torch.testing.assert_close(logits(without_choosing(model, family, [gone[0][:0]] * 2)), dense, rtol=1e-6, atol=1e-7)
    assert (dense - expected).abs().max() > 0.01
    whole = sum(p.numel() for p in model.parameters())
    unit = sum(
        p[0].numel() for n, p in model.named_parameters() if "experts." in n or "mlp.gate." in n or "router" in n
    )
    sizes = remove_units(model, {"expert": gone})
    assert sizes.num_experts == EXPERTS - 1
    assert sum(p.numel() for p in model.parameters()) == whole - unit
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-7)

    save_plain(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values())
    loaded.set_experts_implementation("eager")
    assert loaded.config.num_experts == EXPERTS - 1
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-12, atol=1e-12)
    assert read_structure(loaded).sizes == sizes
    # Losses over routers know the number too.
    loaded.config.output_router_logits = model.config.output_router_logits = True
    losses = [m(input_ids=IDS, labels=IDS, output_router_logits=True).loss for m in (loaded, model)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def naive_reap(model: nn.Module, family: str, samples: list[Tensor]) -> Tensor:
    written = write_out(model, family)
    stacks = [m for m in written.modules() if isinstance(m, WrittenOut)]
    sums, counts = torch.zeros(2, len(stacks), EXPERTS, dtype=torch.float64)

    def see(layer: int, experts: WrittenOut, args: tuple[Tensor, Tensor, Tensor]) -> None:
        for token, chosen, shares in zip(*args, strict=True):
            for expert, share in zip(chosen.tolist(), shares, strict=True):
                sums[layer, expert] += share * experts.expert(expert, token[None]).norm()
                counts[layer, expert] += 1

    for layer, experts in enumerate(stacks):
        experts.register_forward_pre_hook(lambda module, args, layer=layer: see(layer, module, args))
    with torch.no_grad():
        for ids in samples:
            written(input_ids=ids[None])
    return sums / counts.clamp(min=1)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_reap_removes_the_experts_of_the_formula(family: str, implementation: str) -> None:
    model = make_moe(family)
    expected = naive_reap(model, family, [IDS[0], IDS[1, :7], IDS[2, :9]])
    if implementation != "eager":
        model = model.float()
        model.set_experts_implementation(implementation)
    mask = torch.arange(11)[None] < torch.tensor([11, 7, 9])[:, None]  # padding does not count
    data = [{"input_ids": IDS * mask, "attention_mask": mask.long()}]
    report = prune_structured(model, data, {"num_experts": 2}, ("expert",), "reap", progress=False)
    for gone, values in zip(report.removal["expert"], expected, strict=True):
        assert gone.tolist() == values.argsort()[:2].sort().values.tolist()
    assert report.sizes.num_experts == 2
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("saliency", ["reap", "kfac", "taylor2", "magnitude"])
def test_every_saliency(family: str, saliency: str) -> None:
    model = make_moe(family)
    with torch.no_grad():  # one expert of the second layer is hardly worth anything to anyone
        for name, p in model.named_parameters():
            if "layers.1.mlp.experts" in name:
                p[3] *= 1e-3
    total = sum(p.numel() for p in model.parameters())
    data = None if saliency == "magnitude" else [{"input_ids": IDS}]
    report = prune_structured(model, data, 0.8, ("expert",), saliency, progress=False)
    assert report.parameters == sum(p.numel() for p in model.parameters()) < total
    assert 3 in report.removal["expert"][1].tolist()
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_and_heads_together(family: str, tmp_path: Path) -> None:
    model = make_moe(family)
    data = [{"input_ids": IDS}]
    target = {"num_experts": 3, "num_attention_heads": 1, "num_key_value_heads": 1}
    report = prune_structured(model, data, target, ("attention", "expert"), "kfac", progress=False)
    assert (report.sizes.num_experts, report.sizes.num_attention_heads) == (3, 1)
    save_plain(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_is_refused_before_anything_changes() -> None:
    model, data = make_moe("mixtral"), [{"input_ids": IDS}]
    before = snapshot(model)
    gone = {"expert": [torch.tensor([0])] * 2}
    for call, message in (
        (
            lambda: prune_structured(model, data, 0.8, ("ffn",)),
            r"'mixtral' cannot lose units of 'ffn', only 'attention'",
        ),
        (lambda: prune_structured(model, data, {"num_experts": 1}, ("expert",)), "less than the 2 experts that every"),
        (lambda: prune_structured(model, data, 0.1, ("expert",)), "leave at least"),
        (lambda: prune_structured(model, data, 0.9, ("attention", "expert"), "reap"), "'reap' is of experts"),
        (
            lambda: remove_units(model, {"expert": [[0, 1, 2]] * 2}),
            r"removes 3 units; at least 2 must \(num_experts_per",
        ),
        (lambda: mask_units(model, gone), "experts cannot be masked"),
        (lambda: PruningAwarePretraining(0.5, ("expert",), saliency="kfac"), "which experts are not"),
        (lambda: PruningAwarePretraining(0.5, ("expert",), saliency="reap"), "saliency='reap' must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert snapshot(model) == before
    model.model.layers[0].mlp.experts.down_proj.data.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="not finite"):
        prune_structured(model, data, 0.9, ("expert",), "reap", progress=False)
    assert len(model.model.layers[0].mlp.experts.down_proj) == EXPERTS


# -- while training


def run(folder: Path, family: str, epochs: int, resume: Path | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = make_moe(family).config.to_dict() | {"initializer_range": 0.2}
    module = CausalLM(config=config, learning_rate=1e-3, weight_decay=0.1, lr_schedule="constant")
    callback = PruningAwarePretraining(
        **{"target": {"num_experts": 2}, "types": ("expert",), "every_n_steps": 2, "start": 1, **settings}
    )
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(callback, saver, max_steps=-1, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, batches(samples=12), ckpt_path=resume)
    return module, callback, trainer


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_go_while_training(family: str, tmp_path: Path) -> None:
    module, callback, trainer = run(tmp_path, family, 3)
    assert callback.finished
    assert [record.units["expert"] for record in callback.history] == [4, 3, 2]
    assert module.model.config.num_experts == 2
    (optimizer,) = trainer.optimizers
    for parameter in module.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    module.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded.eval()), logits(module.model.eval()))
    # Resumed between the two removals, it ends bit-identical.
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["PruningAwarePretraining"][
        "shrinking"
    ]
    assert state["sizes"]["num_experts"] == 3
    resumed, *_ = run(tmp_path / "resumed", family, 3, tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(module).items())


def test_experts_and_heads_go_along_a_line(tmp_path: Path) -> None:
    module, callback, _ = run(tmp_path, "mixtral", 4, target=0.7, types=("attention", "expert"), end=9)
    assert callback.finished
    assert callback.history[-1].parameters == sum(p.numel() for p in module.parameters())
    assert torch.isfinite(logits(module.model.eval())).all()
