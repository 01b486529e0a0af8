"""The kernels of csrc/cuda as a program for the CPU, compiled once for all files, and calls of it."""

import pytest
from cuda_program import call, linked


@pytest.fixture(scope="session")
def program():
    return linked()


@pytest.fixture
def run(program, tmp_path):
    def run(*arguments, **options):
        return call(program, tmp_path, *arguments, **options)

    return run
