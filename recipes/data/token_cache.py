"""Rows in tokens, made once on a machine by several processes and kept, so that neither its other ranks nor the next run make
them again.

They are kept under a digest of all that decides what they are: the bytes of the files, the tokenizer with its chat template, what
the configuration says of rows, and the versions and the code that read them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from megatron_ext.errors import UserError
from megatron_ext.runtime.checkpoint_files import checksum
from recipes.cli.launch import usable_cores
from recipes.data.blocks import RowBlocks, find_blocks
from recipes.data.digests import sampled_digest
from recipes.data.files import Place, data_files, placed_rows
from recipes.data.once import made_once
from recipes.data.parallel import encoded_chunks
from recipes.data.reader import Seen
from recipes.data.rows import Pair, Prompt, PromptReading, Reading
from recipes.data.settings import HOW_KEPT, RUN_TOKENS, RowsSection
from recipes.data.shards import SUFFIX
from recipes.data.stored import EncodedRows, StoredRows, write_rows
from recipes.data.streaming import StreamedRows

__all__ = ["TokenCache"]

logger = logging.getLogger(__name__)

# Files of together fewer bytes are read by each rank by itself, in less time than it takes to agree.
LEAST_BYTES = 1 << 20
MOST_PROCESSES = 16
VERSIONS = ("tokenizers", "transformers", "jinja2", "pyarrow")


class TokenCache:
    """
    Args:
        folder: where tokens are kept, on a disk of this machine or one that machines share.
        processes: that make them; 0: each rank by itself, and nothing is kept; None: as many as there are cores, up to 16.
    """

    def __init__(self, folder: str | Path, processes: int | None = None):
        self.folder = Path(folder).expanduser()
        self.processes = min(usable_cores(), MOST_PROCESSES) if processes is None else processes
        self._told: set[str] = set()

    @classmethod
    def of(cls, section: RowsSection, run: Path) -> TokenCache:
        """As the configuration says.

        Args:
            run: the run's folder.
        """
        return cls(section.token_cache or run / RUN_TOKENS, section.token_processes)

    def load(self, path: str | Path, reading: Reading) -> Sequence[Prompt] | Sequence[Pair]:
        """All rows of a file, a folder or a pattern, as `Reading.load`.

        Raises:
            UserError: a row or file, here or in the process that makes the tokens; or a folder that cannot be written to.
        """
        files = data_files(path)
        if not self.processes or not _is_worth_it(files):
            return reading.load(path)
        if why := _why_not(reading, files):
            self._tell(logging.INFO, f"tokens of {path} are made by each rank and not kept: {why}")
            return reading.load(path)
        before = _states(files)
        key = _key(files, reading)

        def load(folder: Path) -> StoredRows | None:
            if not folder.exists():
                return None
            found = StoredRows.open(folder, {"key": key}, files)
            if isinstance(found, str):
                self._tell(logging.WARNING, f"tokens in {folder} are made anew: {found}")
                return None
            return found

        def make(folder: Path, tell: Callable[[str], None]) -> None:
            said = {"key": key}
            write_rows(folder, self._encoded(path, files, reading, said, tell), said)
            if _states(files) != before:
                raise UserError(f"{path} was changed while it was read: start again when it is as it shall be")

        found = made_once(self._place(path, key), load, make, f"the tokens of {path}")
        seen, made, seconds = (found.said[name] for name in ("seen", "made", "seconds"))
        self._tell(
            logging.INFO,
            f"tokens of {path}: {seen['rows']} rows, made in {seconds:.1f} s at {made}, kept in {self.folder}",
        )
        _seen(seen, files).tell(path)
        for note in found.said["notes"]:
            self._tell(logging.WARNING, note)
        return found

    def stream(self, path: str | Path, reading: Reading, check: Callable[[Any], None] | None = None) -> StreamedRows:
        """The same rows to be read when they are drawn: only where they stand is found out now, once on a machine.

        Args:
            check: see `StreamedRows`.
        """
        files = data_files(path)
        for file in files:
            if not Path(file).is_file():
                reading.load(file)  # says why it cannot be read
        samples = [sampled_digest(file) for file in files]
        window = reading.section.streaming_window
        if not self.processes:
            return StreamedRows(
                path, RowBlocks(files, find_blocks(files, lambda _: None)), reading, window, samples, check
            )
        key = _digest({"states": _states(files), "samples": samples, "forms": list(map(_form, files)), "code": _code()})

        def load(folder: Path) -> np.ndarray | None:
            try:
                found = np.load(folder / "blocks.npy")
                said = json.loads((folder / "checksum.json").read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
            except (OSError, ValueError, EOFError) as error:  # an empty file is the last
                self._tell(logging.WARNING, f"the places of rows in {folder} are found anew: {error}")
                return None
            if said != checksum(folder / "blocks.npy"):
                self._tell(
                    logging.WARNING, f"the places of rows in {folder} are found anew: they are not what was written"
                )
                return None
            return found

        def make(folder: Path, tell: Callable[[str], None]) -> None:
            np.save(folder / "blocks.npy", find_blocks(files, tell))
            (folder / "checksum.json").write_text(json.dumps(checksum(folder / "blocks.npy")), encoding="utf-8")

        blocks = made_once(self._place(path, f"places-{key}"), load, make, f"the places of the rows of {path}")
        return StreamedRows(path, RowBlocks(files, blocks), reading, window, samples, check)

    def _place(self, path: str | Path, key: str) -> Path:
        """With a name that people can tell."""
        name = re.sub(r"[^\w.-]+", "_", Path(path).name)[:40]
        return self.folder / f"{name}-{key}"

    def _encoded(
        self, path: str | Path, files: list[str], reading: Reading, said: dict[str, Any], tell: Callable[[str], None]
    ) -> Iterator[EncodedRows]:
        """Fills `said`, too."""
        seen, notes, begun = Seen(dict(reading.section.fields)), [], time.monotonic()
        counts = [0] * len(files)
        with tqdm(desc=f"tokens of {path}", unit="row", disable=not _is_main(), mininterval=1.0) as bar:
            for chunk in encoded_chunks(reading, files, self.processes):
                seen.add(chunk.seen)
                notes += [note for note in chunk.notes if note not in notes]
                counts[chunk.file] += chunk.seen.rows
                bar.update(chunk.seen.rows)
                tell(f"{seen.rows} rows so far")
                yield chunk.rows
        if 0 in counts:
            next(placed_rows(files[counts.index(0)]))  # raises, as it has no rows
        seen.check(path, reading.section)
        said["seen"] = {"rows": seen.rows, "too_long": seen.too_long, "first": None}
        if seen.first_too_long is not None:
            place, why = seen.first_too_long
            said["seen"]["first"] = [files.index(place.file), place.number, why]
        said["notes"] = notes
        said["seconds"], said["made"] = time.monotonic() - begun, datetime.now().isoformat(timespec="seconds")

    def _tell(self, level: int, line: str) -> None:
        """Once, on rank 0."""
        if _is_main() and line not in self._told:
            logger.log(level, "%s", line)
        self._told.add(line)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_worth_it(files: list[str]) -> bool:
    try:
        return sum(os.stat(file).st_size for file in files) >= LEAST_BYTES
    except OSError:  # whoever reads it says it better
        return False


def _why_not(reading: Reading, files: list[str]) -> str | None:
    """Why what becomes of rows is not known by a digest."""
    if any(file.endswith(SUFFIX) for file in files):
        return "rows of shards are read where they lie"
    if reading.video is not None:
        return "videos of rows are files of their own"
    if isinstance(reading, PromptReading) and reading.opening is not None:
        return "trainer.grpo.environment, which writes the prompts, may write others"
    if reading.tokenizer.template.asks_for_date:
        return f"the chat template of {reading.tokenizer.path} can write the date (strftime_now)"
    return None


def _states(files: list[str]) -> list[tuple[int, int, int]]:
    """What changes when a file is written to."""
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, files)]


def _key(files: list[str], reading: Reading) -> str:
    section = {
        f.name: getattr(reading.section, f.name) for f in dataclasses.fields(RowsSection) if f.name not in HOW_KEPT
    }
    tokenizer = reading.tokenizer
    decides = {
        "files": [[_form(file), *checksum(Path(file))] for file in files],
        "tokenizer": tokenizer.digests(),
        "special tokens": tokenizer.template.special_tokens,  # an id does not tell by which names a template may write it
        "stops": tokenizer.stop_ids,  # what is said of the template
        "section": {name: dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x for name, x in section.items()},
        "limit": reading.limit,
        "options": reading.options,
        "versions": {name: version(name) for name in VERSIONS},
        "code": _code(),
    }
    return _digest(decides)


def _digest(decides: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


def _form(file: str) -> str:
    """What the name says of how it is read."""
    return Path(file).suffix if Path(file).suffix in (".parquet", ".arrow", ".tar", ".zst") else ""


@functools.cache
def _code() -> str:
    """Of all that reads rows."""
    digest = xxhash.xxh3_64()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _seen(said: dict[str, Any], files: list[str]) -> Seen:
    first = said["first"] and (Place(files[said["first"][0]], said["first"][1]), said["first"][2])
    return Seen({}, said["rows"], too_long=said["too_long"], first_too_long=first)
