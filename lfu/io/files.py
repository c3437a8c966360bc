"""Files that appear whole or not at all.

Writing goes to a sibling of the target, is flushed to the disk, and is renamed into place, so a reader (and a run that
is resumed after a power cut) never sees half of anything. Read next: `tensors.py`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lfu.errors import InputError, escape


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; InputError if the file is missing, not JSON, or not an object."""
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    try:
        with named(path):
            value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one where nothing has that name; else as `read_json`."""
    return read_json(path) if os.path.lexists(path) else {}


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError of the system that names no file names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError where it is none, names a key twice, or is nested too deeply to be read."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"an object has the key {escape(max(names, key=names.count))} twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half of a character, {escape(error.object[error.start])}") from error
    return value


def first_few(names: list[str], count: int = 4, *, shown: Callable[[str], str] = escape) -> str:
    """The first few names, escaped, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(shown, names[:count])) + more


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling to write into; on success it takes the place of `target`, on an error it vanishes.

    A folder that was there before is set aside by one rename and put back if the next one fails.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            fsync(path)
        replace_folder(temporary, target)
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`, which may exist."""
    before = target.with_name(f"{target.name}.{os.getpid()}.old.tmp")
    existed = target.exists()
    if existed:
        target.rename(before)
    try:
        new.rename(target)
    except BaseException:  # Ctrl-C too
        if existed:
            before.rename(target)
        raise
    shutil.rmtree(before, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with named(temporary):
            temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        temporary.replace(target)
        fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(target: Path, value: dict[str, Any]) -> None:
    """Write a JSON object that appears whole or not at all."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(target: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file readable by whoever may read its folder (the library itself would say 0600).

    InputError, and nothing is written, where a value is not finite.
    """
    require_finite(tensors, dict.fromkeys(tensors, target.name))
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, target, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{target} could not be written: {error}. Is the disk full?") from error
    umask = os.umask(0)
    os.umask(umask)
    target.chmod(0o666 & ~umask)


def require_finite(tensors: Mapping[str, Tensor], files: Mapping[str, Path | str]) -> None:
    """InputError for the first tensor with a value that is NaN or infinite; `files` says where each one belongs."""
    for name, tensor in tensors.items():
        # Such a value makes the sum one too, and a sum takes a thirtieth of the time of looking at each value.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise InputError(f"{files[name]}: {escape(name)} holds values that are not finite (NaN or infinite).")


def remove_leftovers(folder: Path, name: str = "", *, alone: bool = False) -> None:
    """Remove what writes that were cut off left of a target, or of all. What cannot be removed does no harm.

    Those of living processes stay, but for whoever is `alone` in the folder.
    """
    for left in folder.iterdir() if folder.is_dir() else ():
        found = LEFTOVER.fullmatch(left.name)
        if found and name in ("", found[1]) and (alone or not is_alive(int(found[2]))):
            shutil.rmtree(left, ignore_errors=True)
            with suppress(OSError):
                left.unlink()


LEFTOVER = re.compile(r"(.+)\.(\d+)(?:\.old)?\.tmp")
"""A target's name, and the process that was writing it."""


def is_alive(process: int) -> bool:
    """Whether there is another process of this number; one that is over, or this very one, writes no more."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def fsync(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The checksum of a file; safetensors itself has none."""
    digest = hashlib.sha256()
    with named(path), path.open("rb") as file:
        for part in iter(partial(file.read, 2**20), b""):
            digest.update(part)
    return digest.hexdigest()
