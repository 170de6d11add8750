"""Where the tiles of a kernel matrix go: to memory, or to files from which a stopped computation goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np

from ntkadv.architectures.base import Kernels

__all__ = ["KernelName", "Outputs"]

KernelName = Literal["ntk", "nngp"]


class Outputs:
    """The matrices being filled, in memory or in files, and how far they are filled."""

    def __init__(
        self,
        store: str | PathLike[str] | None,
        names: tuple[KernelName, ...],
        shape: tuple[int, int],
        dtype: str,
        fingerprint: str,
    ) -> None:
        self.store = None if store is None else Path(store)
        self.done = 0
        self.meta = {"fingerprint": fingerprint, "shape": list(shape), "dtype": dtype, "kernels": list(names)}
        if self.store is None:
            self.arrays = {name: np.empty(shape, dtype) for name in names}
            return
        if self.store.suffix != ".npy":
            raise ValueError(f"store must be the path of a .npy file, got {self.store}")
        paths = {name: self._path(name, len(names)) for name in names}
        self.progress_file = self.store.with_suffix(".progress.json")
        self.done = self._read_progress(list(paths.values()))
        self._save_done()  # before the files are there: one that nothing describes would be refused
        mode = "r+" if self.done else "w+"
        self.arrays = {
            name: np.lib.format.open_memmap(path, mode, np.dtype(dtype), shape) for name, path in paths.items()
        }

    def _path(self, name: str, count: int) -> Path:
        assert self.store is not None
        return self.store if count == 1 else self.store.with_name(f"{self.store.stem}-{name}.npy")

    def _read_progress(self, paths: list[Path]) -> int:
        if not self.progress_file.exists():
            if any(path.exists() for path in paths):
                raise ValueError(f"store: {paths[0]} exists, but nothing tells what it holds; name another file")
            return 0
        saved = json.loads(self.progress_file.read_text())
        done = saved.pop("done")
        if saved != self.meta:
            raise ValueError(
                f"store: {self.store} holds the matrix of other images, of another kernel, or cut into other tiles; "
                "name another file, or remove that one and its .progress.json"
            )
        return done if all(path.exists() for path in paths) else 0

    def resume_at(self, compute: Callable[[tuple[int, int]], Kernels], tiles: list[tuple[int, int]]) -> int:
        """Give the number of tiles that are there, after a look whether the first of them is this kernel's."""
        if self.done:
            rows, columns = tiles[0]
            for name, array in self.arrays.items():
                block = np.asarray(getattr(compute(tiles[0]), name))
                there = array[rows : rows + block.shape[0], columns : columns + block.shape[1]]
                block = block[: there.shape[0], : there.shape[1]]
                off_diagonal = np.ones(block.shape, bool) if block.size == 1 else ~np.eye(*block.shape, dtype=bool)
                if not np.allclose(block[off_diagonal], there[off_diagonal], rtol=1e-4):
                    raise ValueError(f"store: {self.store} holds the matrix of another architecture; name another file")
        return self.done

    def write(self, corner: tuple[int, int], block: Kernels, *, symmetric: bool) -> None:
        """Put a tile in its place, and into the mirrored one."""
        i, j = corner
        for name, array in self.arrays.items():
            values = np.asarray(getattr(block, name))
            values = values[: array.shape[0] - i, : array.shape[1] - j]
            if symmetric and i == j:
                values = (values + values.T) / 2
            array[i : i + values.shape[0], j : j + values.shape[1]] = values
            if symmetric and i != j:
                array[j : j + values.shape[1], i : i + values.shape[0]] = values.T
        self.done += 1
        self._save_progress()

    def write_diagonal(self, blocks: list[Kernels]) -> None:
        """Put the exact diagonal in its place."""
        for name, array in self.arrays.items():
            values = np.concatenate([np.asarray(getattr(block, name)) for block in blocks])
            np.fill_diagonal(array, values[: len(array)])

    def finish(self) -> Mapping[str, np.ndarray]:
        """Give the matrices, whole."""
        self._save_progress()
        return self.arrays

    def _save_progress(self) -> None:
        if self.store is None:
            return
        for array in self.arrays.values():
            array.flush()  # pyright: ignore[reportAttributeAccessIssue]  # a memmap wherever there is a store
        self._save_done()

    def _save_done(self) -> None:
        temporary = self.progress_file.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self.meta, "done": self.done}))
        temporary.replace(self.progress_file)
