// The fused block in inference: three phases over a group of images that stays in the last-level cache.
//
//     hidden_state (B, H, W, C)
//       |  1  by tokens     [LayerNorm] -> projection_in                      reads C, writes 2C + L + 1 a token
//     projection [tokens][pitch]: q | ctx | gates
//       |  2  by planes     gated aggregation, gated_aggregation_fwd.inc  reads C + L + 1, writes C
//     agg [tokens][pitch]
//       |  3  by tokens     everything that is local to a token               reads 3C (agg, q, hidden), writes C
//     result (B, H, W, C)
//
// Phase 3, for a block of tokens that one thread owns; x, y and a chunk of hidden units are its scratch in L2:
//
//     y = (agg W_h + b) * q -> [LayerNorm] -> x = y W_out + b -> [norm1] + hidden_state
//     pre-norm:   y = LayerNorm(x);  for each chunk: h = GELU(y W_1[chunk]);  x += h W_2[chunk];  result = x
//     post-norm:                     for each chunk: h = GELU(x W_1[chunk]);  y += h W_2[chunk];  result = norm2(y) +
//     x
//
// A block of tokens streams every weight once. Where that is more than the tokens are worth (few tokens of many
// channels), the same steps run over all tokens, one after the other, each product split by columns: every thread then
// streams its part of the weights once, and tokens pass through L3 instead.
//
// Weights are read where the module has them, and nothing made of them outlives the call. By columns, a thread packs
// the slice it is about to use. By blocks, every thread reads every weight, so all are packed first, into scratch.
//
// Both ways, and any cut into groups and blocks, give the same bits: an element of a product is summed in blocks of k
// that depend on K alone (gemm.inc), and chunks of hidden units are whole blocks of k.

#include "block.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "gated_aggregation.h"
#include "gemm_driver.h"
#include "isa.h"
#include "scratch.h"
#include "work_sharing.h"

namespace focalnet::cpu {
namespace {

constexpr int64_t kScratchBytes = 352 * 1024;     // of a thread, in a 512 KB L2 beside weights and streams
constexpr int64_t kGroupBytes = 8 * 1024 * 1024;  // of projection and agg, for each thread: its share of the L3

// Tokens whose x, y and chunk of hidden units fit into a thread's scratch.
int64_t rows_in_scratch(const Block& b) {
    return kScratchBytes / 4 / (2 * pitch_of(b.C) + pitch_of(k_block(b.fc2.K)));
}

// No block of tokens pays for streaming the weights: images go in groups that by_columns takes, where they fit.
bool is_wide(const Block& b) { return rows_in_scratch(b) < kLeastRows; }

thread_local Memory shared_memory, own_memory, packed_memory, focal_memory;

// Where a block of tokens keeps what is between the steps.
struct Scratch {
    float *x, *y, *hidden;
    int64_t pitch, hidden_pitch;
    int64_t chunk;  // hidden units at a time
};

// Rows of a matrix from one token on.
struct Rows {
    const float* data;
    int64_t pitch;
};

// A group of images.
class Group {
  public:
    Group(const Block& block, const float* packed_focal_weights, int64_t first_image, int64_t images)
        : b_(block),
          packed_focal_weights_(packed_focal_weights),
          images_(images),
          tokens_(images * block.H * block.W),
          pitch_(pitch_of(block.C)),
          projection_pitch_(pitch_of(block.projection_in.N)),
          hidden_state_(block.hidden_state + first_image * block.H * block.W * block.C),
          result_(block.result + first_image * block.H * block.W * block.C) {}

    void run_by_columns() {
        const int64_t hidden_pitch = pitch_of(b_.fc2.K);
        float* x = allocate(tokens_ * (2 * pitch_ + hidden_pitch));
        const Scratch scratch{x,      x + tokens_ * pitch_, x + 2 * tokens_ * pitch_,
                              pitch_, hidden_pitch,         round_up(b_.fc2.K, kPanel)};
        const Together together{kernels_};
        project(together, 0, tokens_, scratch.y);
        aggregate();
        modulate(together, 0, tokens_, scratch);
    }

    void run_by_blocks() {
        const int64_t chunk = k_block(b_.fc2.K), hidden_pitch = pitch_of(chunk);
        const int64_t rows = rows_of_block(rows_in_scratch(b_));
        allocate(0);
        const auto by_blocks = [&](auto step) {
            share_tokens(tokens_, rows, [&](int64_t first, int64_t n) {
                float* x = own_memory.get(rows * (2 * pitch_ + hidden_pitch));
                step(first, n, Scratch{x, x + rows * pitch_, x + 2 * rows * pitch_, pitch_, hidden_pitch, chunk});
            });
        };
        const Alone alone{kernels_};
        by_blocks([&](int64_t row, int64_t n, const Scratch& s) { project(alone, row, n, s.y); });
        aggregate();
        by_blocks([&](int64_t row, int64_t n, const Scratch& s) { modulate(alone, row, n, s); });
    }

  private:
    // For projection, agg and as many floats more, which it returns.
    float* allocate(int64_t more) {
        projection_ = shared_memory.get(tokens_ * (projection_pitch_ + pitch_) + more);
        agg_ = projection_ + tokens_ * projection_pitch_;
        return agg_ + tokens_ * pitch_;
    }

    Rows hidden_state(int64_t row) const { return {hidden_state_ + row * b_.C, b_.C}; }

    static GemmTask product(const Linear& w, Rows a, int64_t rows, float* c, int64_t c_pitch) {
        return {a.data, a.pitch,         rows,    w, 0, w.K, k_block(w.K), 0, round_up(w.N, kPanel), c, c_pitch,
                false,  After::kNothing, nullptr, 0};
    }

    RowsTask rows_task(Rows in, int64_t rows, Rows residual, float* out, int64_t out_pitch) const {
        return {in.data, in.pitch, residual.data, residual.pitch, out,     out_pitch,
                rows,    b_.C,     false,         0.0f,           nullptr, nullptr};
    }

    static RowsTask normed(RowsTask task, const Norm& norm) {
        task.norm = true;
        task.eps = norm.eps;
        task.weight = norm.weight;
        task.bias = norm.bias;
        return task;
    }

    template <typename By>
    void project(const By& by, int64_t row, int64_t rows, float* scratch) const {
        Rows in = hidden_state(row);
        if (!b_.post_norm) {
            by.rows(normed(rows_task(in, rows, {}, scratch, pitch_), b_.norm1));
            in = {scratch, pitch_};
        }
        by.gemm(product(b_.projection_in, in, rows, projection_ + row * projection_pitch_, projection_pitch_));
    }

    void aggregate() const {
        const auto view = [&](float* data, int64_t pitch) {
            return Map{data, b_.H * b_.W * pitch, b_.W * pitch, pitch};
        };
        const Problem problem{Element::kFloat32,
                              images_,
                              b_.H,
                              b_.W,
                              b_.C,
                              b_.L,
                              view(projection_ + b_.C, projection_pitch_),
                              view(projection_ + 2 * b_.C, projection_pitch_),
                              b_.focal_weights,
                              b_.normalize_modulator ? 1.0f / static_cast<float>(b_.L + 1) : 1.0f,
                              packed_focal_weights_};
        gated_aggregation(problem, view(agg_, pitch_));
    }

    template <typename By>
    void modulate(const By& by, int64_t row, int64_t rows, const Scratch& s) const {
        GemmTask context = product(b_.projection_context, {agg_ + row * pitch_, pitch_}, rows, s.y, pitch_);
        context.after = After::kMultiply;
        context.factor = projection_ + row * projection_pitch_;
        context.factor_pitch = projection_pitch_;
        by.gemm(context);
        const Rows x{s.x, pitch_}, y{s.y, pitch_};
        if (b_.norm_in_modulation) by.rows(normed(rows_task(y, rows, {}, s.y, pitch_), b_.modulation_norm));
        by.gemm(product(b_.projection_out, y, rows, s.x, pitch_));
        const RowsTask branch = rows_task(x, rows, hidden_state(row), s.x, pitch_);
        by.rows(b_.post_norm ? normed(branch, b_.norm1) : branch);
        if (!b_.post_norm) by.rows(normed(rows_task(x, rows, {}, s.y, pitch_), b_.norm2));
        mlp(by, b_.post_norm ? x : y, rows, b_.post_norm ? s.y : s.x, s);
        float* result = result_ + row * b_.C;
        by.rows(b_.post_norm ? normed(rows_task(y, rows, x, result, b_.C), b_.norm2)
                             : rows_task(x, rows, {}, result, b_.C));
    }

    // Before norm the sum goes onto the residual that `out` holds, behind it `out` is overwritten.
    template <typename By>
    void mlp(const By& by, Rows in, int64_t rows, float* out, const Scratch& s) const {
        for (int64_t unit = 0; unit < b_.fc2.K; unit += s.chunk) {
            const int64_t end = std::min(b_.fc2.K, unit + s.chunk);
            GemmTask fc1 = product(b_.fc1, in, rows, s.hidden, s.hidden_pitch);
            fc1.column_begin = unit;
            fc1.column_end = round_up(end, kPanel);
            fc1.after = After::kGelu;
            by.gemm(fc1);
            GemmTask fc2 = product(b_.fc2, {s.hidden, s.hidden_pitch}, rows, out, pitch_);
            fc2.k_begin = unit;
            fc2.k_end = end;
            fc2.accumulate = !b_.post_norm;
            by.gemm(fc2);
        }
    }

    const Block& b_;
    const float* packed_focal_weights_;
    const Kernels& kernels_ = current_kernels();
    const int64_t images_, tokens_, pitch_, projection_pitch_;
    const float* hidden_state_;
    float* result_;
    float *projection_ = nullptr, *agg_ = nullptr;
};

// The block with all its linear layers packed into scratch.
Block packed(const Block& block) {
    Block b = block;
    Linear* const layers[] = {&b.projection_in, &b.projection_context, &b.projection_out, &b.fc1, &b.fc2};
    pack(current_kernels(), layers, packed_memory);
    return b;
}

// The focal weights of a block, packed into scratch.
const float* packed_focal_weights(const Block& b) {
    Problem problem{};
    problem.C = b.C;
    problem.L = b.L;
    problem.weights = b.focal_weights;
    float* memory = focal_memory.get(packed_focal_floats(problem));
    pack_focal_weights(problem, memory);
    return memory;
}

}  // namespace

void block(const Block& block) {
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t tokens = block.H * block.W;
    const int64_t bytes = tokens * (pitch_of(block.projection_in.N) + pitch_of(block.C)) * 4;
    int64_t most = threads * kGroupBytes / bytes;
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
    by_columns(block.B / groups * tokens, rows_in_scratch(block)) ? each(block, &Group::run_by_columns)
                                                                  : each(packed(block), &Group::run_by_blocks);
}

}  // namespace focalnet::cpu
