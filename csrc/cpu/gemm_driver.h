// How a product is laid out in memory, cut along k, and shared among threads. For drivers only: kernels must
// not include it, see gated_aggregation.h.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "block.h"
#include "gated_aggregation.h"
#include "scratch.h"
#include "work_sharing.h"

namespace focalnet::cpu {

constexpr int64_t kLeastRows = 66;      // that a block of tokens needs to pay for streaming the weights
constexpr int64_t kWideRows = 96;       // a block of fewer hardly pays for it
constexpr int64_t kMostTogether = 512;  // tokens; beyond, what passes through L3 outweighs the weights
constexpr int64_t kRowUnit = 6;         // rows of a block are a multiple of: whole tiles, see gemm.inc
constexpr int64_t kPanelsAtATime = 8;   // that a thread packs before it asks for more
constexpr int64_t kLeastUnits = 4;      // of the last blocks, which are low so that the threads end together

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// An odd number of cache lines: rows of a tile at a power of two from each other would share one set of the L1.
inline int64_t pitch_of(int64_t columns) { return (ceil_div(columns, kPanel) | 1) * kPanel; }

// k of the blocks a product is summed in: nearly equal ones, whole panels of the layer before.
inline int64_t k_block(int64_t K) { return round_up(ceil_div(K, ceil_div(K, kDepth)), kPanel); }

inline int64_t packed_floats(const Linear& w) { return ceil_div(w.N, kPanel) * (1 + w.K) * kPanel; }

// Packs linear layers into `memory`, which keeps them until it is asked for the next.
template <size_t N>
void pack(const Kernels& kernels, Linear* const (&layers)[N], Memory& memory) {
    int64_t floats = 0;
    for (const Linear* layer : layers) floats += packed_floats(*layer);
    float* to = memory.get(floats);
    for (Linear* layer : layers) {
        layer->packed = to;
        share_ranges(ceil_div(layer->N, kPanel), 1, kPanelsAtATime, [&](auto next) {
            for (Range panels = next(); !panels.empty(); panels = next())
                for (int64_t p = panels.begin; p < panels.end; ++p)
                    kernels.pack(*layer, p * kPanel, to + p * (1 + layer->K) * kPanel);
        });
        to += packed_floats(*layer);
    }
}

// Whether all threads share the products of so many tokens, each streaming its part of the weights, instead of taking
// blocks of tokens that fit into their scratch: blocks are few then, or too low.
inline bool by_columns(int64_t tokens, int64_t rows_in_scratch) {
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    return tokens < kLeastRows * threads || (rows_in_scratch < kWideRows && tokens <= kMostTogether);
}

// Rows of a block of tokens at most: what fits into a thread's scratch, or pays for streaming the weights.
inline int64_t rows_of_block(int64_t rows_in_scratch) {
    return std::max(kLeastRows, rows_in_scratch) / kRowUnit * kRowUnit;
}

// Calls `step(first, n)` for blocks of n tokens that together are all; n is at most `rows`, of rows_of_block.
template <typename Step>
void share_tokens(int64_t tokens, int64_t rows, const Step& step) {
    share_ranges(ceil_div(tokens, kRowUnit), kLeastUnits, rows / kRowUnit, [&](auto next) {
        for (Range block = next(); !block.empty(); block = next()) {
            const int64_t first = block.begin * kRowUnit;
            step(first, std::min(tokens, block.end * kRowUnit) - first);
        }
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
        // Where rows are cut, threads outnumber the panels: each range is one panel then, so none reaches into another
        // part of the rows.
        share_ranges(parts * panels, 1, panels, [&](auto next) {
            for (Range range = next(); !range.empty(); range = next()) {
                const int64_t i = range.begin / panels;
                kernels.gemm(part(task, {i * task.rows / parts, (i + 1) * task.rows / parts},
                                  {range.begin - i * panels, range.end - i * panels}));
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

  private:
    static GemmTask part(GemmTask task, Range rows, Range panels) {
        task.a += rows.begin * task.a_pitch;
        task.c += rows.begin * task.c_pitch + panels.begin * kPanel;
        if (task.factor != nullptr) task.factor += rows.begin * task.factor_pitch + panels.begin * kPanel;
        task.rows = rows.end - rows.begin;
        task.column_end = task.column_begin + panels.end * kPanel;
        task.column_begin += panels.begin * kPanel;
        return task;
    }
};

}  // namespace focalnet::cpu
