"""neural-tangents imports on current JAX, without TensorFlow, and leaves JAX as it was."""

import subprocess
import sys
import textwrap

import pytest

from ntkadv.architectures import import_neural_tangents

pytestmark = pytest.mark.loose_promotion


def run(code):
    """Run in a fresh interpreter; give what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_brings_no_tensorflow_and_leaves_jax_as_it_was():
    assert (
        run("""
            import sys
            import jax, jax.core, jax.interpreters.ad
            modules = (jax, jax.core, jax.interpreters.ad)
            before = [set(vars(module)) for module in modules]
            had_util = "jax.util" in sys.modules

            from ntkadv.architectures import import_neural_tangents
            nt = import_neural_tangents()

            assert nt.stax.Relu and nt is sys.modules["neural_tangents"] and import_neural_tangents() is nt
            assert not any(name.split(".")[0] in ("tensorflow", "tf2jax", "torch") for name in sys.modules)
            assert ("jax.util" in sys.modules) == had_util
            assert "neural_tangents.experimental" not in sys.modules
            for module, names in zip(modules, before, strict=True):
                added = {n for n in set(vars(module)) - names if not isinstance(vars(module)[n], type(sys))}
                assert not added, added  # submodules may appear, names may not
            print("fine")
        """)
        == "fine"
    )


def test_the_error_says_how_to_install_what_is_missing():
    message = run("""
        import sys
        import importlib.abc

        class Missing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] == "neural_tangents":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Missing())
        from ntkadv.architectures import import_neural_tangents
        try:
            import_neural_tangents()
        except ImportError as error:
            print(error)
    """)
    assert message.startswith("neural-tangents is not installed")
    assert "pip install --no-deps neural-tangents==0.6.5" in message


def test_the_error_names_what_jax_no_longer_has():
    message = run("""
        from ntkadv.architectures import stax
        stax._MOVED["jax.core"]["jax._src.core"] += ("GoneForGood",)
        try:
            stax.import_neural_tangents()
        except ImportError as error:
            print(error)
    """)
    assert "GoneForGood" in message
    assert "JAX" in message


@pytest.mark.parametrize("implementation", [1, 2])
def test_empirical_kernels_work_after_the_import(implementation, key):
    import jax
    import jax.numpy as jnp

    nt = import_neural_tangents()
    x = jax.random.normal(key, (3, 5))
    w = jax.random.normal(jax.random.key(1), (5, 2))
    kernel = nt.empirical_ntk_fn(lambda params, x: jnp.tanh(x @ params), implementation=implementation)(x, None, w)
    slopes = 1 - jnp.tanh(x @ w) ** 2
    expected = jnp.mean(slopes[:, None] * slopes[None], axis=-1) * (x @ x.T)
    assert jnp.allclose(kernel, expected, rtol=1e-5, atol=1e-6)
