"""Exports are read by transformers alone, and compared with the module that was trained."""

import copy
import json
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
from launching import launch_calls
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from tiny import TINY, make_tokens
from tokenizers import Tokenizer, models
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lightning_prune import CausalLM, WeightPruning
from lightning_prune.checkpoints.export import ExportError, export
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.checkpoints.sources import trained_tokenizer
from lightning_prune.cli import main
from lightning_prune.errors import CheckpointError
from lightning_prune.pruning.masks import unpack_masks
from lightning_prune.structure import folders
from lightning_prune.text.data import EMBEDDED

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FAMILIES = {
    "llama": TINY,
    "tied": TINY | {"tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
}
TOKENS = make_tokens(4, 16, vocab=320)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = EMBEDDED["austen"].read_text(encoding="utf-8")[20_000:40_000]
    return trained_tokenizer([text], 320, tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """Module and checkpoint of a family, pruned to 2:4 and trained for two steps; made when first asked for."""
    made = {}

    def train(family="llama"):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            L.seed_everything(0, verbose=False)
            module = CausalLM(config=FAMILIES[family], learning_rate=1e-3)
            module.tokenizer = tokenizer
            rows = [{"input_ids": row} for row in make_tokens(16, 16, vocab=320)]
            trainer = L.Trainer(
                accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, default_root_dir=folder,
                callbacks=[WeightPruning(score="wanda", pattern="2:4", num_samples=4, progress=False)],
            )  # fmt: skip
            trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
            trainer.save_checkpoint(folder / "last.ckpt")
            made[family] = module.eval(), folder / "last.ckpt"
        return made[family]

    return train


@pytest.fixture
def changed(trained, tmp_path):
    """A copy of the checkpoint with something changed in it."""

    def change(edit, family="llama"):
        checkpoint = torch.load(trained(family)[1], weights_only=True)
        edit(checkpoint)
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return change


def write_distributed(ckpt, folder):
    """The same in the format of ModelParallelStrategy: tensors in shards, and the rest in meta.pt."""
    rest = torch.load(ckpt, weights_only=True)
    dcp.save({"state_dict": rest.pop("state_dict")}, checkpoint_id=folder)
    rest.pop("optimizer_states")
    torch.save(rest, folder / "meta.pt")
    return folder


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def files_of(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def stored_tensors(file):
    """Names, types and places of a safetensors file's tensors, and their bytes; metadata may differ."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    del header["__metadata__"]
    return header, content[start:]


def state_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


# -- what comes out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["ckpt", "distributed", "folder"])
def test_transformers_loads_what_was_trained(family, format, trained, tmp_path):
    module, source = trained(family)
    module.save_pretrained(tmp_path / "expected")
    if format == "distributed":
        source = write_distributed(source, tmp_path / "distributed.ckpt")
    elif format == "folder":
        source = tmp_path / "expected"
    inspection = export(source, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(model.eval()), logits(module.model))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (family != "llama")
    # Byte for byte what the module itself writes; the card has the name of the folder.
    found, expected = files_of(tmp_path / "out"), files_of(tmp_path / "expected")
    sparsity, said = json.loads(found.pop("sparsity.json")), json.loads(expected.pop("sparsity.json"))
    assert (sparsity["zeros"], sparsity["layers"]) == (said["zeros"], said["layers"])
    assert b"50.00%" in found.pop("README.md")
    assert b"50.00%" in expected.pop("README.md")
    assert found == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == module.tokenizer.get_vocab()

    assert inspection.pattern == sparsity["pattern"] == "2:4"
    assert sparsity["score"] == (None if format == "folder" else "wanda")
    assert (sparsity["zeros"] * 2, sparsity["sparsity"]) == (sparsity["weights"], 0.5)
    plain = inspect(tmp_path / "out")
    assert {t.name: (t.zeros, t.pattern) for t in inspection.selected()} == {
        name: (layer["zeros"], layer["pattern"]) for name, layer in sparsity["layers"].items()
    }
    assert {t.name: t.zeros for t in plain.selected()} == {t.name: t.zeros for t in inspection.selected()}
    assert (inspection.totals(True), inspection.bytes_on_disk) == (plain.totals(True), plain.bytes_on_disk)
    assert inspection.masks == (None if format == "folder" else len(sparsity["layers"]))
    assert list(tmp_path.glob(".out*")) == []
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "expected").stat().st_mode


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype, trained, tmp_path):
    module, source = trained()
    inspection = export(source, tmp_path / "out", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = copy.deepcopy(module.model).to(getattr(torch, dtype))
    assert model.dtype == getattr(torch, dtype)
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in model.state_dict().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert (inspection.pattern, inspection.resurrected) == ("2:4", 0)


def test_values_that_a_dtype_cannot_hold(changed, tmp_path):
    def edit(checkpoint):
        checkpoint["state_dict"]["model.model.norm.weight"][3] = 1e6

    path = changed(edit)
    with pytest.raises(ExportError, match=r"dtype='float16' cannot hold 'model.model.norm.weight'.* 1e\+06"):
        export(path, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    export(path, tmp_path / "out", dtype="bfloat16")


def test_shards_as_transformers_makes_them(trained, tmp_path, monkeypatch):
    module, source = trained("tied")
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *args: save(*args, max_shard_size="20KB"))
    export(source, tmp_path / "shards")
    monkeypatch.undo()
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    export(tmp_path / "shards", tmp_path / "whole")  # and back
    assert torch.equal(
        load_file(tmp_path / "whole" / "model.safetensors")["model.norm.weight"], module.model.model.norm.weight
    )
    for folder in ("shards", "whole"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), logits(module.model))


def test_folders_with_other_names_than_the_model(trained, tmp_path):
    """The hub's GPT-2 lacks the prefix; experts of a mixture are stored one by one."""
    module, _ = trained("gpt2")
    module.save_pretrained(tmp_path / "gpt2")
    state = load_file(tmp_path / "gpt2" / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor.bfloat16() for name, tensor in state.items()}
    save_file(state, tmp_path / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    export(tmp_path / "gpt2", tmp_path / "gpt2-out")
    expected = copy.deepcopy(module.model).bfloat16().state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in state_of(tmp_path / "gpt2-out").items())

    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    mixtral = MixtralForCausalLM(MixtralConfig(**fields, num_local_experts=3))
    mixtral.save_pretrained(tmp_path / "mixtral")
    export(tmp_path / "mixtral", tmp_path / "mixtral-out")
    tensors = [stored_tensors(tmp_path / name / "model.safetensors") for name in ("mixtral", "mixtral-out")]
    assert tensors[0] == tensors[1]
    assert all(torch.equal(t, mixtral.state_dict()[n]) for n, t in state_of(tmp_path / "mixtral-out").items())


def test_dtypes_may_be_mixed_and_generation_settings_are_kept(trained, tmp_path):
    trained()[0].save_pretrained(tmp_path / "in")
    state = load_file(tmp_path / "in" / "model.safetensors")
    state = {name: tensor.bfloat16() if "_proj" in name else tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    # transformers refuses to save this, and loads it.
    (tmp_path / "in" / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.3}')
    export(tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: t.dtype for n, t in written.items()} == {n: t.dtype for n, t in state.items()}
    assert files_of(tmp_path / "out")["generation_config.json"] == files_of(tmp_path / "in")["generation_config.json"]


def test_tokenizer_and_processor_are_those_of_the_folder(trained, tmp_path):
    trained()[0].model.save_pretrained(tmp_path / "in")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    own = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>", padding_side="left")
    own.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    own.save_pretrained(tmp_path / "in")
    settings = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    for name in settings:
        (tmp_path / "in" / name).write_text(f'{{"of": "{name}"}}')
    export(tmp_path / "in", tmp_path / "out")
    export(tmp_path / "in", tmp_path / "out", overwrite=True)  # with a folder for templates inside
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.pad_token is None  # one that is the end of texts as well would take these for padding
    assert (found.eos_token, found.padding_side, found.chat_template) == ("<end>", "left", own.chat_template)
    for name in settings:
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "in" / name).read_text()
    module = CausalLM(str(tmp_path / "in"))
    module.save_pretrained(tmp_path / "saved")
    assert module.tokenizer.pad_token == "<end>"  # while it trains
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token is None


def test_a_model_that_this_process_has_registered(tmp_path):
    class OwnConfig(LlamaConfig):
        model_type = "own_llama"

    class OwnLM(LlamaForCausalLM):
        config_class = OwnConfig

    OwnConfig(**TINY).save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError, match="own_llama"):
        CausalLM(config=TINY | {"model_type": "own_llama"})
    AutoConfig.register("own_llama", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnLM)
    try:
        module = CausalLM(config=TINY | {"model_type": "own_llama"})
        module.save_pretrained(tmp_path / "in")
        export(tmp_path / "in", tmp_path / "out", progress=False)
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is OwnLM
        assert all(torch.equal(t, module.model.state_dict()[n]) for n, t in state_of(tmp_path / "out").items())
    finally:
        CONFIG_MAPPING._extra_content.pop("own_llama")
        MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(OwnConfig)
    with pytest.raises(ExportError, match=r"'own_llama', which is no .*: code .* is not run here. Register its"):
        export(tmp_path / "in", tmp_path / "again", progress=False)


# Whose routers transformers reads in float32 whatever they were, and whose configuration holds an infinity.
OTHERS = {
    "deepseek_v3": TINY
    | {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
    "mamba2": {
        "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_heads": 8, "state_size": 8,
        "n_groups": 1, "chunk_size": 4, "time_step_limit": [0.0, {"__float__": "Infinity"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("family", list(OTHERS))
def test_what_is_special_in_a_family(family, tmp_path):
    L.seed_everything(0, verbose=False)
    module = CausalLM(config=OTHERS[family] | {"model_type": family}, dtype="bfloat16").to(torch.bfloat16).eval()
    trainer = L.Trainer(accelerator="cpu", max_steps=0, logger=False, enable_checkpointing=False, barebones=True)
    trainer.fit(module, [{"input_ids": TOKENS}])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.model.config.to_dict() == module.model.config.to_dict()
    export(tmp_path / "last.ckpt", tmp_path / "model", "none")
    export(tmp_path / "model", tmp_path / "again", "none")
    for found in (loaded.model.state_dict(), state_of(tmp_path / "model"), state_of(tmp_path / "again")):
        assert found.keys() == module.model.state_dict().keys()
        assert all(torch.equal(found[n].double(), t.double()) for n, t in module.model.state_dict().items())


def test_weights_that_are_shared_by_chance_stay_whole(changed, tmp_path):
    def edit(checkpoint):
        state = checkpoint["state_dict"]
        state["model.model.layers.1.input_layernorm.weight"] = state["model.model.layers.0.input_layernorm.weight"]

    path = changed(edit)
    export(path, tmp_path / "out")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(t, state[f"model.{n}"]) for n, t in state_of(tmp_path / "out").items())


def test_nothing_foreign_in_the_configuration(changed, tmp_path):
    def edit(checkpoint):
        checkpoint["hyper_parameters"]["config"]["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}

    export(changed(edit), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


# -- tokenizers


def test_which_tokenizer(trained, changed, tokenizer, tmp_path):
    _, source = trained()
    export(source, tmp_path / "none", tokenizer="none")
    assert "tokenizer.json" not in files_of(tmp_path / "none")
    export(tmp_path / "none", tmp_path / "still-none")  # a folder without a tokenizer
    assert "tokenizer.json" not in files_of(tmp_path / "still-none")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    export(tmp_path / "none", tmp_path / "given", tokenizer=str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(tmp_path / "given").get_vocab() == tokenizer.get_vocab()

    def edit(checkpoint):
        checkpoint["hyper_parameters"]["tokenizer"] = "/gone/tokenizer"

    path = changed(edit)
    with pytest.raises(ExportError, match=r"tokenizer='/gone/tokenizer', which the checkpoint names.*'none'"):
        export(path, tmp_path / "out")
    export(path, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))


def test_a_tokenizer_with_too_many_tokens(trained, tokenizer, tmp_path):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<{i}>" for i in range(9)])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(ExportError, match="has 329 tokens, more than the model's 320"):
        export(trained()[1], tmp_path / "out", tokenizer=str(tmp_path / "larger"))


# -- what is refused


@pytest.mark.parametrize("format", ["ckpt", "distributed"])
def test_revived_weights_are_refused(format, changed, tmp_path):
    name = "model.model.layers.1.mlp.up_proj.weight"

    def edit(checkpoint):
        (state,) = (s for k, s in checkpoint["callbacks"].items() if k.startswith("WeightPruning"))
        mask = unpack_masks({name: state["masks"][name]})[name]
        row, column = (~mask).nonzero()[7].tolist()
        checkpoint["state_dict"][name][row, column] = 1e-30  # which float16 would hide

    path = changed(edit)
    if format == "distributed":
        path = write_distributed(path, tmp_path / "d.ckpt")
    with pytest.raises(ExportError, match=r"1 of 768 pruned weights of 'model.layers.1.mlp.up_proj.weight'"):
        export(path, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_masks_of_nothing_are_refused(changed, tmp_path):
    def edit(checkpoint):
        (state,) = (s for k, s in checkpoint["callbacks"].items() if k.startswith("WeightPruning"))
        state["masks"]["elsewhere.weight"] = next(iter(state["masks"].values()))

    with pytest.raises(ExportError, match=r"masks of 'elsewhere.weight' that belong to no tensor"):
        export(changed(edit), tmp_path / "out")


@pytest.mark.parametrize("where", ["ckpt", "meta.pt", ".metadata"])
def test_pickles_are_never_run(where, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Bomb:
        def __reduce__(self):
            return os.system, ("touch exploded",)

    path = tmp_path / "a.ckpt"
    if where == "ckpt":
        torch.save(torch.load(trained()[1], weights_only=True) | {"more": Bomb()}, path)
    else:
        write_distributed(trained()[1], path)
        torch.save({"hyper_parameters": Bomb()}, path / where, _use_new_zipfile_serialization=where == "meta.pt")
    with pytest.raises(CheckpointError, match="is not opened"):
        export(path, tmp_path / "out")
    assert not Path("exploded").exists()
    assert not (tmp_path / "out").exists()


def drop(key):
    return lambda checkpoint: checkpoint.pop(key)


def set_config(**fields):
    return lambda checkpoint: checkpoint["hyper_parameters"]["config"].update(fields)


def rename(old, new):
    def edit(checkpoint):
        checkpoint["state_dict"] = {n.replace(old, new): t for n, t in checkpoint["state_dict"].items()}

    return edit


def resize(checkpoint):
    checkpoint["state_dict"]["model.model.norm.weight"] = torch.ones(5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("hyper_parameters"), "does not say which model it holds"),
        (set_config(model_type="vit"), "model_type='vit', which is no causal language model"),
        (set_config(quantization_config={"quant_method": "gptq"}), "is quantized"),
        (set_config(hidden_size="wide"), "is not one of 'llama'"),
        (set_config(hidden_size=48), "has shape .* but the architecture"),
        (set_config(num_hidden_layers=3), r"9 such as 'model.layers.2.\S+' missing, none unexpected"),
        (rename("q_proj", "query"), r"missing, 2 such as 'model.layers.0.self_attn.query.weight' unexpected"),
        (rename("model.model", "net.model"), "unexpected; it was not saved by CausalLM"),
        (rename("q_proj", "q_proj.base_layer"), "merge the adapters"),
        (resize, r"'model.model.norm.weight' has shape \(5,\)"),
    ],
)
def test_checkpoints_that_do_not_fit(edit, message, changed, tmp_path):
    def without_masks(checkpoint):
        checkpoint["callbacks"] = {}
        edit(checkpoint)

    with pytest.raises(ExportError, match=message):
        export(changed(without_masks), tmp_path / "out", tokenizer="none")
    assert [entry.name for entry in tmp_path.iterdir()] == ["changed.ckpt"]


def test_tied_weights_that_differ(changed, tmp_path):
    def edit(checkpoint):
        checkpoint["state_dict"]["model.lm_head.weight"] = checkpoint["state_dict"]["model.lm_head.weight"] + 1

    for path in (changed(edit, "tied"), write_distributed(tmp_path / "changed.ckpt", tmp_path / "d.ckpt")):
        with pytest.raises(ExportError, match="are one weight in this architecture"):
            export(path, tmp_path / "out")


def test_folders_that_do_not_fit(trained, tmp_path):
    trained()[0].save_pretrained(tmp_path / "in")
    state = load_file(tmp_path / "in" / "model.safetensors")
    save_file({n: t for n, t in state.items() if "norm" not in n}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ExportError, match=r"5 such as 'model.layers.0.input_layernorm.weight' missing"):
        export(tmp_path / "in", tmp_path / "out")
    save_file(state | {"more.weight": torch.ones(3)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ExportError, match=r"none missing, 'more.weight' unexpected"):
        export(tmp_path / "in", tmp_path / "out")
    save_file(state | {"model.norm.weight": torch.ones(3)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ExportError, match=r"'model.norm.weight' has shape"):
        export(tmp_path / "in", tmp_path / "out")


# -- what was there before


@pytest.fixture
def old(trained, tmp_path):
    """A folder that an export has written, and what is in it."""
    export(trained("gpt2")[1], tmp_path / "out")
    return files_of(tmp_path / "out")


def test_an_old_folder_is_replaced_only_on_request(old, trained, tmp_path):
    with pytest.raises(ExportError, match=r"is not empty; .*--overwrite"):
        export(trained()[1], tmp_path / "out")
    assert files_of(tmp_path / "out") == old
    (tmp_path / "link").symlink_to(tmp_path / "out")
    export(trained()[1], tmp_path / "link", overwrite=True)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trained()[0].model))
    assert "generation_config.json" in files_of(tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "out"]
    (tmp_path / "empty").mkdir()
    export(trained()[1], tmp_path / "empty")


def test_nothing_but_a_model_is_overwritten(trained, tmp_path):
    _, source = trained()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years")
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    (tmp_path / "repository" / "config.json").write_text("{}")
    for name in ("notes", "repository"):
        with pytest.raises(ExportError, match="holds other things than a model"):
            export(source, tmp_path / name, overwrite=True)
    with pytest.raises(ExportError, match="is a file"):
        export(source, tmp_path / "notes" / "thesis.txt", overwrite=True)
    for output in (source.parent, source):
        with pytest.raises(ExportError, match="is or holds the checkpoint"):
            export(source, output, overwrite=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
@pytest.mark.parametrize("stage", ["write", "check", "rename"])
def test_a_failure_leaves_the_old_folder(error, stage, old, trained, tmp_path, monkeypatch):
    _, source = trained()
    seen = []
    if stage == "write":
        save = PreTrainedModel.save_pretrained

        def fail(*args, **kwargs):
            save(*args, **kwargs)  # all weights are there, the tokenizer is not
            seen.append(1)
            raise error

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    elif stage == "check":

        def fail(*args):
            seen.append(1)
            raise error

        monkeypatch.setattr("lightning_prune.checkpoints.export.same_bits", fail)
    else:
        replace = os.replace

        def fail(old, new):
            if Path(old).name == "new":
                seen.append(1)
                if isinstance(error, OSError):
                    raise error
                signal.raise_signal(signal.SIGINT)
            replace(old, new)

        monkeypatch.setattr("lightning_prune.structure.folders.os.replace", fail)
        # As on a file system that cannot exchange two folders in one step.
        monkeypatch.setattr("lightning_prune.structure.folders._exchange", lambda *_: False)
    with pytest.raises((ExportError, OSError) if isinstance(error, OSError) else KeyboardInterrupt):
        export(source, tmp_path / "out", overwrite=True)
    assert seen
    if stage == "rename" and isinstance(error, KeyboardInterrupt):  # held back until the new folder was in place
        assert json.loads(files_of(tmp_path / "out")["config.json"])["model_type"] == "llama"
    else:
        assert files_of(tmp_path / "out") == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("why", ["here", "disk"])
def test_a_folder_that_cannot_be_exchanged_is_refused(why, trained, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out" if why == "here" else tmp_path)
    if why == "disk":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    with pytest.raises(ExportError, match=r"output='.*out' is the folder that you are in, .*a folder inside"):
        export(trained()[1], "." if why == "here" else "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_whose_files_the_checkpoint_links_to_is_not_replaced(old, tmp_path):
    """As a snapshot in the hub's cache links to its blobs."""
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "out").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    with pytest.raises(ExportError, match="would be lost with it"):
        export(tmp_path / "snapshot", tmp_path / "out", overwrite=True)
    export(tmp_path / "snapshot", tmp_path / "other")
    (tmp_path / "snapshot" / "exported").symlink_to(tmp_path / "other")  # only where it was written to
    export(tmp_path / "snapshot", tmp_path / "other", overwrite=True)
    assert files_of(tmp_path / "out") == old


def test_a_folder_that_may_not_be_written_to_is_refused_before_the_work(old, trained, tmp_path, monkeypatch):
    """Nor can it be moved, though the folder around it is this user's."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "out" and access(path, mode))
    monkeypatch.setattr("lightning_prune.checkpoints.export.read_model", None)
    with pytest.raises(ExportError, match=r"output='.*out' cannot be written \(Permission denied: '.*out'\); choose"):
        export(trained()[1], tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == old


def test_ctrl_c_while_folders_are_exchanged_waits_for_the_new_one(old, trained, tmp_path, monkeypatch):
    _, source = trained()
    exchange, done = folders._exchange, []

    def interrupted(*paths):
        signal.raise_signal(signal.SIGINT)
        done.append(exchange(*paths))
        signal.raise_signal(signal.SIGINT)
        return done[-1]

    monkeypatch.setattr(folders, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "out", overwrite=True)
    assert len(done) == 1
    assert files_of(tmp_path / "out") != old
    assert inspect(tmp_path / "out").sparsity == inspect(source).sparsity
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_full_disk(old, trained, tmp_path):
    """The system itself refuses to write on, in the middle of the weights."""
    resource = pytest.importorskip("resource", reason="limits the size of files")
    _, source = trained()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ExportError, match=r"cannot be written: .*File too large"):
            export(source, tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_of(tmp_path / "out") == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_reads_back_other_than_it_was_written(trained, tmp_path, monkeypatch):
    save = PreTrainedModel.save_pretrained

    def flip(model, folder):
        save(model, folder)
        file = Path(folder, "model.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", flip)
    with pytest.raises(ExportError, match="reads back other than it was written"):
        export(trained()[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- the command line


def test_command(trained, tmp_path, capsys):
    _, source = trained()
    command = ["export", str(source), str(tmp_path / "out")]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr()
    assert "every one of them is 2:4" in " ".join(out.out.split())
    assert "Masks kept" in out.out
    assert "shards" not in out.err
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-prune: error: output=")
    assert error.count("\n") == 1
    assert main([*command, "--overwrite", "--tokenizer", "none"]) == 0
    assert inspect(tmp_path / "out").tensors[0].dtype == "float32"
    for wrong, message in [
        (["export", str(source)], "output"),
        (["export", "/no/such.ckpt", "x"], "checkpoint='/no/such.ckpt' does not exist"),
        ([*command, "--dtype", "int4"], "dtype='int4' is not known; use one of 'float32', 'bfloat16', 'float16'"),
        (
            [*command, "--overwrite", "--tokenizer", "/no/such"],
            "tokenizer='/no/such' is not an existing file or folder",
        ),
    ]:
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def fit_shards(folder: Path) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    module = CausalLM(config=FAMILIES["tied"] | {"intermediate_size": 45})
    rows = [{"input_ids": row} for row in torch.randint(320, (16, 16))]
    trainer = L.Trainer(
        accelerator="cpu", devices=2, max_steps=2, logger=False, enable_checkpointing=False,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[WeightPruning(score="magnitude", sparsity=0.5, progress=False)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    trainer.save_checkpoint(folder / "sharded.ckpt")
    state = {n: p.full_tensor() for n, p in module.model.state_dict().items()}
    if trainer.global_rank == 0:
        torch.save(state, folder / "whole.pt")


@pytest.mark.distributed
@pytest.mark.slow
def test_shards_of_two_processes(tmp_path):
    done = launch_calls(2, fit_shards, [(tmp_path,)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "sharded.ckpt").glob("*.distcp"))) == 2
    inspection = export(tmp_path / "sharded.ckpt", tmp_path / "out")
    assert (inspection.masks, inspection.sparsity) == (14, 0.5)
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert all(torch.equal(t, expected[n]) for n, t in state_of(tmp_path / "out").items())
