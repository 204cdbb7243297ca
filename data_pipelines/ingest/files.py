"""Files that rows name: found below a folder, or refused; nothing is downloaded, and nothing read that is no file."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from mmagent.records import EncodedImage, check_image
from mmagent.retries import TRANSIENT, retried

MAX_FILE = 1 << 28
"""Bytes that an image, a caption or a row may have: it is held in memory whole."""
MAX_RECORD = 1 << 29
"""Bytes that all images of a record may have."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):", re.ASCII)
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|UklGR|R0lGOD)[A-Za-z0-9+/\s]{60,}=*\s*")
_UNPRINTABLE = re.compile(r"[%\\\x00-\x1f\x7f\ud800-\udfff]")


class RefusedError(ValueError):
    """A row that cannot be used: ``reason`` is what of it, in a word or two, ``problem`` what is wrong with that."""

    def __init__(self, reason: str, problem: str):
        super().__init__(f"{reason}: {problem}")
        self.reason, self.problem = reason, problem

    def __reduce__(self) -> tuple[type[RefusedError], tuple[str, str]]:
        return type(self), (self.reason, self.problem)


def key_of(name: str, extension: bool = True) -> str:
    """The path of a file as a part of keys, which have no dots in their last part: ``a/b.c.jpg`` is ``a/b%2Ec-jpg``.
    No two paths give the same."""
    folder, slash, file = name.rpartition("/")
    stem, dot, end = file.rpartition(".") if extension else (file, "", "")
    stem = _UNPRINTABLE.sub(_escape, stem or end).replace(".", "%2E")
    end = f"-{_UNPRINTABLE.sub(_escape, end)}" if dot and file.rpartition(".")[0] else ""
    return _UNPRINTABLE.sub(_escape, folder) + slash + stem + end


def _escape(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape"))


def refused_file(error: OSError, name: str) -> RefusedError:
    """Why a file is refused that cannot be opened or read; raises the error itself where it is the storage that fails,
    and not this file."""
    if error.errno in TRANSIENT:
        raise error
    return RefusedError("path", f"{_short(name)} cannot be opened: {error.strerror}")


@dataclass(frozen=True)
class Root:
    """The ``folder`` that paths are relative to, and the one they may not leave; ``outside`` lets them. ``named`` is
    given every file that is asked for (:func:`stamp_of`)."""

    folder: str
    within: str
    outside: bool = False
    named: list[tuple[str, int, int]] | None = field(default=None, compare=False, repr=False)

    def path(self, name: str) -> str:
        """Where the file ``name`` lies. Raises :class:`RefusedError` where that is another place than the folder, after
        all links are followed, or an address."""
        scheme = _SCHEME.match(name)
        if scheme and scheme[1].lower() == "file" and name[5:].startswith("///"):
            name = unquote(name[7:])
        elif scheme and name[scheme.end() :].startswith("//"):
            raise RefusedError("path", f"{_short(name)} is an address, and nothing is downloaded here")
        try:
            real = _place(os.path.join(self.folder, name))
            within = _real(self.within)
            inside = os.path.commonpath([real, within]) == within
        except (ValueError, OSError) as error:  # a zero byte, a circle of links
            raise RefusedError("path", f"{_short(name)} is no path: {error}") from error
        if not inside and not self.outside:
            told = "leads out of the data set's folder (--images names another, --allow-outside allows any)"
            raise RefusedError("path", f"{_short(name)} {told}")
        return real

    def read(self, name: str, limit: int = MAX_FILE) -> bytes:
        """The bytes of a file. Raises :class:`RefusedError` for what is not there, no regular file, or too large."""

        def whole() -> bytes:
            with open(self.open(name), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise RefusedError("path", f"{_short(name)} has {size} bytes, the limit is {limit}")
                return file.read(limit)

        try:
            return retried(whole, name)
        except OSError as error:
            raise refused_file(error, name) from error

    def open(self, name: str) -> int:
        """A descriptor of a regular file, which the caller closes."""
        path = self.path(name)
        if self.named is not None:
            self.named.append((path, *stamp_of(path)))
        try:
            # the last link was followed by now, and a pipe must not make us wait
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            told = f"{_short(name)} cannot be opened: {error.strerror}"
            if not os.path.isabs(name):
                told += f" (--images names the folder that paths are relative to, now {_short(self.folder)})"
            raise RefusedError("path", told) from error
        except OSError as error:
            raise refused_file(error, name) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise RefusedError("path", f"{_short(name)} is no regular file")
        return descriptor


def stamp_of(path: str) -> tuple[int, int]:
    """``(bytes, time of change in ns)`` of a file, (-1, 0) where there is none."""
    try:
        status = os.stat(path)
    except OSError:  # whoever opens it finds out why
        return -1, 0
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _place(path: str) -> str:
    """``os.path.realpath``, of a file among many in a folder: the way to the folder is looked up once."""
    folder, name = os.path.split(path)
    if name in ("", os.curdir, os.pardir):
        return os.path.realpath(path)
    found = os.path.join(_real(folder), name)
    try:
        is_link = stat.S_ISLNK(os.lstat(found).st_mode)
    except OSError:  # whoever opens it finds out why
        is_link = True
    return os.path.realpath(found) if is_link else found


def _short(name: str) -> str:
    shown = ascii(name)[1:-1] if not name.isprintable() else name
    return repr(shown if len(shown) <= 120 else f"{shown[:100]}...")


def picture_bytes(value: Any, root: Root) -> bytes:
    """An image as rows hold it: bytes, ``{"bytes": ..., "path": ...}`` as ``datasets`` writes, a ``data:`` URI, base64,
    or the path of a file. Raises :class:`RefusedError`."""
    if isinstance(value, Mapping):
        found = next((value[name] for name in ("bytes", "path", "url") if value.get(name)), None)
        if found is None or isinstance(found, Mapping):
            raise RefusedError("images", "an image without bytes and without a path")
        return picture_bytes(found, root)
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value[:5].lower() == "data:":
        head, comma, body = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RefusedError("images", "a data: URI that is not base64")
        return _base64(body)
    if isinstance(value, str) and _BASE64.fullmatch(value):
        return _base64(value)
    if isinstance(value, str) and value:
        return root.read(value)
    raise RefusedError(
        "images", f"no image but {type(value).__name__}" if value else "a place for an image, and no image"
    )


def _base64(body: str) -> bytes:
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError("images", f"base64 that cannot be read: {error}") from error


@dataclass
class Pictures:
    """Reads the images of one record, each once decoded (or its header looked at) to see that it can be, within
    :data:`MAX_RECORD` bytes."""

    key: str
    root: Root
    decode: bool = True
    _bytes: int = field(default=0, repr=False)

    def __call__(self, value: Any, number: int) -> EncodedImage:
        """The image of a row's ``value``. Raises :class:`RefusedError` or :class:`~mmagent.records.RecordError`."""
        if isinstance(value, EncodedImage):  # a frame that was decoded already
            return value
        data = picture_bytes(value, self.root)
        self._bytes += len(data)
        if self._bytes > MAX_RECORD:
            raise RefusedError("images", f"more than {MAX_RECORD} bytes of images in one row")
        return check_image(data, self.key, f"images[{number}]", decode=self.decode)
