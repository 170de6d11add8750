"""A run directory: what was asked for, metrics as they come, arrays, figures; what makes a stopped run go on.

Every file but the growing `.jsonl` ones is written beside its place and then moved there, so a run killed at any moment
leaves either the whole file or none.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntkadv._typing import AnyArray

_META = "__meta__"


class Run:
    """A directory that holds one run, and lets it go on after it was stopped.

    ::

        config.json         what was asked for; a directory serves one configuration only
        environment.jsonl   one line a start: versions, device, date
        metrics.jsonl       one line a call of `log`
        arrays/NAME.npz     `save` and `cached`
        NAME.json, NAME.png, NAME.pdf    `save_json` and `figure`

    Args:
        path: the directory, made if need be.
        config: a dataclass or mapping; whatever the results depend on belongs here.
        overwrite: throw away configuration, metrics and arrays that are there, and begin anew.

    Raises:
        OSError: the directory cannot be made or written.
        ValueError: the directory holds a run with another configuration; the message names what differs.
        TypeError: the configuration holds something that cannot be written as JSON.
    """

    def __init__(self, path: str | os.PathLike[str], config: Any, *, overwrite: bool = False):
        self.path = Path(path)
        self.config = _as_config(config)
        try:
            (self.path / "arrays").mkdir(parents=True, exist_ok=True)
            if overwrite:
                self._clear()
            self._adopt_config()
            _drop_torn_line(self.path / "metrics.jsonl")
            _drop_torn_line(self.path / "environment.jsonl")
            append_line(self.path / "environment.jsonl", environment())
        except OSError as error:
            raise OSError(
                f"the run directory {self.path} cannot be used ({error}); choose one that can be made and written."
            ) from error

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def log(self, **metrics: Any) -> None:
        """Append a line to metrics.jsonl; it is on its way to the disk when this returns."""
        append_line(self.path / "metrics.jsonl", metrics)

    def metrics(self) -> list[dict[str, Any]]:
        """Read all logged lines, those of earlier starts first."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def save(self, name: str, /, **arrays: AnyArray) -> Path:
        """Write arrays/NAME.npz, replacing what is there."""
        path = self._array_path(name)
        with _replacing(path) as file:
            _write_npz(file, arrays)
        return path

    def load(self, name: str, /) -> dict[str, np.ndarray]:
        """Read what `save` wrote under this name.

        Raises:
            FileNotFoundError: nothing was saved under it.
            ValueError: the file is damaged.
        """
        path = self._array_path(name)
        if not path.is_file():
            saved = sorted(file.stem for file in path.parent.glob("[!.]*.npz"))
            raise FileNotFoundError(f"{path} does not exist; this run holds {', '.join(saved) or 'no arrays yet'}.")
        return _read_npz(path)

    def cached(self, name: str, make: Callable[[], Mapping[str, AnyArray]]) -> dict[str, np.ndarray]:
        """Load what is saved under this name, or else make it, save it and return it.

        A damaged file is made anew, with a `RuntimeWarning`.
        """
        path = self._array_path(name)
        if path.is_file():
            try:
                return _read_npz(path)
            except ValueError as error:
                warnings.warn(f"{error} It is computed again.", RuntimeWarning, stacklevel=2)
        arrays = {key: np.asarray(array) for key, array in make().items()}
        self.save(name, **arrays)
        return arrays

    def checkpoint(self, name: str) -> Path:
        """Path for `save_checkpoint` and `load_checkpoint` inside this run."""
        return self._array_path(f"{name}.checkpoint")

    def save_json(self, name: str, obj: Any) -> Path:
        """Write NAME.json: arrays as lists, NaN and infinities as the strings "nan", "inf" and "-inf"."""
        path = self.path / f"{_plain(name)}.json"
        _write_json(path, obj)
        return path

    def figure(self, fig: Figure, name: str) -> tuple[Path, Path]:
        """Write NAME.png (200 dots per inch) and NAME.pdf; the same figure gives the same bytes."""
        png, pdf = self.path / f"{_plain(name)}.png", self.path / f"{_plain(name)}.pdf"
        with _replacing(png) as file:
            fig.savefig(file, format="png", dpi=200, metadata={"Software": None})
        with _replacing(pdf) as file:
            fig.savefig(file, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
        return png, pdf

    def _array_path(self, name: str) -> Path:
        return self.path / "arrays" / f"{_plain(name)}.npz"

    def _clear(self) -> None:
        stale = [self.path / name for name in ("config.json", "metrics.jsonl", "environment.jsonl")]
        for file in (*stale, *(self.path / "arrays").glob("*.npz"), *(self.path / "arrays").glob(".*.tmp")):
            file.unlink(missing_ok=True)

    def _adopt_config(self) -> None:
        path = self.path / "config.json"
        if not path.exists():
            _write_json(path, self.config)
            return
        try:
            held = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}); choose another directory or pass overwrite=True."
            ) from error
        differing = list(_differences(held, self.config))
        if differing:
            raise ValueError(
                f"the run directory {self.path} holds a run with another configuration:\n  "
                + "\n  ".join(differing)
                + "\nChoose another directory, or pass overwrite=True to throw that run away."
            )


def environment() -> dict[str, Any]:
    """Describe what computes: versions of Python and packages, device, processor count, date (UTC)."""
    device = jax.devices()[0]
    packages = ("ntkadv", "jax", "jaxlib", "equinox", "diffrax", "numpy", "scipy")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{package: package_version(package) for package in packages},
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
    }


def package_version(package: str) -> str:
    """Version of an installed package, or "not installed", as when ntkadv runs from a bare source tree."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def save_checkpoint(path: str | os.PathLike[str], arrays: Mapping[str, AnyArray], meta: Mapping[str, Any]) -> None:
    """Write arrays and a JSON-like `meta` into one file, at once: a kill leaves the former checkpoint intact.

    Raises:
        TypeError: an array or an entry of `meta` cannot be written.
        ValueError: an array has the name `__meta__`, which is taken.
    """
    if _META in arrays:
        raise ValueError(f"arrays must not hold the name {_META}, which is taken; choose another.")
    text = json.dumps(_jsonable(meta, "meta", finite=False))
    with _replacing(Path(path)) as file:
        _write_npz(file, {**arrays, _META: np.array(text)})


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Read what `save_checkpoint` wrote; None if there is nothing, or nothing intact (with a `RuntimeWarning`)."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        arrays = _read_npz(path)
        return arrays, json.loads(str(arrays.pop(_META)))
    except (ValueError, KeyError) as error:
        warnings.warn(f"the checkpoint {path} is not used: {error}", RuntimeWarning, stacklevel=2)
        return None


def arrays_of(tree: Any, name: str = "leaf") -> dict[str, np.ndarray]:
    """Name the leaves of a pytree by their number, for `Run.save` and `save_checkpoint`; `tree_of` puts them back."""
    return {f"{name}{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


def tree_of(arrays: Mapping[str, AnyArray], like: Any, name: str = "leaf") -> Any:
    """Put the leaves that `arrays_of` named into a pytree of the structure of `like`, whose own leaves do not matter.

    Raises:
        ValueError: a leaf is missing, or there is one too many: these are the arrays of another tree.
    """
    structure = jax.tree.structure(like)
    names = [f"{name}{i}" for i in range(structure.num_leaves)]
    missing = [one for one in names if one not in arrays]
    if missing or f"{name}{structure.num_leaves}" in arrays:
        held = sum(re.fullmatch(rf"{re.escape(name)}\d+", one) is not None for one in arrays)
        raise ValueError(
            f"arrays must hold the {structure.num_leaves} leaves of this tree as {name}0, {name}1, ..., got {held} of "
            f"that name; they were written from another tree."
        )
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[one]) for one in names])


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` for writing, and move it there once it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_npz(file: IO[bytes], arrays: Mapping[str, AnyArray]) -> None:
    """As `np.savez`, with any name for an array, never pickling, and the same bytes for the same arrays."""
    with zipfile.ZipFile(file, "w") as archive:
        for key, array in arrays.items():
            host = np.asarray(array)
            if host.dtype.kind not in "biufcSU":
                raise TypeError(f"{key} must hold numbers or strings, got dtype {host.dtype}; convert it first.")
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, host, allow_pickle=False)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, TypeError, EOFError, OSError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or cannot be read ({type(error).__name__}: {error}).") from error


def _write_json(path: Path, obj: Any) -> None:
    text = json.dumps(_jsonable(obj, path.stem), indent=2) + "\n"
    with _replacing(path) as file:
        file.write(text.encode())


def append_line(path: Path, obj: Any) -> None:
    """Append one object to a file of JSON lines."""
    line = json.dumps(_jsonable(obj, path.stem)) + "\n"
    with open(path, "a") as file:
        file.write(line)


def rewrite_lines(path: Path, objects: Sequence[Any]) -> None:
    """Write a file of JSON lines anew, at once."""
    with _replacing(path) as file:
        file.write("".join(json.dumps(_jsonable(obj, path.stem)) + "\n" for obj in objects).encode())


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill left unfinished, so that the next one does not run on from it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _jsonable(obj: Any, where: str, *, finite: bool = True) -> Any:
    """Turn numbers, arrays, dataclasses and paths into what JSON knows; `where` names the place in an error."""
    if isinstance(obj, (np.ndarray, np.generic, jax.Array)):
        obj = np.asarray(obj).tolist()
    if isinstance(obj, Mapping):
        return {str(key): _jsonable(value, f"{where}.{key}", finite=finite) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_jsonable(value, f"{where}[{i}]", finite=finite) for i, value in enumerate(obj)]
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        fields = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
        return _jsonable({"type": type(obj).__name__, **fields}, where, finite=finite)
    if isinstance(obj, float) and finite and not math.isfinite(obj):
        return str(obj)
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    raise TypeError(
        f"{where} is a {type(obj).__name__}, which cannot be written as JSON; give numbers, strings or arrays."
    )


def _as_config(config: Any) -> dict[str, Any]:
    held = _jsonable(config, "config")
    if not isinstance(held, dict):
        raise TypeError(f"config must be a dataclass or a mapping, got {type(config).__name__}.")
    return held


def _differences(held: Any, asked: Any, where: str = "") -> Iterator[str]:
    """Each place where two configurations differ, with both values."""
    if isinstance(held, dict) and isinstance(asked, dict):
        for key in (*held, *(key for key in asked if key not in held)):
            yield from _differences(
                held.get(key, "nothing"), asked.get(key, "nothing"), f"{where}.{key}" if where else key
            )
    elif held != asked:
        yield f"{where}: the directory has {held!r}, asked for is {asked!r}"


def _plain(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name must be a plain file name of letters, digits, '_', '-' and '.', got {name!r}.")
    return name
