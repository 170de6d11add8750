"""Three phases, where they are and where not; phase diagrams against single runs."""

import dataclasses

import jax
import numpy as np
import pytest

from ntkadv.cgro import (
    PatchDistribution,
    PatchNetwork,
    SignalLine,
    Trajectory,
    is_cgro,
    phase_diagram,
    phase_times,
    train,
)


@pytest.fixture(scope="module")
def three_phases():
    """A run with signal well above noise, and the attack just below the signal."""
    distribution = PatchDistribution(400, alpha=4.0, sigma=0.05)
    network = PatchNetwork(width=40)
    keys = jax.random.split(jax.random.key(5), 3)
    data, test = distribution.sample(16, key=keys[0]), distribution.sample(400, key=keys[1])
    filters = network.init(keys[2], 400, std=0.02)
    settings = {"filters": filters, "steps": 15_000, "learning_rate": 0.2, "test": test}
    return {delta: train(network, data, attack=SignalLine(delta), **settings) for delta in (3.95, 2.0)}


def test_three_phases_end_in_robust_memorisation(three_phases):
    run = three_phases[3.95]
    times = phase_times(run)
    assert times.absent == {}
    assert 0 < times.signal_learnt < times.noise_leads < times.memorised
    assert times.transitions == (times.signal_learnt, times.noise_leads)
    end = run.accuracies()
    assert (end["train_clean"], end["train_robust"], end["test_clean"]) == (1, 1, 1)
    assert end["test_robust"] < 0.6
    assert is_cgro(end)
    before = np.searchsorted(run.steps, times.noise_leads)
    assert np.abs(run.V[before]).max() < 0.01  # the noise is not memorised yet when it takes over


def test_an_attack_that_leaves_signal_has_no_third_phase(three_phases):
    run = three_phases[2.0]
    times = phase_times(run)
    assert "III" in times.absent
    assert times.memorised is None
    assert times.transitions[1] is None
    assert run.accuracies()["test_robust"] == 1
    assert not is_cgro(run.accuracies())


def made(signal, share, noise):
    """A run of two samples with the given curves."""
    T = len(signal)
    blank = dict.fromkeys((field.name for field in dataclasses.fields(Trajectory)), np.zeros((T, 2)))
    curves = {"steps": 10 * np.arange(T), "U": np.array([signal, signal]).T / 8, "V": np.array([noise, noise]).T}
    rest = {"signal_share": np.array(share), "network": PatchNetwork(width=2), "alpha": 2.0, "delta": 1.0}
    return Trajectory(**{**blank, **curves, **rest})


def test_phase_times_are_read_off_the_curves():
    times = phase_times(made([0, 0.5, 2, 3, 3, 3], [1, 1, 1, 1, 0.2, 0], [0, 0, 0, 0, 0, 4]))
    assert (times.signal_learnt, times.noise_leads, times.memorised) == (20, 40, 50)
    assert times.absent == {}
    assert phase_times(made([0, 0.5, 2, 3], [1, 0.9, 0.9, 0.1], [0, 0, 0, 2]), signal_level=0.4).signal_learnt == 10

    never = phase_times(made([0, 0.1, 0.1], [0.1, 0, 0], [0, 1, 2]))
    assert set(never.absent) == {"I", "II"}
    assert "never learnt" in never.absent["I"]
    assert never.transitions == (None, None)
    assert never.memorised == 10

    early = phase_times(made([0, 0, 2, 2], [0.4, 0.3, 0.2, 0.1], [0, 2, 2, 2]))
    assert set(early.absent) == {"II"}
    assert early.transitions == (None, None)

    stays = phase_times(made([0, 2, 2], [1, 1, 0.8], [0, 0, 0]))
    assert "80%" in stays.absent["II"]
    assert "2 of 2 samples are not memorised" in stays.absent["III"]
    assert stays.signal_learnt == 10

    there = phase_times(made([2, 2, 2], [1, 0.1, 0.1], [0, 0, 3]))
    assert set(there.absent) == {"I"}


@pytest.mark.slow
def test_a_phase_diagram_is_made_of_single_runs(key):
    distribution = PatchDistribution(60, alpha=1.0, sigma=0.1)
    network = PatchNetwork(width=8)
    settings = {"n": 6, "steps": 300, "learning_rate": 0.2, "init_std": 0.05, "n_test": 50}
    diagram = phase_diagram(
        network, distribution, signals=[0.5, 2.0], ratios=[0.0, 0.99], seeds=2, key=key, progress=False, **settings
    )
    expected = {name: np.zeros((2, 2)) for name in diagram.accuracies}
    for i, alpha in enumerate([0.5, 2.0]):
        for seed in range(2):
            keys = jax.random.split(jax.random.fold_in(key, seed), 3)
            here = dataclasses.replace(distribution, alpha=alpha)
            data, test = here.sample(6, key=keys[0]), here.sample(50, key=keys[1])
            filters = network.init(keys[2], 60, std=0.05)
            for j, ratio in enumerate([0.0, 0.99]):
                run = train(
                    network, data, test=test, filters=filters, attack=SignalLine(ratio * alpha), steps=300,
                    learning_rate=0.2,
                )  # fmt: skip
                for name, value in run.accuracies().items():
                    expected[name][i, j] += value / 2
    for name, values in diagram.accuracies.items():
        np.testing.assert_allclose(values, expected[name], atol=0.011)  # a margin within rounding of zero may turn
    assert diagram.holds(high=0.0, chance=1.0).all()


def test_bad_settings_are_refused(unchecked, key):
    with pytest.raises(ValueError, match=r"ratios must lie in \[0, 1\), got 1"):
        phase_diagram(
            PatchNetwork(width=2), PatchDistribution(5, alpha=1.0, sigma=1.0), signals=[1.0], ratios=[1.0], n=2,
            steps=2, learning_rate=0.1, init_std=0.1, key=key,
        )  # fmt: skip
    run = made([0, 1], [1, 1], [0, 0])
    with pytest.raises(ValueError, match=r"takeover must lie in \(0, 1\), got 1"):
        phase_times(run, takeover=1)
    with pytest.raises(ValueError, match="noise_level must be finite and positive"):
        phase_times(run, noise_level=0.0)
