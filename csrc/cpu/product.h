// How a product is laid out in memory, cut along k, and shared among threads. For drivers only: kernels must
// not include it, see gated_aggregation.h.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "block.h"
#include "gated_aggregation.h"
#include "share.h"

namespace focalnet::cpu {

constexpr int64_t kSlices = 6;      // of a shared product for each thread
constexpr int64_t kLeastRows = 64;  // that a block of tokens needs to pay for streaming the weights

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// An odd number of cache lines: rows of a tile at a power of two from each other would share one set of the L1.
inline int64_t pitch_of(int64_t columns) { return (ceil_div(columns, kPanel) | 1) * kPanel; }

// k of the blocks a product is summed in: nearly equal ones, whole panels of the layer before.
inline int64_t k_block(int64_t K) { return round_up(ceil_div(K, ceil_div(K, kDepth)), kPanel); }

inline int64_t packed_floats(const Linear& w) { return ceil_div(w.N, kPanel) * (1 + w.K) * kPanel; }

// Packs all panels of `w` into `to`.
inline void pack(const Kernels& kernels, const Linear& w, float* to) {
    torch::stable::parallel_for(0, ceil_div(w.N, kPanel), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) kernels.pack(w, p * kPanel, to + p * (1 + w.K) * kPanel);
    });
}

// One thread does a step, for its block of tokens.
struct Alone {
    const Kernels& kernels;
    void gemm(const GemmTask& task) const { kernels.gemm(task); }
    void rows(const RowsTask& task) const { kernels.normalize_and_add(task); }
};

// All threads share a step: a product by columns (and rows, where threads outnumber the panels), the rest by rows.
struct Together {
    const Kernels& kernels;

    void gemm(const GemmTask& task) const {
        const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
        const int64_t panels = (task.column_end - task.column_begin) / kPanel;
        const int64_t parts = std::min(task.rows, ceil_div(threads, panels));
        // Slices of the columns: few enough that reading the rows again for each costs little.
        const int64_t slices = std::min(panels, kSlices * ceil_div(threads, std::max<int64_t>(1, parts)));
        share_out(parts * slices, [&](auto next) {
            for (int64_t i = next(); i < parts * slices; i = next()) {
                const int64_t row = i / slices * task.rows / parts, panel = i % slices * panels / slices;
                GemmTask part = task;
                part.rows = (i / slices + 1) * task.rows / parts - row;
                part.column_begin = task.column_begin + panel * kPanel;
                part.column_end = task.column_begin + (i % slices + 1) * panels / slices * kPanel;
                part.a += row * task.a_pitch;
                part.c += row * task.c_pitch + panel * kPanel;
                if (part.factor != nullptr) part.factor += row * task.factor_pitch + panel * kPanel;
                kernels.gemm(part);
            }
        });
    }

    void rows(const RowsTask& task) const {
        torch::stable::parallel_for(0, task.rows, 16, [&](int64_t begin, int64_t end) {
            RowsTask part = task;
            part.in += begin * task.in_pitch;
            if (part.residual != nullptr) part.residual += begin * task.residual_pitch;
            part.out += begin * task.out_pitch;
            part.rows = end - begin;
            kernels.normalize_and_add(part);
        });
    }
};

}  // namespace focalnet::cpu
