"""Pretrained language models by hub id, folder or GGUF file; weights that are missing are refused."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from lightning_prune.checkpoints import check_folder
from lightning_prune.sources import looks_like_path, pretrained_arguments


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
    name, kwargs = pretrained_arguments(model, gguf_file, "model")
    if looks_like_path(model) and Path(name).is_dir() and "gguf_file" not in kwargs:
        check_folder(Path(name))
    if revision is not None:
        kwargs["revision"] = revision
    if "gguf_file" in kwargs and hasattr(transformers, "GgufConfig"):
        # newer versions keep the weights of some architectures packed, out of reach of pruning and training
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded: Any
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs, **(options or {}))
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except Exception as error:  # each family raises its own for files that are damaged, or not of it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model={model!r} cannot be loaded, it may be damaged or cut off: {reason}") from error
    if info["missing_keys"]:  # transformers warns, and goes on with random numbers in their place
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"model={model!r} lacks {len(missing)} of the weights of a {type(loaded).__name__}, such as "
            f"{missing[0]!r}; take config.json and weights from the same causal language model"
        )
    if "gguf_file" in kwargs:
        _forget_quantization(loaded)
    return loaded


def _forget_quantization(model: Any) -> None:
    """Remove what transformers remembers of a GGUF file: the weights are plain now, yet it refuses to save them."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
