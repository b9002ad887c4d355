"""What a pruning says that it covers and leaves out; every figure is counted again by hand."""

from __future__ import annotations

import logging
import re
import warnings

import lightning as L
import pytest
import torch
import torch.distributed as dist
import transformers as hf
from tiny import TINY, make_tokens
from torch import nn

from lightning_prune import CausalLM, OneShot, PERPRetraining, SparsityMonitor, WeightPruning, prune
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.perp import add_adapters
from lightning_prune.pruning.coverage import Coverage, measure_coverage

TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 32}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.project = nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 16, 2, bidirectional=True)
        self.head = nn.Linear(32, 5)


class Distilled(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.teacher = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8)).requires_grad_(False)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.classifier = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 3))


def clip():
    text = TEXT | {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=60, **sizes, **heads))


def mixtral():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2))


class ForgetGate(nn.Module):
    """A gate that chooses no experts, with a matrix of its own beside a layer."""

    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(torch.ones(2, 4))
        self.down = nn.Linear(4, 2)


# Model, patterns of the parameters that are pruned, of those that count and are not, and what is said of these.
CASES = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), r"_proj\.weight", None, []),
    "mixtral": (
        mixtral,
        r"self_attn\..*_proj\.weight|mlp\.experts\..*",
        r"mlp\.gate\.weight",
        [r"mlp\.gate\.weight \(2 tensors, \d+\.\d%\): router"],
    ),
    "bert": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, max_position_embeddings=32)),
        r"(query|key|value|dense)\.weight",
        None,
        [r"classifier\.weight \(1 tensor, \d\.\d%\): head", r"word_embeddings\.weight \(1 tensor, .*\): embedding"],
    ),
    "bart": (bart, r"(_proj|fc1|fc2)\.weight", None, [r"shared\.weight \(1 tensor, .*\): embedding"]),
    "clip": (clip, r"(_proj|fc1|fc2|_projection|patch_embedding)\.weight", None, [r"position_embedding\.weight"]),
    "tagger": (Tagger, r"(project\.weight|lstm\.weight_.*)", None, [r"head\.weight .*: head"]),
    "teacher": (Distilled, r"student\..*\.weight", r"teacher\.[02]\.weight", [r"teacher\.\*\.weight .*: frozen"]),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
        r"c_(attn|proj|fc)\.weight",
        None,
        [r"wte\.weight .*: embedding"],
    ),
    "gate": (ForgetGate, r"down\.weight", "rates", ["rates .*: parameter of ForgetGate, which is no layer"]),
    "cnn": (Pictures, r"features\.[03]\.weight", r"up\.weight", ["ConvTranspose2d cannot be pruned", "head"]),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
        r"(_proj|query|key|value|dense|projection|fc1|fc2)\.weight",
        None,
        ["head", "position_embeddings"],
    ),
}  # fmt: skip


def by_hand(model, pruned, dense):
    """Numbers of all parameters, of those that are pruned, and of those that count and are not."""
    sizes = {n: len(p.flatten().tolist()) for n, p in model.named_parameters()}
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1}
    chosen = {n for n in matrices if re.search(pruned + "$", n)}
    left = {n for n in matrices - chosen if dense and re.search(dense, n)}
    return sum(sizes.values()), sum(sizes[n] for n in chosen), sum(sizes[n] for n in left)


@pytest.mark.parametrize("case", CASES)
def test_prune_says_what_it_leaves_out(case, caplog):
    make, pruned, dense, said = CASES[case]
    torch.manual_seed(0)
    model = make()
    everything, candidates, left = by_hand(model, pruned, dense)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO, "lightning_prune"):
        warnings.simplefilter("always")
        masks = prune(model, score="magnitude", sparsity=0.5)
    found = measure_coverage(make())
    assert sum(mask.numel() for mask in masks.values()) == candidates == found.candidates == found.counted
    assert (found.parameters, found.countable) == (everything, candidates + left)
    warned = [str(w.message) for w in caught if "candidates" in str(w.message)]
    noted = [record.getMessage() for record in caplog.records if record.name == "lightning_prune"]
    assert (len(warned), len(noted)) == ((1, 0) if candidates < 0.9 * (candidates + left) else (0, 1))
    text = (warned + noted)[0]
    assert f"{candidates:,} weights are candidates: {candidates / (candidates + left):.1%} of" in text
    assert f"{candidates / everything:.1%} of {everything:,} parameters" in text
    assert ("left out" in text) == bool(left)
    for pattern in said:
        assert re.search(pattern, text), text
    shares = sum(entry.numel for entry in found.left_out if entry.countable)
    assert shares == left


class Trained(L.LightningModule):
    """A user's module around any model; its loss needs no data."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return sum(p.float().square().sum() for p in self.parameters() if p.requires_grad)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(model, *callbacks, **kwargs):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=kwargs.pop("logger", False), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **kwargs,
    )  # fmt: skip
    trainer.fit(Trained(model), torch.utils.data.DataLoader(make_tokens(4, 4), batch_size=2))
    return trainer


@pytest.mark.few_fast(5)
@pytest.mark.parametrize("case", CASES)
def test_the_callback_file_and_monitor_have_the_same_figures(case, caplog, tmp_path):
    make, pruned, dense, _ = CASES[case]
    torch.manual_seed(0)
    model = make()
    everything, candidates, left = by_hand(model, pruned, dense)
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = SparsityMonitor(history=False)
        seen = {}
        trainer = fit(model, WeightPruning(score="magnitude", sparsity=0.5), monitor, default_root_dir=tmp_path,
                      logger=Kept(seen))  # fmt: skip
    said = [str(w.message) for w in caught] + [record.getMessage() for record in caplog.records]
    assert sum("weights are candidates" in line for line in said) == 1
    zeros = sum(
        p.numel() - int(p.count_nonzero()) for n, p in model.named_parameters() if re.search(pruned + "$", n)
    )  # fmt: skip
    (done,) = [line for line in said if "are pruned," in line]
    share, of_all = zeros / (candidates + left), zeros / everything
    assert f"{share:.2%} of the countable weights, {of_all:.2%} of all parameters" in done
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = inspect(tmp_path / "last.ckpt", progress=False)
    assert (found.totals().zeros, found.totals().numel) == (zeros, candidates + left)
    assert found.totals(True).numel == everything + sum(b.numel() for b in persistent_buffers(model))
    assert seen["sparsity/countable"] == pytest.approx(share)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("model", [nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8), nn.GRU(8, 8)])])
def test_the_callback_says_it_once_a_fit_before_training_also_where_it_prunes_later(model, step, caplog):
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, WeightPruning(score="magnitude", sparsity=0.5, schedule=OneShot(step)))
    said = [str(w.message) for w in caught] + [record.getMessage() for record in caplog.records]
    assert sum("weights are candidates" in line for line in said) == 1


def persistent_buffers(model):
    return [t for n, t in model.state_dict().items() if n in dict(model.named_buffers())]


class Kept(L.pytorch.loggers.logger.Logger):
    name, version = "kept", 0

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def log_metrics(self, metrics, step=None):
        self.seen.update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_zeros_that_keep_cannot_hold_are_named():
    torch.manual_seed(0)
    model = mixtral()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp.gate.weight" in name or "_proj.weight" in name:
                weight[torch.rand_like(weight) < 0.5] = 0
        model.model.embed_tokens.weight[3] = 0  # padding is no mask
        model.lm_head.weight[0, 0] = 0  # nor is one zero
    with pytest.warns(UserWarning, match="score='keep' cannot hold the zeros of 2 tensors") as caught:
        fit(model, WeightPruning(score="keep"))
    text = next(str(w.message) for w in caught if "cannot hold" in str(w.message))
    for layer in range(2):
        assert re.search(rf"model\.model\.layers\.{layer}\.mlp\.gate\.weight: [\d,]+ zeros", text)


def test_what_keep_holds_is_not_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Bilinear(8, 8, 1))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[2].weight.zero_()  # initialized to zero, not pruned
    frozen = nn.Bilinear(8, 8, 2).requires_grad_(False)
    with torch.no_grad():
        frozen.weight[:, ::2] = 0  # stays as it is
    found: list[Coverage] = []
    pruning = WeightPruning(score="keep")
    begin = pruning._begin
    pruning._begin = lambda *args: (found.append(pruning._plan.coverage), begin(*args))
    fit(nn.ModuleList([model, frozen]), pruning)
    assert found[0].zeros_lost == ()
    assert found[0].counted == 128


class Linear4bit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(8, 4, dtype=torch.int8))
        self.bias = nn.Parameter(torch.zeros(8))


class LinearActivation(nn.Module):
    pass


@pytest.mark.parametrize("plain", [1, 20])
def test_layers_in_a_form_that_nobody_knows_are_named(plain):
    """They are no parameters, so the shares know nothing of them: where they are many, it is a warning."""
    layers = [*(nn.Linear(8, 8) for _ in range(plain)), Linear4bit(), LinearActivation(), nn.LazyLinear(3), nn.GELU()]
    model = nn.Sequential(*layers)
    found = measure_coverage(model, ignore=[nn.LazyLinear])
    assert found.packed == ((f"{plain}", "Linear4bit"),)
    assert found.share == 1.0
    assert found.worrying == (plain == 1)
    assert f"1 layers whose weights are no plain parameters (quantized?): {plain} (Linear4bit)" in str(found)
    assert "neither" not in str(measure_coverage(nn.Sequential(*layers[:plain])))


def test_adapters_are_one_line():
    model = CausalLM(config=TINY).model
    prune(model, score="magnitude", sparsity=0.5)
    model = add_adapters(model, adapter="mask_lora", r=2)
    coverage = measure_coverage(model)
    (added,) = [entry for entry in coverage.left_out if entry.reason == "adapter"]
    matrices = [p for name, p in model.named_parameters() if "lora_" in name]
    assert (added.tensors, added.numel) == (len(matrices), sum(p.numel() for p in matrices))
    assert f"what PEFT has added ({len(matrices)} tensors" in str(coverage)
    assert "embedding" in str(coverage)


def test_long_lists_end():
    model = nn.Module()
    for i in range(30):
        setattr(model, f"part{'abcdefghijklmnopqrstuvwxyzABCD'[i]}", nn.ConvTranspose1d(2, 2, 1))
    model.fc = nn.Linear(4, 4)
    text = str(measure_coverage(model))
    assert "22 tensors more (64.7%): ConvTranspose1d cannot be pruned" in text
    assert len(text.splitlines()) == 11


def test_a_head_beside_it_is_not_counted_as_pruned_share():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 100)})
    found = measure_coverage(model, targets=["head"])
    assert (found.candidates, found.counted, found.countable, found.share) == (400, 0, 16, 0.0)
    assert found.pruned_shares({"head.weight": 200}) == (0.0, 200 / 520)


@pytest.mark.parametrize("case", ["mixtral", "tagger"])
def test_of_sharded_weights_the_whole_counts_without_other_ranks(case, monkeypatch):
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    make = CASES[case][0]
    whole = measure_coverage(make())
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    mesh = dist.init_device_mesh("cpu", (2,))
    model = make()
    for module in (*model.children(), model):
        fully_shard(module, mesh=mesh)
    assert next(model.parameters()).to_local().numel() * 2 == next(model.parameters()).numel()
    for collective in ("all_reduce", "all_gather_into_tensor", "broadcast", "all_gather"):
        monkeypatch.setattr(dist, collective, None)
    assert measure_coverage(model) == whole


class Distilling(Trained):
    """A student that learns from the outputs of a frozen teacher."""

    def training_step(self, batch, batch_idx):
        x = batch.float() @ torch.ones(4, 8) / 100
        return (self.model.student(x) - self.model.teacher(x)).square().mean()


@pytest.mark.parametrize("score", ["wanda", "gblm", "kfac", "magnitude"])
def test_a_frozen_teacher_stays_as_it_is(score):
    torch.manual_seed(0)
    model = Distilled()
    before = {n: p.clone() for n, p in model.teacher.named_parameters()}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[WeightPruning(score=score, sparsity=0.5, num_samples=4)],
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"teacher\.\*\.weight \(2 tensors, 80\.0%\): frozen"):
        trainer.fit(Distilling(model), torch.utils.data.DataLoader(make_tokens(8, 4), batch_size=2))
    for name, parameter in model.teacher.named_parameters():
        assert torch.equal(parameter, before[name])
    assert sum(int((layer.weight == 0).sum()) for layer in model.student) == 64


def test_retraining_without_adapters_prunes_the_frozen_weights():
    torch.manual_seed(0)
    module = CausalLM(config=TINY)
    pruning = WeightPruning(score="magnitude", sparsity=0.5)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[pruning, PERPRetraining(adapter=None, train=("norm",))],
    )  # fmt: skip
    data = torch.utils.data.DataLoader([{"input_ids": row} for row in make_tokens(4, 8, 300)], batch_size=2)
    trainer.fit(module, data)
    assert len(pruning.masks) == 14
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("frozen", "targets", "retraining", "pruned"),
    [
        ("model.layers.0", None, {}, 7),
        ("model.layers.0", None, {"adapter": None, "train": ("norm",)}, 7),
        ("model.layers.0", ["layers.0", "layers.1"], {}, 14),
        ("", None, {}, 14),  # loaded for inference: it says nothing
    ],
)
def test_layers_that_a_user_froze_are_left_dense_beside_adapters_too(frozen, targets, retraining, pruned):
    torch.manual_seed(0)
    module = CausalLM(config=TINY)
    part = module.model.get_submodule(frozen).requires_grad_(False)
    dense = {name: p.clone() for name, p in part.named_parameters() if "proj" in name}
    pruning, adapted = WeightPruning(score="magnitude", sparsity=0.5, targets=targets), []

    class Middle(L.Callback):
        def on_train_start(self, trainer, pl_module):
            adapted.extend(name for name, _ in pl_module.named_parameters() if name.endswith("lora_A.default.weight"))

    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[pruning, PERPRetraining(**retraining), Middle()],
    )  # fmt: skip
    data = torch.utils.data.DataLoader([{"input_ids": row} for row in make_tokens(4, 8, 300)], batch_size=2)
    trainer.fit(module, data)
    assert len(pruning.masks) == pruned
    assert len(adapted) == (0 if retraining else pruned)
    same = [torch.equal(weight, part.get_parameter(name)) for name, weight in dense.items()]
    assert all(same) if pruned == 7 else not any(same)
