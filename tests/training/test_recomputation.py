"""One setting under the names that transformers has given it, on whichever release is installed."""

import warnings

import pytest

from perceptiondlm.training.config import load_run_config
from perceptiondlm.training.recomputation import recomputation_kwargs
from perceptiondlm.training.train import trainer_arguments


EXAMPLE = "training/configs/scenes.yaml"


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_either_name_is_obeyed_without_a_warning(tmp_path, pytestconfig, name):
    overrides = [
        f"trainer.output_dir={tmp_path}",
        "trainer.use_cpu=true",
        f"trainer.{name}=true",
        f"trainer.{name}_kwargs={{use_reentrant: true}}",
    ]
    run = load_run_config(pytestconfig.rootpath / EXAMPLE, overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        arguments = trainer_arguments(run)
    assert run.trainer["gradient_checkpointing"] is True
    assert arguments.gradient_checkpointing
    assert recomputation_kwargs(arguments) == {"use_reentrant": True}


def test_two_values_for_one_setting_are_refused(pytestconfig):
    overrides = ["trainer.gradient_checkpointing=true", "trainer.activation_checkpointing=false"]
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True and trainer.activation_checkpointing=False are"):
        load_run_config(pytestconfig.rootpath / EXAMPLE, overrides)
