"""Run by test_retraining in processes of its own: prune, retrain through adapters, merge; write what each rank has.

Usage: retraining_worker.py DEVICES CASES_JSON, where a case is [folder, strategy, settings]; they run one after the
other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from versions import has
from worker import LLAMA, SHARDED, STRATEGIES, Model, Tokens

from lightning_prune import CausalLM, LinearSchedule, PERPRetraining, WeightPruning
from lightning_prune.perp import adapter_masks, add_adapters, merge, remove_adapters, save_adapter, set_masks
from lightning_prune.perp.layers import sparse_layers
from lightning_prune.perp.record import unwrapped
from lightning_prune.sharding import gather_whole, local, reshard


def whole(tensors: Iterator[tuple[str, Tensor]], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": gather_whole(t.detach()).clone().contiguous() for name, t in tensors}


def halve(model: nn.Module) -> dict[str, Tensor]:
    """Prune half of every decoder matrix at random; a tenth of what is kept is zero too. The masks."""
    generator, masks = torch.Generator().manual_seed(0), {}
    for name, p in model.named_parameters():
        aside = ("bias", ".gate.weight", "router")
        if p.dim() > 1 and (".layers." in name or ".h." in name) and not any(part in name for part in aside):
            draw = torch.rand(p.shape, generator=generator)
            masks[name] = draw > 0.5
            p.data.masked_fill_(draw < 0.55, 0.0)
    return masks


class Watch(L.Callback):
    """Before the merge: base weights and factors, what a rank holds of them, and who has optimizer states.

    With `leave_gathered`, checkpoints and the merge come after a forward pass that had no backward, from which FSDP2
    leaves parameters gathered.
    """

    def __init__(self, leave_gathered: bool) -> None:
        self.leave_gathered = leave_gathered
        self.state: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        for p in pl_module.parameters():
            if not p.requires_grad:
                assert p.grad is None
                assert p not in trainer.optimizers[0].state
        self.gather(pl_module)

    def gather(self, pl_module: Any) -> None:
        if self.leave_gathered:
            logits_of(pl_module.model)
            names = dict(pl_module.named_parameters())
            assert not any(isinstance(p, DTensor) for name, p in names.items() if "q_proj.base_layer" in name)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reshard(pl_module)
        for name, layer in sparse_layers(pl_module.model):
            a, b = layer.matrices()
            self.state |= whole(iter({layer.weight_name(name): layer.base_weight}.items()), "base")
            self.state |= whole(iter({f"{name}.A": a, f"{name}.B": b}.items()), "factor")
            held = {"kept": layer.kept, "A": local(a), "B": local(b), "weight": layer.base_part}
            self.state |= {f"held.{name}.{what}": torch.tensor(t.numel()) for what, t in held.items()}
        self.gather(pl_module)


def make_module(settings: dict[str, Any], strategy: str) -> Any:
    if settings.pop("causal_lm", False):
        config = {**LLAMA, "initializer_range": 0.1}
        return CausalLM(config=config, learning_rate=1e-2, weight_decay=0.1, lr_schedule="constant")
    parallel = settings.pop("parallel", {})
    names = [name for name in ("family", "intermediate_size") if name in settings]
    return Model(parallel=parallel if strategy in SHARDED else None, **{name: settings.pop(name) for name in names})


def run(out: Path, devices: int, strategy: str, settings: dict[str, Any]) -> None:
    """Fit, and write to ``out/rankN.safetensors`` weights, masks and logits, all whole, and what `Watch` saw."""
    torch.set_num_threads(1)
    settings = dict(settings)
    L.seed_everything(0, verbose=False)  # of the order of the samples too
    torch.manual_seed(settings.pop("initial", 0))
    module = make_module(settings, strategy)
    if settings.pop("functional", False):
        functional(out, module)
        return
    if settings.pop("refused", False):
        refused(out, module)
        return
    if settings.pop("distilled", False):
        settings["distill_from"] = make_module({}, "single").model
    if settings.pop("checkpointing", False):
        module.model.gradient_checkpointing_enable()
    trainer_settings, resume = settings.pop("trainer", {}), settings.pop("resume", None)
    schedule = LinearSchedule(0, 4, 2) if settings.pop("gradual", False) else None
    masks, pruner = {}, None
    if settings.pop("pruned_before", False):
        masks = halve(module.model)
        if settings.pop("tiny", False):  # kept weights that are +0.0 in bfloat16
            weight = next(p for n, p in module.model.named_parameters() if n.endswith("o_proj.weight"))
            mask = next(mask for n, mask in masks.items() if n.endswith("o_proj.weight"))
            weight.data[mask] = torch.where(weight.data[mask] == 0, 1e-42, weight.data[mask])
    else:
        pruner = WeightPruning(
            score=settings.pop("score", "gblm"), sparsity=0.5, num_samples=16, progress=False, schedule=schedule
        )
    trained_on, weights_only = settings.pop("trained_on", False), settings.pop("weights_only", False)
    pruner_first = settings.pop("pruner_first", False)
    twice, leave_gathered = settings.pop("twice", False), settings.pop("leave_gathered", False)
    saved = settings.pop("saved", True)
    perp = PERPRetraining(**{"masks": masks or None, "r": 4, "merge": not twice, "seed": 0, **settings})
    watch, save = (
        Watch(leave_gathered),
        ModelCheckpoint(
            dirpath=out,
            filename="{epoch}",
            save_top_k=-1,
            enable_version_counter=False,
            save_weights_only=weights_only,
        ),
    )

    def make_trainer(*callbacks: L.Callback) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu", devices=devices, strategy=STRATEGIES[strategy](), logger=False, default_root_dir=out,
            enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
            enable_checkpointing=save in callbacks, **{"max_epochs": 1, **trainer_settings},
        )  # fmt: skip

    callbacks: list[L.Callback] = [watch, perp, *([] if pruner is None else [pruner])]
    callbacks = [watch, *callbacks[:0:-1]] if pruner_first else callbacks
    trainer = make_trainer(*callbacks, *([save] if saved else []))
    trainer.fit(module, DataLoader(Tokens(), batch_size=4), ckpt_path=resume)
    if weights_only and isinstance(
        module, CausalLM
    ):  # the module is merged, and its shards cannot take the adapters in the checkpoint
        with pytest.raises(ValueError, match=r"PERPRetraining.*load_merged_state"):
            trainer.predict(module, DataLoader(Tokens(), batch_size=4), ckpt_path=out / "epoch=0.ckpt")
    if twice:
        perp = PERPRetraining(masks=masks or None, r=4)
        callbacks = [watch, perp, *([] if pruner is None else [pruner])]
        make_trainer(*callbacks).fit(module, DataLoader(Tokens(), batch_size=4))
    if trained_on:  # all of the merged model, with its zeros held
        pruner = WeightPruning(score="keep", num_samples=16, progress=False)
        make_trainer(pruner).fit(module, DataLoader(Tokens(), batch_size=4))
    assert type(module.model).__name__.removeprefix("FSDP") in (
        "LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "GptOssForCausalLM", "Lfm2ForCausalLM",
    )  # fmt: skip
    assert "configure_model" not in module.__dict__
    if isinstance(module, CausalLM):
        module.save_pretrained(out / "model")
    masks = masks or {n.removeprefix("model."): gather_whole(m) for n, m in pruner.masks.items()}
    state = {**watch.state, **{f"mask.{n}": m.to(torch.uint8) for n, m in masks.items()}}
    state |= whole(module.model.named_parameters(), "weight")
    state |= {"losses": torch.stack(watch.losses), "logits": logits_of(module.model)}
    save_file(state, out / f"rank{trainer.global_rank}.safetensors")


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """Of a merged model, which must still gather its parameters."""
    logits: Tensor = model(Tokens().ids[:2], use_cache=False).logits
    return logits.clone()


def functional(out: Path, module: Model) -> None:
    """Without a Trainer: adapters, shards, a loop, the merge. The ranks of an earlier case are still there."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    masks, ids = halve(module.model), Tokens().ids
    model = add_adapters(module.model, masks=masks, r=4)
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for block in unwrapped(model).model.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(unwrapped(model), mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(6):
        if step == 3:  # until then every rank holds whole masks
            set_masks(model, masks)
        batch = ids[8 * step :][:8].chunk(ranks)[rank]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    logits_of(model)  # FSDP2 leaves parameters gathered
    found = adapter_masks(model)
    assert all(torch.equal(gather_whole(found[name]), mask) for name, mask in masks.items())
    logits_of(model)
    save_adapter(model, out / "adapter")
    logits_of(model)
    plain = merge(model)
    assert plain is module.model
    state = {**whole(plain.named_parameters(), "weight"), **{f"mask.{n}": m.to(torch.uint8) for n, m in masks.items()}}
    state |= {"losses": torch.stack(losses), "logits": logits_of(plain)}
    save_file(state, out / f"rank{rank}.safetensors")


def refused(out: Path, module: Model) -> None:
    """What every rank says to what cannot be right, or is not on one of them."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    errors: dict[str, str] = {}

    @contextmanager
    def refuses(what: str) -> Iterator[None]:
        with pytest.raises(ValueError, match=r".+") as error:
            yield
        errors[what] = str(error.value)

    def sharded(*names: str, family: str = "llama") -> nn.Module:
        """A new model with adapters; FSDP2 shards these of its modules."""
        fresh = Model(family=family).model
        model = add_adapters(fresh, masks=halve(fresh), r=4)
        for name in names:
            fully_shard(model.get_submodule(name), mesh=mesh)
        return model

    ids, first = Tokens().ids[:2], "model.layers.0.mlp.up_proj"
    for what, name in (("PEFT model sharded", ""), ("layer sharded", f"base_model.model.{first}.base_layer")):
        with refuses(what):
            sharded(name)(input_ids=ids)
    with refuses("layer sharded with its adapter"):
        sharded(f"base_model.model.{first}")(input_ids=ids)
    experts = "base_model.model.model.layers.0.mlp.experts"
    places = {"experts sharded": f"{experts}.base_layer.base_layer", "experts sharded with adapters": experts}
    for what, name in places.items() if has("transformers", "5") else ():
        with refuses(what):
            sharded(name, family="mixtral")(input_ids=ids)
    model = sharded("base_model.model")
    masks = adapter_masks(model)
    layer = dict(sparse_layers(model))[first]
    wrong = local(masks[f"{first}.weight"])
    if rank == 1:
        wrong.view(-1)[local(layer.base_weight.detach()).view(-1).nonzero()[0]] = False
    with refuses("mask of one rank"):
        set_masks(model, masks)
    if rank == 1:
        local(layer.matrices()[1].detach())[0] = float("inf")
    with refuses("infinite on one rank"):
        merge(model)
    assert isinstance(model, PeftModel)
    module.model = remove_adapters(model)
    with refuses("sharded before"):
        add_adapters(module.model)
    strategies = {"fit after the merge": ModelParallelStrategy(), "another strategy": SingleDeviceStrategy()}
    strategies["fit after the merge"]._device_mesh = {"tensor_parallel": mesh_of_one()}
    for what, strategy in strategies.items():
        with refuses(what):
            PERPRetraining().setup(SimpleNamespace(strategy=strategy, callbacks=[]), module, "fit")
    (out / f"rank{rank}.json").write_text(json.dumps(errors))


def mesh_of_one() -> Any:
    return SimpleNamespace(size=lambda: 1)
