"""Perturbations of models that look at one pixel each: what transfers is known."""

import csv
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from ntkadv.attacks import PGD, Linf
from ntkadv.data import Dataset
from ntkadv.evaluation import evaluate
from ntkadv.statistics import wilson_interval
from ntkadv.transfer import TransferMatrix, transfer

N = 6
IMAGES = np.full((N, 2, 2, 1), 0.5, np.float32)
IMAGES[:, 0, 0, 0] = np.arange(N) / 10
IMAGES[:, 0, 1, 0] = [0.1, 0.1, 0.6, 0.9, 0.9, 0.1]
LABELS = np.array([0, 0, 0, 1, 1, 1], np.int32)
ATTACK = PGD(Linf(0.1), steps=2, loss="margin", random_start=False)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Class 1 where one pixel of the first row exceeds a threshold."""

    pixel: int
    threshold: float

    def __call__(self, x):
        score = x[:, 0, self.pixel, 0] - self.threshold
        return jnp.stack([-score, score], axis=1)


LEFT, LOWER, RIGHT = Threshold(0, 0.25), Threshold(0, 0.17), Threshold(1, 0.5)
MODELS = {"left": LEFT, "lower | left": LOWER, "right": RIGHT}


def matrix_of(models=MODELS, data=(IMAGES, LABELS), attack=ATTACK, **options):
    return transfer(models, data, attack, **{"key": jax.random.key(0), "batch_size": 4, "progress": False, **options})


def answers(model, pixel0, pixel1):
    """What a model says of the two pixels, worked out apart from JAX."""
    return (([pixel0, pixel1][model.pixel] > model.threshold) == LABELS).tolist()


def test_every_cell_is_what_the_moved_pixel_makes_of_it():
    matrix = matrix_of(noise=False)
    assert matrix.sources == ["none", "left", "lower | left", "right"]
    assert matrix.targets == ["left", "lower | left", "right"]
    towards_the_other = np.where(LABELS == 0, 0.1, -0.1)
    left, right = IMAGES[:, 0, 0, 0].astype(float), IMAGES[:, 0, 1, 0].astype(float)
    moved = np.clip(left + towards_the_other, 0, 1)
    pixels = [(left, right), (moved, right), (moved, right), (left, np.clip(right + towards_the_other, 0, 1))]
    for i, pair in enumerate(pixels):
        for j, model in enumerate(MODELS.values()):
            assert matrix.correct[i, j].tolist() == answers(model, *pair), (i, j)


def test_rates_count_only_samples_that_were_right():
    matrix = matrix_of(noise=False)
    np.testing.assert_allclose(matrix.clean, [1, 5 / 6, 4 / 6])
    np.testing.assert_allclose(matrix.accuracy[1], [4 / 6, 4 / 6, 4 / 6])
    np.testing.assert_allclose(matrix.fooled[0], 0)
    np.testing.assert_allclose(matrix.fooled[1], [2 / 6, 1 / 5, 0])
    low, high = matrix.interval
    assert (low[1, 0], high[1, 0]) == wilson_interval(4, 6)
    low, high = matrix.fooled_interval
    assert (low[1, 1], high[1, 1]) == wilson_interval(1, 5)


def test_rate_is_nan_for_a_target_that_is_never_right():
    matrix = matrix_of({"wrong": LEFT}, (IMAGES, 1 - LABELS))
    assert np.isnan(matrix.fooled).all()
    assert np.isnan(matrix.fooled_interval).all()


def test_diagonal_is_what_an_evaluation_finds():
    attack = PGD(Linf(0.15), steps=2)
    key = jax.random.key(3)
    models = {"left": LEFT, "right": RIGHT}
    matrix = transfer(models, (IMAGES, LABELS), attack, key=key, progress=False)
    for name, model in models.items():
        expected = evaluate(model, (IMAGES, LABELS), [attack], key=key, check=False, progress=False).correct[
            attack.name
        ]
        np.testing.assert_array_equal(matrix.correct[matrix.sources.index(name), matrix.targets.index(name)], expected)


def test_targets_may_be_other_models_than_sources():
    matrix = matrix_of({"left": LEFT}, targets={"lower": LOWER})
    assert (matrix.sources, matrix.targets) == (["none", "random", "left"], ["lower"])
    np.testing.assert_array_equal(matrix.correct[2, 0], matrix_of().correct[2, 1])


def test_random_points_are_uniform_in_the_ball():
    """Of pixels 0.05 from the threshold, a uniform change of at most 0.2 carries three in eight across."""
    n = 2000
    images = np.full((n, 1, 2, 1), 0.3, np.float32)
    attack = PGD(Linf(0.2), steps=1)
    matrix = matrix_of({"left": LEFT}, (images, np.ones(n, np.int32)), attack, batch_size=500)
    assert matrix.sources[1] == "random"
    assert matrix.accuracy[1, 0] == pytest.approx(5 / 8, abs=4 * (15 / 64 / n) ** 0.5)


def test_table_csv_and_markdown_hold_every_cell(tmp_path):
    matrix = matrix_of()
    low, high = matrix.interval
    cell = f"{matrix.accuracy[2, 1]:.3f} [{low[2, 1]:.3f}, {high[2, 1]:.3f}]"
    row = next(line for line in str(matrix).splitlines() if "│ left" in line)
    assert row.split("│")[3].strip() == cell
    assert "perturbed against" in str(matrix)
    assert "PGD-2 margin, Linf eps = 0.1" in str(matrix)
    lines = matrix.to_markdown().splitlines()
    assert lines[0] == r"| perturbed against | left | lower \| left | right |"
    assert [line.split(" | ")[0] for line in lines[2:7]] == [
        "| none",
        "| random",
        "| left",
        r"| lower \| left",
        "| right",
    ]
    matrix.to_csv(tmp_path / "transfer.csv")
    with open(tmp_path / "transfer.csv", newline="") as file:
        held = {(line["source"], line["target"]): line for line in csv.DictReader(file)}
    assert len(held) == 5 * 3
    line = held["left", "lower | left"]
    assert [float(line[name]) for name in ("accuracy", "low", "high")] == [matrix.accuracy[2, 1], low[2, 1], high[2, 1]]
    assert (float(line["fooled"]), int(line["clean_correct"]), line["norm"], float(line["eps"])) == (
        0.2,
        5,
        "Linf",
        0.1,
    )


def test_a_narrow_terminal_gets_every_number_too():
    screen = io.StringIO()
    rich.console.Console(width=50, file=screen).print(matrix_of())
    assert max(len(line) for line in screen.getvalue().splitlines()) <= 50
    assert "…" not in screen.getvalue()
    assert "0.833" in screen.getvalue()


def test_matrix_comes_back_from_json(tmp_path):
    matrix = matrix_of(confidence=0.9)
    matrix.to_json(tmp_path / "transfer.json")
    back = TransferMatrix.from_json(tmp_path / "transfer.json")
    np.testing.assert_array_equal(back.correct, matrix.correct)
    assert (back.sources, back.targets, back.attack, back.confidence) == (
        matrix.sources, matrix.targets, matrix.attack, 0.9
    )  # fmt: skip
    assert str(back) == str(matrix)
    (tmp_path / "transfer.json").write_text('{"n": 6, "sources": []}')
    with pytest.raises(ValueError, match="'bits' is missing"):
        TransferMatrix.from_json(tmp_path / "transfer.json")


def test_split_of_a_data_set_is_used():
    data = Dataset.from_arrays(
        name="pixels", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:4], y_test=LABELS[:4], num_classes=2
    )
    assert [matrix_of({"left": LEFT}, data, split=split).n for split in ("test", "train")] == [4, 6]


def test_what_users_do_wrong_is_named(unchecked):
    key, pair = jax.random.key(0), (IMAGES, LABELS)
    with pytest.raises(ValueError, match="sources must be a dictionary"):
        transfer({}, pair, ATTACK, key=key)
    with pytest.raises(ValueError, match="targets must be a dictionary"):
        transfer(MODELS, pair, ATTACK, key=key, targets={})
    with pytest.raises(ValueError, match="sources must not be called 'random'"):
        transfer({"random": LEFT}, pair, ATTACK, key=key)
    with pytest.raises(TypeError, match="attack must be one attack, got list"):
        transfer(MODELS, pair, [ATTACK], key=key)
    with pytest.raises(TypeError, match="key must be a random key"):
        transfer(MODELS, pair, ATTACK, key=0)
