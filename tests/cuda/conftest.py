"""The kernels of csrc/cuda as a program for the CPU, compiled once for all files."""

import pytest
from cuda_program import compile_sources


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return compile_sources(tmp_path_factory.mktemp("cuda"))
