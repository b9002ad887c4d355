"""A causal language model of transformers as a LightningModule.

Letters: B samples, T tokens, V vocabulary.
"""

import inspect
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from huggingface_hub import HfApi
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from lightning_prune.checkpoints.cards import Making, described_files
from lightning_prune.checkpoints.model import LoadedModel
from lightning_prune.checkpoints.reading import check_checkpoint_of, check_no_kernel, read_resumable
from lightning_prune.checkpoints.sources import (
    config_from,
    empty_pretrained,
    existing_path,
    has_tokenizer,
    is_causal_lm,
    load_pretrained,
    load_tokenizer,
    looks_like_path,
    named_where_it_fails,
    plain_source,
)
from lightning_prune.checkpoints.states import follow_shrunk_checkpoints, units_in
from lightning_prune.errors import CheckpointError
from lightning_prune.evaluation.perplexity import NextTokenLoss
from lightning_prune.naming import DTYPES, has_class, uncompiled
from lightning_prune.pruning.running import (
    IGNORE_INDEX,
    causal_lm_losses,
    logits_of_tokens,
    next_token_labels,
    next_token_losses,
    run_batch,
)
from lightning_prune.results import Table
from lightning_prune.safety import expanded
from lightning_prune.schedules import LearningRateSchedule as Schedule
from lightning_prune.schedules import learning_rate_factor
from lightning_prune.sharding import has_sharded_parameters, whole_state
from lightning_prune.structure.masking import mask_units
from lightning_prune.structure.saving import note_masked_units, without_masked_units, writing_plain
from lightning_prune.text.parallelize import parallelize
from lightning_prune.text.reading_once import read_here, read_once

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig


class CausalLM(L.LightningModule):
    """Train, evaluate and calibrate a causal language model.

    The transformers model is `self.model`. Checkpoints carry its configuration in their hyper-parameters, so
    `CausalLM.load_from_checkpoint(path, weights_only=True)` neither reads the original weights again nor asks
    the hub.

    Logged values: `train_loss` (this batch, this process), `train_loss_epoch`, `val_loss`, `val_perplexity`,
    `test_loss` and `test_perplexity`. All but the first are means over every predicted token of every process,
    not over batches.

    Args:
        model: Pretrained weights: a hub id, a local folder, or a `.gguf` file (dequantized on loading).
        gguf_file: Name of a GGUF file inside the folder or hub repository `model` (without `model`, inside
            `tokenizer`).
        config: In place of `model`, the architecture to train from random weights: a dictionary with
            "model_type" and further fields of that configuration (`config.to_dict()` of transformers), a folder
            or configuration file, or a hub id. Seed before, e.g. `L.seed_everything(0)`.
        revision: Branch, tag or commit of a hub repository.
        tokenizer: Where to load the tokenizer from; default `model`, and without it the tokenizer of the
            Trainer's data module. It is saved with the model.
        dtype: Of the weights: "float32", "bfloat16" or "float16".
        attn_implementation: Passed to transformers, e.g. "sdpa" or "eager". Default its choice.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of weights with two or more dimensions other than embeddings (and an output head tied to
            them). Biases, norms and embeddings are never decayed.
        betas: Of AdamW.
        warmup_steps: Optimizer steps of linear warm-up.
        warmup_ratio: In place of `warmup_steps`, their share of all steps, in [0, 1).
        lr_schedule: After the warm-up "constant", or "linear" or "cosine" down to `min_lr_ratio`.
        min_lr_ratio: Final learning rate as a share of `learning_rate`, in [0, 1].
        fused: Use the fused AdamW kernel.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        reshard_after_forward: With `ModelParallelStrategy` (FSDP2): gather a block's weights again for its backward.
        cpu_offload: With `ModelParallelStrategy`: keep shards of weights and optimizer states in main memory.
        read_once: Read the weights of `model` in `configure_model` in place of here: under `ModelParallelStrategy`
            without tensor parallelism in the first process alone, which sends the others their shards; otherwise in
            every process. Until then parameters are on the meta device, so only a Trainer can use the module.

    Raises:
        ValueError: If an argument is out of range, not exactly one of `model` and `config` is given, or `read_once`
            with `config`.
        FileNotFoundError: If a local path does not exist.
    """

    def __init__(
        self,
        model: str | None = None,
        gguf_file: str | None = None,
        config: dict[str, Any] | str | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attn_implementation: str | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 0,
        warmup_ratio: float | None = None,
        lr_schedule: Schedule = "cosine",
        min_lr_ratio: float = 0.0,
        fused: bool = False,
        gradient_checkpointing: bool = False,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        read_once: bool = False,
    ) -> None:
        super().__init__()
        model, config, tokenizer = map(plain_source, (model, config, tokenizer))
        _check_source(model, config)
        if gguf_file is not None and model is None and tokenizer is None:
            raise ValueError(f"gguf_file={gguf_file!r} needs model, the folder or hub repository that holds it.")
        _check_choice("dtype", dtype, tuple(DTYPES))
        _check_choice("lr_schedule", lr_schedule, ("constant", "linear", "cosine"))
        _check_range("learning_rate", learning_rate, lambda v: v > 0, "above 0")
        _check_range("weight_decay", weight_decay, lambda v: v >= 0, "0 or above")
        _check_range("warmup_steps", warmup_steps, lambda v: v >= 0, "0 or above")
        _check_range("min_lr_ratio", min_lr_ratio, lambda v: 0 <= v <= 1, "in [0, 1]")
        _check_range("betas", betas, lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two values in [0, 1)")
        if warmup_ratio is not None:
            _check_range("warmup_ratio", warmup_ratio, lambda v: 0 <= v < 1, "in [0, 1)")
            if warmup_steps:
                raise ValueError(
                    f"warmup_steps={warmup_steps} and warmup_ratio={warmup_ratio} exclude each other. Pass one."
                )
        if read_once and model is None:
            raise ValueError(
                "read_once=True needs model, whose weights it reads; with config there are none. Leave it out."
            )
        self.save_hyperparameters()

        options: dict[str, Any] = {"dtype": DTYPES[dtype]}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        self._options, self._unread = options, read_once
        self.model: Any = (
            _from_config(config, revision, options)
            if model is None
            else (empty_pretrained if read_once else load_pretrained)(model, gguf_file, revision, options)
        )
        # from_pretrained returns the model in eval mode, which the Trainer keeps: no dropout, no checkpointing
        self.model.train()
        if gradient_checkpointing:
            plain = self.model  # transformers 5.24 deprecates the older name
            enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
            enable({"use_reentrant": False})

        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_source, self._tokenizer_gguf = _tokenizer_origin(model, gguf_file, tokenizer)
        self._train_loss = NextTokenLoss()
        self._val_loss, self._val_perplexity = NextTokenLoss(), NextTokenLoss(perplexity=True)
        self._test_loss, self._test_perplexity = NextTokenLoss(), NextTokenLoss(perplexity=True)

    # ---- forward and losses

    def configure_model(self) -> None:
        """Read the weights if `read_once` left that for here, and shard the model under `ModelParallelStrategy`.

        Raises:
            ValueError: the model cannot be sharded; with `read_once`, the weights cannot be read, or are of another
                model than it is by now.
        """
        hp, mesh = self.hparams, self.device_mesh
        reshard, offload = hp["reshard_after_forward"], hp["cpu_offload"]
        if self._unread and mesh is not None and mesh["tensor_parallel"].size() == 1:
            shard = partial(parallelize, self.model, mesh, reshard_after_forward=reshard, cpu_offload=offload)
            device = torch.device("cpu") if offload else self.trainer.strategy.root_device
            read_once(self.model, self._read, shard, device)
        else:
            if self._unread:
                read_here(self.model, self._read)
            if mesh is not None and not has_sharded_parameters(self.model):
                parallelize(self.model, mesh, reshard_after_forward=reshard, cpu_offload=offload)
        self._unread = False

    def _read(self) -> Any:
        hp = self.hparams
        return load_pretrained(hp["model"], hp["gguf_file"], hp["revision"], self._options)

    def _check_read(self) -> None:
        if self._unread:
            raise RuntimeError(
                "CausalLM(read_once=True) has no weights yet: configure_model reads them, which a Trainer calls; leave "
                "read_once out to use the module without one"
            )

    def cpu(self) -> Any:
        """Move to main memory; a model that is not read yet stays as it is."""
        # Trainers call this after an error, and that of moving from the meta device would hide it.
        return self if self._unread else super().cpu()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        """Logits of shape (B, T, V) for token ids of shape (B, T).

        Args:
            input_ids: The tokens.
            attention_mask: Which of them are real.
            others: What else the model takes, such as the position_ids of packed rows.

        Raises:
            ValueError: the model does not take some of them.
        """
        self._check_read()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **others}
        logits: Tensor = run_batch(self.model, inputs).logits
        return logits_of_tokens(self.model, logits, input_ids)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss over the predicted tokens of the batch, in nats; without any zero, and a `train_loss` of NaN."""
        losses, tokens = self._token_losses(batch)
        loss = losses.sum() / tokens.clamp(min=1)  # gradients of zero, not NaN, and every rank has some
        self._train_loss.update(losses, tokens)
        mean = losses.detach().sum() / tokens  # asking whether there are tokens would wait for the device
        self.log("train_loss", mean, prog_bar=True, on_step=True, on_epoch=False)
        self.log("train_loss_epoch", self._train_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log `val_loss` and `val_perplexity`."""
        self._evaluate(batch, "val", self._val_loss, self._val_perplexity)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log `test_loss` and `test_perplexity`."""
        self._evaluate(batch, "test", self._test_loss, self._test_perplexity)

    def calibration_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean next-token loss of each sample, of shape (B,): what gradient-based scores differentiate.

        Args:
            batch: "input_ids" (B, T), optionally "attention_mask" and "labels" of the same shape, and what else the
                model takes.

        Returns:
            Losses in nats per predicted token.

        Raises:
            ValueError: If a sample has no token to predict, or the batch is of another kind.
        """
        labels = _labels(batch)
        return causal_lm_losses(self._logits(batch), labels)

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self(**{name: value for name, value in batch.items() if name != "labels"})
        return logits

    def _token_losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Losses (B, T - 1) of the batch's tokens, and how many of them count."""
        labels = _labels(batch)
        losses = next_token_losses(self._logits(batch), labels)
        return losses, (labels[:, 1:] != IGNORE_INDEX).sum()

    def _evaluate(
        self, batch: Mapping[str, Tensor], stage: str, mean: NextTokenLoss, perplexity: NextTokenLoss
    ) -> None:
        losses, tokens = self._token_losses(batch)
        for name, metric in ((f"{stage}_loss", mean), (f"{stage}_perplexity", perplexity)):
            metric.update(losses, tokens)
            self.log(name, metric, prog_bar=True, on_step=False, on_epoch=True)

    # ---- optimization

    def configure_optimizers(self) -> "OptimizerLRSchedulerConfig":
        """AdamW on the trainable parameters, and a schedule that is stepped with it."""
        hp = self.hparams
        optimizer = torch.optim.AdamW(
            decay_groups(self.model, hp["weight_decay"]),
            lr=hp["learning_rate"],
            betas=tuple(hp["betas"]),
            fused=hp["fused"],
        )
        steps = self._total_steps()
        warmup = hp["warmup_steps"] if hp["warmup_ratio"] is None else round(hp["warmup_ratio"] * steps)
        factor = partial(
            learning_rate_factor,
            steps=steps,
            warmup_steps=warmup,
            schedule=hp["lr_schedule"],
            min_ratio=hp["min_lr_ratio"],
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _total_steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if math.isfinite(steps) and steps >= 0:
            return int(steps)
        if self.hparams["lr_schedule"] == "constant" and self.hparams["warmup_ratio"] is None:
            return 0  # not needed
        raise ValueError(
            f"lr_schedule={self.hparams['lr_schedule']!r} with warmup_ratio={self.hparams['warmup_ratio']} needs "
            "the number of training steps, which is unlimited here. Set max_steps of the Trainer, or use "
            "lr_schedule='constant' with warmup_steps."
        )

    # ---- tokenizer, checkpoints, saving

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, loaded on first use; None if the model has none yet."""
        if self._tokenizer is None and self._tokenizer_source is not None:
            self._tokenizer = load_tokenizer(
                self._tokenizer_source, gguf_file=self._tokenizer_gguf, revision=self.hparams["revision"]
            )
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._check_vocabulary(tokenizer)
        self._tokenizer = tokenizer
        self._tokenizer_source, self._tokenizer_gguf = tokenizer.name_or_path or None, None

    def _check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        embeddings = self.model.get_input_embeddings().num_embeddings
        if len(tokenizer) > embeddings:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, more than the model's {embeddings} embeddings. Set "
                f"vocab_size in config to at least {len(tokenizer)}, or use the model's own tokenizer."
            )

    def _check_meaning(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer whose ids are those of other tokens for the model."""
        own: Any = None
        with suppress(OSError, ValueError):  # a model may come without one that can be loaded
            own = self.tokenizer
        if own is None or own is tokenizer:
            return
        mine = {number: token for token, number in own.get_vocab().items()}
        theirs = tokenizer.get_vocab()
        wrong = [number for token, number in theirs.items() if mine.get(number, token) != token]
        if len(wrong) > len(theirs) / 100:  # not a few that were renamed, such as those a .gguf file pads with
            raise ValueError(
                f"The tokenizer of the data module ({tokenizer.name_or_path}) is not the model's ({own.name_or_path}): "
                f"{len(wrong)} of its {len(theirs)} ids mean other tokens there. Pass tokenizer={own.name_or_path!r} "
                "to the data module; or that of the data to CausalLM(tokenizer=...), if the model is to learn it anew."
            )

    def setup(self, stage: str) -> None:
        """Check that the data module fits the model, and take its tokenizer if the model has none."""
        check_checkpoint_of(self.trainer)
        follow_shrunk_checkpoints(self.trainer)  # also where it is resumed without its callback
        datamodule = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(datamodule, "tokenizer", None)
        if isinstance(tokenizer, PreTrainedTokenizerBase):  # a data module of the user's own may hold another kind
            self._check_vocabulary(tokenizer)
            if self._tokenizer is None and self._tokenizer_source is None:
                self.tokenizer = tokenizer
            self._check_meaning(tokenizer)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        block_size = getattr(datamodule, "block_size", None)
        if isinstance(positions, int) and isinstance(block_size, int) and block_size > positions:
            raise ValueError(
                f"block_size={block_size} of the data module exceeds the model's {positions} positions "
                "(max_position_embeddings). Use shorter blocks."
            )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Build the module of a checkpoint; nothing in it is run.

        Args:
            checkpoint_path: A Lightning ``.ckpt``; its check sums are compared.
            args: See Lightning's method of this name.
            kwargs: See there; ``weights_only`` is True unless it is given.

        Raises:
            CheckpointError: it is missing, damaged, a folder, or names a class that is not this one.
        """
        if isinstance(checkpoint_path, (str, Path)):
            if expanded(checkpoint_path, "checkpoint_path").is_dir():
                raise CheckpointError(
                    f"{checkpoint_path} is the folder of a distributed checkpoint: turn it into a model first "
                    f"(lightning-prune export {shlex.quote(str(checkpoint_path))} model), and take CausalLM('model')"
                )
            if kwargs.get("weights_only") is not False:
                _check_origin(cls, checkpoint_path, read_resumable(checkpoint_path).get("hyper_parameters") or {})
        load = super().load_from_checkpoint
        if "weights_only" in inspect.signature(load).parameters:
            kwargs.setdefault("weights_only", True)
        else:  # before lightning 2.6, which would give it to the class
            kwargs.pop("weights_only", None)
        return load(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the architecture as it is now into the hyper-parameters, in place of where it came from."""
        checkpoint.setdefault(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).update(
            model=None,
            config=json.loads(self.model.config.to_json_string(use_diff=False)),
            tokenizer=self._tokenizer_source,
            gguf_file=self._tokenizer_gguf,
            read_once=False,  # the checkpoint has the weights
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Merge adapters of `PERPRetraining` that a checkpoint holds and this module does not.

        Where nothing else does, note which units `PruningAwarePretraining` had masked in shards, so that
        `save_pretrained` leaves them out.

        Raises:
            ValueError: training is to be resumed from it, without that callback; or a damaged state.
            CheckpointError: the adapters cannot be merged; or the checkpoint is of a model in PEFT's, and this is not.
        """
        units = units_in(checkpoint.get("callbacks", {}), sharded=True)
        # In one piece, and in a Trainer, the callback slices them off.
        if units is not None and (self._trainer is None or has_sharded_parameters(self.model)):
            note_masked_units(self.model, units.removal, units.attention_unit)
            if self._trainer is None:  # zeros are loaded with the weights, but no norms that leave channels out
                mask_units(self.model, units.removal, attention_unit=units.attention_unit)
        state = checkpoint.get("state_dict", {})  # ModelParallelStrategy has loaded the weights already
        own = {name for name, _ in self.named_parameters() if ".lora_A." in name}  # also of another model beside
        unmerged = any(".lora_A." in name and name not in own for name in state)
        wrapped = any(name.startswith("model.base_model.model.") for name in state) and not unmerged
        if wrapped and not hasattr(uncompiled(self.model), "get_base_model"):
            raise CheckpointError(
                "the checkpoint is of a model in PEFT's (prompts or a prefix), and this CausalLM's is plain: put the "
                "same around it first, in __init__ of a subclass (self.model = get_peft_model(self.model, ...))"
            )
        beside = any("unmerged" in held for held in checkpoint.get("callbacks", {}).values() if isinstance(held, dict))
        if not (unmerged or beside) or not own <= state.keys():
            return

        if self._trainer is not None and self._trainer.state.fn == "fit":
            callbacks: list[Any] = self._trainer.callbacks  # type: ignore[attr-defined]
            # It puts them on later. By name: importing it would load PEFT.
            if any(has_class(callback, "PERPRetraining") for callback in callbacks):
                return
            raise ValueError(
                "the checkpoint was written while adapters were trained: put PERPRetraining(...), with the settings it "
                "was made with, into this Trainer too; or start from CausalLM.load_from_checkpoint, which merges them"
            )
        if unmerged:
            from lightning_prune.checkpoints.states import merged_parts  # takes peft with it, which few need here

            checkpoint["state_dict"], _ = merged_parts(state, checkpoint.get("callbacks", {}), "the checkpoint")

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model and tokenizer as a plain transformers folder with safetensors, a model card and `sparsity.json`.

        The card says what is zero and, while the module belongs to a Trainer, which callbacks pruned it with which
        settings, and the losses and perplexities that were logged last.

        The folder appears whole or not at all; what it held beside an older model stays. The first process writes.
        Where parameters are sharded every process must call, and the whole weights are gathered in the main memory of
        the first; units that `PruningAwarePretraining` has masked are left out. A model without a tokenizer is saved
        without one.

        Args:
            folder: Created if it does not exist.

        Raises:
            ValueError: masked units are not zero any more; parameters that the configuration does not say; `folder` is
                a file; or the model is in PEFT's, whose prompts or adapters a plain model has not.
            RuntimeError: with `read_once`, before the weights are read.
        """
        self._check_read()
        folder = expanded(folder, "folder")
        if hasattr(uncompiled(self.model), "get_base_model"):
            raise ValueError(
                f"save_pretrained writes a plain transformers model, and this one is in a {type(self.model).__name__}: "
                "merge its adapters first (module.model = module.model.merge_and_unload(), or "
                "lightning_prune.perp.merge(module.model) of those that PERPRetraining has put on), or write what PEFT "
                "trains alone with module.model.save_pretrained(folder)"
            )
        self._save_pretrained(folder, whole_state(self.model))

    @rank_zero_only
    def _save_pretrained(self, folder: Path, state: dict[str, Any] | None) -> None:
        small = without_masked_units(self.model, state)
        whole: Any = small
        state = state if small is self.model else None
        with writing_plain(small, folder, state, self.tokenizer) as new:
            found = LoadedModel("", whole, None).inspection(state)
            for name, text in described_files(folder.resolve().name, whole, found, self._making()).items():
                (new / name).write_text(text, encoding="utf-8")

    def push_to_hub(self, repo_id: str, private: bool | None = None, **options: Any) -> str:
        """Upload what `save_pretrained` writes, the model card included, to a repository of the hub.

        Where parameters are sharded every process must call, and the first uploads.

        Args:
            repo_id: Such as "owner/name"; created if it does not exist.
            private: Whether a repository that is created is private. Default what the owner's settings say.
            options: Of `huggingface_hub.upload_folder`, such as `commit_message`, `revision` or `token`.

        Returns:
            The address of the commit; empty on other processes than the first.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, repo_id.rpartition("/")[2])  # the card is called as its folder
            self.save_pretrained(folder)
            return _upload(folder, repo_id, private, options) or ""

    def _making(self) -> Making:
        """What the Trainer's callbacks and metrics say of how the weights came about."""
        trainer: Any = self._trainer
        if trainer is None:
            return Making(base=self.hparams["model"])
        facts = [describe() for c in trainer.callbacks if (describe := getattr(c, "describe_masks", None)) is not None]
        scores = dict.fromkeys(str(fact["score"]) for fact in facts)
        measured = [
            (n, f"{float(v):.4f}") for n, v in trainer.callback_metrics.items() if n.startswith(("val_", "test_"))
        ]
        return Making(
            score=", ".join(scores) or None,
            settings=[fact["settings"] for fact in facts],
            masks=sum(fact["masks"] for fact in facts) if facts else None,
            base=self.hparams["model"],
            tables=[Table("Measured in training", ("", ""), measured)] if measured else [],
        )


@rank_zero_only
def _upload(folder: Path, repo_id: str, private: bool | None, options: dict[str, Any]) -> str:
    api = HfApi(token=options.pop("token", None))
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def _check_origin(cls: type[CausalLM], path: str | Path, stored: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters by which Lightning would import what this program has not."""
    instantiator, class_path = stored.get("_instantiator"), stored.get("_class_path")
    module, _, name = str(class_path).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)  # nothing is imported on the word of a file
    ours = class_path is None or (isinstance(found, type) and issubclass(found, cls))
    if instantiator not in (None, "lightning.pytorch.cli.instantiate_module") or not ours:
        raise CheckpointError(
            f"{path} was written by {class_path or instantiator!r}, which is not imported on the word of a file; call "
            "load_from_checkpoint of that class"
        )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those with and those without weight decay.

    Args:
        model: Any module.
        weight_decay: Of the first group: parameters with two or more dimensions that are not embeddings.

    Returns:
        Parameter groups of an optimizer, empty ones left out.
    """
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2 and p not in embeddings]
    kept = [p for p in trainable if p.ndim < 2 or p in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Labels (B, T) of a batch."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"batch is a {type(batch).__name__}; CausalLM takes dicts with 'input_ids' of shape (B, T)")
    return next_token_labels(batch)


def _from_config(config: dict[str, Any] | str | None, revision: str | None, options: dict[str, Any]) -> Any:
    built = _config_of(config, revision)
    if not is_causal_lm(built.model_type):
        raise ValueError(
            f"config has model_type={built.model_type!r}, which is no causal language model of transformers. Use "
            "one such as 'llama', 'mistral', 'qwen2' or 'gpt2'."
        )
    return AutoModelForCausalLM.from_config(built, trust_remote_code=False, **options)


def _config_of(config: dict[str, Any] | str | None, revision: str | None) -> PretrainedConfig:
    if isinstance(config, str):
        name = str(existing_path(config, "config")) if looks_like_path(config) else config
        with named_where_it_fails("config", name):
            return AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    fields = dict(config or {})
    check_no_kernel("config", fields)  # it may come from a checkpoint
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            f"config={config!r} lacks the field 'model_type', which names the architecture. Add e.g. "
            "'model_type': 'llama', or pass config.to_dict() of a transformers configuration."
        )
    try:
        return config_from(model_type, fields)
    except Exception as error:  # each family raises its own
        said = str(error).partition(" Should contain one of")[0]  # of hundreds of families
        raise ValueError(f"config={config!r} is not a configuration of transformers: {said}") from error


def _tokenizer_origin(model: str | None, gguf_file: str | None, tokenizer: str | None) -> tuple[str | None, str | None]:
    """Source and GGUF file name of the tokenizer; (None, None) if there is none yet."""
    if tokenizer is not None:
        return tokenizer, gguf_file if model is None else None
    if model is None or gguf_file is not None or model.endswith(".gguf") or not looks_like_path(model):
        return model, gguf_file
    folder = existing_path(model, "model")
    return (model if has_tokenizer(folder) else None), None


def _check_source(model: str | None, config: dict[str, Any] | str | None) -> None:
    if (model is None) == (config is None):
        raise ValueError(
            f"Exactly one of model and config must be given; received model={model!r} and config={config!r}. "
            "model loads pretrained weights, config trains from random ones."
        )
    if isinstance(config, Mapping):
        try:
            json.dumps(config)
        except TypeError as error:
            raise ValueError(
                f"config must hold plain values only, so that checkpoints load safely: {error}. Pass numbers, "
                "strings, lists and dictionaries."
            ) from error
    elif config is not None and not isinstance(config, str):
        raise ValueError(
            f"config must be a dictionary or a string, received {type(config).__name__}. Pass config.to_dict()."
        )


def _check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not known. Use one of {', '.join(map(repr, accepted))}.")


def _check_range(name: str, value: Any, accepts: Callable[[Any], bool], accepted: str) -> None:
    try:
        valid = accepts(value)
    except TypeError:  # no number
        valid = False
    if not valid:
        raise ValueError(f"{name}={value!r} is out of range: it must be {accepted}.")
