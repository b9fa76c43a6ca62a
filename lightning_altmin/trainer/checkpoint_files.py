"""Checkpoint files: whole or not there, checked before anything is loaded, and what is wrong said in plain words."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import CheckpointIO, TorchCheckpointIO
from torch import Tensor


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file and what to do."""


class CheckedCheckpoints(CheckpointIO):
    """Reads and writes checkpoints as the wrapped plugin does, and checks every local file before it is loaded.

    Where the plugin is Lightning's default, local files are written beside their place and then renamed. Lightning
    writes them to the system's folder for temporary files and moves them, which on another file system is a copy: a
    process killed meanwhile would leave half a file in the place of the checkpoint before it.

    Args:
        inner: Lightning's own plugin, or the user's.
    """

    def __init__(self, inner: CheckpointIO) -> None:
        self.inner = inner

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """As the wrapped plugin.

        Raises:
            CheckpointError: If the disk is full, or the file cannot be written for another reason.
        """
        try:
            if type(self.inner) is TorchCheckpointIO and "://" not in str(path) and storage_options is None:
                _write(checkpoint, Path(path))
            else:
                self.inner.save_checkpoint(checkpoint, path, storage_options)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {str(path)!r} could not be written: {error.strerror or error}. Checkpoints written "
                "before it are whole: make room there, or choose another folder, and go on from the last one with "
                "ckpt_path"
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """As the wrapped plugin.

        Raises:
            CheckpointError: If the file is cut off or damaged.
        """
        with damage_named(path):
            return self.inner.load_checkpoint(path, *args, **options)

    def remove_checkpoint(self, path: str | Path) -> None:
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        self.inner.teardown()


def check_checkpoints(trainer: Trainer) -> None:
    """Let a Trainer read and write checkpoints through `CheckedCheckpoints`."""
    strategy = trainer.strategy
    if not isinstance(strategy.checkpoint_io, CheckedCheckpoints):
        strategy.checkpoint_io = CheckedCheckpoints(strategy.checkpoint_io)


@contextmanager
def damage_named(path: str | Path) -> Iterator[None]:
    """Check a local file, and load it inside this context.

    torch itself notices neither a changed byte inside a tensor nor says of a file without its end that it has none.

    Raises:
        CheckpointError: If the file is cut off or damaged.
    """
    file = Path(path)
    whole = False
    if file.is_file():
        if file.stat().st_size == 0:
            raise _damaged(file, "it is empty")
        try:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    part = archive.testzip()
                if part is not None:
                    raise _damaged(file, f"the checksum of its part {part!r} is wrong")
                whole = True
        except (zipfile.BadZipFile, EOFError) as error:
            raise _damaged(file, str(error)) from error
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {str(file)!r} cannot be read: {error.strerror or error}. Look at the disk and at the "
                "rights of the file"
            ) from error
    try:
        yield
    except Exception as error:
        if whole or not file.is_file():
            raise
        raise _damaged(file, "its end is missing, or it is no checkpoint at all") from error


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a file that is whole as soon as it has its name, or leave the one that had it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its name does not hold that of the checkpoint: Lightning looks for "last" in names.
    unfinished = path.parent / f".unfinished-{os.getpid()}"
    handled = sys.exc_info()[1]  # a save on an exception: what is wrong with the run is not what is wrong with the file
    try:
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        hidden: BaseException | None = error
        while hidden is not None and hidden is not handled:
            if isinstance(hidden, OSError):  # torch's writer raises a RuntimeError of its own on top of it
                raise hidden from None
            hidden = hidden.__context__
        raise


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {str(file)!r} ({file.stat().st_size} bytes) is cut off or damaged: {reason}. Nothing of it "
        "was loaded. Copy it again if it is a copy, or go on from an earlier checkpoint with ckpt_path"
    )


def refuse_other_model(here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compare the state of a module with one that it is to be given.

    Raises:
        ValueError: If names or shapes differ.
    """
    missing, unexpected = sorted(here.keys() - saved.keys()), sorted(saved.keys() - here.keys())
    reshaped = [
        f"{name}: {tuple(saved[name].shape)} in the checkpoint, {tuple(here[name].shape)} here"
        for name in here.keys() & saved.keys()
        if isinstance(saved[name], Tensor) and isinstance(here[name], Tensor)
        if saved[name].shape != here[name].shape
    ]
    if missing or unexpected or reshaped:
        raise ValueError(
            "the checkpoint belongs to another network: "
            f"missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}, shapes {reshaped or 'equal'}. "
            "Build the same network; with strict=False names may be missing or left over, shapes may not differ"
        )
