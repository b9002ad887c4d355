"""The example of CONTRIBUTING.md runs as it stands, and describes its family rightly."""

import copy
import re
from pathlib import Path

import pytest
import structure_models as zoo
import torch
from lightning.pytorch.callbacks import Callback
from pruning_aware_models import SMALL, fit
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from lightning_prune import CausalLM, PruningAwarePretraining
from lightning_prune.checkpoints.export import export
from lightning_prune.structure import mask_units, read_structure, remove_units, save_plain
from lightning_prune.structure.saving import note_masked_units

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def _registered():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT.partition("## A family of your own")[2], re.DOTALL)
    assert len(code.splitlines()) < 50
    exec(compile(code, "CONTRIBUTING.md", "exec"), {})


@pytest.mark.usefixtures("_registered")
def test_a_family_of_your_own(tmp_path):
    fields = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 28, "num_hidden_layers": 3}
    fields |= {"num_attention_heads": 6, "num_key_value_heads": 3, "pad_token_id": None}
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**fields)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    structure = read_structure(model)
    assert structure.shapes().count(structure.sizes) == sum(p.numel() for p in model.parameters())
    assert [len(names) for names in structure.readers("hidden")] == [3 * 4 + 1]
    removal = zoo.removals("mistral")["all"]
    masked = copy.deepcopy(model)
    mask_units(masked, removal)
    remove_units(model, removal)
    torch.testing.assert_close(zoo.logits(model), zoo.logits(masked), atol=1e-9, rtol=0)
    save_plain(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(zoo.logits(loaded), zoo.logits(model), atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="qk_layernorm=True"):
        read_structure(PhiForCausalLM(PhiConfig(**fields, qk_layernorm=True)))


PHI = {**SMALL, "model_type": "phi", "tie_word_embeddings": False, "pad_token_id": None}


@pytest.mark.usefixtures("_registered")
def test_a_family_of_layer_norms_loads_from_the_middle_of_its_shrinking_as_it_was(tmp_path):
    """Where no norm that leaves out hidden channels would be: in checkpoints, and in what is saved."""
    found = {}

    class Save(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            found[trainer.global_step] = zoo.logits(module.model)
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
            module.model.save_pretrained(tmp_path / f"hf-{trainer.global_step}")
            save_plain(module, tmp_path / f"plain-{trainer.global_step}")
            module.train()

    callback = PruningAwarePretraining({"hidden_size": 24}, ("hidden",), end=6, compact_every=100)
    fit(callback, CausalLM(config=PHI), Save(), max_steps=7)
    assert 24 < callback.history[3].units["hidden"] < 32
    for step in (3, 7):
        export(tmp_path / f"{step}.ckpt", tmp_path / f"out-{step}", progress=False)
        loaded = [CausalLM.load_from_checkpoint(tmp_path / f"{step}.ckpt").model]
        loaded += [AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-{step}") for name in ("hf", "plain", "out")]
        for model in loaded:
            torch.testing.assert_close(zoo.logits(model), found[step], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_registered")
def test_norms_of_masked_channels_are_loaded_with_shards_and_not_saved_as_plain_ones(tmp_path):
    torch.manual_seed(0)
    trained, pending = CausalLM(config=PHI), {"hidden": [torch.tensor([3, 5])]}
    mask_units(trained, pending)
    with pytest.raises(ValueError, match=r"masked \(mask_units\) in the model's LayerNorms.*remove_units"):
        save_plain(trained, tmp_path / "out")
    note_masked_units(trained.model, pending, "group")
    save_plain(trained, tmp_path / "out")
    state = {"sharded": True, "shrinking": {"pending": pending}, "settings": {"attention_unit": "group"}}
    loaded = CausalLM(config=PHI)
    loaded.on_load_checkpoint({"callbacks": {"PruningAwarePretraining": state}, "state_dict": trained.state_dict()})
    loaded.load_state_dict(trained.state_dict())
    for model in (loaded.model, AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        torch.testing.assert_close(zoo.logits(model), zoo.logits(trained.model), rtol=1e-5, atol=1e-6)
