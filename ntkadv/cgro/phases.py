"""The three phases of a run, found from its curves, and when one of them is absent.

I, the signal is learnt, up to a clean margin of order 1; II, it stalls, and the noise takes over the gradient; III, the
noise of every sample is memorised, up to a robust margin of order 1.

Source: Li & Li, ICML 2025, arXiv 2306.01271, Theorem 5.9, as reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntkadv._checks import require_nonnegative
from ntkadv.cgro.dynamics import Trajectory

__all__ = ["PhaseTimes", "phase_times"]


@dataclass(frozen=True)
class PhaseTimes:
    """When the phases of a run end; times are recorded steps, so their resolution is that of the records.

    Attributes:
        signal_learnt: end of phase I; None where the signal is never learnt.
        noise_leads: end of phase II, where the noise has taken over the gradient; None where it never does.
        memorised: end of phase III; None where some sample is never memorised.
        absent: for each phase that is not there, `"I"`, `"II"` or `"III"`, why.
    """

    signal_learnt: int | None
    noise_leads: int | None
    memorised: int | None
    absent: dict[str, str]

    @property
    def transitions(self) -> tuple[int | None, int | None]:
        """The two transition times, I to II and II to III; None where a phase beside it is absent."""
        first = None if {"I", "II"} & set(self.absent) else self.signal_learnt
        second = None if {"II", "III"} & set(self.absent) else self.noise_leads
        return first, second


def phase_times(
    run: Trajectory, *, signal_level: float = 1.0, takeover: float = 0.5, noise_level: float = 1.0
) -> PhaseTimes:
    r"""Find the transition times of a run.

    - I ends at the first step where alpha^q U_y >= `signal_level` for both classes;
    - II ends at the first later step where the signal has less than `takeover` of the squared gradient norm;
    - III ends at the first step where V_i >= `noise_level` for every training sample.

    Args:
        run: a training run.
        signal_level: "Omega~(1/alpha)" for u, which is a clean margin of order 1; the constant is an inference, and
            the logistic loss bends at 1.
        takeover: share of the gradient; 1/2 is where the noise has more of it than the signal.
        noise_level: "Omega(1)" for V_i; the constant is an inference, as above.

    Raises:
        ValueError: a level is not positive, or `takeover` is not in (0, 1).
    """
    for name, value in (("signal_level", signal_level), ("takeover", takeover), ("noise_level", noise_level)):
        require_nonnegative(name, value, strict=True)
    if takeover >= 1:
        raise ValueError(f"takeover must lie in (0, 1), got {takeover}; it is a share.")
    steps = run.steps
    signal = run.alpha**run.network.power * run.U.min(axis=1)
    learnt = _first(signal >= signal_level)
    begin = 0 if learnt is None else learnt
    leads = _first(run.signal_share[begin:] < takeover)
    leads = None if leads is None else begin + leads
    memorised = _first(run.V.min(axis=1) >= noise_level)

    absent: dict[str, str] = {}
    if learnt is None:
        absent["I"] = f"the signal is never learnt: its margin ends at {signal[-1]:.3g}, below {signal_level:g}"
        absent["II"] = "the signal is never learnt, so that it cannot stall"
    elif learnt == 0:
        absent["I"] = f"the signal is there from the start, with a margin of {signal[0]:.3g}"
    if learnt is not None and leads is None:
        absent["II"] = f"the noise never takes over the gradient: the signal keeps {run.signal_share[-1]:.0%} of it"
    elif learnt is not None and leads == learnt and learnt > 0:
        absent["II"] = "the noise leads the gradient before the signal is learnt"
    low = run.V[-1] < noise_level
    if memorised is None:
        absent["III"] = f"{int(low.sum())} of {low.size} samples are not memorised at the end"
    elif learnt is not None and memorised <= learnt:
        absent.setdefault("II", "the noise is memorised before the signal is learnt")
    learnt, leads, memorised = (None if i is None else int(steps[i]) for i in (learnt, leads, memorised))
    return PhaseTimes(learnt, leads, memorised, absent)


def _first(holds: np.ndarray) -> int | None:
    return int(np.argmax(holds)) if holds.any() else None
