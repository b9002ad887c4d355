"""Find what a path or name stands for: a checkpoint, a pretrained model, a tokenizer."""

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_prune.checkpoints.reading import check_config, check_folder, merge_advice
from lightning_prune.errors import first_line
from lightning_prune.safety import expanded
from lightning_prune.structure.saving import PADS_WITH


def looks_like_path(source: str) -> bool:
    """Whether `source` can only mean a local file or folder, so that it is never looked up on the hub.

    Examples:
        >>> [looks_like_path(source) for source in ("HuggingFaceTB/SmolLM2-135M", "./model", "a.gguf")]
        [False, True, True]
    """
    known = {".gguf", ".json", ".jsonl", ".txt", ".parquet", ".ckpt", ".safetensors"}
    return (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or Path(source).suffix.lower() in known
        or Path(source).exists()
    )


def existing_path(source: str, argument: str, on_hub: bool = True) -> Path:
    """Expand `~` and check that the path exists.

    Args:
        source: The path.
        argument: What the user calls it, for errors.
        on_hub: Whether it might be the name of something on the hub, which is said then.

    Raises:
        FileNotFoundError: If it does not; the message names `argument`.
    """
    path = expanded(source, argument)
    if not path.exists():
        raise FileNotFoundError(
            f"{argument}={source!r} is not an existing file or folder (looked at {path.absolute()}). "
            f"Check the path{'; a hub id has the form name or owner/name' if on_hub else ''}."
        )
    return path


def plain_source(value: Any) -> Any:
    """Return the names of files in place of paths, also in a list: plain values, which checkpoints keep."""
    if isinstance(value, (list, tuple)):
        return [str(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def pretrained_arguments(source: str, gguf_file: str | None, argument: str) -> tuple[str, dict[str, Any]]:
    """Turn a source into the first argument and the keyword arguments of transformers' `from_pretrained`.

    Args:
        source: Hub id, local folder, or path of a `.gguf` file.
        gguf_file: Name of a GGUF file inside the folder or hub repository `source`.
        argument: What the user called `source`, for error messages.

    Returns:
        The name or folder, and `{"gguf_file": ...}` or `{}`; remote code is always refused.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If a GGUF file is named twice, or `source` is a file of another kind.
    """
    kwargs: dict[str, Any] = {"trust_remote_code": False}
    if not looks_like_path(source):
        return source, kwargs if gguf_file is None else {**kwargs, "gguf_file": gguf_file}
    path = existing_path(source, argument)
    if path.is_dir():
        if gguf_file is None:
            return str(path), kwargs
        existing_path(str(path / gguf_file), "gguf_file")
        return str(path), {**kwargs, "gguf_file": gguf_file}
    if path.suffix.lower() != ".gguf":
        raise ValueError(
            f"{argument}={source!r} is a file, but only .gguf files are loaded directly. "
            f"Pass the folder that holds it, or a hub id."
        )
    if gguf_file is not None:
        raise ValueError(
            f"{argument}={source!r} already names a GGUF file, and gguf_file={gguf_file!r} names another. "
            "Leave gguf_file out."
        )
    return str(path.parent), {**kwargs, "gguf_file": path.name}


def is_causal_lm(model_type: str) -> bool:
    """Whether transformers has a causal language model of a family; of those, too, that this process has registered."""
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return True
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING


def config_from(model_type: str, fields: Mapping[str, Any]) -> Any:
    """Build a configuration of transformers from plain values, as its files hold them.

    Args:
        model_type: Name of the family.
        fields: The other fields; numbers that JSON cannot say are tagged there, as in ``{"__float__": "Infinity"}``.

    Raises:
        ValueError, TypeError: no such family, or values that it does not take.
    """
    return AutoConfig.for_model(model_type, **_untagged(dict(fields)))


def _untagged(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _untagged(entry) for key, entry in value.items()}
    return list(map(_untagged, value)) if isinstance(value, list) else value


def load_pretrained(
    model: str, gguf_file: str | None = None, revision: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """Load a causal language model with transformers, without running code that comes with it.

    Args:
        model: Hub id, local folder, or path of a `.gguf` file, which is dequantized.
        gguf_file: Name of a GGUF file inside the folder or hub repository `model`.
        revision: Branch, tag or commit of a hub repository.
        options: Further arguments of `from_pretrained`, such as `dtype`.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If the files are damaged, or weights are missing in them.
    """
    name, kwargs = _checked_arguments(model, gguf_file, revision, check_folder)
    if "gguf_file" in kwargs and hasattr(transformers, "GgufConfig"):
        # newer versions keep the weights of some architectures packed, out of reach of pruning and training
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    options = {"dtype": "auto", **(options or {})}  # the default of transformers 5 and not of 4
    loaded: Any
    try:
        with named_where_it_fails("model", model):
            loaded, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs, **options)
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except Exception as error:  # each family raises its own for files that are damaged, or not of it
        raise ValueError(
            f"model={model!r} cannot be loaded, it may be damaged or cut off: {first_line(error)}"
        ) from error
    if any(".base_layer." in name for name, _ in loaded.named_parameters()):  # of the hub; folders were looked at
        raise ValueError(f"model={model!r} is an adapter of PEFT. {merge_advice(model)}")
    if info["missing_keys"]:  # transformers warns, and goes on with random numbers in their place
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"model={model!r} lacks {len(missing)} of the weights of a {type(loaded).__name__}, such as "
            f"{missing[0]!r}; take config.json and weights from the same causal language model"
        )
    if "gguf_file" in kwargs:
        _forget_quantization(loaded)
    return loaded


def empty_pretrained(
    model: str, gguf_file: str | None = None, revision: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """Build what `load_pretrained` loads from its configuration alone.

    Args:
        model: As of `load_pretrained`.
        gguf_file: As there.
        revision: As there.
        options: Further arguments of `from_config`, such as `dtype`.

    Returns:
        The model with parameters on the meta device and buffers in main memory, in training mode.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If the configuration is not that of a causal language model.
    """
    name, kwargs = _checked_arguments(model, gguf_file, revision, check_config)
    with named_where_it_fails("model", model):
        config = AutoConfig.from_pretrained(name, **kwargs)
    with _parameters_on_meta():
        built: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **(options or {}))
    if "gguf_file" in kwargs:
        _forget_quantization(built)
    return built


@contextmanager
def named_where_it_fails(argument: str, name: str) -> Iterator[None]:
    """Say which argument names nothing: where no hub is reached, transformers' error is about the connection alone.

    Raises:
        OSError: `name` is no path on this machine, and the block could not have it from the hub.
    """
    try:
        yield
    except OSError as error:
        if Path(name).exists():
            raise
        raise OSError(
            f"{argument}={name!r} is no folder on this machine, and cannot be had from the hub: "
            f"{first_line(error).rstrip('.')}. Check the path, or give a name of the hub (owner/name) where it can be "
            "reached; without a network, HF_HUB_OFFLINE=1 saves the wait"
        ) from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put the parameters of modules that are built on the meta device, one by one.

    Under ``torch.device("meta")`` buffers would have no values either, nor tensors that are plain attributes.
    """
    here = threading.get_ident()

    def empty(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        others = threading.get_ident() != here  # torch calls this for modules of every thread
        if others or parameter is None or parameter.is_meta:  # tied ones are registered twice
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _checked_arguments(
    model: str, gguf_file: str | None, revision: str | None, check: Callable[[Path], None]
) -> tuple[str, dict[str, Any]]:
    model = str(model)
    name, kwargs = pretrained_arguments(model, gguf_file, "model")
    if looks_like_path(model) and Path(name).is_dir() and "gguf_file" not in kwargs:
        check(Path(name))
    return name, kwargs if revision is None else {**kwargs, "revision": revision}


def _forget_quantization(model: Any) -> None:
    """Remove what transformers remembers of a GGUF file: the weights are plain now, yet it refuses to save them."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


END_OF_TEXT = "<|endoftext|>"
# 256 bytes and the end-of-text token: fewer cannot spell every text
MIN_VOCAB_SIZE = 257
# A bare tokenizer.json does not say which token ends a document; these are the names in common use.
_KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, and not only a model."""
    return any((folder / name).exists() for name in _FILES)


def load_tokenizer(
    source: str | Path, gguf_file: str | None = None, eos_token: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        source: Hub id, local folder, `.gguf` file, or a `tokenizer.json` of the tokenizers library.
        gguf_file: Name of a GGUF file inside the folder or hub repository `source`.
        eos_token: Token that ends a document; default the one the tokenizer declares.
        revision: Branch, tag or commit of a hub repository.

    Returns:
        A transformers tokenizer that has an end-of-text token, and pads with it when it has no padding token.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If no end-of-text token is known, or `eos_token` is not in the vocabulary.
    """
    source = str(source)
    if source.endswith(".json"):
        file = existing_path(source, "tokenizer")
        with _readable(source):
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(file))
        tokenizer.name_or_path = str(file)
        declared = next((t for t in _KNOWN_END_TOKENS if t in tokenizer.get_vocab()), None)
    else:
        name, kwargs = pretrained_arguments(source, gguf_file, "tokenizer")
        if revision is not None:
            kwargs["revision"] = revision
        with _readable(source):
            tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        if source.endswith(".gguf"):
            tokenizer.name_or_path = source  # transformers keeps the folder only
        declared = tokenizer.eos_token
    _set_end_token(tokenizer, eos_token or declared, source)
    return tokenizer


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a tokenizer puts before every text, as those of Gemma, Llama and Mistral do; None for most others.

    Models that were trained with it in the first place expect it there: without it Gemma 3 270M has more than twice the
    perplexity over windows of 512 tokens.
    """
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    return whole[0] if plain and whole[1 : 1 + len(plain)] == plain else None


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Turn whatever a damaged file provokes into one sentence that says which it is."""
    try:
        with named_where_it_fails("tokenizer", source):
            yield
    except (OSError, MemoryError):  # say it themselves
        raise
    except Exception as error:  # that of the tokenizers library is Exception itself
        raise ValueError(
            f"tokenizer={source!r} cannot be loaded, it may be damaged or no tokenizer: {first_line(error)}; copy or "
            "download it again"
        ) from error


def _set_end_token(tokenizer: PreTrainedTokenizerBase, token: str | None, source: str) -> None:
    if token is None:
        raise ValueError(
            f"tokenizer={source!r} declares no end-of-text token, which separates documents. Pass "
            "eos_token=, one of the tokens in its vocabulary, or set it in the tokenizer_config.json beside it."
        )
    if token not in tokenizer.get_vocab():
        raise ValueError(
            f"eos_token={token!r} is not in the vocabulary of tokenizer={source!r}. Pass one of its tokens."
        )
    tokenizer.eos_token = token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = token
        vars(tokenizer)[PADS_WITH] = token


def trained_tokenizer(texts: Iterable[str], vocab_size: int, cache_dir: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on `texts`, or take it from the cache.

    The cache is keyed by the content of the texts and the vocabulary size, so the same text gives the same
    tokenizer on every run.

    Args:
        texts: Training text; read twice when it is not in the cache, so not an iterator.
        vocab_size: Wanted number of tokens, at least 257; small texts may yield fewer.
        cache_dir: Folder in which tokenizers are kept, one sub-folder each.

    Returns:
        The tokenizer, with `<|endoftext|>` (id 0) as its end-of-text and padding token.

    Raises:
        ValueError: If `vocab_size` is too small.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: a byte-level tokenizer needs at least {MIN_VOCAB_SIZE} "
            "(256 bytes and one end-of-text token). Try 4096."
        )
    if vocab_size >= 2**31:
        raise ValueError(f"vocab_size={vocab_size} is too large. Try 4096.")
    folder = cache_dir / f"bpe-{vocab_size}-{_content_hash(texts)}"
    if not folder.exists():
        _save_atomically(_train_bpe(texts, vocab_size), folder)
    return load_tokenizer(str(folder))


def _content_hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little"))  # keeps ["ab", "c"] apart from ["a", "bc"]
        digest.update(encoded)
    return digest.hexdigest()[:32]


def _train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(texts), trainer)
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    return wrapped


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Cut documents into lines, which the trainer counts in parallel."""
    for text in texts:
        yield from text.splitlines(keepends=True)


def _save_atomically(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save so that another process sees either nothing or the whole folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        finished = Path(scratch) / "tokenizer"
        tokenizer.save_pretrained(str(finished))
        try:
            os.replace(finished, folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same content
                raise
