"""CausalLM: loading, optimization, checkpoints, saving."""

import math
import os
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from versions import WEIGHTS_ONLY

from lightning_prune import prune
from lightning_prune.callbacks.perp_retraining import PERPRetraining
from lightning_prune.checkpoints.sources import empty_pretrained, load_tokenizer, trained_tokenizer
from lightning_prune.errors import CheckpointError
from lightning_prune.evaluation.perplexity import perplexity
from lightning_prune.structure import saving
from lightning_prune.text import module as module_file
from lightning_prune.text.data import EMBEDDED, TextDataModule
from lightning_prune.text.module import CausalLM, decay_groups, learning_rate_factor

GGUF = os.environ.get("LIGHTNING_PRUNE_SMOLLM2")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "text.txt").write_text(EMBEDDED["austen"].read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    module = TextDataModule(
        str(folder / "text.txt"),
        sample_by="paragraph",
        vocab_size=400,
        block_size=32,
        batch_size=2,
        cache_dir=str(folder),
    )
    module.setup("fit")
    return module


@pytest.fixture
def batch(data):
    return next(iter(data.val_dataloader()))


def trainer(tmp_path, **kwargs):
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
        "max_steps": 2,
        "limit_val_batches": 3,
    }
    return L.Trainer(**{**options, **kwargs})


def random_model(**kwargs):
    torch.manual_seed(0)
    return CausalLM(config=LLAMA, **kwargs)


@pytest.fixture
def folder(tmp_path):
    """A pretrained model without a tokenizer."""
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def assert_same_weights(a, b):
    for (name, p), (other, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(p, q), name


# ---- construction


def test_from_folder_and_from_config(folder, tmp_path):
    pretrained = CausalLM(str(folder))
    assert_same_weights(pretrained.model, AutoModelForCausalLM.from_pretrained(folder))
    assert CausalLM(folder).hparams == pretrained.hparams  # names, which checkpoints keep
    assert all(module.training for module in pretrained.modules())
    assert pretrained.tokenizer is None
    shapes = {name: p.shape for name, p in pretrained.named_parameters()}
    for config in (LLAMA, LlamaConfig(**LLAMA).to_dict(), folder, str(folder / "config.json")):
        random = CausalLM(config=config)
        assert {name: p.shape for name, p in random.named_parameters()} == shapes
        assert not torch.equal(random.model.lm_head.weight, pretrained.model.lm_head.weight)


def test_dtype_and_attention(folder):
    for kwargs in ({"model": str(folder)}, {"config": LLAMA}):
        model = CausalLM(**kwargs, dtype="bfloat16", attn_implementation="eager")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "Exactly one of model and config"),
        ({"model": "a", "config": LLAMA}, "Exactly one of model and config"),
        ({"config": LLAMA, "gguf_file": "a.gguf"}, "gguf_file='a.gguf' needs model"),
        ({"config": {"hidden_size": 64}}, "lacks the field 'model_type'"),
        ({"config": {"model_type": "lama"}}, "not a configuration of transformers"),
        ({"config": {"model_type": "vit"}}, "model_type='vit', which is no causal language model"),
        ({"config": {**LLAMA, "dtype": torch.float32}}, "config must hold plain values only"),
        ({"config": LlamaConfig(**LLAMA)}, r"received LlamaConfig. Pass config.to_dict\(\)"),
        ({"config": LLAMA, "dtype": "float8"}, "dtype='float8' is not known. Use one of 'float32'"),
        ({"config": LLAMA, "lr_schedule": "step"}, "lr_schedule='step' is not known"),
        ({"config": LLAMA, "learning_rate": 0.0}, "learning_rate=0.0 is out of range"),
        ({"config": LLAMA, "learning_rate": "fast"}, "learning_rate='fast' is out of range: it must be above 0"),
        ({"config": LLAMA, "betas": 0.9}, "betas=0.9 is out of range: it must be two values"),
        ({"config": LLAMA | {"hidden_size": "a"}}, "is not a configuration of transformers: .*'hidden_size'"),
        ({"config": {"model_type": "lama"}}, "is not a configuration of transformers: .* identifier: lama.$"),
        ({"config": LLAMA, "weight_decay": -1.0}, "weight_decay=-1.0 is out of range"),
        ({"config": LLAMA, "betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) is out of range"),
        ({"config": LLAMA, "warmup_steps": -1}, "warmup_steps=-1 is out of range"),
        ({"config": LLAMA, "warmup_ratio": 1.0}, "warmup_ratio=1.0 is out of range"),
        ({"config": LLAMA, "warmup_ratio": 0.1, "warmup_steps": 1}, "exclude each other"),
        ({"config": LLAMA, "min_lr_ratio": 2.0}, "min_lr_ratio=2.0 is out of range"),
    ],
)
def test_argument_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(**kwargs)


def test_path_errors(folder):
    with pytest.raises(FileNotFoundError, match=r"model='./missing' is not an existing"):
        CausalLM("./missing")
    with pytest.raises(FileNotFoundError, match=r"model='missing.gguf' is not an existing"):
        CausalLM("missing.gguf")
    with pytest.raises(FileNotFoundError, match=r"gguf_file='.*a.gguf' is not an existing"):
        CausalLM(str(folder), gguf_file="a.gguf")
    with pytest.raises(FileNotFoundError, match=r"config='./missing.json'"):
        CausalLM(config="./missing.json")
    with pytest.raises(ValueError, match=r"only \.gguf files are loaded directly"):
        CausalLM(str(folder / "config.json"))
    (folder / "a.gguf").touch()
    with pytest.raises(ValueError, match="already names a GGUF file"):
        CausalLM(str(folder / "a.gguf"), gguf_file="b.gguf")


@pytest.mark.parametrize(
    ("argument", "take"),
    [
        ("model", lambda name: CausalLM(model=name)),
        ("model", empty_pretrained),
        ("config", lambda name: CausalLM(config=name)),
        ("tokenizer", load_tokenizer),
    ],
    ids=["model", "meta", "config", "tokenizer"],
)
def test_a_name_that_nothing_goes_by_is_in_the_message(argument, take, monkeypatch):
    """Where the hub is out of reach, transformers names the connection alone."""

    def fail(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    for loader in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", fail)
    with pytest.raises(OSError, match=rf"{argument}='my_modl' is no folder on this machine, .* We couldn't connect"):
        take("my_modl")


def test_a_disk_that_fails_is_no_missing_name(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        CausalLM(model=str(folder))


# ---- losses


def test_losses_ignore_padding(batch):
    model = random_model().eval()
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.zeros(2, 3, dtype=torch.long)], 1),
        "attention_mask": torch.tensor([[1] * 32 + [0] * 3] * 2),
    }
    expected = model.calibration_loss(batch)
    assert expected.shape == (2,)
    assert expected.requires_grad
    torch.testing.assert_close(model.calibration_loss(padded), expected)
    padded["labels"] = padded["input_ids"]
    torch.testing.assert_close(model.calibration_loss(padded), expected)
    reference = model.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    torch.testing.assert_close(expected.mean(), reference)


def test_texts_of_a_packed_row_do_not_meet():
    """What says so is for the model too, not for the labels alone."""
    model = random_model().eval()
    texts = [torch.randint(400, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 5, 9)]
    row = {
        "input_ids": torch.cat(texts, 1),
        "position_ids": torch.cat([torch.arange(text.shape[1]) for text in texts])[None],
    }
    sums = [model.model(input_ids=t, labels=t).loss * (t.shape[1] - 1) for t in texts]
    expected = torch.stack(sums).sum() / (21 - 3)
    torch.testing.assert_close(model.calibration_loss(row)[0], expected)
    torch.testing.assert_close(model._token_losses(row)[0].sum() / 18, expected)


def test_a_batch_without_any_label_counts_for_nothing(tmp_path):
    ids = torch.randint(400, (2, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids[0], "labels": ids[0]}, {"input_ids": ids[1], "labels": torch.full((8,), -100)}]
    model = random_model()
    first = model.model(input_ids=ids[:1], labels=ids[:1]).loss.item()
    run = trainer(tmp_path, max_steps=2, log_every_n_steps=1)
    run.fit(model, DataLoader(rows, batch_size=1))
    assert math.isnan(run.callback_metrics["train_loss"].item())  # of the second batch: there is none
    assert run.callback_metrics["train_loss_epoch"].item() == pytest.approx(first, rel=1e-5)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_logged_values_are_means_over_tokens(tmp_path, data):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(400, (n,), generator=generator) for n in (5, 32, 11)]
    loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=1)
    model = random_model()
    run = trainer(tmp_path)
    run.validate(model, loader, verbose=False)
    reference = perplexity(model, rows)
    assert run.callback_metrics["val_loss"].item() == pytest.approx(reference.nll, rel=1e-6)
    assert run.callback_metrics["val_perplexity"].item() == pytest.approx(reference.perplexity, rel=1e-5)
    run.test(model, loader, verbose=False)
    assert run.callback_metrics["test_loss"].item() == pytest.approx(reference.nll, rel=1e-6)


# ---- optimization


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_factor(schedule):
    for step in range(25):
        p = min(1.0, (step - 5) / 15)
        shape = {"constant": 1.0, "linear": 1 - p, "cosine": 0.5 * (1 + math.cos(math.pi * p))}[schedule]
        floor = 1.0 if schedule == "constant" else 0.1 + 0.9 * shape
        expected = (step + 1) / 5 if step < 5 else floor
        assert learning_rate_factor(step, 20, 5, schedule, 0.1) == pytest.approx(expected)


def test_decay_groups():
    model = random_model().model
    for tied in (False, True):
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.model.layers[0].mlp.up_proj.weight.requires_grad = False
        decayed, kept = decay_groups(model, 0.1)
        names = {id(p): name for name, p in model.named_parameters()}
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
        kept_names = {names[id(p)] for p in kept["params"]}
        assert kept_names == {n for n in names.values() if "norm" in n or "embed" in n}
        rest = {n for n in names.values() if n.endswith("_proj.weight")} | {"lm_head.weight"}
        rest -= {"model.layers.0.mlp.up_proj.weight"} | ({"lm_head.weight"} if tied else set())
        assert {names[id(p)] for p in decayed["params"]} == rest


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("kwargs", [{"warmup_steps": 2}, {"warmup_ratio": 0.4}])
def test_schedule_follows_optimizer_steps(tmp_path, data, kwargs):
    rates = Rates()
    run = trainer(tmp_path, max_steps=5, accumulate_grad_batches=2, callbacks=[rates], limit_val_batches=0)
    run.fit(random_model(learning_rate=0.01, **kwargs), datamodule=data)
    assert rates.rates == pytest.approx([0.01 * learning_rate_factor(i, 5, 2) for i in range(5)])


def test_unlimited_training_needs_a_constant_schedule(tmp_path, data):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    unlimited = {"max_steps": -1, "max_epochs": -1, "callbacks": [Stop()], "limit_val_batches": 0}
    with pytest.raises(ValueError, match=r"lr_schedule='cosine' .* unlimited here. Set max_steps"):
        trainer(tmp_path, **unlimited).fit(random_model(), datamodule=data)
    trainer(tmp_path, **unlimited).fit(random_model(lr_schedule="constant", warmup_steps=3), datamodule=data)


@pytest.mark.few_fast(1)
@pytest.mark.parametrize("kwargs", [{}, {"gradient_checkpointing": True}, {"fused": True, "weight_decay": 0.1}])
def test_fit(tmp_path, data, kwargs):
    model = random_model(learning_rate=3e-3, lr_schedule="constant", **kwargs)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert checkpointing == kwargs.get("gradient_checkpointing", False)
    run = trainer(tmp_path, max_steps=30, val_check_interval=30)
    run.validate(model, datamodule=data, verbose=False)
    before = run.callback_metrics["val_loss"]
    run.fit(model, datamodule=data)
    metrics = run.callback_metrics
    assert metrics["val_loss"] < before - 0.3
    assert metrics["val_perplexity"].item() == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-5)
    assert {"train_loss", "val_loss", "val_perplexity"} <= set(metrics)
    assert model.tokenizer is data.tokenizer


def test_gradient_checkpointing_changes_nothing(batch):
    gradients = []
    for checkpointing in (False, True):
        model = random_model(gradient_checkpointing=checkpointing)
        model.calibration_loss(batch).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# ---- data module and tokenizer


def test_tokenizer_and_blocks_must_fit(tmp_path, data):
    with pytest.raises(ValueError, match="400 tokens, more than the model's 399 embeddings"):
        trainer(tmp_path).fit(CausalLM(config={**LLAMA, "vocab_size": 399}), datamodule=data)
    with pytest.raises(ValueError, match=r"block_size=32 .* exceeds the model's 16 positions"):
        trainer(tmp_path).fit(CausalLM(config={**LLAMA, "max_position_embeddings": 16}), datamodule=data)
    other = trained_tokenizer(["abab baba " * 9, "abba " * 9], 262, tmp_path)
    other.save_pretrained(tmp_path / "other")
    ids, known = data.tokenizer.get_vocab(), {number: token for token, number in other.get_vocab().items()}
    wrong = sum(known.get(number, token) != token for token, number in ids.items())
    assert wrong
    with pytest.raises(ValueError, match=f"is not the model's .*: {wrong} of its 400 ids mean other tokens there"):
        trainer(tmp_path).fit(CausalLM(config=LLAMA, tokenizer=str(tmp_path / "other")), datamodule=data)


@pytest.mark.parametrize("held", ["gpt2", Tokenizer(models.BPE())], ids=["name", "of tokenizers"])
def test_a_data_module_may_call_something_else_its_tokenizer(tmp_path, held):
    class Own(L.LightningDataModule):
        tokenizer, block_size = held, (16, 16)

        def train_dataloader(self):
            return DataLoader([{"input_ids": torch.arange(16)}])

    module = CausalLM(config=LLAMA)
    trainer(tmp_path, max_steps=1).fit(module, Own())
    assert module.tokenizer is None


def test_own_tokenizer_is_kept(tmp_path, data):
    data.tokenizer.save_pretrained(tmp_path / "own")
    model = random_model(tokenizer=str(tmp_path / "own"))
    trainer(tmp_path).fit(model, datamodule=data)
    assert model.tokenizer is not data.tokenizer
    assert model.tokenizer.name_or_path == str(tmp_path / "own")


def test_without_a_trainer_nothing_is_read_once(tmp_path, folder, data, batch):
    model = CausalLM(str(folder), read_once=True)
    for use in (lambda: model(batch["input_ids"]), lambda: model.save_pretrained(tmp_path / "model")):
        with pytest.raises(RuntimeError, match="read_once"):
            use()
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="needs model"):
        CausalLM(config=LLAMA, read_once=True)
    with pytest.raises(ValueError, match="without read_once"):
        trainer(tmp_path, callbacks=[PERPRetraining()]).fit(model, datamodule=data)
    model.configure_model()
    assert_same_weights(model, CausalLM(str(folder)))


# ---- checkpoints and saving


@pytest.mark.parametrize("origin", ["config", "folder", "read once"])
def test_checkpoint_round_trip(tmp_path, data, batch, folder, origin):
    if origin == "config":
        model = random_model(learning_rate=0.01)
    else:
        model = CausalLM(str(folder), read_once=origin == "read once")
    run = trainer(tmp_path)
    run.fit(model, datamodule=data)
    run.save_checkpoint(tmp_path / "model.ckpt")
    for file in folder.iterdir():  # a checkpoint must not need the folder it started from
        file.unlink()
    loaded = CausalLM.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert_same_weights(loaded, model)
    assert loaded.hparams["learning_rate"] == model.hparams["learning_rate"]
    assert loaded.hparams["model"] is None
    assert loaded.tokenizer.get_vocab() == data.tokenizer.get_vocab()
    torch.testing.assert_close(loaded(batch["input_ids"]), model(batch["input_ids"]), rtol=0, atol=0)
    # saved once more, and resumed
    again = trainer(tmp_path, max_steps=3)
    again.fit(loaded, datamodule=data, ckpt_path=tmp_path / "model.ckpt", **WEIGHTS_ONLY)
    assert again.global_step == 3
    again.save_checkpoint(tmp_path / "again.ckpt")
    assert_same_weights(CausalLM.load_from_checkpoint(tmp_path / "again.ckpt", weights_only=True), loaded)


def test_checkpoint_follows_a_changed_architecture(tmp_path, data):
    model = random_model()
    run = trainer(tmp_path)
    run.fit(model, datamodule=data)
    model.model.model.layers = model.model.model.layers[:1]
    model.model.config.num_hidden_layers = 1
    model.model.config.layer_types = None
    run.save_checkpoint(tmp_path / "small.ckpt", weights_only=True)
    loaded = CausalLM.load_from_checkpoint(tmp_path / "small.ckpt", weights_only=True)
    assert_same_weights(loaded, model)


def test_save_pretrained(tmp_path, data, batch):
    model = random_model()
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    model.tokenizer = data.tokenizer
    model.model.model.layers[0].mlp.up_proj.weight.data[::2] = 0
    model.save_pretrained(tmp_path / "with")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    assert_same_weights(loaded, model.model)
    torch.testing.assert_close(loaded(batch["input_ids"]).logits, model.eval()(batch["input_ids"]))
    assert AutoTokenizer.from_pretrained(tmp_path / "with").get_vocab() == data.tokenizer.get_vocab()
    assert CausalLM(str(tmp_path / "with")).tokenizer.get_vocab() == data.tokenizer.get_vocab()


def test_columns_that_a_model_does_not_take_are_named(batch):
    class Strict(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = random_model()
    model.model = Strict(model.model.config)
    batch = {"input_ids": batch["input_ids"], "length": torch.ones(len(batch["input_ids"]))}
    message = r"the batch has \['length'\], which .* Strict does not take \(it takes input_ids, .*remove_columns"
    for use in (
        lambda: model.training_step(batch, 0),
        lambda: model.calibration_loss(batch),
        lambda: prune(model.model, [batch], progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.fixture
def saved(tmp_path):
    """A folder that `save_pretrained` has written, with a file and old weights beside, and what is in it."""
    random_model().save_pretrained(tmp_path / "model")
    for name in ("notes.txt", "model_averaged.safetensors"):
        (tmp_path / "model" / name).write_text("mine")
    return tmp_path / "model", {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}


@pytest.mark.parametrize("call", ["add_check_sums", "save_tokenizer", "described_files"])
def test_what_was_saved_stays_whole_when_saving_fails(call, saved, data, monkeypatch):
    folder, before = saved
    model = CausalLM(config=LLAMA)  # others
    model.tokenizer = data.tokenizer

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module_file if call == "described_files" else saving, call, full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("place", ["beside", "inside", "here", "own", "link"])
def test_what_lies_beside_a_model_stays_when_it_is_saved_again(place, saved, tmp_path, monkeypatch):
    folder, before = saved
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    if place == "inside":
        (folder / "logs").mkdir()
        (folder / "logs" / "events").write_text("mine")
    elif place == "here":
        monkeypatch.chdir(folder)
    elif place == "own":  # the folder around it is another user's
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder.parent and access(path, mode))
    elif place == "link":
        (tmp_path / "link").symlink_to(folder)
    inode = folder.stat().st_ino
    model = CausalLM(config=LLAMA)  # others
    model.save_pretrained({"here": ".", "link": tmp_path / "link"}.get(place, folder))
    assert_same_weights(AutoModelForCausalLM.from_pretrained(folder), model.model)
    assert {file.name for file in folder.iterdir()} - {"logs"} == set(before)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "README.md").read_text().splitlines()[7] == "# model"
    if place == "inside":
        assert (folder / "logs" / "events").read_text() == "mine"
    assert (folder.stat().st_ino == inode) == (place in ("inside", "here", "own"))
    assert {entry.name for entry in tmp_path.iterdir()} <= {"model", "link"}


def test_parameters_that_the_configuration_does_not_say_are_not_lost_in_silence(tmp_path):
    model = random_model()
    for layer in model.model.model.layers:
        layer.mlp.down_proj.bias = torch.nn.Parameter(torch.ones(layer.mlp.down_proj.out_features))
    with pytest.raises(ValueError, match=r"2 parameters that its configuration does not say.*'model.*down_proj.bias'"):
        model.save_pretrained(tmp_path / "model")
    for layer in model.model.model.layers:
        layer.mlp.down_proj.bias = None
    model.model.config.attention_bias = True
    with pytest.raises(ValueError, match=r"lacks 8 parameters that its configuration says.*'model.*bias'"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    model.model.config.attention_bias = False
    with pytest.raises(ValueError, match=r"folder='.*file' is a file"):
        model.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_prompts_of_peft(kind, data, batch, tmp_path):
    model = random_model()
    model.model = get_peft_model(model.model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids = batch["input_ids"]
    if kind is not PrefixTuningConfig:  # written out; a prefix is no tokens
        embeddings = model.model.get_base_model().get_input_embeddings()(ids)
        whole = torch.cat([model.model.get_prompt(batch_size=len(ids)), embeddings], 1)
        expected = model.model.get_base_model()(inputs_embeds=whole).logits[:, 3:]
        torch.testing.assert_close(model(ids), expected)
    losses = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for measured in (model, model.model):
        assert perplexity(measured, list(ids)).nll == pytest.approx(losses.item(), rel=1e-5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, datamodule=data)
    changed = [name for name, p in model.named_parameters() if not torch.equal(before[name], p)]
    assert changed
    assert all(".prompt_encoder." in name for name in changed)
    with pytest.raises(ValueError, match=r"plain transformers model, and this one is in a PeftModelForCausalLM: merge"):
        model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    run.save_checkpoint(tmp_path / "prompts.ckpt")
    with pytest.raises(CheckpointError, match=r"a model in PEFT's \(prompts or a prefix\), .* put the same around it"):
        CausalLM.load_from_checkpoint(tmp_path / "prompts.ckpt")
    state = torch.load(tmp_path / "prompts.ckpt", weights_only=True)
    model.on_load_checkpoint(state)  # of the same kind
    model.load_state_dict(state["state_dict"])


@pytest.mark.slow
@pytest.mark.skipif(GGUF is None, reason="LIGHTNING_PRUNE_SMOLLM2 does not name the GGUF file of SmolLM2-135M")
def test_gguf(tmp_path):
    model = CausalLM(GGUF)
    same = CausalLM(os.path.dirname(GGUF), gguf_file=os.path.basename(GGUF), dtype="bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    assert same.tokenizer(text)["input_ids"] == ids[0].tolist()
    assert perplexity(model, ids, seq_len=ids.shape[1]).perplexity < 40  # 26.2; a wrong layout gives thousands
    model.save_pretrained(tmp_path / "plain")
    loaded = CausalLM(str(tmp_path / "plain"))
    assert_same_weights(loaded.model, model.model)
    assert loaded.tokenizer(text)["input_ids"] == ids[0].tolist()
    checkpoint = {"hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    rebuilt = CausalLM(**checkpoint["hyper_parameters"])
    rebuilt.load_state_dict(model.state_dict())
    assert_same_weights(rebuilt.model, model.model)
    assert rebuilt.tokenizer(text)["input_ids"] == ids[0].tolist()
