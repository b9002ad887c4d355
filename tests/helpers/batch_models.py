"""Tiny transformers models of many kinds with padded batches, and what their samples give one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers as tr
from torch import Tensor, nn

BERT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
BART = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
T5 = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
DISTILBERT = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "num_labels": 3}
WHISPER = {
    **BART,
    "max_source_positions": 20,
    "max_target_positions": 30,
    "num_mel_bins": 8,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WAV2VEC2 = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 20,
    "pad_token_id": 0,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}


def encoder_decoder() -> nn.Module:
    """Two BERTs of different widths, with a projection between them."""
    narrow = tr.BertConfig(**{**BERT, "hidden_size": 16, "tie_word_embeddings": False})
    config = tr.EncoderDecoderConfig.from_encoder_decoder_configs(tr.BertConfig(**BERT), narrow)
    config.decoder_start_token_id, config.pad_token_id, config.tie_word_embeddings = 1, 0, False
    return tr.EncoderDecoderModel(config=config)


def image_captioner() -> nn.Module:
    decoder = tr.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True)
    config = tr.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tr.ViTConfig(**VIT), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return tr.VisionEncoderDecoderModel(config=config)


def llava() -> nn.Module:
    text = tr.LlamaConfig(**BERT, num_key_value_heads=2)
    vision = tr.CLIPVisionConfig(**VIT)
    config = tr.LlavaConfig(text_config=text, vision_config=vision, image_token_id=99, vision_feature_layer=-1)
    return tr.LlavaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert classifier": lambda: tr.BertForSequenceClassification(tr.BertConfig(**BERT, num_labels=3)),
    "roberta classifier": lambda: tr.RobertaForSequenceClassification(tr.RobertaConfig(**BERT, num_labels=3)),
    "distilbert classifier": lambda: tr.DistilBertForSequenceClassification(tr.DistilBertConfig(**DISTILBERT)),
    "llama classifier": lambda: tr.LlamaForSequenceClassification(tr.LlamaConfig(**BERT, num_labels=3, pad_token_id=1)),
    "bert tagger": lambda: tr.BertForTokenClassification(tr.BertConfig(**BERT, num_labels=5)),
    "bert question answering": lambda: tr.BertForQuestionAnswering(tr.BertConfig(**BERT)),
    "bert multiple choice": lambda: tr.BertForMultipleChoice(tr.BertConfig(**BERT)),
    "bert masked lm": lambda: tr.BertForMaskedLM(tr.BertConfig(**BERT, tie_word_embeddings=False)),
    "bart": lambda: tr.BartForConditionalGeneration(tr.BartConfig(**BART)),
    "t5": lambda: tr.T5ForConditionalGeneration(tr.T5Config(**T5)),
    "encoder decoder": encoder_decoder,
    "vit classifier": lambda: tr.ViTForImageClassification(tr.ViTConfig(**VIT, num_labels=3)),
    "image captioner": image_captioner,
    "whisper": lambda: tr.WhisperForConditionalGeneration(tr.WhisperConfig(**WHISPER)),
    "wav2vec2": lambda: tr.Wav2Vec2ForCTC(tr.Wav2Vec2Config(**WAV2VEC2)),
    "clip": lambda: tr.CLIPModel(
        tr.CLIPConfig(text_config={**BERT, "eos_token_id": 2}, vision_config=VIT, projection_dim=16)
    ),
    "llava": llava,
    "blip": lambda: tr.BlipForConditionalGeneration(
        tr.BlipConfig(
            text_config={**BERT, "encoder_hidden_size": 32, "bos_token_id": 2, "eos_token_id": 3},
            vision_config=VIT,
            projection_dim=16,
            image_text_hidden_size=16,
        )
    ),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of `MODELS` in float64, with weights large enough that nothing is nearly linear."""
    torch.manual_seed(seed)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.2)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: Sequence[Tensor], value: float, length: int | None = None, side: str = "right") -> Tensor:
    """Rows of different lengths in one tensor."""
    width = max(len(row) for row in rows) if length is None else length
    batch = torch.full((len(rows), width), value, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        batch[i, slice(0, len(row)) if side == "right" else slice(width - len(row), width)] = row
    return batch


def mask_of(lengths: Sequence[int], width: int | None = None, side: str = "right") -> Tensor:
    return padded([torch.ones(n, dtype=torch.long) for n in lengths], 0, width, side)


def samples_of(batch: Mapping[str, Any], lengths: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """The samples of a batch padded on the right, each by itself and as long as `lengths` says."""
    size = len(next(iter(lengths.values())))
    return [
        {k: v[i : i + 1, : lengths[k][i]] if k in lengths else v[i : i + 1] for k, v in batch.items()}
        for i in range(size)
    ]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def one_by_one(
    model: nn.Module, samples: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor] = own_loss
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input norms and l2 gradient aggregates of every linear layer, from their formulas, sample by sample."""
    model = copy.deepcopy(model).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    norms: dict[str, Any] = dict.fromkeys(layers, 0.0)
    squares: dict[str, Any] = dict.fromkeys(layers, 0.0)

    def hook(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            norms[name] = norms[name] + args[0].detach().flatten(0, -2).square().sum(0)

        return see

    for name, layer in layers.items():
        layer.register_forward_pre_hook(hook(name))
    for sample in samples:
        model.zero_grad()
        loss(model, sample).sum().backward()
        for name, layer in layers.items():
            if layer.weight.grad is not None:
                squares[name] = squares[name] + layer.weight.grad.square()
    seen = [n for n in layers if isinstance(norms[n], Tensor)]
    return {f"{n}.weight": ((norms[n] / len(samples)).sqrt(), torch.as_tensor(squares[n]).sqrt()) for n in seen}
