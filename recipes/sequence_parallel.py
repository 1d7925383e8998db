"""A Lightning strategy for sequences that one device cannot hold.

    trainer:
      strategy:
        class_path: recipes.sequence_parallel.SequenceParallelStrategy
        init_args:
          sequence_parallel_size: 4
          method: dilated

The processes form a grid, `data_parallel_size` x `sequence_parallel_size`. Those of a row share the
same batch and take a part of each of its sequences (`longnet_zoo.parallelize`); weights, gradients
and optimizer states are sharded over all processes by FSDP2, block by block. It runs wherever
torch.distributed does: gloo on CPUs, NCCL on GPUs; under torchrun, SLURM or by itself.

A task with a method `shard_batch(batch, mesh, layout=...)` gets only its part of each batch; any
other task gets whole batches, and only the blocks inside of its models work on parts.
"""

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

import longnet_zoo as lz
from longnet_zoo.layers import TransformerBlock
from longnet_zoo.models import ZooModel
from longnet_zoo.parallel import Layout
from longnet_zoo.parallel.styles import Method
from recipes.checkpoints import read_checkpoint
from recipes.sharded_checkpoints import by_index, by_name, is_sharded, replace_folder

__all__ = ["SequenceParallelStrategy"]

# Lightning's own name of the first one: it picks the batches of a process.
_DATA, _SEQUENCE = "data_parallel", "sequence_parallel"
# Half floats would need their losses scaled, which sharded weights have no way of.
_PRECISIONS = ("bf16-mixed", "bf16-true", "32-true")
# Every process has whole sequences, and layers that know of no other process.
_UNSPLIT = "unsplit"
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class SequenceParallelStrategy(ModelParallelStrategy):
    """Splits every sequence over `sequence_parallel_size` processes, and the weights over all.

    Args:
        sequence_parallel_size: Processes that share a sequence.
        data_parallel_size: Groups of such processes, each with a batch of its own; "auto" takes as
            many as there are.
        method: "dilated" exchanges the keys of long branches only, "ring" passes all keys round,
            "all_to_all" exchanges heads for tokens.
        layout: Which tokens a process takes; "striped" and "zigzag" balance causal attention.
        save_distributed_checkpoint: Whether each process writes its share of a checkpoint, which
            then is a folder; otherwise the first process gathers everything into one file.
        process_group_backend: Backend of torch.distributed; null takes that of the device.
        timeout: How long a process waits for the others before the job fails.

    Sizes and precision are checked when a run starts: what a constructor raises reaches the user of
    a command line in the middle of a traceback.
    """

    def __init__(
        self,
        *,
        sequence_parallel_size: int,
        data_parallel_size: Literal["auto"] | int = "auto",
        method: Method = "dilated",
        layout: Layout = "contiguous",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=sequence_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.sequence_parallel_size = sequence_parallel_size
        self.method, self.layout = method, layout
        self._inputs: str | None = None

    @property
    def sequence_mesh(self) -> DeviceMesh:
        """The processes that share a sequence with this one."""
        return self.device_mesh[_SEQUENCE]

    def check_precision(self, precision: str | int | None) -> None:
        """Checks what a trainer is to compute with.

        Args:
            precision: `trainer.precision`.

        Raises:
            ValueError: Sharded weights cannot be trained with it.
        """
        if precision is not None and str(precision) not in (*_PRECISIONS, "bf16", "32"):
            raise ValueError(
                f"SequenceParallelStrategy computes in {', '.join(_PRECISIONS)}, got "
                f"trainer.precision={precision!r}. Set trainer.precision to {_PRECISIONS[0]}."
            )

    def setup_environment(self) -> None:
        """Connects the processes and puts them into a grid."""
        # Before they are connected, so that none waits for one that has stopped.
        _check_restarts()
        self.check_precision(self.precision_plugin.precision)
        shape = self._grid_shape(self.num_nodes * self.num_processes)
        self._setup_distributed()
        device = self.root_device.type
        self._device_mesh = init_device_mesh(device, shape, mesh_dim_names=(_DATA, _SEQUENCE))
        self.lightning_module._device_mesh = self._device_mesh

    def setup(self, trainer: L.Trainer) -> None:
        """Splits sequences and weights, then makes the optimizer for this process' weights."""
        task, inputs = self.lightning_module, self._inputs_of(trainer)
        if self._inputs not in (None, inputs):
            raise ValueError(
                f"a model is split once, got a model split for inputs={self._inputs!r} that is to "
                f"take inputs={inputs!r}. Make a new task and trainer to {trainer.state.fn.value}."
            )
        self.accelerator.setup(trainer)
        self._evaluate_without_inference_mode(trainer)
        if self._inputs is None:
            self.model = self.precision_plugin.convert_module(task)
            self._share_weights(task)
            if inputs != _UNSPLIT:
                self._split_sequences(task, inputs)
            self._shard_weights(task)
            self.model_to_device()
        self._inputs = inputs
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Moves this process' part of a batch to its device."""
        if self._inputs == "sharded":
            batch = self.lightning_module.shard_batch(batch, self.sequence_mesh, layout=self.layout)
        return super().batch_to_device(batch, device, dataloader_idx)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Returns the optimizer's state: this process' share, or all of it for a single file."""
        is_file = not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=is_file, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return by_index(state) if is_file and self.is_global_zero else state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Saves a checkpoint; an earlier one of this name stays until the new one is complete."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        new = path.with_suffix(".new")
        if self.is_global_zero:
            shutil.rmtree(new, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, new, storage_options)
        self.barrier()
        if self.is_global_zero:
            replace_folder(path, new)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a folder or a file, whatever number of processes wrote it."""
        path = Path(self.broadcast(checkpoint_path))
        if is_sharded(path):
            return super().load_checkpoint(path, weights_only)
        checkpoint = read_checkpoint(path)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        # Lightning's own way takes the parameters for numbered by the model, not by the optimizer.
        states = checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=False):
            named = by_name(state, optimizer, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint

    def _grid_shape(self, world_size: int) -> tuple[int, int]:
        data, sequence = self._data_parallel_size, self.sequence_parallel_size
        for name, size in (("sequence_parallel_size", sequence), ("data_parallel_size", data)):
            if size != "auto" and size < 1:
                raise ValueError(f"{name} must be 1 or more, got {size}.")
        if data == "auto" and world_size % sequence == 0:
            return world_size // sequence, sequence
        if data == "auto" or data * sequence != world_size:
            sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
            nearest = sorted(sorted(sizes, key=lambda size: abs(size - sequence))[:3])
            choices = ", ".join(f"{world_size // size} x {size}" for size in nearest)
            raise ValueError(
                "data_parallel_size x sequence_parallel_size must be the number of processes, got "
                f"{data} x {sequence} and {world_size} processes. Nearest that work: {choices}."
            )
        return data, sequence

    def _inputs_of(self, trainer: L.Trainer) -> str:
        if not hasattr(self.lightning_module, "shard_batch"):
            return "full"
        # A language model reads its prompt in chunks and writes token by token.
        return _UNSPLIT if trainer.state.fn == TrainerFn.PREDICTING else "sharded"

    def _share_weights(self, task: torch.nn.Module) -> None:
        """Gives all processes the first one's weights, whatever seed each had."""
        with torch.no_grad():
            for tensor in [*task.parameters(), *task.buffers()]:
                shared = tensor.to(self.root_device)
                dist.broadcast(shared, src=0)
                tensor.copy_(shared)

    def _split_sequences(self, task: torch.nn.Module, inputs: str) -> None:
        for model in [module for module in task.modules() if isinstance(module, ZooModel)]:
            lz.parallelize(
                model,
                self.sequence_mesh,
                method=self.method,
                inputs=inputs,
                layout=self.layout,
                loss_mesh=self.device_mesh if inputs == "sharded" else None,
                average_gradients=False,
            )

    def _shard_weights(self, task: torch.nn.Module) -> None:
        """Shards weights over all processes; the mean over them is what parallelize asks for."""
        device, world_size = self.root_device.type, self.world_size
        mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
        # Autocast and Lightning's precision plugin choose dtypes; halves are added up in float32.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in [part for part in task.modules() if isinstance(part, TransformerBlock)]:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The task as a whole, since a task calls `model.loss` and more, and not `model`.
        fully_shard(task, mesh=mesh, mp_policy=policy)
        for step in _STEPS:
            register_fsdp_forward_method(task, step)

    def _evaluate_without_inference_mode(self, trainer: L.Trainer) -> None:
        # Weights that were gathered in inference mode could not be trained.
        loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        for loop in (*loops, trainer.predict_loop):
            loop.inference_mode = False


def _check_restarts() -> None:
    """Refuses a torchrun that would hand a restarted job the addresses of the one that failed."""
    # Its workers find this out by these variables alone.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "a restarted job must not meet the store of the one before, got torchrun "
            f"--max-restarts={restarts}, which keeps it. Set the environment variable "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun."
        )
