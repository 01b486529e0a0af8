"""Every way of building and installing the package, each in a fresh environment outside the checkout.

The environments borrow the installed torch, setuptools and so on through a folder of links, so nothing is downloaded;
huggingface's `kernels` is among what they borrow. The extension is compiled once: the wheel and the editable install
are made from the same unpacked source distribution, whose object files ninja finds up to date the second time.
"""

import json
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from builds import (
    COMPILERS,
    NAMES,
    ROOT,
    SUFFIX,
    Python,
    copy_sources,
    environment,
    packages,  # noqa: F401
    packages_without_torch,  # noqa: F401
    python,  # noqa: F401
    quick_compiler,  # noqa: F401
    run,
    sources,  # noqa: F401
    wheel_info,
    wheel_names,
)

pytestmark = pytest.mark.slow
SHIPPED = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="needs a C++ compiler: none of c++, g++, clang++ is on PATH")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    hook = "import setuptools.build_meta as backend; backend.build_sdist('../dist')"
    run(sys.executable, "-c", hook, cwd=copy_sources(folder / "checkout"))
    (made,) = (folder / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        # Early patch releases of Python 3.10 and 3.11 have no filters.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def builder(packages, tmp_path_factory):
    return Python(tmp_path_factory.mktemp("builder") / "venv", packages)


@pytest.fixture(scope="module")
def builds_for_cpu(quick_compiler):
    return environment(FOCALNET_BUILD="cpu", CXX=quick_compiler)


@pytest.fixture(scope="module")
def wheel(unpacked, builder, builds_for_cpu):
    """The wheel, extension included, that the source distribution gives."""
    return builder.wheel(unpacked, env=builds_for_cpu)


def recorded(source):
    """Why an editable install of that source has no extension."""
    return json.loads((source / "focalnet" / "_build_info.json").read_text())["reason"]


def assert_pure(wheel, reason):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in wheel_names(wheel) if name.endswith((".so", ".pyd", ".o"))]
    info = wheel_info(wheel)
    assert not info["built"]
    assert reason in info["reason"]


def test_sdist_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.*")}
    needed |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("kernels/**/*.py")}
    needed |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("focalnet/**/*.py")}
    needed |= {
        "recipes/digits.yaml",
        "recipes/accelerate/fsdp2.yaml",
        *(f"focalnet/pretrained/digits/{name}" for name in SHIPPED),
    }
    assert needed | set(NAMES) <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "_build_info.json"))]


@needs_compiler
def test_wheel_holds_the_package(wheel):
    names = wheel_names(wheel)
    assert {f"focalnet/_C{SUFFIX}", "focalnet/_build_info.json", "focalnet/backends/extension.py"} <= names
    assert "focalnet/kernels/__init__.py" in names
    assert {
        "focalnet/recipes/digits.yaml",
        "focalnet/recipes/accelerate/fsdp2.yaml",
        *(f"focalnet/pretrained/digits/{name}" for name in SHIPPED),
    } <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"focalnet"}
    info = wheel_info(wheel)
    assert info["built"] and info["reason"] is None and info["mode"] == "cpu"
    assert info["torch"] and info["compiler"]
    with zipfile.ZipFile(wheel) as archive:
        binary = archive.read(f"focalnet/_C{SUFFIX}")
    assert b"libtorch_python" not in binary, "linked against the library whose ABI changes with every torch"


@needs_compiler
def test_wheel_runs_beside_huggingface_kernels(wheel, python):
    python.pip("install", wheel)
    facts = python.run("""
        import focalnet.kernels, kernels
        from focalnet.backends import extension
        print(extension.missing(), extension.build_info()["torch_target_version"])
        print(extension.__file__)
        print(focalnet.kernels.__file__)
        print(kernels.__version__)
    """).splitlines()
    assert facts[0] == "None 2.10"
    assert Path(facts[1]).parents[1] == python.site / "focalnet"
    assert Path(facts[2]).parent == python.site / "focalnet" / "kernels"


@needs_compiler
def test_editable_install(wheel, unpacked, builder, builds_for_cpu):
    # `wheel` left the object files, of use to the Python that made them: its headers are named in ninja's commands.
    python = builder
    python.pip("install", "--no-build-isolation", "--editable", unpacked, env=builds_for_cpu)
    facts = python.run("""
        import focalnet.kernels
        from focalnet.backends import extension
        print(extension.missing())
        print(extension.__file__)
        print(focalnet.kernels.__file__)
    """).splitlines()
    assert facts[0] == "None"
    assert Path(facts[1]).parents[1] == unpacked / "focalnet"
    assert Path(facts[2]).parent == unpacked / "kernels"
    assert (unpacked / "focalnet" / f"_C{SUFFIX}").exists()

    # A later build without the extension must not leave the old one in place.
    python.pip("install", "--no-build-isolation", "--editable", unpacked, env=environment(FOCALNET_BUILD="none"))
    assert not (unpacked / "focalnet" / f"_C{SUFFIX}").exists()
    assert recorded(unpacked) == "built with FOCALNET_BUILD=none"


def test_none_gives_a_pure_wheel(sources, python):
    wheel = python.wheel(sources, env=environment(FOCALNET_BUILD="none"))
    assert_pure(wheel, "built with FOCALNET_BUILD=none")


def programs_without_compiler(folder):
    """A folder for PATH that has ninja and nothing else."""
    folder.mkdir()
    (folder / "ninja").symlink_to(shutil.which("ninja", path=environment()["PATH"]))
    return str(folder)


def test_without_compiler_auto_installs_the_pure_package(sources, python, tmp_path):
    wheel = python.wheel(sources, env=environment(PATH=programs_without_compiler(tmp_path / "bin")))
    assert_pure(wheel, "none of c++, g++, clang++ is on PATH")

    python.pip("install", "--no-build-isolation", sources, env=environment(CXX="/nonexistent/c++"))
    reason = python.missing()
    assert "CXX is '/nonexistent/c++'" in reason
    assert "FOCALNET_BUILD=cpu pip install" in reason
    assert not list(python.site.glob("focalnet/*.so"))


def test_without_compiler_cpu_fails(sources, python, tmp_path):
    for changes in ({"CXX": "/nonexistent/c++"}, {"PATH": programs_without_compiler(tmp_path / "bin")}):
        env = environment(FOCALNET_BUILD="cpu", **changes)
        output = python.pip("install", "--no-build-isolation", sources, env=env, fails=True)
        assert "FOCALNET_BUILD=cpu, but the extension cannot be built: no C++ compiler" in output
    assert not (python.site / "focalnet").exists()


def test_isolated_build_without_torch_is_pure(sources, packages_without_torch, tmp_path):
    wheel = Python(tmp_path / "isolated", packages_without_torch).wheel(sources)
    assert_pure(wheel, "torch was not importable while building")
    assert "--no-build-isolation" in wheel_info(wheel)["reason"]


@needs_compiler
def test_source_that_does_not_compile(sources, python):
    """auto: a pure package, the reason, and nothing left of an earlier build; cpu: an error."""
    for path in sources.glob("csrc/**/*.cpp"):
        path.unlink()
    (sources / "csrc" / "module.cpp").write_text('#error "broken on purpose"\n')
    stale = [
        sources / "focalnet" / f"_C{SUFFIX}",
        sources / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / f"focalnet/_C{SUFFIX}",
    ]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of an earlier build")

    wheel = python.wheel(sources)
    assert_pure(wheel, "broken on purpose")

    python.pip("install", "--no-build-isolation", "--editable", sources)
    assert not list(sources.glob("focalnet/*.so"))
    reason = recorded(sources)
    assert reason.startswith("compiling failed: ") and "csrc/module.cpp" in reason and "broken on purpose" in reason

    env = environment(FOCALNET_BUILD="cpu")
    output = python.pip("install", "--no-build-isolation", "--editable", sources, env=env, fails=True)
    assert "FOCALNET_BUILD=cpu, but the extension cannot be built: compiling failed" in output


def test_mode_that_cannot_be(sources):
    env = environment(FOCALNET_BUILD="fast")
    output = run(sys.executable, "setup.py", "--version", cwd=sources, env=env, fails=True)
    assert "FOCALNET_BUILD is 'fast', expected one of auto, cpu, cuda, none" in output
    assert "Traceback" not in output


def test_metadata_needs_no_torch(sources):
    """Nor does the folder kernels/ get in the way of huggingface's package, which hooks into setuptools."""
    fake = sources.parent / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    run(sys.executable, "setup.py", "egg_info", cwd=sources, env=environment(PYTHONPATH=str(fake)))
    metadata = (sources / "focalnet.egg-info" / "PKG-INFO").read_text()
    assert re.search(r"^Version: \d+\.\d+\.\d+", metadata, re.MULTILINE)


def test_kernels_is_huggingfaces_in_the_checkout():
    """The root, where a folder of that name lies, is not on the path of the processes that run the tests."""
    import focalnet.kernels

    import kernels

    assert hasattr(kernels, "get_kernel")
    assert Path(kernels.__file__).parent != ROOT / "kernels"
    assert focalnet.kernels is not kernels
