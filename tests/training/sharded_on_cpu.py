"""Run training/train.py under FSDP2 on a CPU mesh.

accelerate chooses FSDP for accelerators alone; on CPUs it would train whole weights. This program tells it, once it has
chosen, that FSDP2 is wanted. Everything after that is what a run on GPUs does: accelerate's own
preparation, torch's `fully_shard`, the trainer, evaluation and saving.
"""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer

from perceptiondlm.training.train import main


create = Trainer.create_accelerator_and_postprocess


def create_sharded(self: Trainer) -> None:
    create(self)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state = self.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer", "SiglipEncoderLayer"],
        state_dict_type="FULL_STATE_DICT",
    )
    if self.accelerator.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(self.accelerator.mixed_precision)
    self.is_fsdp_enabled = True


if __name__ == "__main__":
    Trainer.create_accelerator_and_postprocess = create_sharded
    sys.exit(main())
