// The operators focalnet::cuda_modulate and focalnet::cuda_modulate_bwd: argument checks, results and scratch. The
// kernels are in modulate.cu.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "arguments.h"
#include "modulate.h"
#include "operator.h"
#include "stream.h"

namespace focalnet::cuda {
namespace {

RowsProblem problem_of(const std::string& name, const Tensor& t) {
    STD_TORCH_CHECK(t.size(3) < (int64_t{1} << 31), name, " has shape ", shape_text(t),
                    "; expected fewer than 2^31 channels");
    const int64_t rows = t.size(3) == 0 ? 0 : t.size(0) * t.size(1) * t.size(2);
    return {element_of(name, t), rows, static_cast<int>(t.size(3)),
            attribute(cudaDevAttrMultiProcessorCount, t.get_device_index())};
}

void check_first(const std::string& name, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda(), name, " is not on a GPU; expected a CUDA tensor");
    check_map(name, t, t, name);
}

void check_same_shape(const std::string& name, const Tensor& t, const Tensor& like, const std::string& like_name) {
    check_map(name, t, like, like_name);
    STD_TORCH_CHECK(t.size(3) == like.size(3), name, " has shape ", shape_text(t), "; expected that of ", like_name,
                    ", ", shape_text(like));
}

// A map that the kernels read, copied if its rows do not lie at one pitch.
Tensor with_equal_rows(const Tensor& t) {
    const Tensor view = with_unit_channel_stride(t);
    return row_pitch(view) ? view : torch::stable::contiguous(view);
}

Rows rows_of(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), *row_pitch(t)}; }

// out = modulator * factor. `out` may be one of them.
void cuda_modulate(const Tensor& modulator, const Tensor& factor, const Tensor& out) {
    check_first("modulator", modulator);
    check_same_shape("factor", factor, modulator, "modulator");
    check_same_shape("out", out, modulator, "modulator");
    check_output_rows("out", out);
    const DeviceGuard guard(modulator.get_device_index());
    const RowsProblem problem = problem_of("modulator", modulator);
    const Tensor a = with_equal_rows(modulator), b = with_equal_rows(factor);
    check(modulate(problem, rows_of(a), rows_of(b), {out.mutable_data_ptr(), *row_pitch(out)},
                   current_stream(modulator.get_device_index())));
}

// dmodulator = dout * q, and its sum over all positions, (C,), or an empty tensor if that is not wanted.
std::tuple<Tensor, Tensor> cuda_modulate_bwd(const Tensor& dout, const Tensor& q, bool need_sum) {
    check_first("dout", dout);
    check_same_shape("q", q, dout, "dout");
    const DeviceGuard guard(dout.get_device_index());
    const RowsProblem problem = problem_of("dout", dout);
    const cudaStream_t stream = current_stream(dout.get_device_index());
    const Tensor a = with_equal_rows(dout), b = with_equal_rows(q);
    Tensor dmodulator = torch::stable::new_empty(dout, shape_of(dout));
    Tensor sum = torch::stable::new_empty(dout, {need_sum ? dout.size(3) : 0});
    const Rows out{dmodulator.mutable_data_ptr(), dout.size(3)};
    if (!need_sum) {
        check(modulate(problem, rows_of(a), rows_of(b), out, stream));
    } else if (problem.C > 0) {
        const Tensor scratch = scratch_of(dout, modulate_and_sum_scratch_bytes(problem));
        check(modulate_and_sum(problem, rows_of(a), rows_of(b), out, sum.mutable_data_ptr(),
                               scratch.mutable_data_ptr(), stream));
    }
    return {dmodulator, sum};
}

}  // namespace
}  // namespace focalnet::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def("cuda_modulate(Tensor modulator, Tensor factor, Tensor(a!) out) -> ()");
    m.def("cuda_modulate_bwd(Tensor dout, Tensor q, bool need_sum) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CUDA, m) {
    m.impl("cuda_modulate", TORCH_BOX(&focalnet::cuda::cuda_modulate));
    m.impl("cuda_modulate_bwd", TORCH_BOX(&focalnet::cuda::cuda_modulate_bwd));
}
