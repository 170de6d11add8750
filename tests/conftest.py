"""What every test relies on: shapes and types checked as they run, no silent promotion of dtypes, real data if any."""

import importlib
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
# Test processes run side by side; small factorisations by several threads each would wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import pytest
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

install_import_hook("ntkadv", "beartype.beartype")

hypothesis.settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("default")


def pytest_configure(config):
    config.addinivalue_line("markers", "loose_promotion: calls a library that mixes dtypes (neural-tangents, Foolbox)")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Compiled programs are let go of before their memory maps are too many: Linux allows a process 65,530 of them.

    XLA does not survive the next one; a program takes about ten.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def strict_dtype_promotion(request):
    mode = "standard" if request.node.get_closest_marker("loose_promotion") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield


@pytest.fixture
def unchecked():
    """Annotations are not checked inside the test: bad input meets the library's own errors, as it does for users."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def x64():
    """Float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def script():
    """Give a function that loads an example or a benchmark by its name, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("examples", "benchmarks"):
            patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / folder))
        yield importlib.import_module


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with the real image files: NTKADV_DATA, else ../shared/data beside the source tree."""
    repository = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("NTKADV_DATA") or repository.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no image files: NTKADV_DATA is not set to a folder and {folder} does not exist")
    return folder
