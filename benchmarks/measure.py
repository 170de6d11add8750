"""How everything here is timed: each side in a process of its own, so that its peak of memory is its own too."""

from __future__ import annotations

import multiprocessing
import resource
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
import numpy as np

__all__ = ["Compilations", "NotRun", "command_line", "finished", "growth_exponent", "in_child", "peak_memory", "timed"]


_GRACE = 10.0
"""Seconds in which a process that has answered may end by itself."""


class NotRun(NamedTuple):
    """What stands in the place of a result that there is none of, and why."""

    reason: str


def in_child(function: Callable[..., dict[str, Any]], *arguments: Any, limit: float) -> dict[str, Any] | NotRun:
    """Call a module-level function in a fresh process, and wait `limit` seconds at most.

    The process starts from nothing (it is spawned, not forked): it compiles anew and shares no memory with others.

    Returns:
        What the function returned, or `NotRun` where the time was over or the process was killed.

    Raises:
        RuntimeError: the function raised; the message holds its traceback.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, function, arguments), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return NotRun(f"stopped after {limit:.0f} s")
        failed, answer = receiver.recv()
        child.join(_GRACE)
    except EOFError:
        child.join()
        return NotRun(f"its process died with exit code {child.exitcode}, as when memory runs out")
    finally:
        child.kill()
        child.join()
        receiver.close()
    if failed:
        raise RuntimeError(f"{function.__name__} failed in its own process:\n{answer}")
    return answer


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((False, function(*arguments)))
    except Exception:
        sender.send((True, traceback.format_exc()))


def timed(
    function: Callable[..., Any], *arguments: Any, repeats: int, budget: float = float("inf")
) -> tuple[Any, dict[str, Any]]:
    """Compile a function, run it once to warm up, then time it `repeats` times, to the moment the device is done.

    With `budget`, no repetition is begun that would not end within so many seconds of the start of compilation; the
    first one always is.

    Returns:
        Its result, and `compile_s`, `min_s`, `median_s`, `repeats`.
    """
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    result, last = finished(compiled, *arguments)
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or time.perf_counter() - start + last < budget):
        result, last = finished(compiled, *arguments)
        seconds.append(last)
    return result, {
        "compile_s": compile_s,
        "min_s": min(seconds),
        "median_s": statistics.median(seconds),
        "repeats": len(seconds),
    }


def finished(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Call a function; its result, and the seconds until every array in it is there."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - start


def peak_memory() -> dict[str, float]:
    """Largest memory this process ever held: on the host (all of it, libraries too) and, where known, on the device.

    A process inherits the peak of the one that started it, so what starts others must itself stay small.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_of_device:
        peak["device_peak_mib"] = statistics_of_device["peak_bytes_in_use"] / 2**20
    return peak


class Compiled(NamedTuple):
    """How many programs were compiled, and in how many seconds."""

    programs: int
    seconds: float


class Compilations:
    """Counts what JAX compiles inside the `with` block."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def snapshot(self) -> Compiled:
        """Give what was compiled so far."""
        return Compiled(len(self._seconds), sum(self._seconds))

    def since(self, before: Compiled) -> Compiled:
        """Give what was compiled since a snapshot."""
        now = self.snapshot()
        return Compiled(now.programs - before.programs, now.seconds - before.seconds)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._seconds.append(duration_secs)


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of log value over log size by least squares: 3 where the value grows as the cube. None for one point."""
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float)), 1)[0])


def command_line() -> str:
    """Tell how this script was called, without the folders, which mean nothing on another machine."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in _FOLDERS:
            next(words, None)
        elif word.partition("=")[0] not in _FOLDERS:
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])


_FOLDERS = ("--root", "--output", "--run")
