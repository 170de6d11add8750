"""The package as installed: importing it costs others nothing, and its parts are all there."""

import configparser
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest


def run(program):
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_import_brings_no_other_framework():
    program = "import sys, ntkadv; print(*(name.partition('.')[0] for name in sys.modules))"
    assert not {"tensorflow", "torch", "neural_tangents", "foolbox"} & set(run(program).stdout.split())


def test_import_is_silent_and_leaves_the_settings_of_jax():
    done = run(
        "import jax; before = dict(jax.config.values); import ntkadv\n"
        "assert {name: jax.config.values[name] for name in before} == before"
    )
    assert done.stdout == done.stderr == ""


def test_every_name_it_exports_exists():
    run("from ntkadv import *")


@pytest.mark.slow
def test_every_module_can_be_the_first_to_be_imported():
    """None depends on another having been imported before, so no circle of imports hides."""
    done = run(
        "import importlib, pkgutil, sys, ntkadv\n"
        "names = [module.name for module in pkgutil.walk_packages(ntkadv.__path__, 'ntkadv.')]\n"
        "for name in names:\n"
        "    for loaded in [loaded for loaded in sys.modules if loaded.partition('.')[0] == 'ntkadv']:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
        "    print(name)\n"
    )
    assert {"ntkadv.data.loading", "ntkadv.runs"} <= set(done.stdout.split())


def test_installed_version_is_the_one_in_the_source():
    source = configparser.ConfigParser()
    source.read(Path(__file__).parents[1] / "setup.cfg")
    assert importlib.metadata.version("ntkadv") == source["metadata"]["version"]
