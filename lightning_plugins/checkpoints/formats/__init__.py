"""Opens checkpoints of every format and offers their tensors one range at a time, mapped from the file.

Read: Lightning's ``.ckpt`` and any other file of ``torch.save`` that holds a state dict, ``.safetensors``, and the
directories of ``torch.distributed.checkpoint`` that Lightning's FSDP and ModelParallel strategies write. A file that
needs more than tensors and plain values is refused unless it is trusted.
"""

from __future__ import annotations

from pathlib import Path

from lightning_plugins.checkpoints.formats.base import Checkpoint
from lightning_plugins.checkpoints.formats.safetensors import SafetensorsFile
from lightning_plugins.checkpoints.formats.sharded import ShardedDirectory
from lightning_plugins.checkpoints.formats.torch_reader import TorchFile
from lightning_plugins.core.checkpoint_file import CheckpointError, refuse_remote
from lightning_plugins.core.sharded_directory import is_sharded_checkpoint
from lightning_plugins.core.zero_directory import is_deepspeed_directory


def open_checkpoint(path: str | Path, *, trust: bool) -> Checkpoint:
    """Open a checkpoint of any format; tensors are not read yet.

    Args:
        path: A file, or a sharded checkpoint's directory.
        trust: Load whatever the file's pickle names, which runs code that the file chooses.

    Raises:
        FileNotFoundError: If there is nothing.
        CheckpointError: If it is no checkpoint, is damaged, or needs trust.
    """
    refuse_remote(path)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.is_dir():
        if is_deepspeed_directory(path):
            raise CheckpointError(
                f"{path} is a directory of DeepSpeed. Where DeepSpeed is installed, `lightning-plugins extract {path} "
                "--weights raw --trust --output FILE.pt` writes its weights into a file, which can be averaged."
            )
        if not is_sharded_checkpoint(path):
            raise CheckpointError(f"{path} is a directory without a sharded checkpoint (no .metadata in it).")
        return ShardedDirectory(path, trust=trust)
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path, trust=trust)
