"""What older versions of the libraries lack; its tests are skipped there by that reason."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser, Namespace
from packaging.version import Version

# Package, the version that has it, what it is, and parts of the names of its tests.
LACKING = (
    ("torch", "2.7", "FSDP2 on a CPU", (
        "tests/distributed/test_sharded.py", "tests/distributed/test_retraining.py",
        "tests/distributed/test_experts.py", "tests/distributed/test_pruning_aware_sharded.py",
        "tests/structure/test_sharded.py",
        "test_nodes.py::test_two_nodes_train_and_export_one_folder", "test_export.py::test_shards_of_two_processes",
        "test_elsa.py::test_ranks_agree_and_a_resumed_run_is_the_uninterrupted_one",
        "test_holding.py::test_two_ranks_train_as_one", "test_holding_loops.py::test_two_processes",
    )),
    ("torch", "2.9", "a switch of precision for each backend", (
        "test_reduced_float32_products_are_off_inside_and_as_before_after",
    )),
    ("torch", "2.8", "check sums in distributed checkpoints", ("test_a_flipped_bit_in_a_distributed_checkpoint",)),
    ("transformers", "5", "experts as one parameter", (
        "tests/pruning/test_experts", "tests/structure/test_experts", "test_weight_pruning_experts.py", "[mixtral]",
        "test_zeros_that_keep_cannot_hold_are_named", "tests/perp/test_experts.py", "test_perp_retraining_experts.py",
        "test_retraining.py*[experts", "test_a_mixture_loses_experts",
    )),
    ("transformers", "5", "Gemma's factor beside its embedding", ("tests/structure/test_removal.py*gemma",
        "tests/structure/test_oneshot.py*gemma", "tests/structure/test_saving.py*gemma",
        "test_pruning_aware_pretraining.py*[gemma]",
    )),
    ("transformers", "5", "OPT whose norms have no weights", (
        "test_channels_go_from_opt_without_weights_in_norms", "test_kept_channels_are_on_the_device_of_a_model",
    )),
    ("transformers", "5", "GPT-NeoX's head under the name of the others", ("tests/structure/*gpt_neox",)),
    ("transformers", "5", "these stacks, their names, or masks in float64", (
        "[encoder decoder]", "test_stacks.py::test_each_stack_meets_what_the_pruned_stacks_before_it_give[clip]",
        "[llava]", "test_clip_runs_with_its_contrastive_loss",
    )),
    ("transformers", "5", "checkpointing of layers outside training", (
        "test_layers_go_on_being_checkpointed_in_calibration",
    )),
    ("transformers", "5", "configurations that check their values", (
        "test_checkpoints_that_do_not_fit[<lambda>-is not",
    )),
    ("transformers", "5", "OPT's norms without weights, and rope_parameters", (
        "test_layer_norms_without_weights_take_the_channels", "test_sizes_that_a_configuration_refuses",
    )),
    ("transformers", "5.20", "GGUF kept quantized", ("test_a_model_read_from_gguf_only_remembers",)),
    ("lightning", "2.6", "averaging of weights as a callback", (
        "tests/callbacks/test_averages.py", "test_perp_checkpoints.py*averag", "test_resuming.py*averag",
        "test_pruning_aware_pretraining.py*averag", "test_shrink_prune_retrain.py*adapters come later",
        "test_weight_pruning_twice.py*averages", "test_perp_retraining_schedule.py*averages",
        "test_a_checkpoint_is_validated_beside_an_average", "test_perp_retraining_experts.py*average",
    )),
    ("lightning", "2.5.5", "a finder after which a plain fit goes on as without it", (
        "test_what_goes_back_to_a_checkpoint_in_the_midst",
    )),
    ("lightning", "2.6", "a checkpoint where a fit fails", ("test_names_of_masks_are_those_of_the_module_whatever",)),
    ("torch", "2.11", "layers recomputed to the last bit (1e-7 apart in 2.6)", (
        "test_adapters.py::test_gradient_checkpointing_trains_the_same",
    )),
    ("peft", "0.21", "names of variants in its signatures", ("test_peft_still_says_which_options_are_variants",)),
    ("peft", "0.20", "HiRA of PEFT", ("test_hira_is_that_of_peft_which_merges_it",)),
    ("datasets", "4", "rows of several types in one JSON file", (
        "test_malformed_rows[row1-", "test_malformed_rows[row3-", "test_malformed_rows[row7-",
    )),
)  # fmt: skip


try:
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
except ImportError:  # never made there: the tests that would are skipped
    EMAWeightAveraging = WeightAveraging = L.Callback  # type: ignore[misc, assignment]


@cache  # asked for every test, and the answer is in a file
def has(package: str, least: str) -> bool:
    """Whether a package is installed in a version or a later one."""
    return Version(version(package)) >= Version(least)


def missing_for(test: str) -> str | None:
    """Why a test cannot run with what is installed; None if it can."""
    for package, least, what, parts in LACKING:
        if not has(package, least) and any(all(p in test for p in part.split("*")) for part in parts):
            return f"{what}: needs {package} {least}"
    return None


# What a Trainer is told to read a checkpoint with; before lightning 2.6 it could not be told.
WEIGHTS_ONLY: dict[str, Any] = {"weights_only": True} if has("lightning", "2.6") else {}


def instantiate(parser: ArgumentParser, configuration: Namespace) -> Any:
    """Make the objects of a configuration; jsonargparse has renamed the method."""
    return (parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes)(configuration)
