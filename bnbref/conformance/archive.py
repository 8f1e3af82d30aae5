"""The vectors as a product: the sums of their files, one digest of all of it, and an archive.

A published version never changes. `DIGESTS` has the digest of each; another case, rule or byte is another version, in a folder of
its own beside the old ones.
"""

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

SUMS = "SHA256SUMS"

DIGESTS = {
    1: "97dac90b433fa78b446176c9fe7a5b2f8ef8e4c92a1abbd1468f0cd41278c5ea",
    2: "1949f142dc6c9f00de9113bf7d8cc23d9bf060165f9d55c7f5b75477fc780914",
    3: "4f9e08bbe1f66f4152846400b9d948e49d12e2830cef59bff1e4cced0b4b8ae8",
    4: "1cd26a12389e6f0b6dd7d901b7f4fb0f789fdab8211de108dc107f89f311c852",
}
"""The digest of each version: the SHA-256 of its file SHA256SUMS, which has that of every other file."""


def sums(folder: Path) -> str:
    """The lines of SHA256SUMS, as `sha256sum -c` reads them: every file of the folder but that one, sorted by name."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def digest(folder: Path) -> str:
    """The digest of all files of a folder."""
    return hashlib.sha256(sums(folder).encode()).hexdigest()


def tar_gz(folder: Path) -> bytes:
    """A .tar.gz of the folder of a published version: the same files in the same order, without times and owners.

    Raises ValueError where the files are those of no published version.
    """
    found = digest(folder)
    version = next((version for version, known in DIGESTS.items() if known == found), None)
    if version is None:
        raise ValueError(f"{folder} must have the digest of a published version, one of {DIGESTS}, got {found}")
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            entry = tarfile.TarInfo(f"bnbref-vectors-v{version}/{path.name}")
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()
