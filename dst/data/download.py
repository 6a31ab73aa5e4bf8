"""Downloads that are complete and verified, or leave nothing behind.

``torch.hub.download_url_to_file`` does part of this: it checks a prefix of SHA-256, while the data sets publish MD5 sums. It has
no mirrors and no timeout.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dst.errors import DataError

_CHUNK = 1 << 18


def download(urls: Sequence[str], folder: str | Path, md5: str, *, timeout: float = 30.0) -> Path:
    """Fetch a file from the first address that serves it intact.

    The file appears under its name only when its checksum agrees; until then it is a ``.part`` file beside
    it, which is removed on any failure, interruption included.

    Args:
        urls: mirrors of one file, tried in order. The last component of the first is the file's name.
        folder: where the file goes; created when the first byte arrives.
        md5: expected checksum, in hexadecimal.
        timeout: seconds without an answer until the next mirror is tried.

    Returns:
        The path of the file.

    Raises:
        DataError: if no mirror serves it; names each with its failure, and the folder to put the file in.
    """
    target = Path(folder) / urls[0].rsplit("/", 1)[-1]
    failures = []
    for url in urls:
        try:
            _fetch(url, target, md5, timeout)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{url} ({error})")
        else:
            return target
    raise DataError(
        f"Could not download {target.name}: {'; '.join(failures)}. Put the file into {target.parent} by hand."
    )


def _fetch(url: str, target: Path, md5: str, timeout: float) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with contextlib.ExitStack() as stack:
        response = stack.enter_context(urllib.request.urlopen(url, timeout=timeout))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: several processes may want the same file.
        handle, part = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent)
        stack.callback(Path(part).unlink, missing_ok=True)
        file = stack.enter_context(os.fdopen(handle, "wb"))
        bar = stack.enter_context(_progress())
        task = bar.add_task(target.name, total=int(response.headers.get("Content-Length") or 0) or None)
        while block := response.read(_CHUNK):
            file.write(block)
            digest.update(block)
            bar.advance(task, len(block))
        file.close()
        if digest.hexdigest() != md5:
            raise ValueError(f"its md5 is {digest.hexdigest()}, not {md5}")
        os.chmod(part, 0o644)  # mkstemp's files are private
        os.replace(part, target)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
