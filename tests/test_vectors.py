"""The vectors as a product: published versions do not change, an archive has all of it, four languages read them in ten lines."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import kit_cases.__main__ as kit_cases
import pytest

from bnbref.cli import main
from bnbref.conformance import archive, vectors

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
LOADERS = {
    "py": [sys.executable, EXAMPLES / "read_vectors.py"],
    "js": ["node", EXAMPLES / "read_vectors.js"],
    "c": ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-o", "read", EXAMPLES / "read_vectors.c"],
    "rs": ["rustc", "--edition", "2021", "-O", "-D", "warnings", "-o", "read", EXAMPLES / "read_vectors.rs"],
}
"""For each language what runs its loader, or what compiles it to `read`."""


def of_file(file):
    """The cases of a JSON file."""
    ids = {case["id"] for case in json.loads(file.read_text(encoding="utf-8"))["cases"]}
    return [case for case in vectors.read(file.stem) if case.id in ids]


def of_version(version):
    return [
        case for file in vectors.folder_of(version).glob("*.safetensors") for case in of_file(file.with_suffix(".json"))
    ]


def test_published_versions_do_not_change():
    folders = {int(folder.name[1:]): folder for folder in vectors.ROOT.glob("v[0-9]*")}
    assert folders.keys() == archive.DIGESTS.keys()
    for version, folder in folders.items():
        assert (folder / archive.SUMS).read_text(encoding="utf-8") == archive.sums(folder), (
            "PYTHONPATH=tests python -m kit_cases bnbref/conformance"
        )
        assert archive.digest(folder) == archive.DIGESTS[version], (
            "what is published stays: another byte is another version"
        )
        assert hashlib.sha256((folder / archive.SUMS).read_bytes()).hexdigest() == archive.DIGESTS[version]


def test_the_digest_is_of_every_byte(tmp_path):
    shutil.copytree(vectors.folder_of(1), tmp_path / "v1")
    assert archive.digest(tmp_path / "v1") == archive.DIGESTS[1]
    for file in sorted((tmp_path / "v1").glob("int8*")):
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert archive.digest(tmp_path / "v1") != archive.DIGESTS[1]
        with pytest.raises(ValueError, match="must have the digest of a published version"):
            archive.tar_gz(tmp_path / "v1")
        file.write_bytes(data)
    (tmp_path / "v1" / "more").touch()
    assert archive.digest(tmp_path / "v1") != archive.DIGESTS[1]


@pytest.mark.parametrize("version", vectors.VERSIONS)
def test_the_archive_is_the_published_files(version, tmp_path, capsys):
    chosen = [] if version == 1 else ["--version", str(version)]  # what asked for the first version gets it
    assert main(["vectors", "archive", str(tmp_path / "it.tar.gz"), *chosen]) == 0
    assert capsys.readouterr().out == archive.DIGESTS[version] + "\n"
    data = (tmp_path / "it.tar.gz").read_bytes()
    assert data == archive.tar_gz(vectors.folder_of(version))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {Path(entry.name).name: tar.extractfile(entry).read() for entry in tar}
        assert {Path(name).parent.name for name in tar.getnames()} == {f"bnbref-vectors-v{version}"}
    assert found == {path.name: path.read_bytes() for path in vectors.folder_of(version).iterdir()}
    assert main(["vectors", "archive", str(tmp_path / "nowhere" / "it.tar.gz")]) == 2
    assert main(["vectors", "archive", str(tmp_path / "it.tar.gz"), "--version", "99"]) == 2


def test_vectors_are_written_with_their_sums(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kit_cases, "all_cases", lambda: {version: of_version(version) for version in vectors.VERSIONS})
    kit_cases.write(tmp_path)
    folders = [vectors.folder_of(version, tmp_path) for version in vectors.VERSIONS]
    assert capsys.readouterr().out.split() == [archive.digest(folder) for folder in folders]
    for version, folder in zip(vectors.VERSIONS, folders, strict=True):
        assert {path.name for path in folder.iterdir()} == {path.name for path in vectors.folder_of(version).iterdir()}
        assert (folder / archive.SUMS).read_text() == archive.sums(folder)


@pytest.mark.parametrize("language", LOADERS)
def test_a_loader_reads_every_tensor(language, tmp_path):
    command = LOADERS[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    if "-o" in command:
        subprocess.run(command, check=True, cwd=tmp_path)
        command = [tmp_path / "read"]
    names = {dtype: name for name, dtype in vectors.DTYPES.items()}
    for file in (file for version in vectors.VERSIONS for file in vectors.folder_of(version).glob("*.safetensors")):
        asked, wanted = [], []
        for case in of_file(file.with_suffix(".json")):
            parts = {"inputs": case.inputs, "outputs": {name: one.value for name, one in case.expected.items()}}
            for part, tensors in parts.items():
                for name, tensor in tensors.items():
                    asked.append(f"{case.id} {part} {name}\n")
                    shape = ",".join(map(str, tensor.shape))
                    wanted.append(f"{names[tensor.dtype]} {shape} {vectors.raw(tensor).hex()}")
        done = subprocess.run(
            [*command, file.parent, file.stem],
            input="".join(asked),
            capture_output=True,
            text=True,
            check=True,
        )
        got = done.stdout.splitlines()
        assert len(got) == len(wanted)
        assert [a for a, g, w in zip(asked, got, wanted, strict=True) if g != w] == []


@pytest.mark.parametrize("language", LOADERS)
def test_the_page_has_the_lines_of_the_loader(language):
    source = (EXAMPLES / f"read_vectors.{language}").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^\S+ ten lines.*\n((?:.*\n)*?)\S+ end\b", source, re.MULTILINE)
    code = lines.strip("\n")
    assert len([line for line in code.splitlines() if line.strip(" {}")]) <= 14
    assert code in (ROOT / "docs" / "content" / "vectors.md").read_text(encoding="utf-8")


def test_the_page_names_the_digests():
    page = (ROOT / "docs" / "content" / "vectors.md").read_text(encoding="utf-8")
    assert [digest for digest in archive.DIGESTS.values() if digest not in page] == []
