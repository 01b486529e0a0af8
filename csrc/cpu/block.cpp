// Inference of a fused block, in three phases over a group of images that stays in the last-level cache.
//
//     hidden_state (B, H, W, C)
//       |  1  by tokens     [LayerNorm] -> projection_in                      per token: reads C, writes 2C + L + 1
//     projection [tokens][pitch]: q | ctx | gates
//       |  2  by planes     gated aggregation (gated_aggregation_fwd.inc)     reads C + L + 1, writes C
//     agg [tokens][pitch]
//       |  3  by tokens     everything local to a token                       reads 3C (agg, q, hidden), writes C
//     result (B, H, W, C)
//
// Phase 3, for a block of tokens that one thread owns. x, y and a chunk of hidden units h are scratch in its L2:
//
//     y = (agg W_h + b) * q -> [LayerNorm] -> x = y W_out + b -> [norm1] + hidden_state
//
//     pre-norm                                      post-norm
//       y = LayerNorm(x)
//       for each chunk:                               for each chunk:
//           h = GELU(y W_1[chunk])                        h = GELU(x W_1[chunk])
//           x += h W_2[chunk]                             y += h W_2[chunk]
//       result = x                                    result = norm2(y) + x
//
// This is the run by blocks: every block of tokens streams all weights once. With few tokens and many channels that
// costs too much. The run by columns then does the same steps one after the other, each for all tokens of the group.
// Every product is split by columns, so each thread streams its share of the weights once, and the activations pass
// through L3 instead.
//
// In bfloat16, the maps between the phases and the operands of products (y, h) are rounded to bfloat16. Operands take
// two bytes where products use bfloat16 dot products, and four where they are computed in float32 (kRounded). x, sums,
// norms and GELU are float32. Under autocast, bfloat16 weights come with float32 maps and vectors.
//
// Weights are read from the module's own tensors, and no packed copy outlives the call. By columns, a thread packs
// each slice just before it uses it. By blocks, every thread reads every weight, so all of them are packed into
// scratch first.
//
// Results are bitwise the same either way, and for any split into groups and blocks. An element of a product is summed
// over blocks of k that depend on K alone (gemm.inc), and a chunk of hidden units is a whole number of these blocks.

#include "block.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cache_sizes.h"
#include "gated_aggregation.h"
#include "gemm_driver.h"
#include "isa.h"
#include "scratch.h"
#include "work_sharing.h"

namespace focalnet::cpu {
namespace {

// Scratch of one thread, for l2_share. It shares the L2 with the weights and the streamed maps.
constexpr int64_t kScratchBytes = 352 * 1024;
// Size of a group's projection and agg in float32, per thread: a thread's share of the L3.
constexpr int64_t kGroupBytes = 8 * 1024 * 1024;

thread_local Memory shared_memory, own_memory, packed_memory, focal_memory;

// Intermediate results of the tokens, and the number of hidden units computed at a time.
struct Scratch {
    Matrix operand, x, hidden;
    Matrix sum;         // post-norm: the MLP's output before norm2
    Matrix projection;  // projection_in's float32 output before rounding; overlaps x, hidden and sum
    int64_t chunk;
};

// Layout of Scratch: operand, x, hidden and sum follow each other, each with all its rows. The functions return bytes
// per row.
struct ScratchLayout {
    const Block& b;
    Element element;  // of the operands of products
    int64_t chunk;

    int64_t operand() const { return pitch_bytes(b.C, element); }
    int64_t x() const { return pitch_bytes(b.C, Element::kFloat32); }
    int64_t hidden() const { return pitch_bytes(chunk, element); }
    // In float32 the sum can use the operand's memory: a post-norm MLP reads x directly.
    bool has_sum() const { return b.post_norm && element != Element::kFloat32; }
    int64_t sum() const { return has_sum() ? x() : 0; }
    int64_t projection() const {
        return element == Element::kRounded ? pitch_bytes(b.projection_in.N, Element::kFloat32) : 0;
    }
    int64_t row() const { return operand() + std::max(x() + hidden() + sum(), projection()); }

    Scratch at(float* memory, int64_t rows) const {
        char* to = reinterpret_cast<char*>(memory);
        const auto matrix = [](char* data, int64_t bytes, Element e) { return Matrix{data, bytes / size_of(e), e}; };
        const Matrix y = matrix(to, operand(), element);
        to += rows * operand();
        const Matrix projected = matrix(to, projection(), Element::kFloat32);
        const Matrix x_rows = matrix(to, x(), Element::kFloat32);
        to += rows * x();
        const Matrix hidden_rows = matrix(to, hidden(), element);
        to += rows * hidden();
        return {y, x_rows, hidden_rows, has_sum() ? matrix(to, sum(), Element::kFloat32) : y, projected, chunk};
    }
};

ScratchLayout layout_by_blocks(const Block& b) {
    const Products products = products_of(b.element);
    return {b, products.a, k_block(b.fc2.K, products.depth)};
}

// The number of tokens that fit into a thread's scratch.
int64_t rows_in_scratch(const Block& b) { return l2_share(kScratchBytes) / layout_by_blocks(b).row(); }

// Whether a thread's scratch holds too few tokens to be worth streaming the weights for. Groups of images are then
// kept small enough to run by columns, if an image is.
bool is_wide(const Block& b) { return rows_in_scratch(b) < kLeastRows; }

// Computes the block for a group of images.
class Group {
  public:
    Group(const Block& block, const float* packed_focal_weights, int64_t first_image, int64_t images)
        : b_(block),
          packed_focal_weights_(packed_focal_weights),
          images_(images),
          tokens_(images * block.H * block.W),
          hidden_state_(rows_from(block.hidden_state, first_image * block.H * block.W)),
          result_(rows_from(block.result, first_image * block.H * block.W)) {}

    void run_by_columns() {
        const ScratchLayout layout{b_, products_.a, round_up(b_.fc2.K, kPanel)};
        const Scratch scratch = layout.at(allocate(tokens_ * layout.row()), tokens_);
        const Together together{products_, b_.threads};
        project(together, 0, tokens_, scratch);
        aggregate();
        modulate(together, 0, tokens_, scratch);
    }

    void run_by_blocks() {
        const ScratchLayout layout = layout_by_blocks(b_);
        const int64_t rows = rows_of_block(rows_in_scratch(b_));
        allocate(0);
        const auto by_blocks = [&](auto step) {
            share_tokens(b_.threads, tokens_, rows, [&](int64_t first, int64_t n) {
                step(first, n, layout.at(own_memory.get(rows * layout.row() / 4), rows));
            });
        };
        const Alone alone{products_};
        by_blocks([&](int64_t row, int64_t n, const Scratch& s) { project(alone, row, n, s); });
        aggregate();
        by_blocks([&](int64_t row, int64_t n, const Scratch& s) { modulate(alone, row, n, s); });
    }

  private:
    // Allocates projection_, agg_ and `more` bytes, and returns the latter.
    float* allocate(int64_t more) {
        const int64_t projection = pitch_bytes(b_.projection_in.N, b_.element), agg = pitch_bytes(b_.C, b_.element);
        float* memory = shared_memory.get((tokens_ * (projection + agg) + more) / 4);
        projection_ = {memory, projection / size_of(b_.element), b_.element};
        memory += tokens_ * projection / 4;
        agg_ = {memory, agg / size_of(b_.element), b_.element};
        return memory + tokens_ * agg / 4;
    }

    RowsTask rows_task(Matrix in, int64_t rows, Matrix residual, Matrix out) const {
        return {in, residual, out, rows, b_.C, false, 0.0f, nullptr, nullptr};
    }

    static RowsTask normed(RowsTask task, const Norm& norm) {
        task.norm = true;
        task.eps = norm.eps;
        task.weight = norm.weight;
        task.bias = norm.bias;
        return task;
    }

    // `in` as an operand of products: unchanged, or converted into s.operand.
    template <typename By>
    Matrix readable(const By& by, Matrix in, int64_t rows, const Scratch& s) const {
        if (in.element == products_.a) return in;
        by.rows(rows_task(in, rows, {}, s.operand));
        return s.operand;
    }

    template <typename By>
    void project(const By& by, int64_t row, int64_t rows, const Scratch& s) const {
        Matrix in = rows_from(hidden_state_, row);
        if (b_.post_norm) {
            in = readable(by, in, rows, s);
        } else {
            by.rows(normed(rows_task(in, rows, {}, s.operand), b_.norm1));
            in = s.operand;
        }
        const Matrix out = rows_from(projection_, row);
        const bool is_rounded_later = products_.a == Element::kRounded;
        by.gemm(product(products_, b_.projection_in, in, rows, is_rounded_later ? s.projection : out));
        if (!is_rounded_later) return;
        RowsTask round = rows_task(s.projection, rows, {}, out);
        round.channels = b_.projection_in.N;
        by.rows(round);
    }

    void aggregate() const {
        const auto view = [&](Matrix m, int64_t column) {
            m = columns_from(m, column);
            return Map{m.data, b_.H * b_.W * m.pitch, b_.W * m.pitch, m.pitch};
        };
        const Problem problem{b_.element,
                              images_,
                              b_.H,
                              b_.W,
                              b_.C,
                              b_.L,
                              view(projection_, b_.C),
                              view(projection_, 2 * b_.C),
                              b_.focal_weights,
                              b_.normalize_modulator ? 1.0f / static_cast<float>(b_.L + 1) : 1.0f,
                              packed_focal_weights_,
                              b_.threads};
        gated_aggregation(problem, view(agg_, 0));
    }

    template <typename By>
    void modulate(const By& by, int64_t row, int64_t rows, const Scratch& s) const {
        modulated(by, row, rows, s);
        const Matrix hidden_state = rows_from(hidden_state_, row), result = rows_from(result_, row);
        by.gemm(product(products_, b_.projection_out, s.operand, rows, s.x));
        const RowsTask branch = rows_task(s.x, rows, hidden_state, s.x);
        by.rows(b_.post_norm ? normed(branch, b_.norm1) : branch);
        if (b_.post_norm) {
            mlp(by, readable(by, s.x, rows, s), rows, s.sum, s);
            by.rows(normed(rows_task(s.sum, rows, s.x, result), b_.norm2));
        } else {
            by.rows(normed(rows_task(s.x, rows, {}, s.operand), b_.norm2));
            mlp(by, s.operand, rows, s.x, s);
            by.rows(rows_task(s.x, rows, {}, result));
        }
    }

    // s.operand = q * modulator, normalised if the block has a norm there.
    template <typename By>
    void modulated(const By& by, int64_t row, int64_t rows, const Scratch& s) const {
        Matrix agg = rows_from(agg_, row), to = s.operand;
        if (agg.element != products_.a) {
            // Converted into x, not into the operand: a product must not overwrite its input.
            agg = {s.x.data, s.x.pitch, products_.a};
            by.rows(rows_task(rows_from(agg_, row), rows, {}, agg));
        }
        GemmTask context = product(products_, b_.projection_context, agg, rows, to);
        context.after = After::kMultiply;
        context.factor = rows_from(projection_, row);
        by.gemm(context);
        if (b_.norm_in_modulation) by.rows(normed(rows_task(to, rows, {}, to), b_.modulation_norm));
    }

    // Pre-norm, the output is added to the residual in `out`. Post-norm, `out` is overwritten.
    template <typename By>
    void mlp(const By& by, Matrix in, int64_t rows, Matrix out, const Scratch& s) const {
        for (int64_t unit = 0; unit < b_.fc2.K; unit += s.chunk) {
            const int64_t end = std::min(b_.fc2.K, unit + s.chunk);
            GemmTask fc1 = product(products_, b_.fc1, in, rows, s.hidden);
            fc1.column_begin = unit;
            fc1.column_end = round_up(end, kPanel);
            fc1.after = After::kGelu;
            by.gemm(fc1);
            GemmTask fc2 = product(products_, b_.fc2, s.hidden, rows, out);
            fc2.k_begin = unit;
            fc2.k_end = end;
            fc2.accumulate = !b_.post_norm;
            by.gemm(fc2);
        }
    }

    const Block& b_;
    const float* packed_focal_weights_;
    const Products products_ = products_of(b_.element);
    const int64_t images_, tokens_;
    const Matrix hidden_state_, result_;
    Matrix projection_{}, agg_{};
};

// The block with all its linear layers packed into scratch.
Block packed(const Block& block) {
    Block b = block;
    Linear* const layers[] = {&b.projection_in, &b.projection_context, &b.projection_out, &b.fc1, &b.fc2};
    pack(b.threads, products_of(b.element), layers, packed_memory);
    return b;
}

// The focal weights of a block, packed into scratch.
const float* packed_focal_weights(const Block& b) {
    Problem problem{};
    problem.element = b.element;
    problem.C = b.C;
    problem.L = b.L;
    problem.weights = b.focal_weights;
    problem.threads = b.threads;
    float* memory = focal_memory.get(packed_focal_floats(problem));
    pack_focal_weights(problem, memory);
    return memory;
}

}  // namespace

void block(const Block& block) {
    const int64_t tokens = block.H * block.W;
    // In bfloat16 a group has as many images as in float32, in half of the memory.
    const int64_t bytes =
        tokens * (pitch_bytes(block.projection_in.N, Element::kFloat32) + pitch_bytes(block.C, Element::kFloat32));
    int64_t most = thread_count(block.threads) * kGroupBytes / bytes;
    if (is_wide(block)) most = std::min(most, kMostTogether / tokens);
    const int64_t groups = ceil_div(block.B, std::max<int64_t>(1, most));
    if (groups == 0) return;
    const float* focal_weights = packed_focal_weights(block);
    const auto each = [&](const Block& b, auto run) {
        for (int64_t i = 0; i < groups; ++i) {
            const int64_t first = i * b.B / groups, last = (i + 1) * b.B / groups;
            (Group(b, focal_weights, first, last - first).*run)();
        }
    };
    by_columns(block.threads, block.B / groups * tokens, rows_in_scratch(block))
        ? each(block, &Group::run_by_columns)
        : each(packed(block), &Group::run_by_blocks);
}

}  // namespace focalnet::cpu
