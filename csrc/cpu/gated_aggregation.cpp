// Driver of gated aggregation: lays out scratch, packs weights, shares planes among the threads, and reduces partial
// sums in a fixed order. No result depends on the number of threads.

#include "gated_aggregation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "scratch.h"
#include "work_sharing.h"

namespace focalnet::cpu {
namespace {

using BF16 = torch::headeronly::BFloat16;

constexpr int64_t kCacheLine = 16;  // floats
// Forward: the rings of one block. They share a 256 KB L2 with the streamed maps.
constexpr int64_t kRingBytes = 160 * 1024;
// Forward: the largest stage in scratch. If it does not fit, the local part of agg waits in agg itself.
constexpr int64_t kStageBytes = 256 * 1024;
// Backward: the rings of 8 lanes. They share a 512 KB L2 with the streamed maps.
constexpr int64_t kChainBytes = 384 * 1024;
// Backward: whole planes of 8 lanes, if these save a second pass up the levels.
constexpr int64_t kPlaneBytes = 1 << 20;
constexpr int64_t kMinStep = 4;  // rows

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t blocks_of(const Problem& p) { return (p.C + kBlock - 1) / kBlock; }

thread_local Memory thread_scratch;

std::vector<LevelLayout> level_layouts(const Problem& p, int64_t lanes) {
    std::vector<LevelLayout> levels(p.L);
    int64_t taps = 0, halo = 0;
    for (int64_t l = 0; l < p.L; ++l) {
        const FocalWeight& w = p.weights[l];
        levels[l] = {w.kh, w.kw, taps, 0, (p.W + w.kw - 1) * lanes, p.H, 0};
        taps += w.kh * w.kw;
    }
    for (int64_t l = p.L - 1; l >= 0; --l) levels[l].halo = halo += levels[l].kh / 2;
    return levels;
}

int64_t taps_of(const std::vector<LevelLayout>& levels) {
    return levels.back().tap + levels.back().kh * levels.back().kw;
}

template <typename T>
void pack_vector(const Problem& p, const std::vector<LevelLayout>& levels, int64_t lanes, int64_t vector, bool flip,
                 float factor, float* packed) {
    for (const LevelLayout& level : levels) {
        const int64_t taps = level.kh * level.kw;
        const T* weight = static_cast<const T*>(p.weights[&level - levels.data()].data);
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t c = vector * lanes + lane;
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t to = level.tap + (flip ? taps - 1 - tap : tap);
                packed[to * lanes + lane] = c < p.C ? factor * static_cast<float>(weight[c * taps + tap]) : 0.0f;
            }
        }
    }
}

// Packs the weights as [C / lanes][taps][lanes] in float32, zero beyond C.
void pack_into(float* packed, const Problem& p, const std::vector<LevelLayout>& levels, int64_t lanes, bool flip,
               float factor) {
    const int64_t vectors = blocks_of(p) * kBlock / lanes, size = taps_of(levels) * lanes;
    share_rows(p.threads, vectors, 16, [&](int64_t begin, int64_t end) {
        for (int64_t v = begin; v < end; ++v) {
            float* to = packed + v * size;
            p.element == Element::kFloat32 ? pack_vector<float>(p, levels, lanes, v, flip, factor, to)
                                           : pack_vector<BF16>(p, levels, lanes, v, flip, factor, to);
        }
    });
}

Floats pack(const Problem& p, const std::vector<LevelLayout>& levels, int64_t lanes, bool flip, float factor) {
    Floats packed = floats(blocks_of(p) * kBlock * taps_of(levels));
    pack_into(packed.get(), p, levels, lanes, flip, factor);
    return packed;
}

int64_t largest_kh(const std::vector<LevelLayout>& levels) {
    int64_t kh = 0;
    for (const LevelLayout& level : levels) kh = std::max(kh, level.kh);
    return kh;
}

// The smallest number of bands with which the threads are busy for 80 % of the time, as far as the map allows. A band
// has at least 8 rows, and at least as many rows as the halos that it recomputes.
int64_t bands_for(const Problem& p, const std::vector<LevelLayout>& levels) {
    const int64_t threads = thread_count(p.threads);
    const int64_t planes = p.B * blocks_of(p);
    const int64_t most = std::max<int64_t>(1, p.H / std::max<int64_t>(8, 2 * levels[0].halo));
    int64_t bands = 1;
    for (; bands < most; ++bands) {
        const int64_t tasks = planes * bands, rounds = (tasks + threads - 1) / threads;
        if (10 * tasks >= 8 * rounds * threads) break;
    }
    return bands;
}

// Simulates the schedule of gated_aggregation_fwd.inc to find the largest number of rows that each ring has to hold.
void simulate(const Problem& p, const ForwardPlan& plan, int64_t y0, std::vector<LevelLayout>& levels, int64_t* agg) {
    const int64_t y1 = std::min(p.H, y0 + plan.band_rows);
    std::vector<int64_t> low(p.L + 1, y0), high(p.L + 1, y1);
    for (int64_t l = 0; l < p.L; ++l) {
        low[l] = std::max<int64_t>(0, y0 - levels[l].halo);
        high[l] = std::min(p.H, y1 + levels[l].halo);
    }
    std::vector<int64_t> done = low, next = low;
    while (done[p.L] < y1) {
        next[0] = std::min(high[0], done[0] + plan.step);
        for (int64_t l = 0; l < p.L; ++l) {
            const int64_t reach = next[l] == high[l] ? high[l + 1] : next[l] - levels[l].kh / 2;
            next[l + 1] = std::max(done[l + 1], std::min(high[l + 1], reach));
            const int64_t oldest = std::max(low[l], done[l + 1] - levels[l].kh / 2);
            levels[l].capacity = std::max(levels[l].capacity, next[l] - oldest);
        }
        *agg = std::max(*agg, next[1] - done[p.L]);
        done = next;
    }
}

// Lays out the rings for the given step and returns the bytes that they take for one block.
int64_t lay_out(const Problem& p, int64_t lanes, int64_t step, std::vector<LevelLayout>& levels, ForwardPlan& plan) {
    plan.step = step;
    plan.agg_capacity = 1;
    for (LevelLayout& level : levels) level.capacity = 1;
    for (int64_t band = 0; band < plan.bands; ++band)
        simulate(p, plan, band * plan.band_rows, levels, &plan.agg_capacity);
    int64_t offset = 0;
    for (LevelLayout& level : levels) {
        level.offset = offset;
        offset += round_up(level.pitch * level.capacity, kCacheLine);
    }
    plan.agg_offset = offset;
    plan.vector_floats = offset + round_up(p.L > 1 ? plan.agg_capacity * p.W * lanes : 0, kCacheLine);
    return plan.vector_floats * (kBlock / lanes) * static_cast<int64_t>(sizeof(float));
}

ForwardPlan forward_plan(const Problem& p, int64_t lanes, std::vector<LevelLayout>& levels) {
    ForwardPlan plan{};
    const int64_t bands = bands_for(p, levels);
    plan.band_rows = (p.H + bands - 1) / bands;
    plan.bands = (p.H + plan.band_rows - 1) / plan.band_rows;
    plan.taps = taps_of(levels);
    for (int64_t step = p.H; lay_out(p, lanes, step, levels, plan) > kRingBytes && step > kMinStep;)
        step = std::max(kMinStep, step / 2);
    plan.row_offset = plan.vector_floats * (kBlock / lanes);
    plan.stage_offset = plan.row_offset + round_up(p.W * lanes, kCacheLine);
    const int64_t stage_floats = p.H * p.W * kBlock;
    const bool fits = stage_floats * static_cast<int64_t>(sizeof(float)) <= kStageBytes;
    plan.own_stage = plan.bands == 1 && (fits || p.element == Element::kBFloat16);
    plan.scratch_floats = plan.stage_offset + (plan.own_stage ? stage_floats : 0);
    plan.levels = levels.data();
    return plan;
}

// The plan of backward, with the arrays that its pointers refer to.
struct Chain {
    std::vector<LevelLayout> levels, grads;
    std::vector<int64_t> lags, halos;
    BackwardPlan plan;
};

// Lays out the rings for the given step and band width, and returns the bytes that they take.
int64_t lay_out(const Problem& p, int64_t lanes, int64_t step, int64_t columns, Chain& chain) {
    BackwardPlan& plan = chain.plan;
    const int64_t L = p.L, last = chain.lags.back();
    plan.step = step;
    plan.steps = (p.H + last + step - 1) / step;
    plan.columns = columns;
    plan.bands = (p.W + columns - 1) / columns;
    const int64_t pitch = (std::min(p.W, columns + 2 * chain.halos[0]) + 2 * plan.margin) * lanes;
    int64_t offset = 0;
    // A row enters the ring when place `from` reaches it, and is needed until place `to` is `more` rows past it.
    const auto ring = [&](LevelLayout& layout, int64_t from, int64_t to, int64_t more) {
        layout.pitch = pitch;
        layout.capacity = std::min(p.H, step + chain.lags[to] - chain.lags[from] + more);
        layout.offset = offset;
        offset += round_up(layout.capacity * pitch, kCacheLine);
    };
    for (int64_t l = 0; l < L; ++l) {
        const int64_t dz = 2 * L - 1 - l, half = chain.levels[l].kh / 2;
        ring(chain.levels[l], l, dz, half);
        ring(chain.grads[l], l + 1, dz + 1, half);
    }
    ring(plan.dagg, 1, 2 * L - 1, 0);
    plan.row_offset = offset;
    plan.last_offset = plan.row_offset + pitch;
    plan.zeros_offset = plan.last_offset + pitch;
    plan.totals_offset = plan.zeros_offset + pitch;
    plan.sums_offset = plan.totals_offset + kBlock;
    plan.scratch_floats = plan.sums_offset + p.H * kBlock;
    return offset * static_cast<int64_t>(sizeof(float));
}

// The widest bands of columns for which the rows that one level uses in the smallest step (of its input, its output
// and its gradients) fit into `bytes`. A band is at least as wide as the halos that it recomputes.
int64_t columns_for(const Problem& p, int64_t lanes, int64_t bytes, const Chain& chain) {
    const int64_t rows = 3 * (kMinStep + largest_kh(chain.levels)), beside = 2 * (chain.halos[0] + chain.plan.margin);
    const int64_t widest = bytes / (rows * lanes * static_cast<int64_t>(sizeof(float))) - beside;
    const int64_t own = std::max<int64_t>({1, widest, beside}), bands = (p.W + own - 1) / own;
    return (p.W + bands - 1) / bands;
}

// Chooses whole planes if they fit. Otherwise it chooses rings, with the largest step for which the rings of all
// levels fit. Wide maps fit with no step. They take the smallest one, for which the rows of one level at a time fit.
void choose(const Problem& p, int64_t lanes, bool sums_known, Chain& chain) {
    const int64_t fitting = kChainBytes / 8 * lanes, fitting_whole = sums_known ? fitting : kPlaneBytes / 8 * lanes;
    if (lay_out(p, lanes, p.H + chain.lags.back(), p.W, chain) <= fitting_whole) return;
    const int64_t columns = columns_for(p, lanes, fitting, chain);
    for (int64_t step = p.H; lay_out(p, lanes, step, columns, chain) > fitting && step > kMinStep;)
        step = std::max(kMinStep, step / 2);
}

Chain backward_chain(const Problem& p, int64_t lanes, bool sums_known) {
    Chain chain{level_layouts(p, lanes), level_layouts(p, lanes), {0}, std::vector<int64_t>(2 * p.L + 1), {}};
    for (int64_t i = 0; i < 2 * p.L; ++i) {
        const LevelLayout& level = chain.levels[std::min(i, 2 * p.L - 1 - i)];
        chain.lags.push_back(chain.lags.back() + level.kh / 2);
        chain.plan.margin = std::max(chain.plan.margin, level.kw / 2);
    }
    for (int64_t i = 2 * p.L - 1; i >= 0; --i)
        chain.halos[i] = chain.halos[i + 1] + chain.levels[std::min(i, 2 * p.L - 1 - i)].kw / 2;
    chain.plan.taps = taps_of(chain.levels);
    choose(p, lanes, sums_known, chain);
    chain.plan.levels = chain.levels.data();
    chain.plan.grads = chain.grads.data();
    chain.plan.lags = chain.lags.data();
    chain.plan.halos = chain.halos.data();
    return chain;
}

// The margins of rings are never written, so they are zeroed once for all tasks of a thread.
float* zeroed_scratch(int64_t n) {
    float* scratch = thread_scratch.get(n);
    std::memset(scratch, 0, n * sizeof(float));
    return scratch;
}

template <typename T>
void gather_gates(const Problem& p, float* planes) {
    const Map& m = p.gates;
    share_rows(p.threads, p.B * p.H, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / p.H, y = i % p.H;
            const T* from = static_cast<const T*>(m.data) + b * m.stride_b + y * m.stride_h;
            float* to = planes + (b * (p.L + 1) * p.H + y) * p.W;
            for (int64_t x = 0; x < p.W; ++x)
                for (int64_t l = 0; l <= p.L; ++l)
                    to[l * p.H * p.W + x] = static_cast<float>(from[x * m.stride_w + l]);
        }
    });
}

// The gates of neighbouring positions lie 2 C + L + 1 elements apart, and every block reads them. They are therefore
// gathered into float32 planes first, which take a fraction of the cache lines.
Floats gate_planes(const Problem& p) {
    Floats planes = floats(p.B * (p.L + 1) * p.H * p.W);
    p.element == Element::kFloat32 ? gather_gates<float>(p, planes.get()) : gather_gates<BF16>(p, planes.get());
    return planes;
}

template <typename T>
void reduce_dgates(const Problem& p, const float* partial, T* dgates) {
    const int64_t plane = p.H * p.W, gates = p.L + 1, blocks = blocks_of(p);
    share_rows(p.threads, p.B * p.H, 8, [&](int64_t begin, int64_t end) {
        std::vector<float> sum(p.W);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / p.H, at = (i % p.H) * p.W;
            for (int64_t l = 0; l < gates; ++l) {
                std::fill(sum.begin(), sum.end(), 0.0f);
                for (int64_t block = 0; block < blocks; ++block) {
                    const float* from = partial + ((b * blocks + block) * gates + l) * plane + at;
                    for (int64_t x = 0; x < p.W; ++x) sum[x] += from[x];
                }
                T* to = dgates + (b * plane + at) * gates + l;
                for (int64_t x = 0; x < p.W; ++x) to[x * gates] = static_cast<T>(sum[x]);
            }
        }
    });
}

template <typename T>
void reduce_dweights(const Problem& p, const std::vector<LevelLayout>& levels, int64_t lanes, const float* partial,
                     void* const* dweights) {
    const int64_t taps = taps_of(levels), vectors = blocks_of(p) * kBlock / lanes, floats = taps * lanes;
    share_rows(p.threads, vectors, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> sum(floats);
        for (int64_t v = begin; v < end; ++v) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t b = 0; b < p.B; ++b) {
                const float* from = partial + (b * vectors + v) * floats;
                for (int64_t i = 0; i < floats; ++i) sum[i] += from[i];
            }
            for (int64_t lane = 0; lane < lanes && v * lanes + lane < p.C; ++lane)
                for (int64_t l = 0; l < p.L; ++l) {
                    const int64_t n = levels[l].kh * levels[l].kw;
                    T* to = static_cast<T*>(dweights[l]) + (v * lanes + lane) * n;
                    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(sum[(levels[l].tap + i) * lanes + lane]);
                }
        }
    });
}

// Adds the rows in the order of the backward kernels, so the sums are bitwise those that the kernels would compute.
void add_rows(const Problem& p, const float* row_sums, float* sums) {
    for (int64_t b = 0; b < p.B; ++b)
        for (int64_t c = 0; c < p.C; ++c) {
            const float* rows = row_sums + (b * blocks_of(p) + c / kBlock) * p.H * kBlock + c % kBlock;
            float sum = 0.0f;
            for (int64_t y = 0; y < p.H; ++y) sum += rows[y * kBlock];
            sums[b * p.C + c] = sum;
        }
}

}  // namespace

int64_t packed_focal_floats(const Problem& p) {
    return blocks_of(p) * kBlock * taps_of(level_layouts(p, current_kernels().lanes));
}

void pack_focal_weights(const Problem& p, float* packed) {
    const int64_t lanes = current_kernels().lanes;
    pack_into(packed, p, level_layouts(p, lanes), lanes, false, 0.5f);
}

void gated_aggregation(const Problem& p, const Map& agg, float* sums) {
    if (p.B == 0) return;
    const Kernels& kernels = current_kernels();
    std::vector<LevelLayout> levels = level_layouts(p, kernels.lanes);
    const ForwardPlan plan = forward_plan(p, kernels.lanes, levels);
    const Floats own_weights = p.packed_weights ? Floats() : pack(p, levels, kernels.lanes, false, 0.5f);
    const float* weights = p.packed_weights ? p.packed_weights : own_weights.get();
    const Floats gates = gate_planes(p);
    const int64_t blocks = blocks_of(p), planes = p.B * blocks;
    const Floats row_sums = floats(planes * p.H * kBlock);
    const bool shared_stage = p.element == Element::kBFloat16 && plan.bands > 1;
    const Floats stage = floats(shared_stage ? planes * p.H * p.W * kBlock : 0);

    const int64_t tasks = planes * plan.bands;
    const auto share = [&](auto kernel, int64_t scratch_floats) {
        share_out(p.threads, tasks, [&](auto next) {
            float* scratch = zeroed_scratch(scratch_floats);
            std::vector<const float*> rows(largest_kh(levels));
            std::vector<int64_t> done(2 * (p.L + 1));
            for (int64_t i = next(); i < tasks; i = next()) {
                const int64_t plane = i / plan.bands;
                kernel({&p, &plan, weights, gates.get(), agg, row_sums.get(), shared_stage ? stage.get() : nullptr,
                        scratch, rows.data(), done.data(), plane / blocks, plane % blocks, i % plan.bands});
            }
        });
    };
    share(kernels.forward, plan.scratch_floats);
    if (plan.bands > 1) share(kernels.forward_global, 0);
    if (sums) add_rows(p, row_sums.get(), sums);
}

void gated_aggregation_backward(const Problem& p, const Map& dagg, const float* sums, const Gradients& out) {
    const Kernels& kernels = current_kernels();
    const Chain chain = backward_chain(p, kernels.lanes, sums != nullptr);
    const std::vector<LevelLayout>& levels = chain.levels;
    const BackwardPlan& plan = chain.plan;
    const Floats weights = pack(p, levels, kernels.lanes, false, 0.5f);
    const Floats gates = gate_planes(p);
    const Floats flipped = pack(p, levels, kernels.lanes, true, 1.0f);
    const int64_t blocks = blocks_of(p), planes = p.B * blocks;
    const Floats dgates = floats(out.want_gates ? planes * p.H * p.W * (p.L + 1) : 0);
    const Floats dweights = floats(out.want_weights ? planes * kBlock * plan.taps : 0);

    share_out(p.threads, planes, [&](auto next) {
        float* scratch = zeroed_scratch(plan.scratch_floats);
        std::vector<const float*> rows(2 * (std::min(p.H, plan.step) + largest_kh(levels)));
        for (int64_t i = next(); i < planes; i = next())
            kernels.backward({&p, &plan, &out, dagg, sums, weights.get(), flipped.get(), gates.get(), dgates.get(),
                              dweights.get(), scratch, rows.data(), i / blocks, i % blocks});
    });
    const bool single = p.element == Element::kFloat32;
    if (out.want_gates && p.B > 0)
        single ? reduce_dgates(p, dgates.get(), static_cast<float*>(out.dgates.data))
               : reduce_dgates(p, dgates.get(), static_cast<BF16*>(out.dgates.data));
    if (out.want_weights)
        single ? reduce_dweights<float>(p, levels, kernels.lanes, dweights.get(), out.dweights)
               : reduce_dweights<BF16>(p, levels, kernels.lanes, dweights.get(), out.dweights);
}

}  // namespace focalnet::cpu
