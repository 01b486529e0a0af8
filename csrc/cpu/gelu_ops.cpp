// The operators focalnet::cpu_bias_gelu_ and focalnet::cpu_gelu_backward_: they check the arguments and share the rows
// among the threads. The arithmetic is in gelu_rows.inc. No result depends on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "gated_aggregation.h"
#include "gelu_rows.h"
#include "isa.h"

namespace focalnet::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements worth starting a thread for: some ten microseconds of work.
constexpr int64_t kGrain = 8192;

float* matrix(const char* name, const Tensor& t, const Tensor& like) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, name,
                    " is not a float32 tensor on the CPU, which is expected");
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.is_contiguous(), name,
                    " is no contiguous matrix of the size of fc1, which is expected");
    return static_cast<float*>(t.mutable_data_ptr());
}

void by_rows(const GeluTask& task, void (*kernel)(const GeluTask&)) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, task.columns));
    torch::stable::parallel_for(0, task.rows, grain, [&](int64_t begin, int64_t end) {
        GeluTask part = task;
        part.fc1 += begin * task.columns;
        part.act += begin * task.columns;
        if (part.dact != nullptr) part.dact += begin * task.columns;
        part.rows = end - begin;
        kernel(part);
    });
}

void cpu_bias_gelu_(Tensor fc1, std::optional<Tensor> bias, Tensor act) {
    STD_TORCH_CHECK(fc1.dim() == 2, "fc1 has ", fc1.dim(), " dimensions; expected 2, (tokens, hidden units)");
    GeluTask task{};
    task.fc1 = matrix("fc1", fc1, fc1);
    task.act = matrix("act", act, fc1);
    task.rows = fc1.size(0);
    task.columns = fc1.size(1);
    std::optional<Tensor> contiguous;
    if (bias.has_value()) {
        STD_TORCH_CHECK(bias->is_cpu() && bias->scalar_type() == ScalarType::Float && bias->dim() == 1 &&
                            bias->size(0) == task.columns,
                        "bias is no float32 vector on the CPU of one value for each of the ", task.columns,
                        " columns of fc1, which is expected");
        contiguous = torch::stable::contiguous(*bias);
        task.bias = static_cast<const float*>(contiguous->const_data_ptr());
    }
    by_rows(task, current_kernels().bias_gelu);
}

void cpu_gelu_backward_(Tensor dact, Tensor fc1, Tensor act) {
    STD_TORCH_CHECK(fc1.dim() == 2, "fc1 has ", fc1.dim(), " dimensions; expected 2, (tokens, hidden units)");
    GeluTask task{};
    task.fc1 = matrix("fc1", fc1, fc1);
    task.act = matrix("act", act, fc1);
    task.dact = matrix("dact", dact, fc1);
    task.rows = fc1.size(0);
    task.columns = fc1.size(1);
    by_rows(task, current_kernels().gelu_backward);
}

}  // namespace
}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def("cpu_bias_gelu_(Tensor(a!) fc1, Tensor? bias, Tensor(b!) act) -> ()");
    m.def("cpu_gelu_backward_(Tensor(a!) dact, Tensor fc1, Tensor(b!) act) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) {
    m.impl("cpu_bias_gelu_", TORCH_BOX(&focalnet::cpu::cpu_bias_gelu_));
    m.impl("cpu_gelu_backward_", TORCH_BOX(&focalnet::cpu::cpu_gelu_backward_));
}
