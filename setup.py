"""Builds focalnet: the Python packages and, if possible, the extension focalnet._C from csrc/.

FOCALNET_BUILD selects what to build:

    auto    (default) the extension, with the CUDA kernels if torch has CUDA and nvcc is found; a part that cannot be
            built is left out and the reason recorded
    cpu     the extension without CUDA; fail if it cannot be built
    cuda    the extension with the CUDA kernels, for any installed torch; fail if they cannot be built
    none    pure Python

CUDA_HOME is the folder of the CUDA toolkit (by default nvcc is found on PATH), NVCC_CCBIN the host compiler of nvcc,
TORCH_CUDA_ARCH_LIST the target GPUs ("8.0;9.0+PTX"), MAX_JOBS the number of parallel compilers.

The result, with reasons for parts that were not built, is written to focalnet/_build_info.json, which
focalnet.backends.extension reads.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# huggingface's package `kernels` hooks into setuptools. With this folder on sys.path (`python setup.py ...`) its
# import would find our folder of the same name, and every build would fail.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("FOCALNET_BUILD", "").strip().lower() or "auto"
BUILD_INFO = "_build_info.json"

# The extension is compiled for the stable ABI of this torch version. The binary also runs on every later version.
MIN_TORCH = (2, 10)
TORCH_TARGET_VERSION = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"

# Compute capabilities that get machine code if the toolkit supports them. Later GPUs run the PTX of the newest one.
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
MIN_CUDA = 12  # the first whose nvcc reads C++20

# Commands that only describe or pack the sources. They do not need torch, and importing it takes seconds.
DESCRIBING = {"sdist", "egg_info", "dist_info", "clean", "--version", "--name", "--help"}


class CannotBuild(Exception):
    """The extension cannot be built. The text is the reason, written for users."""


def check_mode() -> None:
    if MODE not in MODES:
        raise SystemExit(f"focalnet: FOCALNET_BUILD is {MODE!r}, expected one of {', '.join(MODES)}")
    if MODE == "cuda" and not cuda_sources():
        raise SystemExit(
            "focalnet: FOCALNET_BUILD=cuda, but this version has no CUDA sources (no .cu file in csrc/cuda); "
            "use FOCALNET_BUILD=auto, cpu or none"
        )


def cuda_sources() -> list[str]:
    """The sources that nvcc compiles: the kernels, and host code that includes CUDA's headers."""
    kernels = sorted(ROOT.glob("csrc/cuda/*.cu"))
    return [
        path.relative_to(ROOT).as_posix() for path in kernels and [*kernels, *sorted(ROOT.glob("csrc/cuda/*.cpp"))]
    ]


def cpu_sources() -> list[str]:
    sources = [*sorted(ROOT.glob("csrc/*.cpp")), *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    return [path.relative_to(ROOT).as_posix() for path in sources]


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
    if version < MIN_TORCH:
        oldest = ".".join(map(str, MIN_TORCH))
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


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit that can compile the kernels: nvcc, its release, the -gencode flags, the libraries' folders."""

    nvcc: str
    release: str
    gencode: tuple[str, ...]
    library_dirs: tuple[str, ...]

    @property
    def architectures(self) -> list[str]:
        return [re.sub(r".*code=", "", flag) for flag in self.gencode]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if found is None:
            raise CannotBuild(
                f"no nvcc: CUDA_HOME is {home!r}, which has no bin/nvcc; set it to a CUDA toolkit, or unset it to "
                "use the nvcc on PATH"
            )
        return found
    found = shutil.which("nvcc")
    if found is None:
        raise CannotBuild(
            "no nvcc: it is not on PATH, and CUDA_HOME is not set; install the CUDA toolkit of torch's CUDA version, "
            "or set CUDA_HOME to where it is"
        )
    return found


def ask_nvcc(nvcc: str, *arguments: str) -> str:
    """The output of nvcc, stdout and stderr together. Raises CannotBuild if it fails."""
    try:
        result = subprocess.run(
            [nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "output", None) or str(error)).strip().splitlines()
        raise CannotBuild(f"{nvcc} {' '.join(arguments)} failed: {said[-1] if said else error}") from error
    return result.stdout


def gencode_flags(known: set[int], wanted: str | None) -> tuple[str, ...]:
    """nvcc's flags for the GPUs in ``wanted`` ("8.0;9.0+PTX"), by default those of CUDA_ARCHITECTURES in ``known``."""
    if wanted:
        pairs = re.findall(r"(\d+)\.(\d+)a?(\+PTX)?", wanted)
        chosen = [(int(major + minor), bool(ptx)) for major, minor, ptx in pairs]
        unknown = [number for number, _ in chosen if number not in known]
        if not chosen or unknown:
            raise CannotBuild(
                f"TORCH_CUDA_ARCH_LIST is {wanted!r}; expected compute capabilities that this nvcc knows, such as "
                f"'8.0;9.0+PTX' (it knows {', '.join(f'{n // 10}.{n % 10}' for n in sorted(known))})"
            )
    else:
        chosen = [(number, False) for number in CUDA_ARCHITECTURES if number in known]
        chosen[-1] = (chosen[-1][0], True)
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number, _ in chosen]
    return (*flags, *(f"-gencode=arch=compute_{number},code=compute_{number}" for number, ptx in chosen if ptx))


def find_cuda(torch_cuda: str | None) -> Cuda:
    """The toolkit for a torch built with CUDA ``torch_cuda`` (None: without CUDA). Raises CannotBuild if none fits."""
    nvcc = find_nvcc()
    match = re.search(r"release (\d+)\.(\d+)", ask_nvcc(nvcc, "--version"))
    if match is None:
        raise CannotBuild(f"{nvcc} --version names no release; expected the nvcc of a CUDA toolkit")
    release, major = ".".join(match.groups()), int(match[1])
    if major < MIN_CUDA:
        raise CannotBuild(f"{nvcc} is of CUDA {release}; expected {MIN_CUDA}.0 or later")
    if torch_cuda is not None and int(torch_cuda.split(".")[0]) != major:
        raise CannotBuild(
            f"{nvcc} is of CUDA {release}, but torch was built with CUDA {torch_cuda}; set CUDA_HOME to a toolkit of "
            f"CUDA {torch_cuda.split('.')[0]}, or install a torch built with CUDA {major}"
        )
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", ask_nvcc(nvcc, "--list-gpu-arch"))}
    gencode = gencode_flags(known, os.environ.get("TORCH_CUDA_ARCH_LIST"))
    # Ask nvcc for the folders of its libraries: they differ between toolkits of NVIDIA, distributions and conda.
    libraries = re.search(r"LIBRARIES=(.*)", ask_nvcc(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull))
    folders = tuple(re.findall(r'"-L([^"]+)"', libraries[1])) if libraries else ()
    return Cuda(nvcc, release, gencode, folders)


def plan_cuda() -> tuple[Cuda | None, str | None]:
    """The toolkit to build with, or the reason why the kernels are left out. Fails if they were requested."""
    import torch

    if MODE == "cpu":
        return None, "built with FOCALNET_BUILD=cpu"
    if MODE == "auto" and torch.version.cuda is None:
        return None, f"torch {torch.__version__} was built without CUDA (FOCALNET_BUILD=cuda builds them all the same)"
    try:
        return find_cuda(torch.version.cuda), None
    except CannotBuild as error:
        return None, give_up(str(error), "the CUDA kernels")


def plan() -> tuple[list[Extension], type[build_ext], dict[str, object]]:
    """Decide what to build. Returns the extensions, the command that builds them and the facts to record."""
    info: dict[str, object] = {"mode": MODE, "built": False, "reason": None, "torch": None, "compiler": None}
    info["cuda"] = {"built": False, "reason": None}
    if MODE == "none":
        return [], build_ext, info | {"reason": "built with FOCALNET_BUILD=none"}
    if DESCRIBING & set(sys.argv):
        return [], build_ext, info
    try:
        compiler = find_compiler()
        info["compiler"] = compiler_version(compiler)
        info["torch"] = import_torch()
        pybind11_headers = import_pybind11()
    except CannotBuild as error:
        return [], build_ext, info | {"reason": give_up(str(error))}

    # Both torch's ninja file and setuptools' linker command read CXX, and must use the same compiler.
    os.environ["CXX"] = compiler
    # If pip runs as .venv/bin/pip without an activated environment, the environment's ninja is not on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cuda, reason = plan_cuda()
    info["cuda"] = {"built": False, "reason": reason}
    return [extension(str(info["torch"]), pybind11_headers)], build_command(cuda), info | {"built": True}


def give_up(reason: str, what: str = "the extension") -> str:
    """Fail if FOCALNET_BUILD requires ``what``, else print a warning. Returns the reason."""
    if MODE != "auto":
        raise SystemExit(f"focalnet: FOCALNET_BUILD={MODE}, but {what} cannot be built: {reason}")
    print(f"focalnet: WARNING: installing without {what}: {reason}", file=sys.stderr)
    return reason


def compile_cuda(cuda: Cuda, folder: Path, torch_version: str) -> list[str]:
    """Compile csrc/cuda into objects in ``folder``, except those that are up to date. Raises CannotBuild."""
    from torch.utils.cpp_extension import include_paths

    folder.mkdir(parents=True, exist_ok=True)
    command = [cuda.nvcc, "-c", "-O3", "-std=c++20", f"-I{ROOT / 'csrc'}"]
    compiler = os.environ["CXX"]
    if os.name != "nt":
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
        if not os.environ.get("NVCC_CCBIN") and len(shlex.split(compiler)) == 1:
            command += [f"-ccbin={compiler}"]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    # Compile sources in parallel, and also the architectures of each, because the longest source is half of the work.
    kernels = [*cuda.gencode, "-Xfatbin=-compress-all", f"--threads={jobs}"]
    host = [flag for path in include_paths() for flag in ("-isystem", path)]
    host += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    state = hashlib.sha256(f"{cuda} {torch_version}".encode())
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        state.update(path.read_bytes())

    def compile_one(source: str) -> str:
        target = folder / (Path(source).name + ".o")
        line = [*command, *(kernels if source.endswith(".cu") else host), str(ROOT / source), "-o", str(target)]
        key = f"{state.hexdigest()} {shlex.join(line)}"
        record = target.with_suffix(".key")
        if target.exists() and record.exists() and record.read_text() == key:
            return str(target)
        # In one piece with its end of line: sources compile side by side.
        print(shlex.join(line) + "\n", end="", flush=True)
        result = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(result.stdout, end="", flush=True)
        if result.returncode != 0:
            reason = first_error(result.stdout) or f"nvcc returned {result.returncode}"
            if re.search(r"unsupported .*(version|compiler)", result.stdout):
                reason += "; set NVCC_CCBIN to a host compiler that this nvcc takes, such as an older g++"
            raise CannotBuild(reason)
        record.write_text(key)
        return str(target)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, cuda_sources()))


def import_pybind11() -> str:
    """The folder of pybind11's headers. Raises CannotBuild if it is not installed."""
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuild(f"{error}; install pybind11") from error
    return pybind11.get_include()


def extension(torch_version: str, pybind11_headers: str) -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    defines = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        # ninja does not track system headers. This flag makes it recompile everything when torch changes.
        ("FOCALNET_BUILT_WITH_TORCH", f'"{torch_version}"'),
    ]
    # pybind11's own headers come first: the copy in torch 2.10 and 2.11 rejects code for the stable ABI.
    headers = [pybind11_headers, *include_paths()]
    link_flags = []
    if os.name == "nt":
        flags, include_dirs = ["/O2", "/std:c++20", "/W3"], headers
    else:
        flags = ["-O3", "-std=c++20", "-Wall", "-Wextra", "-fvisibility=hidden", "-g0"]
        # The binary must not depend on the path of the sources.
        flags += [f"-ffile-prefix-map={ROOT}{os.sep}="]
        # Treat the headers of others as system headers to silence their warnings.
        flags += [flag for path in headers for flag in ("-isystem", path)]
        include_dirs = []
        if sys.platform == "linux":
            # Some compilers link libstdc++ statically. Were its symbols visible, half of that copy would be replaced
            # by the one that the process has already, and the first stream or exception would crash.
            link_flags = ["-Wl,--exclude-libs,ALL"]
    # torch's CppExtension would link libtorch_python, whose ABI changes between versions.
    return Extension(
        "focalnet._C",
        cpu_sources(),
        depends=[path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("csrc/**/*.*"))],
        include_dirs=[str(ROOT / "csrc"), *include_dirs],
        define_macros=defines,
        library_dirs=library_paths(),
        libraries=["torch_cpu", "c10"] if os.name == "nt" else ["torch_cpu"],
        extra_compile_args=flags,
        extra_link_args=link_flags,
        language="c++",
    )


def build_command(cuda: Cuda | None) -> type[build_ext]:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            if self.inplace:
                # An editable install builds in a temporary folder. Keep the objects in another folder, so that a
                # change of one source does not recompile all of them.
                self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")
            reason = None
            if cuda is not None:
                self.add_cuda(cuda)
            with output_kept() as log:
                try:
                    super().run()
                except (Exception, SystemExit) as error:  # distutils ends some of its errors with SystemExit
                    reason = first_error(log.read_text(errors="replace")) or f"{type(error).__name__}: {error}"
            if reason is not None:
                self.leave_out(give_up(reason))
            self.get_finalized_command("build_py").write_build_info()

        def add_cuda(self, cuda: Cuda) -> None:
            (built,) = self.extensions
            try:
                objects = compile_cuda(cuda, Path(self.build_temp, "cuda"), str(INFO["torch"]))
            except CannotBuild as error:
                INFO["cuda"] = {"built": False, "reason": give_up(str(error), "the CUDA kernels")}
                return
            built.extra_objects += objects
            # Link the CUDA runtime statically, so that the extension loads on machines without CUDA and can report
            # what is missing.
            built.library_dirs += cuda.library_dirs
            built.libraries += ["cudart_static"] if os.name == "nt" else ["cudart_static", "dl", "rt", "pthread"]
            INFO["cuda"] = {
                "built": True,
                "reason": None,
                "release": cuda.release,
                "architectures": cuda.architectures,
            }

        def leave_out(self, reason: str) -> None:
            """Continue as a build of the pure package: no binary, no platform in the wheel's name."""
            self.extensions = []
            self.distribution.ext_modules = []
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True
            INFO.update(built=False, reason=reason, cuda={"built": False, "reason": reason})

    return Build


@contextlib.contextmanager
def output_kept() -> Iterator[Path]:
    """Capture the compiler's output, which goes to the file descriptors and bypasses Python's redirection."""
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
    """The first error message of the compiler or the linker in ``output``, or None."""
    for line in output.splitlines():
        if re.search(r"\berror\b ?[:A-Z]|^nvcc fatal|undefined reference|cannot find -l", line):
            return f"compiling failed: {line.strip().replace(str(ROOT) + os.sep, '')}"
    return None


def remove_binaries(package: Path) -> None:
    """Delete the extension of an earlier build, so that it is not taken for one of this build."""
    for pattern in ("_C.*.so", "_C.so", "_C*.pyd"):
        for path in package.glob(pattern):
            path.unlink()


class BuildPackage(build_py):
    """build_py that records facts about the build in the build folder, and in the sources for an editable install."""

    def run(self) -> None:
        if not self.editable_mode:
            # Files from an earlier build, such as deleted modules and binaries, would otherwise end up in the wheel.
            shutil.rmtree(Path(self.build_lib, "focalnet"), ignore_errors=True)
        super().run()
        if not self.distribution.has_ext_modules():
            self.write_build_info()  # otherwise build_ext writes it after the build

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
        "focalnet.backends",
        "focalnet.benchmark",
        "focalnet.checkpoints",
        "focalnet.cli",
        "focalnet.fusion",
        "focalnet.hub",
        "focalnet.kernels",
        "focalnet.models",
        "focalnet.operators",
        "focalnet.patching",
        "focalnet.pictures",
        "focalnet.pretrained",
        "focalnet.recipes",
        "focalnet.training",
    ],
    package_dir={"focalnet.kernels": "kernels", "focalnet.recipes": "recipes"},
    package_data={
        "focalnet": ["*.json", "py.typed"],
        "focalnet.checkpoints": ["*.tsv"],
        "focalnet.pretrained": ["*/*"],
        "focalnet.recipes": ["*.yaml", "accelerate/*.yaml"],
    },
    include_package_data=False,
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BUILD_EXT, "build_py": BuildPackage},
)
