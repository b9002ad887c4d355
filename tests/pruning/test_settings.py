"""Settings: the object that both front doors build, from Python and from YAML."""

import pytest
from jsonargparse import ArgumentParser
from versions import instantiate

from lightning_prune.callbacks.weight_pruning import WeightPruning
from lightning_prune.pruning.scores import GBLM, KFAC, Wanda
from lightning_prune.pruning.settings import PruningSettings
from lightning_prune.pruning.updates import UPDATES, SparseGPT


def test_settings_are_frozen_and_checked_where_they_are_made():
    settings = PruningSettings(Wanda(), sparsity=0.5)
    with pytest.raises(AttributeError):
        settings.sparsity = 2.0
    with pytest.raises(ValueError, match=r"sparsity=2\.0 must be a number in \[0, 1\]"):
        PruningSettings(Wanda(), sparsity=2.0)


def test_who_changes_the_weights_that_stay():
    assert PruningSettings(Wanda()).solver is None
    assert PruningSettings(Wanda(), update="obs").solver is UPDATES["obs"]
    assert PruningSettings(SparseGPT()).solver == SparseGPT()
    assert PruningSettings(SparseGPT()).selects_itself
    assert not PruningSettings(Wanda(), update="obs").selects_itself


def test_a_description_holds_the_options_of_the_score_and_no_setting_of_memory():
    described = PruningSettings(KFAC(0.3), sparsity=0.5, targets=["mlp"]).describe()
    assert described["gamma"] == 0.3
    assert described["targets"] == "['mlp']"
    assert "gradient_device" not in described


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ({"class_path": "lightning_prune.pruning.scores.GBLM", "init_args": {"alpha": 3}}, GBLM(3.0)),
        ({"class_path": "lightning_prune.pruning.scores.KFAC"}, KFAC()),
        ("wanda", Wanda()),
    ],
)
def test_yaml_names_a_score_or_its_class(score, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(WeightPruning, "pruning")
    callback = instantiate(parser, parser.parse_object({"pruning": {"score": score}})).pruning
    assert callback.settings.score == expected
