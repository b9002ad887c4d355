"""Names that other packages keep to themselves: each is used in one place, and is still where that place looks."""

from __future__ import annotations

import ast
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from tiny import make_llama
from torch import nn
from torch.distributed.checkpoint import filesystem, metadata
from versions import has

PACKAGE = Path(__file__).parent.parent / "lightning_prune"
# What has no public name, and the one file that knows it. Of each below there is a thing that has it. If one goes, an
# error says so. Two could also come to mean something else, and have no public way out. A loader that is given to `fit`
# stands nowhere but in `_data_source` before training begins: another one would be calibrated on. And layers of one's
# own are made known to PEFT by `_register_custom_module` alone: what PEFT has built is looked at afterwards.
USES = {
    "_orig_mod": "naming",
    "_base": "pruning.hooks",
    "_modules": "pruning.masks",
    "_parameters": "callbacks.traces",
    "_buffers": "callbacks.traces",
    "_forward_hooks": "pruning.running",
    "_forward_pre_hooks": "pruning.running",
    "_backward_hooks": "pruning.running",
    "_backward_pre_hooks": "pruning.running",
    "_compiled_call_impl": "callbacks.checks",
    "_StorageInfo": "checkpoints.reading",
    "_MEM_FORMAT_ENCODING": "checkpoints.reading",
    "_start_method": "callbacks.kinds",
    "_ddp_comm_state": "callbacks.checks",
    "_step_supports_amp_scaling": "callbacks.pruning_aware_pretraining",
    "_data_source": "callbacks.calibration_data",
    "_batches_that_stepped": "callbacks.sparsity_monitor",
    "_attn_implementation": "structure.classes",
    "_no_split_modules": "pruning.stacks",
    "_gradient_checkpointing_func": "pruning.running",
    "_apply_gate": "pruning.experts",
    "_get_feature_vector_attention_mask": "pruning.padding",
    "_hf_hook": "pruning.offloading",
    "_register_custom_module": "perp.options",
    "_fingerprint": "text.sequences",
}
OWN = {"_generate_state_key"}  # Lightning's callbacks are asked for it, and ours defines it
DOCUMENTED = {"_version", "_fields"}  # of tensors, in PyTorch's notes on autograd; of named tuples


def test_each_is_used_in_one_file() -> None:
    trees = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    found: dict[str, set[str]] = {}
    ours = DOCUMENTED | OWN | _defined(trees.values())
    for name, tree in trees.items():
        for private in _foreign(tree) - ours:
            found.setdefault(private, set()).add(name)
    assert found == {private: {file} for private, file in USES.items()}


def _defined(trees: object) -> set[str]:
    """Private attributes that classes of the package give themselves."""
    defined: set[str] = set()
    for tree in trees:  # type: ignore[attr-defined]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(part, ast.FunctionDef):
                    defined.add(part.name)
                elif isinstance(part, (ast.Assign, ast.AnnAssign)):
                    names = part.targets if isinstance(part, ast.Assign) else [part.target]
                    defined |= {name.id for name in names if isinstance(name, ast.Name)}
    return defined - USES.keys()


def _foreign(tree: ast.AST) -> set[str]:
    """Private names that are imported from other packages, or asked of an object."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(PACKAGE.name):
            names |= {*node.module.split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            names |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_torch_has_them() -> None:
    layer = nn.Linear(2, 2)
    for name in ("_modules", "_parameters", "_buffers"):
        assert isinstance(getattr(layer, name), dict)
    register = {
        "_forward_hooks": layer.register_forward_hook,
        "_forward_pre_hooks": layer.register_forward_pre_hook,
        "_backward_hooks": layer.register_full_backward_hook,
        "_backward_pre_hooks": layer.register_full_backward_pre_hook,
    }
    for name, hook in register.items():
        assert not getattr(layer, name)
        hook(lambda *_: None)  # type: ignore[operator]
        assert len(getattr(layer, name)) == 1
    x = torch.zeros(4)
    assert x._base is None
    assert x.view(2, 2)._base is x
    assert torch.compile(layer)._orig_mod is layer
    assert layer._compiled_call_impl is None
    layer.compile()
    assert layer._compiled_call_impl is not None
    for module, name in ((metadata, "_MEM_FORMAT_ENCODING"), (filesystem, "_StorageInfo")):
        assert isinstance(getattr(module, name), type)


def test_lightning_has_them() -> None:
    state = object()
    strategy = DDPStrategy(ddp_comm_state=state, start_method="spawn")
    assert (strategy._start_method, strategy._ddp_comm_state) == ("spawn", state)
    trainer = Trainer(logger=False, enable_checkpointing=False, barebones=True)
    assert hasattr(trainer.fit_loop._data_source, "instance")
    assert callable(trainer.fit_loop._data_source.dataloader)
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 0
    assert LightningModule()._trainer is None


def test_transformers_peft_and_datasets_have_them() -> None:
    model = make_llama()
    assert model.config._attn_implementation in ("eager", "sdpa")
    assert type(model.model.layers[0]).__name__ in model._no_split_modules
    model.gradient_checkpointing_enable()
    assert callable(model.model.layers[0]._gradient_checkpointing_func)
    assert callable(transformers.Wav2Vec2Model._get_feature_vector_attention_mask)
    assert callable(peft.LoraConfig()._register_custom_module)
    assert isinstance(datasets.Dataset.from_dict({"text": ["a"]})._fingerprint, str)


@pytest.mark.skipif(not has("transformers", "5"), reason="experts are stored otherwise")
def test_experts_have_a_gate() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    assert callable(MixtralExperts._apply_gate)


def test_accelerate_has_them() -> None:
    layer = nn.Linear(2, 2)
    weight = layer.weight.detach().clone()
    cpu_offload(layer, torch.device("cpu"))
    hook = next(each for each in layer._hf_hook.hooks if each.weights_map is not None)
    assert hook.offload
    assert layer.weight.is_meta
    assert torch.equal(hook.weights_map["weight"], weight)
    assert torch.device(hook.execution_device).type == "cpu"
    loader = OffloadedWeightsLoader(state_dict={"0.weight": weight})
    prefixed = PrefixedDataset(loader, "0.")
    assert (prefixed.dataset, prefixed.prefix) == (loader, "0.")
    assert (loader.index, loader.save_folder, list(loader.state_dict)) == ({}, None, ["0.weight"])
