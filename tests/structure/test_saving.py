"""Units that are masked and still there, in a checkpoint or noted on a model: what is written is the small model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt2_config import GPT2
from lightning.pytorch.callbacks import ModelCheckpoint
from pruning_aware_models import SMALL, count, fit, make_module
from safetensors import safe_open
from tiny import make_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_prune import CausalLM, PruningAwarePretraining, prune_structured
from lightning_prune.checkpoints.export import export
from lightning_prune.checkpoints.model import load_model
from lightning_prune.errors import CheckpointError, ExportError
from lightning_prune.structure import mask_units, save_plain
from lightning_prune.structure.saving import note_masked_units, noted_units, sliced_copy
from lightning_prune.structure.shrinking import Shrinking

IDS = make_tokens(3, 9, vocab=64)
FAMILIES: dict[str, Any] = {
    "llama": SMALL,
    "untied": {**SMALL, "tie_word_embeddings": False},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 8},
    "gemma": {**SMALL, "model_type": "gemma", "head_dim": 8},
    "gpt2": GPT2,
}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def masked_run(config: dict[str, Any], folder: Path, **settings: Any) -> tuple[Any, int]:
    """A checkpoint at step 6, when nothing is sliced off yet; the model as it was, and its parameters without units."""
    types = ("ffn", "layer") if config is GPT2 else ("attention", "ffn", "hidden")
    target = 0.5 if config is GPT2 else {"num_key_value_heads": 1, "intermediate_size": 40, "hidden_size": 24}
    callback = PruningAwarePretraining(**{"target": target, "types": types, "end": 6, **settings})
    found: list[Any] = []

    class Keep(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            found.append(copy.deepcopy(pl_module.model))

    save = Keep(dirpath=folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shrinking, "compaction_due", False)
        fit(callback, make_module(config=config), save, max_steps=6, enable_checkpointing=True)
    return found[-1], callback.history[-1].parameters


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_masked_units_is_exported_without_them(family: str, tmp_path: Path) -> None:
    masked, wanted = masked_run(FAMILIES[family], tmp_path)
    path = tmp_path / "step=6.ckpt"
    assert count(masked) > wanted
    found = export(path, tmp_path / "out", progress=False)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert count(small) == wanted
    assert found.totals(True).numel == wanted
    torch.testing.assert_close(logits_of(small), logits_of(masked), rtol=1e-4, atol=1e-5)
    loaded = load_model(path, progress=False).model
    assert count(loaded) == wanted
    torch.testing.assert_close(logits_of(loaded), logits_of(small), rtol=1e-5, atol=1e-6)
    # Rounded once, after what slicing rescales.
    export(path, tmp_path / "half", dtype="bfloat16", progress=False)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="bfloat16")
    for name, value in small.named_parameters():
        assert torch.equal(half.get_parameter(name), value.to(torch.bfloat16)), name


def test_sizes_that_a_llama_refuses_are_exported_as_a_mistral(tmp_path: Path) -> None:
    masked_run(SMALL, tmp_path, target={"hidden_size": 27})
    export(tmp_path / "step=6.ckpt", tmp_path / "out", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.hidden_size % model.config.num_attention_heads
    assert type(model).__name__ == "MistralForCausalLM"


def load_and_compare(model: Any, folder: Path) -> None:
    """Save as anybody would, without a word to the package."""
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert count(loaded) == count(model)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_what_save_pretrained_of_transformers_writes_loads(family: str, tmp_path: Path) -> None:
    """27 hidden channels are no configuration of a Llama of four heads."""
    module = make_module(config=FAMILIES[family])
    fit(PruningAwarePretraining({"hidden_size": 27, "intermediate_size": 40}, end=6), module, max_steps=8)
    load_and_compare(module.model, tmp_path / "callback")
    pruned = make_module(config=FAMILIES[family]).model
    types = ("attention", "ffn", "hidden")
    prune_structured(pruned, target=0.61, types=types, saliency="magnitude", compensate=False, progress=False)
    load_and_compare(pruned, tmp_path / "one shot")


def test_gpt2_cannot_end_where_nothing_loads() -> None:
    model = make_module(config=GPT2).model
    with pytest.raises(ValueError, match="takes head_dim for hidden_size"):
        prune_structured(model, target=0.9, types=("hidden",), saliency="magnitude", compensate=False, progress=False)


def test_a_unit_that_has_come_back_is_not_dropped(tmp_path: Path) -> None:
    masked_run(SMALL, tmp_path)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    pending = checkpoint["callbacks"]["PruningAwarePretraining"]["shrinking"]["pending"]
    checkpoint["state_dict"]["model.model.layers.1.mlp.down_proj.weight"][3, pending["ffn"][1][0]] = 1e-30
    torch.save(checkpoint, tmp_path / "revived.ckpt")
    with pytest.raises(ExportError, match=r"'model.layers.1.mlp.down_proj.weight' are not zero any more"):
        export(tmp_path / "revived.ckpt", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"settings": None}, {"shrinking": {"pending": 3}}, {"shrinking": {"pending": {"ffn": [1]}}}, "text"]
)
def test_a_damaged_state_is_an_error(change: Any, tmp_path: Path) -> None:
    masked_run(SMALL, tmp_path)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["PruningAwarePretraining"]
    checkpoint["callbacks"]["PruningAwarePretraining"] = change if isinstance(change, str) else {**state, **change}
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(CheckpointError, match="PruningAwarePretraining callback is damaged"):
        export(tmp_path / "damaged.ckpt", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="PruningAwarePretraining callback is damaged"):
        CausalLM.load_from_checkpoint(tmp_path / "damaged.ckpt", weights_only=True)


def test_units_that_the_model_does_not_have_are_an_error(tmp_path: Path) -> None:
    masked_run(SMALL, tmp_path)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    shrinking = checkpoint["callbacks"]["PruningAwarePretraining"]["shrinking"]
    shrinking["pending"] = {"ffn": [torch.tensor([48]), torch.tensor([48])]}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ExportError, match="units are 0 to 47"):
        export(tmp_path / "other.ckpt", tmp_path / "out", progress=False)


def test_a_noted_model_is_saved_small_and_stays_as_it_is(tmp_path: Path) -> None:
    module = make_module()
    units = {"ffn": [torch.tensor([3, 7]), torch.tensor([0, 47])], "hidden": [torch.tensor([5])]}
    mask_units(module.model, units)
    note_masked_units(module.model, units, "group")
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    module.save_pretrained(tmp_path / "module")
    save_plain(module, tmp_path / "plain")
    for folder in ("module", "plain"):
        small = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert (small.config.intermediate_size, small.config.hidden_size) == (46, 31)
        torch.testing.assert_close(logits_of(small), logits_of(module.model), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in module.model.named_parameters())
    assert module.model.config.hidden_size == 32

    noted = noted_units(copy.deepcopy(module))
    assert noted is not None
    with pytest.raises(ValueError, match="not those of a LlamaForCausalLM"):
        sliced_copy(module.model, {"strange": torch.zeros(1)}, noted)
    with pytest.raises(ValueError, match="another PruningAwarePretraining has masked"):
        fit(PruningAwarePretraining(0.5), module)
    note_masked_units(module.model, {}, "group")
    assert noted_units(module) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_compiled_parts_are_written_by_the_names_of_an_ordinary_model(tied: bool, masked: bool, tmp_path: Path) -> None:
    module = make_module(config={**SMALL, "tie_word_embeddings": tied})
    model: Any = module.model
    if masked:
        removal = {"ffn": [torch.tensor([2, 5])] * len(model.model.layers)}
        mask_units(model, removal)
        note_masked_units(model, removal, "group")
    expected = logits_of(model)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    if not tied:
        model.model = torch.compile(model.model, backend="eager")
    save_plain(model, tmp_path / "plain")
    module.save_pretrained(tmp_path / "own")
    for folder in ("plain", "own"):
        found, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(logits_of(found), expected)
        assert found.config.intermediate_size == SMALL["intermediate_size"] - 2 * masked
    layers = json.loads((tmp_path / "own" / "sparsity.json").read_text(encoding="utf-8"))["layers"]
    assert set(layers) == {n for n, _ in found.named_parameters() if "_proj" in n}


def test_weights_that_are_shared_as_no_configuration_says_are_not_lost_in_silence(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL | {"tie_word_embeddings": False}))
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"shares the parameter 'lm_head.weight' .*config.tie_word_embeddings=True"):
        save_plain(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    model.config.tie_word_embeddings = True
    save_plain(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = make_tokens(2, 9, vocab=64)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_parameters_of_quantized_layers_are_said(tmp_path: Path) -> None:
    """Which the layers are made with when weights are loaded."""
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL))
    model.model.layers[0].mlp.up_proj.weight_scale_inv = torch.nn.Parameter(torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"does not say, such as 'model.layers.0.mlp.up_proj.weight_scale_inv'"):
        save_plain(model, tmp_path)
    model.config.quantization_config = {"quant_method": "fp8"}
    save_plain(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.up_proj.weight_scale_inv" in file.keys()  # noqa: SIM118
