"""A file operation that goes wrong: the n-th of a command, by a signal, a full disk or a failing one.

Python announces what it does to files by name (`sys.addaudithook`), before it does it; writing, syncing and closing,
which it does not announce, are wrapped. So the operations of a command can be counted, and one of them can be the last.
A write that fails, or is killed, leaves half of what it should have written. Read next: `crash.py`.
"""

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

FAULTS = ("SIGKILL", "SIGTERM", "SIGINT twice", "ENOSPC", "EIO")
POLITE = ("SIGTERM", "SIGINT twice")
"""What waits for the end of a write, and may be survived."""
CREATING = ("open", "mkdir", "write", "save")
"""What a full disk refuses, and goes on to refuse."""
ANNOUNCED = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink")


class Watch:
    """The file operations of this process in a folder, from `begin` on: noted, and number `at` struck by `fault`."""

    def __init__(self, folder: Path, notes: Path, at: int | None = None, fault: str = "") -> None:
        self.folder, self.notes, self.at, self.fault = str(folder), notes, at, fault
        self.count, self.full = 0, False

    def begin(self) -> None:
        """Watch this process until its end."""
        self.descriptor = os.open(self.notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.open, self.fsync, self.save = builtins.open, os.fsync, safetensors.torch.serialize_file
        sys.addaudithook(self.hear)
        builtins.open = io.open = self.open_watched
        os.fsync, safetensors.torch.serialize_file = self.fsync_watched, self.save_watched  # type: ignore[assignment]

    def meet(self, kind: str, path: str, half: Callable[[], object] = lambda: None) -> None:
        """One operation is about to be done; if it is the one to be struck, first half of it, then the fault."""
        if not path.startswith(self.folder):
            return
        name = os.path.relpath(path, self.folder).replace(str(os.getpid()), "PID")
        os.write(self.descriptor, f"{kind} {name}\n".encode())
        struck, self.count = self.count == self.at, self.count + 1
        if struck or (self.full and kind in CREATING):
            self.full = self.fault == "ENOSPC"
            if self.fault not in POLITE:
                half()
            self.strike(path)

    def strike(self, path: str) -> None:
        """The fault itself. A signal may let the process live."""
        if self.fault.startswith("SIG"):
            name, *more = self.fault.split()
            for _ in range(1 + len(more)):
                signal.raise_signal(signal.Signals[name])
        else:
            code = getattr(errno, self.fault)
            raise OSError(code, os.strerror(code), path)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """What Python announces."""
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (not writing and event not in ANNOUNCED) or not isinstance(arguments[0], str | os.PathLike):
            return
        place = os.getcwd()
        if event != "open" and arguments[-1] >= 0:  # relative to an open folder
            place = os.readlink(f"/proc/self/fd/{arguments[-1]}")
        self.meet(event.removeprefix("os."), os.path.join(place, arguments[0]))

    def open_watched(self, file: Any, mode: str = "r", *rest: Any, **how: Any) -> Any:
        opened = self.open(file, mode, *rest, **how)
        writing = set(mode) & set("wax+") and not isinstance(file, int)
        return WatchedFile(opened, os.path.abspath(file), self) if writing else opened

    def fsync_watched(self, descriptor: int) -> None:
        self.meet("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        self.fsync(descriptor)

    def save_watched(self, tensors: Any, path: str | Path, *rest: Any, **how: Any) -> None:
        """A safetensors file, which no Python writes: what fails there is an error of its own."""

        def half() -> None:
            self.save(tensors, path, *rest, **how)
            os.truncate(path, os.path.getsize(path) // 2)

        try:
            self.meet("save", os.path.abspath(path), half)
        except OSError as error:
            raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from error
        self.save(tensors, path, *rest, **how)


class WatchedFile:
    """A file open for writing whose writing and closing are watched."""

    def __init__(self, file: Any, path: str, watch: Watch) -> None:
        self.file, self.path, self.watch = file, path, watch

    def write(self, content: Any) -> Any:
        def half() -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()

        self.watch.meet("write", self.path, half)
        return self.file.write(content)

    def close(self) -> None:
        if not self.file.closed:
            try:
                self.watch.meet("close", self.path)
            finally:
                self.file.close()

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
