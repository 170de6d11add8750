"""Crops and mirrors, every one of them, against NumPy; their draws against what is to be expected."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.training import CropFlip

HEIGHT, WIDTH, PADDING = 4, 5, 2


def every_draw():
    """All corners, mirrored or not: arrays as `draw` gives them, with an axis of draws."""
    rows, columns, flips = zip(*itertools.product(range(5), range(5), (False, True)), strict=True)
    return jnp.stack([jnp.asarray(rows), jnp.asarray(columns)], axis=1), jnp.asarray(flips)


def cropped(image, corner, is_flipped):
    padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    part = padded[corner[0] : corner[0] + HEIGHT, corner[1] : corner[1] + WIDTH]
    return np.flip(part, axis=1) if is_flipped else part


def test_every_crop_and_mirror_is_that_of_numpy():
    image = np.random.default_rng(0).random((HEIGHT, WIDTH, 3)).astype(np.float32)
    drawn = every_draw()
    made = jax.vmap(CropFlip(padding=PADDING).apply, (None, 0))(jnp.asarray(image), drawn)
    for ours, corner, is_flipped in zip(made, *map(np.asarray, drawn), strict=True):
        np.testing.assert_array_equal(ours, cropped(image, corner, is_flipped))


def test_pixels_come_back_to_where_they_were_and_the_others_stay():
    rng = np.random.default_rng(1)
    image, kept = rng.random((2, HEIGHT, WIDTH, 3)).astype(np.float32)
    drawn = every_draw()
    change = CropFlip(padding=PADDING)
    made = jax.vmap(change.apply, (None, 0))(jnp.asarray(image), drawn)
    back = jax.vmap(change.restore, (0, None, 0))(made, jnp.asarray(kept), drawn)
    # Numbers of the pixels say which were seen.
    numbers = np.arange(1.0, HEIGHT * WIDTH + 1).reshape(HEIGHT, WIDTH, 1)
    for ours, corner, is_flipped in zip(back, *map(np.asarray, drawn), strict=True):
        seen = np.isin(numbers, cropped(numbers, corner, is_flipped))
        np.testing.assert_array_equal(ours, np.where(seen, image, kept))


def test_of_what_is_changed_outside_the_image_nothing_comes_back():
    change, drawn = CropFlip(padding=PADDING), every_draw()
    made = jnp.full((HEIGHT, WIDTH, 1), 7.0)
    back = jax.vmap(change.restore, (None, None, 0))(made, jnp.zeros_like(made), drawn)
    rows, columns = np.abs(np.asarray(drawn[0]).T - PADDING)
    np.testing.assert_array_equal(np.sum(back == 7, axis=(1, 2, 3)), (HEIGHT - rows) * (WIDTH - columns))


def test_corners_and_mirrors_are_drawn_uniformly_and_independently(key):
    change, n = CropFlip(padding=2), 20_000
    corners, flips = jax.vmap(change.draw)(jax.random.split(key, n))
    cells = np.zeros((5, 5, 2))
    np.add.at(cells, (*np.asarray(corners).T, np.asarray(flips).astype(int)), 1)
    # Chi squared with 49 degrees of freedom: mean 49, standard deviation 9.9.
    assert np.sum((cells - n / 50) ** 2 / (n / 50)) < 49 + 4.5 * 9.9
    never = jax.vmap(CropFlip(padding=0, flip=False).draw)(jax.random.split(key, 100))
    assert not np.any(never[0])
    assert not np.any(never[1])


def test_without_padding_and_mirror_it_is_the_image(key):
    image = jax.random.uniform(key, (HEIGHT, WIDTH, 3), jnp.float32)
    change = CropFlip(padding=0, flip=False)
    np.testing.assert_array_equal(change.apply(image, change.draw(key)), image)


def test_wrong_settings_are_named(unchecked):
    with pytest.raises(ValueError, match="padding must be at least 0"):
        CropFlip(padding=-1)
    with pytest.raises(TypeError, match="padding must be"):
        CropFlip(padding=1.5)
