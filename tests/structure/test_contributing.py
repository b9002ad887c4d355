"""The example of CONTRIBUTING.md runs as it stands, and describes its family rightly."""

import copy
import re
from pathlib import Path

import pytest
import structure_models as zoo
import torch
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from lightning_prune.structure import mask_units, read_structure, remove_units, save_plain

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
