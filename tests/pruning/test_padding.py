"""Batches of transformers models that are no plain causal language model: their loss, their padding, their stacks."""

import warnings

import naive
import numpy as np
import pytest
import torch
import transformers as tr
from batch_models import (
    BERT,
    MODELS,
    WAV2VEC2,
    build,
    mask_of,
    normal,
    one_by_one,
    own_loss,
    padded,
    samples_of,
    tokens,
)
from tiny import make_llama, make_tokens, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_prune import prune
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.running import causal_lm_loss
from lightning_prune.pruning.statistics import ALL_STATISTICS
from lightning_prune.pruning.targets import find_targets

LENGTHS = [9, 5, 9, 3]


def text(lengths=LENGTHS, seed=0, **more):
    rows = [tokens(n, seed=seed + i) for i, n in enumerate(lengths)]
    return {"input_ids": padded(rows, 1), "attention_mask": mask_of(lengths), **more}


def targets_text(lengths, seed=7):
    return padded([tokens(n, seed=seed + i) for i, n in enumerate(lengths)], -100)


CLASSES = torch.tensor([0, 2, 1, 0])


def batch_of(name):
    """A padded batch for a model, and the lengths of its parts."""
    short = {"input_ids": LENGTHS, "attention_mask": LENGTHS}
    if name.endswith("classifier") and name != "vit classifier":
        return text(labels=CLASSES), short
    if name == "bert tagger":
        return text(labels=targets_text(LENGTHS) % 5 * (mask_of(LENGTHS)) - 100 * (1 - mask_of(LENGTHS))), {
            **short,
            "labels": LENGTHS,
        }
    if name == "bert masked lm":
        labels = targets_text(LENGTHS).masked_fill(tokens(4, 9, seed=5) > 60, -100)
        labels[:, 1] = 7
        return text(labels=labels), {**short, "labels": LENGTHS}
    if name == "bert question answering":
        return text(start_positions=CLASSES, end_positions=torch.tensor([3, 2, 2, 1])), short
    if name in ("bart", "t5", "encoder decoder"):  # source and target of one length, padded differently
        target = [4, 9, 2, 7]
        return text(labels=targets_text(target)), {**short, "labels": target}
    if name == "vit classifier":
        return {"pixel_values": normal(4, 3, 16, 16).double(), "labels": CLASSES}, {"pixel_values": [3] * 4}
    if name == "image captioner":
        target = [4, 9, 2, 7]
        return {"pixel_values": normal(4, 3, 16, 16).double(), "labels": targets_text(target)}, {"labels": target}
    if name == "whisper":
        target = [4, 9, 2, 7]
        return {"input_features": normal(4, 8, 40).double(), "labels": targets_text(target)}, {"labels": target}
    assert name == "wav2vec2"
    lengths = [800, 490, 800, 310]
    waves = padded([normal(n, seed=i).double() for i, n in enumerate(lengths)], 0.0)
    batch = {"input_values": waves, "attention_mask": mask_of(lengths), "labels": tokens(4, 3) % 19 + 1}
    return batch, {"input_values": lengths, "attention_mask": lengths}


def statistics(model, batches, loss_fn=None, wanted=("input_norm", "gradient_l2")):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    ignore = [
        f"*{n}"
        for n in ("lm_head", "proj_out", "encoder.pooler.dense", "predictions.decoder")
        if any(name.endswith(n) for name in names)
    ]
    found = find_targets(model, targets=[nn.Linear], ignore=ignore)
    size = sum(len(next(iter(b.values()))) for b in batches)
    return collect(model, batches, found, wanted, num_samples=size, loss_fn=loss_fn, progress=False)


def close(found, expected):
    for name, entry in found.items():
        norm, gradient = expected[name]
        torch.testing.assert_close(entry.input_norm.double(), norm, rtol=1e-4, atol=1e-6, msg=name)
        if entry.gradient_l2 is not None:
            scale = float(gradient.max())
            torch.testing.assert_close(entry.gradient_l2.double(), gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)


# -- padding, against samples without any --------------------

PADDED = [
    n
    for n in MODELS
    if n not in ("bert multiple choice", "bert question answering", "clip", "llava", "blip", "image captioner")
]


@pytest.mark.few_fast(4)
@pytest.mark.parametrize("name", PADDED)
def test_a_padded_batch_counts_as_its_samples_do(name):
    model = build(name)
    batch, lengths = batch_of(name)
    expected = one_by_one(model, samples_of(batch, lengths))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no layer's padding is unknown
        close(statistics(model, [batch]), expected)
        close(statistics(model, [batch], own_loss), expected)
        close(statistics(model, [batch], wanted=("input_norm",)), expected)


def test_question_answering():
    """Its loss compares all positions of a padded row, so gradients are those of the padded samples."""
    model = build("bert question answering")
    batch, lengths = batch_of("bert question answering")
    gradients = one_by_one(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)])
    norms = one_by_one(model, samples_of(batch, lengths))
    close(statistics(model, [batch]), {n: (norms[n][0], gradients[n][1]) for n in norms})


def test_multiple_choice():
    model = build("bert multiple choice")
    lengths = [9, 4, 5, 6, 7, 8, 3, 2]
    batch = {k: v.view(4, 2, 9) for k, v in text(lengths).items()} | {"labels": torch.tensor([0, 1, 1, 0])}
    samples = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    gradients = {n: g for n, (_, g) in one_by_one(model, samples).items()}
    # What is counted: the choices without padding; their forward pass is that of any sequence.
    choices = [{"input_ids": text(lengths)["input_ids"][i : i + 1, :n]} for i, n in enumerate(lengths)]
    norms = one_by_one(model.bert, choices, lambda m, b: m(**b).pooler_output.sum())
    found = statistics(model, [batch])
    for name, entry in found.items():
        if name != "classifier.weight":
            expected = norms[name.removeprefix("bert.")][0] * 2**0.5  # two choices a sample
            torch.testing.assert_close(entry.input_norm.double(), expected, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(entry.gradient_l2.double(), gradients[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[4, 9, 2, 7], [6, 4, 5, 2], [12, 3, 1, 12]])
def test_a_decoder_of_any_length_has_its_own_padding(lengths):
    model = build("t5")
    batch = text(labels=targets_text(lengths))
    short = {"input_ids": LENGTHS, "attention_mask": LENGTHS, "labels": lengths}
    expected = one_by_one(model, samples_of(batch, short))
    close(statistics(model, [batch]), expected)
    shifted = torch.cat([torch.zeros(4, 1, dtype=torch.long), batch["labels"][:, :-1].clamp(min=0)], 1)
    given = {**batch, "decoder_input_ids": shifted, "decoder_attention_mask": mask_of(lengths)}
    close(statistics(model, [given]), expected)
    del given["labels"]
    close(statistics(model, [given], wanted=("input_norm",)), expected)


def test_an_unpadded_source_with_a_padded_target():
    model = build("bart")
    batch = {"input_ids": tokens(3, 8), "labels": targets_text([8, 3, 5])}
    expected = one_by_one(model, samples_of(batch, {"labels": [8, 3, 5]}))
    close(statistics(model, [batch]), expected)


def test_an_encoder_decoder_that_makes_its_target_of_the_source():
    """BART's classifier reads the state of the last token that ends a text."""
    torch.manual_seed(0)
    from batch_models import BART

    model = tr.BartForSequenceClassification(tr.BartConfig(**BART, num_labels=3)).double().eval()
    batch = text(labels=CLASSES)
    batch["input_ids"][torch.arange(4), torch.tensor(LENGTHS) - 1] = 2
    expected = one_by_one(model, samples_of(batch, {"input_ids": LENGTHS, "attention_mask": LENGTHS}))
    close(statistics(model, [batch]), expected)


def test_gradient_checkpointing_keeps_source_and_target_apart():
    model = build("bart").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch, lengths = batch_of("bart")
    expected = one_by_one(build("bart"), samples_of(batch, lengths))
    close(statistics(model, [batch]), expected)


IMAGE_LAYERS = {
    "llava": ("model.vision_tower.encoder.layers.0.mlp.fc1", "model.language_model.layers.0.mlp.up_proj"),
    # Cross-attention of the text to the image.
    "blip": (
        "text_decoder.bert.encoder.layer.0.crossattention.self.key",
        "text_decoder.bert.encoder.layer.0.crossattention.self.query",
    ),
}


@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_images_are_not_padded(name):
    """As many rows of an image (four patches and a class) as tokens: the mask of the text must not touch them."""
    model = build(name)
    ids = torch.tensor([[99, 99, 99, 99, 7], [99, 99, 99, 99, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": normal(2, 3, 16, 16).double()}
    rows = {}
    vision, words = (model.get_submodule(layer) for layer in IMAGE_LAYERS[name])
    handles = [m.register_forward_pre_hook(lambda m, args: rows.update({m: args[0].detach()})) for m in (vision, words)]
    model(**batch)
    for handle in handles:
        handle.remove()
    assert rows[vision].shape[:2] == ids.shape
    found = statistics(model, [batch], wanted=("input_norm",))
    for layer, real in ((vision, rows[vision].flatten(0, 1)), (words, rows[words].flatten(0, 1)[:-1])):
        key = next(f"{n}.weight" for n, m in model.named_modules() if m is layer)
        expected = (real.square().sum(0) / 2).sqrt()
        torch.testing.assert_close(found[key].input_norm.double(), expected, rtol=1e-4, atol=1e-6)


def test_places_of_images_are_not_predicted():
    model = build("llava")
    token = model.config.image_token_id
    ids = torch.tensor([[token, token, token, token, 7, 8], [token, token, token, token, 1, 3]])
    batch = {"input_ids": ids, "pixel_values": normal(2, 3, 16, 16).double()}
    expected = causal_lm_loss(model, {**batch, "labels": ids.masked_fill(ids == token, -100)})
    torch.testing.assert_close(causal_lm_loss(model, batch), expected)
    logits = model(**batch).logits.log_softmax(-1)
    torch.testing.assert_close(expected, -logits[:, 3:5].gather(2, ids[:, 4:, None]).mean((1, 2)))


# -- in a Trainer --------------------


@pytest.mark.parametrize("score", ["magnitude", "wanda", "gradient", "gblm", "kfac", "sparsegpt"])
def test_a_padded_classifier_in_a_trainer_and_as_a_function(score, tmp_path):
    import lightning as L

    from lightning_prune import WeightPruning

    class Classifier(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build("bert classifier").float()

        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    batches = [text(seed=i, labels=CLASSES) for i in range(2)]
    # The pooler and the classifier get one row a sample.
    how = {"score": score, "num_samples": 8, "ignore": ["embeddings"]}
    pruning = WeightPruning(**how, calibration=batches)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", callbacks=[pruning], default_root_dir=tmp_path, **options, barebones=False
    )
    module = Classifier()
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    found = {n.removeprefix("model."): m for n, m in pruning.masks.items()}
    expected = prune(build("bert classifier").float(), batches, progress=False, **how)
    assert "bert.pooler.dense.weight" in expected
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("statistic", ["input_norm", "output_grad_norm"])  # in forward passes alone, and in backward
@pytest.mark.parametrize("kind", ["wav2vec2", "adapter", "squeezed", "text of speech"])
def test_layers_of_speech_have_the_mask_of_their_length_or_are_named(kind, statistic):
    """Each convolution has a mask of its own, and so have those of an adapter behind the layers."""
    sizes = {**WAV2VEC2, "ctc_loss_reduction": "mean"}
    torch.manual_seed(0)
    if kind == "text of speech":
        model = tr.Speech2TextForConditionalGeneration(tr.Speech2TextConfig(
            vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=1,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, conv_channels=16,
            conv_kernel_sizes=(3, 3), input_feat_per_channel=8, max_source_positions=100, max_target_positions=40,
        ))  # fmt: skip
    elif kind == "squeezed":
        model = tr.SEWForCTC(tr.SEWConfig(**sizes, squeeze_factor=2))
    else:
        adapter = {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 12} if kind == "adapter" else {}
        model = tr.Wav2Vec2ForCTC(tr.Wav2Vec2Config(**sizes, **adapter))
    model = model.double().eval()
    if kind == "text of speech":
        lengths, waves = [20, 12, 16], [normal(n, 8, seed=i).double() for i, n in enumerate([20, 12, 16])]
        name, batch = "input_features", {"labels": tokens(3, 4) % 19 + 1}
    else:
        lengths, waves = [400, 250, 330], [normal(n, seed=i).double() for i, n in enumerate([400, 250, 330])]
        name, batch = "input_values", {"labels": tokens(3, 2) % 19 + 1}
    batch |= {name: nn.utils.rnn.pad_sequence(waves, batch_first=True), "attention_mask": mask_of(lengths)}
    found = find_targets(model)
    how = {"statistics": {"input_norm", statistic}, "progress": False}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole = collect(model, [batch], found, num_samples=3, **how)
    alone = [
        collect(model, [{name: x[None], "attention_mask": torch.ones(1, len(x)).long(), "labels": y[None]}], found,
                num_samples=1, **how)
        for x, y in zip(waves, batch["labels"], strict=True)
    ]  # fmt: skip
    # The last row of an adapter's convolutions meets what was made of padding, and nothing alone: the rows are told.
    counted, rows = {}, torch.tensor([len(x) for x in waves])

    def count(layer, args):
        nonlocal rows
        rows = (rows + 2 * layer.padding[0] - layer.kernel_size[0]) // layer.stride[0] + 1
        x = nn.functional.pad(args[0], layer.padding * 2).unfold(-1, layer.kernel_size[0], layer.stride[0])
        real = (torch.arange(x.shape[2]) < rows[:, None])[:, None, :, None]
        counted[layer] = ((x * real).square().sum((0, 2)).T.flatten() / 3).sqrt()  # by places, then channels

    for layer in (m for n, m in model.named_modules() if isinstance(m, nn.Conv1d) and "pos_conv" not in n):
        layer.register_forward_pre_hook(count)
    with torch.no_grad():
        model(**batch)
    different = []
    for target in found:
        expected = (sum(each[target.name].input_norm.square() for each in alone) / 3).sqrt()
        if "adapter.layers" in target.name:
            expected = counted[target.modules[0]]
        if not torch.allclose(whole[target.name].input_norm, expected, rtol=1e-6):
            different.append(target.name)
    text = " ".join(str(w.message) for w in said)
    if kind == "squeezed":  # half as many rows in each layer
        assert "sew.encoder.layers.0" in text or "sew.encoder.upsample" in text
        assert all("sew.encoder" in name for name in different)
    else:
        assert different == []
        assert text == ""


def test_sound_padded_at_the_front_is_named():
    """The model's own mask takes the rows of the padding for the real ones."""
    torch.manual_seed(0)
    model = tr.Wav2Vec2Model(tr.Wav2Vec2Config(**WAV2VEC2)).double().eval()
    mask = mask_of([400, 250]).flip(1)
    batch = {"input_values": normal(2, 400).double() * mask, "attention_mask": mask}
    found = [t for t in find_targets(model) if "q_proj" in t.name]
    with pytest.warns(UserWarning, match="padding of the batches cannot be found in the inputs of 'encoder.layers.0"):
        collect(model, [batch], found, statistics={"input_norm"}, num_samples=2, progress=False,
                loss_fn=lambda m, b: m(**b)[0].square().mean((1, 2)))  # fmt: skip


@pytest.mark.parametrize("length", [0, 12])
def test_sound_too_short_for_the_convolutions_has_no_rows(length):
    """The mask that the model makes for its layers has all of them."""
    torch.manual_seed(0)
    model = tr.Wav2Vec2Model(tr.Wav2Vec2Config(**WAV2VEC2)).double().eval()
    waves = [normal(n, seed=i).double() for i, n in enumerate([400, 250, length])]
    batch = {"input_values": nn.utils.rnn.pad_sequence(waves, batch_first=True)}
    batch["attention_mask"] = mask_of([400, 250, length])
    found = find_targets(model)
    rows = model._get_feat_extract_output_lengths(torch.tensor([400, 250, length])).clamp(min=0)
    inputs = {}
    query = model.encoder.layers[0].attention.q_proj
    query.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0].detach()))
    how = {"statistics": {"input_norm"}, "progress": False, "num_samples": 3}
    whole = collect(model, [batch], found, loss_fn=lambda m, b: m(**b)[0].square().mean((1, 2)), **how)
    real = torch.cat([x[:n] for x, n in zip(inputs["x"], rows, strict=True)])
    assert rows.tolist()[2] == 0
    torch.testing.assert_close(
        whole["encoder.layers.0.attention.q_proj.weight"].input_norm, (real.square().sum(0) / 3).sqrt()
    )


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    "name", ["pixel_mask", "pixel_attention_mask", "feature_attention_mask", "image_attention_mask"]
)
def test_padding_of_images_and_sound_is_said_to_count(name, sequential):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    padded = torch.ones(2, 3)
    padded[1, 2] = 0
    for masks in ([torch.ones(2, 3), torch.ones(2, 3)], [torch.ones(2, 3), padded, padded]):
        batches = [{"x": torch.randn(2, 3, 4), name: mask} for mask in masks]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            prune(Model(), batches, "wanda", num_samples=2 * len(batches), sequential=sequential, progress=False,
                  loss_fn=lambda m, b: m(b["x"]).square().flatten(1).mean(1))  # fmt: skip
        # The mask of Idefics says which images a token sees.
        expected = [f"the batches hold padding by {name!r}"] * (len(masks) == 3 and not name.startswith("image"))
        assert [str(w.message).partition(", which is not read")[0] for w in said] == expected


# -- the model's own loss --------------------


@pytest.mark.parametrize("name", ["bert tagger", "bert masked lm", "wav2vec2", "image captioner", "bart"])
def test_a_model_is_scored_by_its_own_loss(name):
    model = build(name)
    batch, _ = batch_of(name)
    samples = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    gradients = one_by_one(model, samples)
    for given in (None, own_loss):
        found = statistics(model, [batch], given, wanted=("gradient_l2",)) if name != "image captioner" else {}
        for layer, entry in found.items():
            expected = gradients[layer][1]
            torch.testing.assert_close(
                entry.gradient_l2.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()), msg=layer
            )


def test_clip_runs_with_its_contrastive_loss():
    from lightning_prune.pruning.running import model_loss

    model = build("clip")
    batch = text(pixel_values=normal(4, 3, 16, 16).double())
    torch.testing.assert_close(model_loss(model, batch), model(**batch, return_loss=True).loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert tagger", "bert masked lm", "bart", "t5", "bert question answering"])
def test_masks_are_those_of_a_loss_fn(name):
    batch, _ = batch_of(name)
    for score in ("wanda", "gblm", "kfac"):
        own = prune(build(name), [batch], score, num_samples=4, loss_fn=own_loss, progress=False)
        found = prune(build(name), [batch], score, num_samples=4, progress=False)
        assert all(torch.equal(found[n], own[n]) for n in own)


@pytest.mark.parametrize("wrapper", ["peft", "compile"])
def test_wrapped_models_keep_their_loss(wrapper):
    from lightning_prune.pruning.running import model_loss

    for name in ("bert tagger", "causal") if wrapper == "peft" else ("causal",):
        model = build(name) if name != "causal" else make_llama().double().eval()
        batch, _ = batch_of("bert tagger")
        if name == "causal":
            batch = {"input_ids": make_tokens(3, 7), "labels": make_tokens(3, 7, seed=2)}
        expected = own_loss(model, batch)
        if wrapper == "peft":
            from peft import LoraConfig, get_peft_model

            layers = ["query"] if name != "causal" else ["q_proj"]
            wrapped = get_peft_model(model, LoraConfig(target_modules=layers)).eval()
        else:
            wrapped = torch.compile(model, backend="eager")
        with torch.compiler.set_stance("force_eager"):
            loss = model_loss(wrapped, batch)
        assert loss.shape == ((3,) if name == "causal" else ())
        torch.testing.assert_close(loss.mean().float(), expected.float())


def test_a_causal_model_that_compares_without_a_shift():
    """BartForCausalLM's own loss takes labels as they are; without labels each next token is predicted."""
    from batch_models import BART

    from lightning_prune.pruning.running import model_loss

    torch.manual_seed(0)
    model, ids = tr.BartForCausalLM(tr.BartConfig(**BART)).eval(), tokens(2, 6)
    labels = tokens(2, 6, seed=3)
    logits = model(input_ids=ids).logits
    same_place = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model_loss(model, {"input_ids": ids, "labels": labels}), same_place)
    shifted = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(model_loss(model, {"input_ids": ids}), shifted.mean(1))


def test_what_is_missing_is_said_before_anything_changes():
    t5 = build("t5")
    before = snapshot(t5)
    for score in ("wanda", "gradient"):
        with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder whose decoder gets no"):
            prune(t5, [{"input_ids": tokens(2, 5)}], score, num_samples=2, progress=False)
    assert snapshot(t5) == before
    images = {"pixel_values": normal(2, 3, 16, 16).double()}
    for name, batch, missing in (
        ("bert tagger", text(), "add 'labels' to the batches, or pass loss_fn"),
        (
            "vit classifier",
            images,
            "ViTForImageClassification makes none of a batch",
        ),
        ("bert question answering", text(), "add 'start_positions' and 'end_positions' to the batches"),
    ):
        model = build(name)
        with pytest.raises(ValueError, match=missing):
            prune(model, [batch], "gradient", num_samples=2, progress=False)


@pytest.mark.parametrize("score", ["wanda", "gradient"])
@pytest.mark.parametrize("name", ["whisper", "vit classifier"])
def test_images_and_speech_take_the_models_dtype(name, score):
    batch, _ = batch_of(name)
    model = build(name).to(torch.bfloat16)
    heads = ["proj_out"] if name == "whisper" else ["classifier"]
    masks = prune(model, [batch], score, num_samples=4, ignore=heads, progress=False)
    assert all(0.4 < float(mask.float().mean()) < 0.6 for mask in masks.values())


def test_inputs_of_plain_modules_take_the_models_dtype():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).to(torch.bfloat16)
    prune(model, [normal(4, 8)], "wanda", num_samples=4, progress=False)
    assert (model[0].weight == 0).sum() == 24


# -- padding that the batch does not name: what a model inside is called with --------------------

OTHERS = [4, 9, 2, 7]
PAD = 0


class Encoder(nn.Module):
    """A BERT, a layer of its own on each token, and one on their mean; or with `deep`, on each token too."""

    def __init__(self, deep=False, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.bert = tr.BertModel(tr.BertConfig(**BERT), add_pooling_layer=False)
        self.first, self.second, self.deep, self.reentrant = nn.Linear(32, 16), nn.Linear(16, 5), deep, reentrant
        self.double().eval()
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(std=0.2)

    def encode(self, ids, mask):
        def head(x):
            x = self.first(x).tanh()
            return (self.second(x) if self.deep else x).tanh()

        hidden = self.bert(ids, mask).last_hidden_state
        made = head(hidden) if self.reentrant is None else checkpoint(head, hidden, use_reentrant=self.reentrant)
        mean = (made * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return mean if self.deep else self.second(mean)


def of_tuple(model, batch):
    ids, mask, labels = batch
    return nn.functional.cross_entropy(model.encode(ids, mask), labels, reduction="none")


def of_computed(model, batch):
    return of_tuple(model, (batch["ids"], batch["ids"] != PAD, batch["labels"]))


def of_towers(model, batch):
    one, other = (model.encode(**{"ids": t["input_ids"], "mask": t["attention_mask"]}) for t in batch.values())
    return (one - other).square().sum(1)


def of_prefixes(model, batch):
    names = ("q_", "d_") if "q_input_ids" in batch else ("", "d_")
    return of_towers(model, {n: {k: batch[n + k] for k in ("input_ids", "attention_mask")} for n in names})


def unnamed(kind):
    """A padded batch, its samples without padding, and their losses."""
    one, other = text(), text(OTHERS, seed=9)
    ones = samples_of(one, dict.fromkeys(one, LENGTHS))
    others = samples_of(other, dict.fromkeys(other, OTHERS))
    if kind == "tuple":
        singles = [(*s.values(), CLASSES[i : i + 1]) for i, s in enumerate(ones)]
        return (*one.values(), CLASSES), singles, of_tuple
    if kind == "computed":
        ids = one["input_ids"].masked_fill(one["attention_mask"] == 0, PAD)
        singles = [{"ids": s["input_ids"], "labels": CLASSES[i : i + 1]} for i, s in enumerate(ones)]
        return {"ids": ids, "labels": CLASSES}, singles, of_computed
    if kind == "towers":
        singles = [{"query": a, "doc": b} for a, b in zip(ones, others, strict=True)]
        return {"query": one, "doc": other}, singles, of_towers
    if kind == "first tower without padding":  # its mask is named by the batch, that of the second is not
        one = {"input_ids": tokens(4, 9), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
        ones = [{k: v[i : i + 1] for k, v in one.items()} for i in range(4)]
    first = "q_" if kind == "prefixes" else ""

    def joined(a, b):
        return {**{first + k: v for k, v in a.items()}, **{"d_" + k: v for k, v in b.items()}}

    return joined(one, other), [joined(a, b) for a, b in zip(ones, others, strict=True)], of_prefixes


KINDS = ["tuple", "computed", "towers", "prefixes", "first tower named", "first tower without padding"]


def as_one_by_one(model, kind, wanted, reference=None):
    batch, singles, loss = unnamed(kind)
    layers = {f"{n}.weight": n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    expected = naive.statistics(reference or model, singles, layers, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = collect(
            model,
            [batch],
            find_targets(model, targets=[nn.Linear]),
            wanted,
            num_samples=4,
            loss_fn=loss,
            progress=False,
        )
    for name, values in expected.items():
        for statistic in wanted:
            value, scale = getattr(found[name], statistic).double().numpy(), np.abs(values[statistic]).max()
            np.testing.assert_allclose(
                value, values[statistic], rtol=1e-4, atol=1e-6 * scale, err_msg=f"{name} {statistic}"
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [{"input_norm", "hessian"}, ALL_STATISTICS])
def test_padding_that_a_batch_does_not_name_is_that_of_the_call(kind, wanted):
    as_one_by_one(Encoder(deep=kind in ("tuple", "computed")), kind, wanted)


@pytest.mark.parametrize("kind", ["tuple", "towers"])
def test_padding_of_calls_in_recomputed_blocks(kind):
    """Blocks run again in the backward pass, when their call is over."""
    model = Encoder(reentrant=False).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    as_one_by_one(model, kind, ALL_STATISTICS, Encoder())
    if kind == "tuple":
        as_one_by_one(Encoder(True, reentrant=True), kind, ALL_STATISTICS, Encoder(True))


@pytest.mark.parametrize("score", ["wanda", "kfac", "gblm"])
def test_block_after_block_on_padding_that_the_batch_does_not_name(score):
    batch, singles, loss = unnamed("tuple")
    settings = {"score": score, "sparsity": 0.5, "num_samples": 4, "loss_fn": loss, "sequential": score != "kfac"}
    settings |= {"ignore": ["first", "second"], "progress": False}
    padded_masks, masks = (prune(Encoder(), data, **settings) for data in ([batch], singles))
    assert all(torch.equal(padded_masks[name], masks[name]) for name in masks)


def test_what_of_several_masks_cannot_be_told_is_said():
    """Both towers run, then a layer of their own on something made of both."""

    class Both(Encoder):
        def encode(self, ids, mask):
            hidden = [self.bert(a, attention_mask=m).last_hidden_state for a, m in zip(ids, mask, strict=True)]
            return self.second(self.first(hidden[0] + hidden[1]).tanh()).mean(1)

    one, other = text(), text(OTHERS, seed=9)
    batch = tuple(zip(one.values(), other.values(), strict=True))
    for wanted in ({"input_norm"}, {"input_norm", "output_grad_norm"}):
        model = Both()
        targets = find_targets(model, targets=[nn.Linear])
        with pytest.warns(
            UserWarning, match=r"cannot be found in the inputs of '(first|second).weight', '(first|second)"
        ):
            collect(model, [batch], targets, wanted, num_samples=4, loss_fn=lambda m, b: m.encode(*b).square().sum(1))


@pytest.mark.parametrize("wanted", [{"input_norm"}, {"input_norm", "output_grad_norm"}])
def test_a_layer_before_the_call_that_tells_padding_is_named(wanted):
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.bert = nn.Linear(8, 32), Encoder().bert.float()

        def forward(self, x, mask):
            return self.bert(inputs_embeds=self.before(x), attention_mask=mask).last_hidden_state[:, 0].sum(1)

    model = Projected()
    with pytest.warns(UserWarning, match=r"cannot be found in the inputs of 'before.weight', whose"):
        collect(
            model,
            [(normal(4, 9, 8), mask_of(LENGTHS))],
            find_targets(model, targets=[nn.Linear]),
            wanted,
            num_samples=4,
            loss_fn=lambda m, b: m(*b),
        )


def test_an_encoder_decoder_called_by_a_module_with_a_tuple():
    batch, lengths = batch_of("t5")
    model = build("t5")
    expected = one_by_one(model, samples_of(batch, lengths))

    def loss(m, b):
        return m(input_ids=b[0], attention_mask=b[1], labels=b[2]).loss

    found = find_targets(model, targets=[nn.Linear], ignore=["lm_head"])
    statistics = collect(
        model, [tuple(batch.values())], found, ("input_norm", "gradient_l2"), num_samples=4, loss_fn=loss
    )
    close(statistics, expected)
    close(collect(model, [tuple(batch.values())], found, ("input_norm",), num_samples=4, loss_fn=loss), expected)
