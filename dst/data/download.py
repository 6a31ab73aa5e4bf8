"""Downloads of data sets, complete and verified.

``torch.hub.download_url_to_file`` verifies a prefix of SHA-256, while the data sets publish MD5 sums. It has no mirrors and no
timeout.
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dst.checkpoints import replacing
from dst.errors import DataError

_CHUNK = 1 << 18


def download(urls: Sequence[str], folder: str | Path, md5: str, *, timeout: float = 30.0) -> Path:
    """Download a file from the first mirror that serves it intact.

    The file appears under its name once its checksum agrees. Until then it is a hidden ``.part`` file in the same folder,
    which any failure, interruption included, removes.

    Args:
        urls: Mirrors of one file, tried in order. The last component of the first is the file's name.
        folder: The folder of the file; created when a mirror answers.
        md5: Expected checksum, in hexadecimal.
        timeout: Seconds without an answer until the next mirror is tried.

    Returns:
        The path of the file.

    Raises:
        DataError: No mirror serves it; names each mirror with its failure, and the folder to put the file in.
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
    with (
        urllib.request.urlopen(url, timeout=timeout) as response,
        replacing(target) as file,
        _progress() as bar,
    ):
        task = bar.add_task(target.name, total=int(response.headers.get("Content-Length") or 0) or None)
        while block := response.read(_CHUNK):
            file.write(block)
            digest.update(block)
            bar.advance(task, len(block))
        if digest.hexdigest() != md5:
            raise ValueError(f"its md5 is {digest.hexdigest()}, not {md5}")


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
