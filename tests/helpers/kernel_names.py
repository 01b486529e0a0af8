"""The names of CUDA kernels, without template arguments: those that ptxas reports, and those that a source defines."""

import re


def names(reported):
    return {re.sub("<.*", "", kernel["kernel"]) for kernel in reported}


def written(source):
    return set(re.findall(r"(\w+_kernel)\(", source.read_text()))
