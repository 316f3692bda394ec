"""Finding a source on this machine, or as a dataset of the Hugging Face hub."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from megatron_hpt.errors import DataError
from megatron_hpt.preparation.reading import SUFFIXES, Files, files_below, local_files, one_split

_HUB_ID = re.compile(r"(?P<dataset>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<glob>.+))?")


def find(source: str) -> Files:
    """Find the files of a local path; where there is none, of a dataset `OWNER/NAME`, or some of them: `OWNER/NAME/GLOB`.

    Raises:
        DataError: there is neither.
    """
    hub = _HUB_ID.fullmatch(source)
    if hub and not Path(source).exists() and (hub["glob"] or Path(source).suffix not in SUFFIXES):
        return _fetch(hub["dataset"], hub["glob"] or "*.parquet")
    return local_files(Path(source))


def _fetch(dataset: str, glob: str) -> Files:
    """Fetch the newest version into the hub's cache, where its folder is named by the commit."""
    from httpx import HTTPError
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=[glob]))
    except (OSError, ValueError, HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{dataset}: no such file or folder here, and it cannot be fetched from the Hugging Face hub: {reason}; fetch it "
            "on a machine with a network and give the path of its files"
        ) from None
    paths = [path for path in files_below(folder) if fnmatch(str(path.relative_to(folder)), glob)]
    if not paths:
        raise DataError(f"{dataset}: no file of the dataset is named like {glob!r} and ends in {', '.join(SUFFIXES)}")
    return one_split(dataset, folder, paths)
