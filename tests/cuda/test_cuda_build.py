"""Building the extension with its CUDA kernels: what is refused and in which words, what is left when it fails, and,
where there is nvcc, that the result loads on a machine without CUDA.
"""

import concurrent.futures
import re
import shutil
import stat
import sys
from pathlib import Path

import ptxas
import pytest
import torch
from builds import (
    COMPILERS,
    ROOT,
    SUFFIX,
    Python,
    copy_few_sources,
    environment,
    packages,  # noqa: F401
    python,  # noqa: F401
    quick_compiler,  # noqa: F401
    run,
    sources,  # noqa: F401
    wheel_info,
)
from kernel_names import names, written
from nvcc import FLAGS, code

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMPILERS, reason="needs a C++ compiler: none of c++, g++, clang++ is on PATH"),
]

WHEEL_LIMIT = 20 * 2**20  # bytes
UNSUPPORTED = "crt/host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 9"


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit whose nvcc is a script: it answers questions, and compiles nothing."""

    def make(release="13.0"):
        program = tmp_path / "toolkit" / "bin" / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text(
            "#!/bin/sh\n"
            'case "$*" in\n'
            f'*--version*) echo "Cuda compilation tools, release {release}, V{release}.1" ;;\n'
            "*--list-gpu-arch*) echo compute_80; echo compute_90 ;;\n"
            """*--dryrun*) echo '#$ LIBRARIES=  "-L/nowhere"' ;;\n"""
            f'*) echo "{UNSUPPORTED}" >&2; exit 1 ;;\n'
            "esac\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return str(program.parent.parent)

    return make


class Rebuilt:
    """Sources that one Python builds again and again: a build finds the objects that the one before has left."""

    def __init__(self, folder, packages, compiler):
        self.sources, self.python = copy_few_sources(folder / "sources"), Python(folder / "venv", packages)
        self.compiler = compiler

    def wheel_and_log(self, **changes):
        return self.python.wheel_and_log(self.sources, environment(CXX=self.compiler, **changes))


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory, packages, quick_compiler):
    return Rebuilt(tmp_path_factory.mktemp("rebuilt"), packages, quick_compiler)


def torch_of_cuda(folder, version):
    """For PYTHONPATH: makes the installed torch say that it was built with that CUDA."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import torch\n\ntorch.version.cuda = {version!r}\n")
    return str(folder)


def path_without_nvcc(folder):
    folder.mkdir()
    for name in ("ninja", COMPILERS[0]):
        (folder / name).symlink_to(shutil.which(name, path=environment()["PATH"]))
    return str(folder)


def refusal(sources, **changes):
    """What setup.py prints when FOCALNET_BUILD=cuda cannot be done."""
    env = environment(FOCALNET_BUILD="cuda", **changes)
    output = run(sys.executable, "setup.py", "build", cwd=sources, env=env, fails=True)
    assert "FOCALNET_BUILD=cuda, but the CUDA kernels cannot be built: " in output
    assert "Traceback" not in output
    assert not list(sources.glob("build/lib*/focalnet/*.so"))
    return output


def test_without_nvcc(sources, tmp_path):
    output = refusal(sources, PATH=path_without_nvcc(tmp_path / "bin"))
    assert "no nvcc: it is not on PATH, and CUDA_HOME is not set; install the CUDA toolkit" in output


def test_cuda_home_without_nvcc(sources, tmp_path):
    output = refusal(sources, CUDA_HOME=str(tmp_path))
    assert f"CUDA_HOME is {str(tmp_path)!r}, which has no bin/nvcc; set it to a CUDA toolkit" in output


def test_toolkit_that_is_too_old(sources, toolkit):
    assert "is of CUDA 11.8; expected 12.0 or later" in refusal(sources, CUDA_HOME=toolkit("11.8"))


def test_toolkit_of_another_major_version_than_torchs(sources, toolkit, tmp_path):
    torch_12 = torch_of_cuda(tmp_path / "site", "12.8")
    output = refusal(sources, CUDA_HOME=toolkit("13.0"), PYTHONPATH=torch_12)
    assert "is of CUDA 13.0, but torch was built with CUDA 12.8; set CUDA_HOME to a toolkit of CUDA 12" in output


def test_architecture_that_nvcc_does_not_know(sources, toolkit):
    output = refusal(sources, CUDA_HOME=toolkit(), TORCH_CUDA_ARCH_LIST="7.0")
    assert "TORCH_CUDA_ARCH_LIST is '7.0'" in output and "it knows 8.0, 9.0" in output


def test_host_compiler_that_nvcc_does_not_take(sources, toolkit):
    output = refusal(sources, CUDA_HOME=toolkit())
    assert "unsupported GNU version" in output and "set NVCC_CCBIN to a host compiler that this nvcc takes" in output


def test_auto_installs_without_the_kernels_and_keeps_the_reason(rebuilt, toolkit, python, tmp_path):
    torch_13 = torch_of_cuda(tmp_path / "site", "13.0")
    wheel, _ = rebuilt.wheel_and_log(CUDA_HOME=toolkit(), PYTHONPATH=torch_13)
    info = wheel_info(wheel)
    assert info["built"] and not info["cuda"]["built"]
    assert "unsupported GNU version" in info["cuda"]["reason"]
    python.pip("install", wheel)
    missing, cuda_missing = python.run("""
        from focalnet.backends import extension
        print(extension.missing())
        print(extension.cuda_missing())
    """).splitlines()
    assert missing == "None"
    assert "has no CUDA kernels: compiling failed: " in cuda_missing and "unsupported GNU version" in cuda_missing
    assert "FOCALNET_BUILD=cuda pip install" in cuda_missing


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA: auto builds the kernels")
def test_auto_leaves_the_kernels_out_where_torch_has_no_cuda(rebuilt, toolkit):
    wheel, _ = rebuilt.wheel_and_log(CUDA_HOME=toolkit())
    info = wheel_info(wheel)
    assert info["built"]
    assert info["cuda"] == {
        "built": False,
        "reason": f"torch {torch.__version__} was built without CUDA (FOCALNET_BUILD=cuda builds them all the same)",
    }


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def hurry():
    """The option that makes nvcc take a quarter of its time, where it knows it."""
    return "-Ofc=max" if "--Ofast-compile" in run("nvcc", "--help", cwd=ROOT) else ""


@needs_nvcc
def test_wheel_with_kernels_loads_without_cuda(rebuilt, python):
    """The code of its kernels is not that of a user's wheel, which test_registers.py compiles with the same flags."""
    flags = {"TORCH_CUDA_ARCH_LIST": "9.0+PTX", "NVCC_APPEND_FLAGS": f"-Xptxas=-v {hurry()}", "CUDA_HOME": None}
    wheel, log = rebuilt.wheel_and_log(FOCALNET_BUILD="cuda", **flags)
    assert wheel_info(wheel)["cuda"]["architectures"] == ["sm_90", "compute_90"]
    # No smaller than if a user's code were there beside this.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        folders = pool.map(lambda source: code(source, 90), ptxas.SOURCES)
        theirs = sum((folder / "code.cubin").stat().st_size for folder in folders)
    assert wheel.stat().st_size + theirs < WHEEL_LIMIT

    lines = [line for line in log.splitlines() if re.search(r"\bnvcc\b.*\.cu\b", line)]
    assert len(lines) == len(ptxas.SOURCES)
    for line in lines:
        decisive = re.findall(r"\s(-O\S+|-std\S+|-Xptxas\S*|-Xcicc\S*|-+maxrregcount\S*)", line)
        assert [*decisive, "-Xptxas=-v"] == list(FLAGS)
    assert names(ptxas.kernels(log)) == set().union(*map(written, ptxas.SOURCES))

    python.pip("install", wheel)
    facts = python.run("""
        import torch, focalnet
        from focalnet.backends import extension
        print(extension.__file__)
        print(extension.cuda_missing())
        print(torch.ops.focalnet.cuda_gated_aggregation.default._schema.name)
        print(focalnet.backends()["cuda"])
    """).splitlines()
    assert Path(facts[0]).parents[1] == python.site / "focalnet"
    assert (python.site / "focalnet" / f"_C{SUFFIX}").exists()
    assert facts[1:3] == ["None", "focalnet::cuda_gated_aggregation"]
    if torch.version.cuda is None:
        assert facts[3] == f"torch {torch.__version__} was built without CUDA"
