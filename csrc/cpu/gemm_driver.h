// How a product is laid out in memory, cut along k, and shared among threads. For drivers only: kernels must
// not include it, see gated_aggregation.h.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "block.h"
#include "gated_aggregation.h"
#include "isa.h"
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

// k of the blocks a product is summed in: nearly equal ones, whole panels of the layer before.
inline int64_t k_block(int64_t K, int64_t depth) { return round_up(ceil_div(K, ceil_div(K, depth)), kPanel); }

inline int64_t size_of(Element element) { return element == Element::kBFloat16 ? 2 : 4; }

// An odd number of cache lines: rows of a tile at a power of two from each other would share one set of the L1.
inline int64_t pitch_of(int64_t columns, Element element) {
    const int64_t line = static_cast<int64_t>(kLineBytes) / size_of(element);
    return (ceil_div(columns, line) | 1) * line;
}

// Bytes of a row of so many columns.
inline int64_t pitch_bytes(int64_t columns, Element element) { return pitch_of(columns, element) * size_of(element); }

// The rows from one on.
inline Matrix rows_from(Matrix m, int64_t row) {
    if (m.data != nullptr) m.data = static_cast<char*>(m.data) + row * m.pitch * size_of(m.element);
    return m;
}

// The columns from one on.
inline Matrix columns_from(Matrix m, int64_t column) {
    if (m.data != nullptr) m.data = static_cast<char*>(m.data) + column * size_of(m.element);
    return m;
}

// a times all of w, to c.
inline GemmTask product(const Products& products, const Linear& w, Matrix a, int64_t rows, Matrix c) {
    const int64_t columns = round_up(w.N, kPanel), block = k_block(w.K, products.depth);
    return {a, rows, w, 0, w.K, block, 0, columns, c, false, After::kNothing, Matrix{}};
}

inline int64_t panel_floats(const Products& products, const Linear& w) {
    return (products.header + ceil_div(w.K, products.words_of_k)) * kPanel;
}

inline int64_t packed_floats(const Products& products, const Linear& w) {
    return ceil_div(w.N, kPanel) * panel_floats(products, w);
}

// Packs linear layers into `memory`, which keeps them until it is asked for the next.
template <size_t N>
void pack(Threads who, const Products& products, Linear* const (&layers)[N], Memory& memory) {
    int64_t floats = 0;
    for (const Linear* layer : layers) floats += packed_floats(products, *layer);
    float* to = memory.get(floats);
    for (Linear* layer : layers) {
        layer->packed = to;
        share_ranges(who, ceil_div(layer->N, kPanel), 1, kPanelsAtATime, [&](auto next) {
            for (Range panels = next(); !panels.empty(); panels = next())
                for (int64_t p = panels.begin; p < panels.end; ++p)
                    products.pack(*layer, p * kPanel, to + p * panel_floats(products, *layer));
        });
        to += packed_floats(products, *layer);
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
void share_tokens(Threads who, int64_t tokens, int64_t rows, const Step& step) {
    share_ranges(who, ceil_div(tokens, kRowUnit), kLeastUnits, rows / kRowUnit, [&](auto next) {
        for (Range block = next(); !block.empty(); block = next()) {
            const int64_t first = block.begin * kRowUnit;
            step(first, std::min(tokens, block.end * kRowUnit) - first);
        }
    });
}

// One thread does a step, for its block of tokens.
struct Alone {
    Products products;
    void gemm(const GemmTask& task) const { products.gemm(task); }
    void rows(const RowsTask& task) const { current_kernels().normalize_and_add(task); }
};

// All threads share a step: a product by columns (and rows, where threads outnumber the panels), the rest by rows.
struct Together {
    Products products;
    Threads who;

    void gemm(const GemmTask& task) const {
        const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
        const int64_t panels = (task.column_end - task.column_begin) / kPanel;
        const int64_t parts = std::min(task.rows, ceil_div(threads, panels));
        // Where rows are cut, threads outnumber the panels: each range is one panel then, so none reaches into another
        // part of the rows.
        share_ranges(who, parts * panels, 1, panels, [&](auto next) {
            for (Range range = next(); !range.empty(); range = next()) {
                const int64_t i = range.begin / panels;
                products.gemm(part(task, {i * task.rows / parts, (i + 1) * task.rows / parts},
                                   {range.begin - i * panels, range.end - i * panels}));
            }
        });
    }

    void rows(const RowsTask& task) const {
        share_rows(who, task.rows, 16, [&](int64_t begin, int64_t end) {
            RowsTask part = task;
            part.in = rows_from(task.in, begin);
            part.residual = rows_from(task.residual, begin);
            part.out = rows_from(task.out, begin);
            part.rows = end - begin;
            current_kernels().normalize_and_add(part);
        });
    }

  private:
    static GemmTask part(GemmTask task, Range rows, Range panels) {
        task.a = rows_from(task.a, rows.begin);
        task.c = columns_from(rows_from(task.c, rows.begin), panels.begin * kPanel);
        task.factor = columns_from(rows_from(task.factor, rows.begin), panels.begin * kPanel);
        task.rows = rows.end - rows.begin;
        task.column_end = task.column_begin + panels.end * kPanel;
        task.column_begin += panels.begin * kPanel;
        return task;
    }
};

}  // namespace focalnet::cpu
