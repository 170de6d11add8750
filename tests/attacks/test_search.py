"""How attacks go over many samples: batches, what is left, cost, and files to go on from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_models import IMAGE, images, labels_of, smooth

from ntkadv.attacks import APGD, FGSM, PGD, AutoAttack, Cost, Linf, TargetedAPGD, search
from ntkadv.attacks.search import batches

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

MODEL = smooth()
N = 30


@pytest.fixture
def samples():
    x = images(N, seed=2)
    return x, labels_of(MODEL, x, flipped=3)


def run(attack, samples, key, **options):
    return attack.run(MODEL, *samples, key=key, batch_size=8, **options)


ENSEMBLE = AutoAttack(
    Linf(0.04), version="custom", attacks_to_run=["apgd-ce", "apgd-t", "fab-t", "square"], steps=6, queries=30
)
SEVERAL = [ENSEMBLE, TargetedAPGD(Linf(0.02), steps=6, loss="margin"), PGD(Linf(0.02), steps=4)]
several = pytest.mark.parametrize("attack", SEVERAL, ids=lambda attack: attack.name)


class StopError(Exception):
    pass


@several
def test_a_stopped_search_goes_on_to_the_same_result_bit_for_bit(attack, samples, key, tmp_path, monkeypatch):
    whole = run(attack, samples, key)
    monkeypatch.setattr(search, "_SAVE_EVERY", -1.0)
    save = search.save_checkpoint
    saves = []
    monkeypatch.setattr(search, "save_checkpoint", lambda *arguments: (saves.append(1), save(*arguments)))
    run(attack, samples, key, state_path=tmp_path / "counted.npz")
    assert len(saves) > len(whole.log), "within stages too"

    for stop in range(1, len(saves)):
        path = tmp_path / f"stopped-{stop}.npz"

        def stopping(*arguments, left=[stop]):  # noqa: B006
            save(*arguments)
            left[0] -= 1
            if not left[0]:
                raise StopError

        monkeypatch.setattr(search, "save_checkpoint", stopping)
        with pytest.raises(StopError):
            run(attack, samples, key, state_path=path)
        monkeypatch.setattr(search, "save_checkpoint", save)
        resumed = run(attack, samples, key, state_path=path)
        np.testing.assert_array_equal(resumed.points, whole.points)
        np.testing.assert_array_equal(resumed.is_wrong, whole.is_wrong)
        assert resumed.fell_to.tolist() == whole.fell_to.tolist()
        assert resumed.cost == whole.cost
        plain = [{k: v for k, v in line.items() if k != "seconds"} for line in whole.log]
        assert [{k: v for k, v in line.items() if k != "seconds"} for line in resumed.log] == plain


def test_a_finished_search_is_read_and_not_run_again(samples, key, tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    whole = run(ENSEMBLE, samples, key, state_path=path)
    monkeypatch.setattr(search, "_attempt", None)
    np.testing.assert_array_equal(run(ENSEMBLE, samples, key, state_path=path).points, whole.points)


@pytest.mark.slow
def test_another_batch_size_may_go_on(samples, key, tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    monkeypatch.setattr(search, "_SAVE_EVERY", -1.0)
    save, left = search.save_checkpoint, [6]

    def stopping(*arguments):
        save(*arguments)
        left[0] -= 1
        if not left[0]:
            raise StopError

    monkeypatch.setattr(search, "save_checkpoint", stopping)
    with pytest.raises(StopError):
        run(ENSEMBLE, samples, key, state_path=path)
    whole = run(ENSEMBLE, samples, key)
    resumed = ENSEMBLE.run(MODEL, *samples, key=key, batch_size=30, state_path=path)
    np.testing.assert_array_equal(resumed.is_wrong, whole.is_wrong)
    np.testing.assert_allclose(resumed.points, whole.points, atol=1e-4)


def test_a_state_file_of_another_evaluation_is_refused_by_name(samples, key, tmp_path):
    path = tmp_path / "state.npz"
    x, labels = samples
    attack = FGSM(Linf(0.1))
    attack.run(MODEL, x, labels, key=key, state_path=path)
    cases = {
        "attack": (FGSM(Linf(0.2)), MODEL, x, labels, key),
        "model": (attack, smooth(seed=7), x, labels, key),
        "images": (attack, MODEL, x * np.float32(0.5), labels, key),
        "labels": (attack, MODEL, x, (labels + 1) % 3, key),
        "key": (attack, MODEL, x, labels, jax.random.key(1)),
    }
    for name, (other, model, images_, labels_, key_) in cases.items():
        with pytest.raises(ValueError, match=rf"holds another evaluation \(other .*{name}"):
            other.run(model, images_, labels_, key=key_, state_path=path)


def test_a_damaged_state_file_is_not_used(samples, key, tmp_path):
    path = tmp_path / "state.npz"
    path.write_bytes(b"PK not an archive")
    with pytest.warns(RuntimeWarning, match=r"state\.npz is not used"):
        done = run(FGSM(Linf(0.1)), samples, key, state_path=path)
    np.testing.assert_array_equal(done.points, run(FGSM(Linf(0.1)), samples, key).points)


def test_what_is_reported_is_what_the_model_says(samples, key):
    x, labels = samples
    done = run(ENSEMBLE, samples, key)
    wrong = np.asarray(MODEL(done.points)).argmax(axis=1) != labels
    np.testing.assert_array_equal(done.is_wrong, wrong)
    assert ((done.fell_to != "") == wrong).all()
    assert (done.fell_to[:3] == "clean").all()
    np.testing.assert_array_equal(done.points[:3], x[:3])
    assert done.log[-1]["robust_accuracy"] == pytest.approx(1 - wrong.mean())
    broken = sum(line["broken"] for line in done.log)
    assert broken == wrong.sum() - 3


def test_each_stage_meets_only_what_all_before_it_left(samples, key):
    log = run(ENSEMBLE, samples, key).log
    left = N - 3
    for line in log:
        assert line["attacked"] == left
        left -= line["broken"]


def test_cost_counts_the_passes_of_single_samples(samples, key):
    x, labels = samples
    calls = []

    def model(z):
        jax.debug.callback(lambda: calls.append(len(z)))
        return MODEL(z)

    attack = PGD(Linf(0.02), steps=4)
    done = attack.run(model, x[:8], labels[:8], key=key)
    jax.effects_barrier()
    # One pass for the clean logits, one to judge the result: neither is counted.
    assert sum(calls) == done.cost.gradients + done.cost.forwards + 2 * 8
    assert done.cost == Cost(gradients=4 * 8, forwards=8)


def test_few_samples_go_into_small_batches_of_few_sizes():
    sizes = {len(batches(np.arange(n), 256)[0].places) for n in range(1, 257)}
    assert sizes == {16, 32, 64, 128, 256}
    for n in (1, 5, 8, 9, 64, 65, 256, 600):
        cut = batches(np.arange(n) + 7, 256)
        kept = np.concatenate([batch.places[: batch.size] for batch in cut])
        assert kept.tolist() == list(range(7, 7 + n))
        assert {len(batch.places) for batch in cut} <= sizes
    assert len(batches(np.arange(3), 2)) == 2
    assert batches(np.arange(0), 4) == []


def test_one_program_serves_all_radii(key):
    traces = []

    def model(x):
        traces.append(x.shape)
        return MODEL(x)

    x = images(8)
    labels = labels_of(MODEL, x)
    attack = APGD(Linf(0.01), steps=3)
    attack.run(model, x, labels, key=key)
    once = len(traces)
    strengths = []
    for eps in (0.05, 0.1, 0.2):
        traces.clear()
        attacked = attack.with_eps(eps).run(model, x, labels, key=key).points
        strengths.append(float(np.abs(attacked - x).max()))
        assert len(traces) == 1, "looked at for its number of classes, not compiled"
    assert once > 1
    np.testing.assert_allclose(strengths, [0.05, 0.1, 0.2], rtol=1e-5)


def test_models_whose_shape_depends_on_the_batch_are_refused(key):
    def squeezing(x):
        logits = jnp.sum(x, axis=(1, 2))
        return logits[:3] if len(x) == 5 else logits

    x = np.ones((4, *IMAGE), np.float32)
    labels = np.zeros(4, np.int32)
    with pytest.raises(ValueError, match=r"model must return logits \(5, num_classes\) .* got \(3, 2\)"):
        APGD(Linf(0.1)).run(squeezing, np.repeat(x, 3, axis=0)[:10], np.zeros(10, np.int32), key=key, batch_size=5)
    assert APGD(Linf(0.1), steps=2).run(squeezing, x, labels, key=key).points.shape == x.shape
