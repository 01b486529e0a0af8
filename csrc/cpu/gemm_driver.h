// How a product is laid out in memory, split along k, and shared among threads. For drivers only: kernels must not
// include it, see gated_aggregation.h.

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

// A block of fewer tokens is not worth streaming the weights for.
constexpr int64_t kLeastRows = 66;
// A block of fewer tokens is hardly worth streaming the weights for.
constexpr int64_t kWideRows = 96;
// Up to this many tokens, products by columns replace blocks of fewer than kWideRows tokens. Beyond it, passing the
// activations through L3 costs more than streaming the weights.
constexpr int64_t kMostTogether = 512;
// The rows of a block are a multiple of this, for whole tiles (gemm.inc).
constexpr int64_t kRowUnit = 6;
// The most panels that a thread packs before it asks for more.
constexpr int64_t kPanelsAtATime = 8;
// Row units of the last blocks. These are small so that the threads finish together.
constexpr int64_t kLeastUnits = 4;

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// Size of the blocks of k over which a product is summed. They are nearly equal, and whole panels of the layer before.
inline int64_t k_block(int64_t K, int64_t depth) { return round_up(ceil_div(K, ceil_div(K, depth)), kPanel); }

inline int64_t size_of(Element element) { return element == Element::kBFloat16 ? 2 : 4; }

// Elements from one row to the next: an odd number of cache lines. If the distance were a power of two, the rows of a
// tile would share one set of L1.
inline int64_t pitch_of(int64_t columns, Element element) {
    const int64_t line = static_cast<int64_t>(kLineBytes) / size_of(element);
    return (ceil_div(columns, line) | 1) * line;
}

// Bytes from one row to the next.
inline int64_t pitch_bytes(int64_t columns, Element element) { return pitch_of(columns, element) * size_of(element); }

// The matrix from row `row` on.
inline Matrix rows_from(Matrix m, int64_t row) {
    if (m.data != nullptr) m.data = static_cast<char*>(m.data) + row * m.pitch * size_of(m.element);
    return m;
}

// The matrix from column `column` on.
inline Matrix columns_from(Matrix m, int64_t column) {
    if (m.data != nullptr) m.data = static_cast<char*>(m.data) + column * size_of(m.element);
    return m;
}

// The product of a and all of w, stored in c.
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

// Packs linear layers into `memory`. The packed weights stay valid until the next use of `memory`.
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

// Whether the threads share every product by columns, each streaming its part of the weights, instead of each taking
// blocks of tokens that fit into its scratch. True if there would be too few blocks, or blocks of too few rows.
inline bool by_columns(Threads who, int64_t tokens, int64_t rows_in_scratch) {
    return tokens < kLeastRows * thread_count(who) || (rows_in_scratch < kWideRows && tokens <= kMostTogether);
}

// The most rows of a block of tokens: as many as fit into a thread's scratch, and at least enough to be worth
// streaming the weights for.
inline int64_t rows_of_block(int64_t rows_in_scratch) {
    return std::max(kLeastRows, rows_in_scratch) / kRowUnit * kRowUnit;
}

// Calls `step(first, n)` for blocks of n tokens that together cover all. n is at most `rows`, from rows_of_block.
template <typename Step>
void share_tokens(Threads who, int64_t tokens, int64_t rows, const Step& step) {
    share_ranges(who, ceil_div(tokens, kRowUnit), kLeastUnits, rows / kRowUnit, [&](auto next) {
        for (Range block = next(); !block.empty(); block = next()) {
            const int64_t first = block.begin * kRowUnit;
            step(first, std::min(tokens, block.end * kRowUnit) - first);
        }
    });
}

// Runs a step in the calling thread, for its block of tokens.
struct Alone {
    Products products;
    void gemm(const GemmTask& task) const { products.gemm(task); }
    void rows(const RowsTask& task) const { current_kernels().normalize_and_add(task); }
};

// Shares a step among all threads. Products are split by columns, and also by rows if there are more threads than
// panels. Other steps are split by rows.
struct Together {
    Products products;
    Threads who;

    void gemm(const GemmTask& task) const {
        const int64_t panels = (task.column_end - task.column_begin) / kPanel;
        const int64_t parts = std::min(task.rows, ceil_div(thread_count(who), panels));
        // If rows are split, there are more threads than panels. Each range is then a single panel, so no range
        // extends over two parts of the rows.
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
