"""Rows from where they lie: JSONL, Parquet, or a folder that Hugging Face `datasets` saved.

A place is a file, a folder, or a pattern such as `data/part-*.parquet`; `#train` behind a folder chooses a split.
Parquet and saved data sets are read by pyarrow, batch by batch. Imports no torch.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foreword.config import FIELDS
from foreword.errors import ConfigError, DataError, did_you_mean
from foreword.eval.rows import Row, missing_hint, parse_row

PARQUET = (".parquet", ".pq")
BATCH_ROWS = 1024
"""Rows of a columnar file that are in memory at once, beside those made of them."""
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
"""How the files of one split are named on the Hugging Face hub."""
SPLITS = ("train", "validation", "dev", "test")
"""File names that make a folder of Parquet files several splits, not one."""


def read_rows(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Read the rows of a place; fields that no part of foreword knows are left aside.

    `columns` gives the data's names of input, target, messages and references where they differ. The same records
    give the same rows, whatever holds them; of a class label (`ClassLabel`) the name is taken. In JSONL a byte-order
    mark, CRLF and blank lines are fine.

    Raises DataError naming file, row and field for a place that is missing, empty or broken, a split that is not
    there, and a record that is malformed; ConfigError where pyarrow is needed and not installed.
    """
    names, rows = columns or {}, list[Row]()
    files = find_files(path)
    for file in files:
        several = str(file) if len(files) > 1 else ""
        for number, record in _records(file, names):
            try:
                data = _decoded(record) if isinstance(record, bytes) else record
                rows.append(parse_row(data, names, len(rows), number, several))
            except DataError as error:
                raise DataError(f"{file}, row {number}: {error.message}", hint=error.hint) from error
    if not rows:
        raise DataError(
            f"{path} holds no rows", hint='A row is {"input": "...", "target": "..."}; JSONL has one a line.'
        )
    return rows


def find_files(place: str | Path) -> list[Path]:
    """Return the files that a place stands for, in order. Raises DataError where there is none."""
    path, (folder, mark, split) = Path(place), str(place).rpartition("#")
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_folder(path, None)
    if mark and Path(folder).is_dir():
        return _files_of_folder(Path(folder), split)
    if mark and Path(folder).is_file():
        raise DataError(f"cannot read {place}: {folder} is one file", hint=f"A folder has splits; write {folder}.")
    if glob.has_magic(str(place)):
        if found := [Path(name) for name in sorted(glob.glob(str(place))) if Path(name).is_file()]:
            return found
        raise DataError(f"cannot read {place}: no file fits the pattern", hint="Check the path in [task].")
    raise DataError(f"cannot read {place}: No such file or directory", hint="Check the path in [task].")


def is_there(place: str | Path) -> bool:
    """Return whether a place stands for files."""
    try:
        return bool(find_files(place))
    except DataError:
        return False


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits", [])
        return _files_of_data_set(folder / _chosen(folder, splits, split))
    if (folder / "state.json").is_file():
        if split is not None:
            raise DataError(f"{folder} holds one data set and no splits, asked for is {split!r}", hint="Leave it out.")
        return _files_of_data_set(folder)
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    if not files:
        raise DataError(
            f"cannot read {folder}: the folder holds no saved data set and no Parquet",
            hint="Name a JSONL or Parquet file, or a folder made by save_to_disk.",
        )
    named: dict[str, list[Path]] = {}
    for file in files:
        shard = SHARD.fullmatch(file.stem)
        named.setdefault(shard[1] if shard else file.stem, []).append(file)
    splits = [name for name in named if name in SPLITS or any(SHARD.fullmatch(file.stem) for file in named[name])]
    return named[_chosen(folder, splits, split)] if split is not None or len(splits) > 1 else files


def _chosen(folder: Path, splits: Sequence[str], split: str | None) -> str:
    known = ", ".join(splits) or "none"
    if split is None:
        example = f"{folder}#{splits[0]}" if splits else "a Parquet file"
        raise DataError(f"{folder} has the splits {known}, and none is named", hint=f"Write {example}.")
    if split not in splits:
        raise DataError(f"{folder} has no split {split!r}; it has {known}", hint=did_you_mean(split, splits))
    return split


def _files_of_data_set(folder: Path) -> list[Path]:
    state = _read_json(folder / "state.json")
    if any(value for key, value in state.items() if key.startswith("_indices")):
        raise DataError(f"{folder} was saved by an old datasets, as rows and an order", hint="Save it again.")
    try:
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'} names no data files", hint="Save the data set again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="Save the data set again.") from error
    return data


def _records(file: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """Yield row numbers, from 1, with the JSON or the record that stands there."""
    if file.suffix in (*PARQUET, ".arrow"):
        yield from enumerate(_columnar(file, columns), start=1)
        return
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}", hint="Check the path in [task].") from error
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _decoded(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error})", hint="Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed JSON: {error}", hint="Each line is one JSON object.") from error


def _columnar(file: Path, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the records of a Parquet or Arrow file: the columns that a row is made of."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(
            f"reading {file} needs pyarrow, which is not installed", hint="pip install 'foreword[data]'"
        ) from error
    try:
        if file.suffix in PARQUET:
            parquet = ParquetFile(file)
            schema = parquet.schema_arrow
            wanted = _wanted(file, schema.names, columns)
            batches = parquet.iter_batches(BATCH_ROWS, columns=wanted)
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
            schema = batches.schema
            wanted = _wanted(file, schema.names, columns)
        names = _label_names(schema)
        either = {"messages", "input"} <= set(wanted)  # rows of both kinds: what a row has not is null
        for batch in batches:
            for record in batch.select(wanted).to_pylist():
                for key in names.keys() & record.keys():
                    record[key] = names[key].get(record[key], record[key])
                yield {key: value for key, value in record.items() if not either or value is not None}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {file}: {str(error).splitlines()[0]}", hint="The file is broken or cut off: write it again."
        ) from error


def _wanted(file: Path, present: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """Return the columns to read. Raises DataError for one that every row needs and that is not there."""
    named = {field: columns.get(field, field) for field in FIELDS}
    paired = "input" in columns or "target" in columns
    needed = (
        ["messages"] if not paired and named["messages"] in {*present, columns.get("messages")} else ["input", "target"]
    )
    for field in needed:
        if named[field] not in present:
            raise DataError(
                f"{file}: column {named[field]} is missing; it has {', '.join(present)}",
                hint=missing_hint(named[field], present),
            )
    return [name for name in dict.fromkeys(named.values()) if name in present]


def _label_names(schema: Any) -> dict[str, dict[Any, str]]:
    """Return the names behind the numbers of class labels, by column, as `datasets` notes them in the schema."""
    noted = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(noted)["info"]["features"] if noted else {}
        kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
        labels = {name: kind["names"] for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: dict(enumerate(names)) for name, names in labels.items()}
