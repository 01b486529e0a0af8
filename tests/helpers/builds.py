"""Builds and installs the package: copies of the sources, and fresh environments outside the checkout.

The environments borrow the installed torch, setuptools and so on through a folder of links, so nothing is downloaded.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
COMPILERS = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
NAMES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "requirements.txt", "LICENSE", "README.md")
FOLDERS = ("focalnet", "kernels", "recipes", "csrc")


def environment(**changes):
    """The environment of a user's shell, without variables that affect a build. ``changes`` of None remove one."""
    unwanted = ("FOCALNET_", "PYTHONPATH", "PYTHONHOME", "CXX", "CC", "CFLAGS", "CXXFLAGS", "LDFLAGS")
    unwanted += ("CUDA_", "NVCC", "TORCH_CUDA")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    # ninja is installed beside the Python that runs the tests, and that folder need not be on PATH.
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    kept.update(changes)
    return {name: value for name, value in kept.items() if value is not None}


def run(*command, cwd, env=None, fails=False):
    """Runs a command and returns all it printed."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=280,
    )
    assert (result.returncode != 0) == fails, f"{command} returned {result.returncode}\n{result.stdout[-6000:]}"
    return result.stdout


def link_packages(folder, wanted):
    """Fills a folder with links to the installed packages whose file name `wanted` accepts."""
    folder.mkdir()
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(site).iterdir():
            if wanted(path.name) and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The installed packages, without this one, however it is installed."""

    def wanted(name):
        return not name.startswith(("focalnet", "__editable__", "__pycache__")) and not name.endswith(".pth")

    return link_packages(tmp_path_factory.mktemp("borrowed") / "packages", wanted)


@pytest.fixture(scope="module")
def packages_without_torch(tmp_path_factory):
    """The packages of an isolated build: setuptools, and the pip that runs it."""

    def wanted(name):
        return re.match(r"(setuptools|_distutils_hack|wheel|packaging|pip)\b", name)

    return link_packages(tmp_path_factory.mktemp("isolated") / "packages", wanted)


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory):
    """A compiler for CXX that does not optimise, which halves the build time."""
    program = tmp_path_factory.mktemp("compiler") / "c++"
    program.write_text(f'#!/bin/sh\nexec {shutil.which(COMPILERS[0])} "$@" -O0\n')
    program.chmod(0o755)
    return str(program)


class Python:
    """A fresh virtual environment that borrows packages from a folder."""

    def __init__(self, folder, packages):
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.program = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.site = Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
        (self.site / "borrowed.pth").write_text(f"{packages}\n")
        self.folder = folder

    def run(self, code, cwd=None):
        return run(self.program, "-c", textwrap.dedent(code), cwd=cwd or self.folder)

    def pip(self, *arguments, env=None, fails=False):
        where = ("--no-index", "--no-deps", "--disable-pip-version-check")
        return run(
            self.program, "-m", "pip", arguments[0], *where, *arguments[1:], cwd=self.folder, env=env, fails=fails
        )

    def wheel(self, source, env=None):
        """Builds a wheel without isolation and returns its path."""
        return self.wheel_and_log(source, env)[0]

    def wheel_and_log(self, source, env=None):
        """Also what the build printed."""
        out = self.folder / "wheels"
        shutil.rmtree(out, ignore_errors=True)
        log = self.pip("wheel", "--verbose", "--no-build-isolation", "--wheel-dir", out, source, env=env)
        (built,) = out.iterdir()
        return built, log

    def missing(self):
        """The installed package's reason why it has no extension, or None."""
        return json.loads(
            self.run("import json; from focalnet.backends import extension as e; print(json.dumps(e.missing()))")
        )


@pytest.fixture
def python(tmp_path, packages):
    return Python(tmp_path / "venv", packages)


def copy_sources(folder):
    """Copy the sources without build results, as a fresh clone has them."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    folder.mkdir()
    for name in NAMES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def copy_few_sources(folder):
    """Copy the sources without kernels for CPUs, which compiles quickly: what an import calls is left."""
    copy_sources(folder)
    for path in (folder / "csrc" / "cpu").glob("*.cpp"):
        if path.name not in ("amx.cpp", "threads.cpp"):
            path.unlink()
    return folder


@pytest.fixture
def sources(tmp_path):
    return copy_few_sources(tmp_path / "sources")


def wheel_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def wheel_info(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("focalnet/_build_info.json"))
