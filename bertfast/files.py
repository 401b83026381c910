"""The user's mistakes and the files we write: one clear error, and never a half-written file.

Every file is written under a temporary name in the folder it will live in, synced, renamed, and the folder synced:
a reader sees the old file or the new one, whatever is killed and whenever. What the disk refuses (full, read-only,
no permission) becomes a `UserError`, and the temporary file is gone.
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two processes writing one folder are not told apart
    fcntl = None  # type: ignore[assignment]


class UserError(Exception):
    """A mistake of the user's, told in one line. The CLI prints it without a traceback and exits with code 2."""


def switch(name: str) -> bool:
    """Whether an environment variable is 1. Warns of one that is neither 1 nor 0."""
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        warnings.warn(f"bertfast: {name}={value} is neither 0 nor 1, and without effect", stacklevel=2)
    return value == "1"


unfinished: set[Path] = set()  # temporary names in use, which a stop must not leave behind


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name for the body to write a file under; afterwards that file is `path`, or what it links to.

    For writers that want a name (safetensors, matplotlib). A process that is killed outright (SIGKILL, a power cut)
    leaves what it had written as `.NAME.PID.tmp` beside `path`. It stays until you delete it: on a disk of several
    machines nobody can tell it from the file of one that is still writing. Raises UserError where the file cannot be
    written.
    """
    path = without_links(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.add(temporary)
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors creates files for the owner only
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        raise _explained(error, path, temporary) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
        unfinished.discard(temporary)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary sibling folder for the body to fill; afterwards that folder is `path`.

    A folder already at `path` is replaced as a whole (of a link, what it points to). Whatever stops the body, Ctrl-C
    included, leaves the old state; a killed process leaves the temporary folder, and the next one clears it away.
    Raises UserError where the folder cannot be written or renamed, or is being written by another process.
    """
    path = without_links(path)
    temporary, old = siblings(path)
    try:
        with suppress(FileNotFoundError):  # of a current folder that was deleted
            if os.path.ismount(path) or Path.cwd().is_relative_to(path):
                raise UserError(f"{path} is a mount point or the current folder, which cannot be replaced: name one in "
                                "it")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(exist_ok=True)
    except OSError as error:
        raise _explained(error, path) from error
    with locked(temporary, path):
        try:
            unfinished.add(temporary)
            for leftover in temporary.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield temporary
            readers = temporary.stat().st_mode & 0o666
            for folder, _, names in os.walk(temporary):
                for name in names:
                    Path(folder, name).chmod(readers)
                    _sync(Path(folder, name))
                _sync(Path(folder))
            shutil.rmtree(old, ignore_errors=True)
            if not _exchanged(temporary, path):
                if path.exists():
                    os.replace(path, old)  # a folder cannot be renamed over a full one
                os.replace(temporary, path)
            _sync(path.parent)
        except Exception as error:
            raise _explained(error, path, temporary) from error
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(temporary, ignore_errors=True)
            unfinished.discard(temporary)


def without_links(path: str | Path) -> Path:
    """The absolute path without links. Raises UserError where it is relative to a current folder that was deleted."""
    try:
        return Path(os.path.realpath(path))
    except FileNotFoundError as error:
        raise UserError(f"cannot write {path}: there is no current folder") from error


def siblings(path: Path) -> tuple[Path, Path]:
    """Where `atomic_folder` writes what will be `path`, and where it keeps what was there."""
    return path.parent / f".{path.name}.tmp", path.parent / f".{path.name}.old"


@contextmanager
def locked(folder: Path, path: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which ends with the process, however that ends.

    Raises UserError, naming `path`, where another process holds it. Some file systems have no such locks (NFS, of
    folders): there two processes are not told apart.
    """
    if fcntl is None:
        yield
        return
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _explained(error, path) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path} is being written by another process") from error
        except OSError:
            pass
        yield
    finally:
        os.close(lock)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a small file as a whole, atomically. Raises UserError where it cannot be written."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises UserError where it cannot be written."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # bytes of a file's name that are no UTF-8: \\udc80


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises UserError, naming the file, where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def create_folder(path: str | Path) -> Path:
    """The folder, with its parents, made where it is not there yet. Raises UserError where it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}") from error
    return Path(path)


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content, read in pieces. Raises UserError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _sync(path: Path) -> None:
    """Flush a file's or a folder's content to the disk, so that a later rename cannot outrun it."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and orders renames itself
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two could be made to change places in one step: Linux can, on most of its file systems."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, TypeError):  # of another C library; Windows has no CDLL(None)
        return False
    AT_FDCWD, RENAME_EXCHANGE = -100, 2
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def refusal(error: Exception) -> str | None:
    """What the system said, where it was the system that refused.

    Libraries written in Rust (safetensors, tokenizers) hide the errno in the text of their own exception.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(code[1])) if code else None


def _explained(error: Exception, path: Path, temporary: Path | None = None) -> Exception:
    """The disk's refusals as a UserError naming `path`, or what could not be read to fill `temporary`; any other error
    as it is."""
    reason = refusal(error)
    if reason is None:
        return error
    if temporary and isinstance(error, OSError) and isinstance(error.filename, str):
        name = Path(error.filename)
        if name not in (path, path.parent) and not name.is_relative_to(temporary):
            return UserError(f"cannot read {name}: {reason}")
    if not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    return UserError(f"cannot write {path}: {reason}")
