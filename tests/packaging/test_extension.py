"""Is the compiled extension there, and if not, is the reason given the right one?"""

import importlib.machinery
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import library_paths

from focalnet.backends import extension

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
KEYS = {"avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"}
KEYS |= {"amx_bf16", "neon", "sve"}

needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


@pytest.fixture
def package(tmp_path):
    """A package focalnet of extension.py alone, to put any binary beside it; torch is a stand-in, quick to import."""
    folder = tmp_path / "focalnet"
    (folder / "backends").mkdir(parents=True)
    for package in (folder, folder / "backends"):
        (package / "__init__.py").touch()
    shutil.copy(extension.__file__, folder / "backends")
    (tmp_path / "torch.py").write_text(f"__version__ = {torch.__version__!r}\n")
    return folder


def ask(package):
    """What a new interpreter says about the extension of that package."""
    code = (
        "import json; from focalnet.backends import extension as e; "
        "print(json.dumps([e.missing(), e.build_info(), e.cpu_capabilities()]))"
    )
    env = os.environ | {"PYTHONPATH": str(package.parent)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(result.stdout)


def record(package, **facts):
    (package / "_build_info.json").write_text(json.dumps(facts))


def test_is_there_wherever_it_can_be():
    """Installed by setup.py on a machine with a compiler, the extension loads: no build breaks in silence."""
    recorded = extension.recorded_build()
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    if recorded.get("mode") == "none" or not compiler:
        assert extension.missing() is not None
    else:
        assert extension.missing() is None


ROOT = Path(__file__).parents[2]
FLAGS_OF_THE_EXTENSION = """
import json, runpy, setuptools, sys
setuptools.setup = lambda **options: print(json.dumps(getattr(options["ext_modules"][0], sys.argv[1])))
runpy.run_path("setup.py")
"""


def flags_of_the_extension(name):
    """What setup.py gives the compiler ("extra_compile_args") or the linker ("extra_link_args")."""
    environment = {**os.environ, "FOCALNET_BUILD": "cpu"}
    command = [sys.executable, "-c", FLAGS_OF_THE_EXTENSION, name]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(said.stdout.splitlines()[-1])


@needs_extension
def test_headers_of_pybind11_itself_come_before_the_copy_that_torch_brings():
    """The copy of torch 2.10 and 2.11 rejects what is compiled for the stable ABI."""
    pybind11 = pytest.importorskip("pybind11")
    if os.name == "nt":
        pytest.skip("the compiler takes another flag")
    flags = flags_of_the_extension("extra_compile_args")
    assert flags[flags.index("-isystem") + 1] == pybind11.get_include()


STREAM_AND_ERROR = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("focalnet._C", sys.argv[1])
sys.modules["focalnet._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from focalnet.backends import extension
assert extension.missing() is None and sys.modules["focalnet._C"] is module
assert torch.ops.focalnet.cpu_l2_bytes() > 0
try:
    torch.ops.focalnet.cpu_set_isa("nonsense")
except RuntimeError as error:
    print(error)
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="the flag is for Linux's linkers")
def test_a_compiler_that_links_the_standard_library_statically_makes_an_extension_that_works(tmp_path):
    """A stream and an exception: both went to two copies of libstdc++ at once, and crashed."""
    objects = [str(path) for path in (ROOT / "build").glob(f"temp.*-{sys.implementation.cache_tag}/csrc/**/*.o")]
    if not objects or extension.recorded_build()["cuda"]["built"]:
        pytest.skip("the objects of a build in place, without CUDA, are not here")
    binary = str(tmp_path / f"_C{SUFFIX}")
    libraries = [f"-L{folder}" for folder in library_paths()]
    flags = flags_of_the_extension("extra_link_args")
    link = ["c++", "-shared", "-static-libstdc++", *objects, *libraries, "-ltorch_cpu", *flags, "-o", binary]
    subprocess.run(link, check=True, timeout=120)
    command = [sys.executable, "-c", STREAM_AND_ERROR, binary]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "unknown isa 'nonsense'" in ended.stdout


@needs_extension
def test_build_info():
    info = extension.build_info()
    assert info["torch_target_version"] == "2.10"
    assert info["cxx_standard"] >= 202002
    assert info["compiler"]
    assert info["built_with_torch"] == extension.recorded_build()["torch"]
    if platform.machine() in ("x86_64", "AMD64") and not os.environ.get("CXXFLAGS"):
        # One build for every machine: nothing beyond the architecture's baseline outside the kernels that ask first.
        assert info["baseline_instruction_sets"] == ["sse2"]


@needs_extension
def test_cpu_capabilities_have_every_name():
    capabilities = extension.cpu_capabilities()
    assert set(capabilities) == KEYS
    assert all(type(value) is bool for value in capabilities.values())


@needs_extension
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="compares with /proc/cpuinfo, which only Linux has")
def test_cpu_capabilities_match_the_kernels():
    flags = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    if "asimd" in flags:
        flags.add("neon")
    assert extension.cpu_capabilities() == {name: name in flags for name in KEYS}


def test_absent_without_a_record(package):
    assert ask(package) == [extension.why_absent(package), {}, {}]
    reason = extension.why_absent(package)
    assert "focalnet._C was not built: these sources were never built or installed" in reason
    assert "FOCALNET_BUILD=cpu pip install --no-build-isolation" in reason


def test_absent_with_the_recorded_reason(package):
    record(package, mode="auto", built=False, reason="no C++ compiler: CXX is 'x'")
    reason, info, capabilities = ask(package)
    assert "was not built: no C++ compiler: CXX is 'x'; to build it, run" in reason
    assert info == {} and capabilities == {}


def test_absent_although_built(package):
    record(package, mode="cpu", built=True, reason=None)
    assert "it was built, but its file is gone" in extension.why_absent(package)


def test_absent_with_an_unreadable_record(package):
    (package / "_build_info.json").write_text("{")
    assert f"{package / '_build_info.json'} cannot be read" in extension.why_absent(package)


def test_built_for_another_python(package):
    (package / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    reason = ask(package)[0]
    assert "was built for another Python: found _C.cpython-39-x86_64-linux-gnu.so" in reason
    assert f"this interpreter loads _C{SUFFIX}" in reason


@pytest.mark.parametrize("content", [b"", b"not a library" * 100])
def test_broken_binary_is_told_from_an_absent_one(package, content):
    (package / f"_C{SUFFIX}").write_bytes(content)
    record(package, mode="cpu", built=True, reason=None, torch="2.10.0")
    reason, info, capabilities = ask(package)
    assert "focalnet._C was built but does not load (built with torch 2.10.0, running torch" in reason
    assert f"_C{SUFFIX}: " in reason, "the loader's own words"
    assert "to build it anew, run" in reason
    assert info == {} and capabilities == {}


@needs_extension
def test_whole_binary_in_another_package(package):
    (package.parent / "torch.py").unlink()
    shutil.copy(sys.modules["focalnet._C"].__file__, package)
    reason, info, capabilities = ask(package)
    assert reason is None
    assert info == extension.build_info()
    assert capabilities == extension.cpu_capabilities()
