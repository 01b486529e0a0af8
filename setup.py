"""Builds focalnet: the Python packages, and focalnet._C from csrc/ where that is possible.

FOCALNET_BUILD says what is wanted:

    auto    (default) build the extension; if that cannot be done, install without it and record the reason
    cpu     build the extension; if that cannot be done, fail
    cuda    as cpu, with the CUDA sources (this version has none)
    none    pure Python

What was built, and if nothing was, why, goes to focalnet/_build_info.json, which focalnet.extension reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# With this folder on sys.path (`python setup.py ...`), `import kernels` finds our folder, and huggingface's package of
# that name, which hooks into setuptools, breaks every build.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("FOCALNET_BUILD", "").strip().lower() or "auto"
BUILD_INFO = "_build_info.json"

# The oldest torch whose stable ABI the extension is compiled for; the binary then runs on every later one.
OLDEST_TORCH = (2, 10)
TORCH_TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"

# Commands that only describe or pack the sources: importing torch for them would cost seconds and change nothing.
DESCRIBING = {"sdist", "egg_info", "dist_info", "clean", "--version", "--name", "--help"}


class CannotBuild(Exception):
    """The extension cannot be built; the text is the reason, fit to be shown to a user."""


def check_mode() -> None:
    if MODE not in MODES:
        raise SystemExit(f"focalnet: FOCALNET_BUILD is {MODE!r}, expected one of {', '.join(MODES)}")
    if MODE == "cuda" and not cuda_sources():
        raise SystemExit(
            "focalnet: FOCALNET_BUILD=cuda, but this version has no CUDA sources (no .cu file in csrc/cuda); "
            "use FOCALNET_BUILD=auto, cpu or none"
        )


def cuda_sources() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/*.cu"))


def cpu_sources() -> list[str]:
    return ["csrc/module.cpp", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/*.cpp"))]


def import_torch() -> str:
    """Returns torch's version, or raises CannotBuild."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise CannotBuild(f"torch could not be imported while building: {error}") from error
        raise CannotBuild(
            "torch was not importable while building (a build in isolation, pip's default, hides an installed torch; "
            "--no-build-isolation shows it)"
        ) from error
    except Exception as error:
        raise CannotBuild(f"torch could not be imported while building: {type(error).__name__}: {error}") from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise CannotBuild(f"torch {torch.__version__} is too old, expected {oldest} or later")
    return str(torch.__version__)


def find_compiler() -> str:
    """Returns the command that compiles C++, or raises CannotBuild."""
    if os.name == "nt":
        return os.environ.get("CXX", "cl")  # setuptools finds Visual Studio by itself
    wanted = os.environ.get("CXX")
    if wanted:
        if shutil.which(shlex.split(wanted)[0]) is None:
            raise CannotBuild(f"no C++ compiler: CXX is {wanted!r}, which is not a program that can be run")
        return wanted
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise CannotBuild("no C++ compiler: none of c++, g++, clang++ is on PATH, and CXX is not set")


def compiler_version(compiler: str) -> str:
    if os.name == "nt":
        return compiler
    result = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True, check=False)
    return (result.stdout.splitlines() or [compiler])[0].strip()


def plan() -> tuple[list[Extension], type[build_ext], dict[str, object]]:
    """Decides what to build: the extensions, the command that builds them and the facts to record."""
    info: dict[str, object] = {"mode": MODE, "built": False, "reason": None, "torch": None, "compiler": None}
    if MODE == "none":
        return [], build_ext, info | {"reason": "built with FOCALNET_BUILD=none"}
    if DESCRIBING & set(sys.argv):
        return [], build_ext, info
    try:
        compiler = find_compiler()
        info["compiler"] = compiler_version(compiler)
        info["torch"] = import_torch()
    except CannotBuild as error:
        return [], build_ext, info | {"reason": give_up(str(error))}

    # torch's ninja file and setuptools' linker line must name the same compiler; CXX is what both read.
    os.environ["CXX"] = compiler
    # pip run as .venv/bin/pip, without the environment activated, leaves the ninja beside it off PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return [extension(str(info["torch"]))], build_command(), info | {"built": True}


def give_up(reason: str) -> str:
    """An error where the extension was asked for, else a warning. Returns the reason."""
    if MODE != "auto":
        raise SystemExit(f"focalnet: FOCALNET_BUILD={MODE}, but the extension cannot be built: {reason}")
    print(f"focalnet: WARNING: installing without the compiled extension: {reason}", file=sys.stderr)
    return reason


def extension(torch_version: str) -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    defines = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        # In the flags so that ninja compiles everything again when torch changes: it does not follow system headers.
        ("FOCALNET_BUILT_WITH_TORCH", f'"{torch_version}"'),
    ]
    if os.name == "nt":
        flags, include_dirs = ["/O2", "/std:c++20", "/W3"], include_paths()
    else:
        flags = ["-O3", "-std=c++20", "-Wall", "-Wextra", "-fvisibility=hidden", "-g0"]
        # The same sources give the same binary, wherever they lie.
        flags += [f"-ffile-prefix-map={ROOT}{os.sep}="]
        # torch's headers, and the pybind11 among them, as system headers: their warnings are not ours.
        flags += [flag for path in include_paths() for flag in ("-isystem", path)]
        include_dirs = []
    # Not torch's CppExtension, which links libtorch_python: its ABI is the one that changes between versions.
    return Extension(
        "focalnet._C",
        cpu_sources(),
        depends=[path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("csrc/**/*.*"))],
        include_dirs=[str(ROOT / "csrc"), *include_dirs],
        define_macros=defines,
        library_dirs=library_paths(),
        libraries=["torch_cpu", "c10"] if os.name == "nt" else ["torch_cpu"],
        extra_compile_args=flags,
        language="c++",
    )


def build_command() -> type[build_ext]:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            if self.inplace:
                # An editable install builds in a folder that is thrown away: keep the objects, or each edit of one
                # source compiles all of them.
                self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")
            reason = None
            with output_kept() as log:
                try:
                    super().run()
                except (Exception, SystemExit) as error:  # distutils ends some of its errors with SystemExit
                    reason = first_error(log.read_text(errors="replace")) or f"{type(error).__name__}: {error}"
            if reason is not None:
                self.leave_out(give_up(reason))
            self.get_finalized_command("build_py").write_build_info()

        def leave_out(self, reason: str) -> None:
            """Makes this a build of the pure package: no binary, no platform in the wheel's name."""
            self.extensions = []
            self.distribution.ext_modules = []
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True
            INFO.update(built=False, reason=reason)

    return Build


@contextlib.contextmanager
def output_kept() -> Iterator[Path]:
    """Keeps what the compiler prints: it writes to the file descriptors, where Python's redirection does not reach."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    handle, name = tempfile.mkstemp(prefix="focalnet-build-", suffix=".log")
    try:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        yield Path(name)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(handle)
        print(Path(name).read_text(errors="replace"), flush=True)
        os.unlink(name)


def first_error(output: str) -> str | None:
    """The first line in which the compiler or the linker says what is wrong."""
    for line in output.splitlines():
        if re.search(r"\berror\b ?[:A-Z]|undefined reference|cannot find -l", line):
            return f"compiling failed: {line.strip().replace(str(ROOT) + os.sep, '')}"
    return None


def remove_binaries(package: Path) -> None:
    """An extension of an earlier build must not pass for the one that this build did not make."""
    for pattern in ("_C.*.so", "_C.so", "_C*.pyd"):
        for path in package.glob(pattern):
            path.unlink()


class BuildPackage(build_py):
    """build_py that records the build's facts: in the build folder; beside the sources too if they are installed."""

    def run(self) -> None:
        if not self.editable_mode:
            # A build folder that an earlier build left would put modules that are gone, and binaries, into the wheel.
            shutil.rmtree(Path(self.build_lib, "focalnet"), ignore_errors=True)
        super().run()
        if not self.distribution.has_ext_modules():
            self.write_build_info()  # otherwise build_ext does, when it knows how it ended

    def write_build_info(self) -> None:
        folders = [Path(self.build_lib, "focalnet")]
        if self.editable_mode:
            folders.append(ROOT / "focalnet")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / BUILD_INFO).write_text(json.dumps(INFO, indent=2, sort_keys=True) + "\n")
            if not INFO["built"]:
                remove_binaries(folder)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        mine = os.path.join(self.build_lib, "focalnet", BUILD_INFO)
        return [*(path for path in super().get_outputs(include_bytecode) if path != mine), mine]


check_mode()
EXTENSIONS, BUILD_EXT, INFO = plan()
setup(
    packages=[
        "focalnet",
        "focalnet.benchmark",
        "focalnet.checkpoints",
        "focalnet.cli",
        "focalnet.hub",
        "focalnet.kernels",
        "focalnet.patching",
    ],
    package_dir={"focalnet.kernels": "kernels"},
    package_data={"focalnet": ["*.json"]},
    include_package_data=False,
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BUILD_EXT, "build_py": BuildPackage},
)
