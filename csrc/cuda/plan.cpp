// How the maps are cut: the cheapest of three ways. The cost is the bytes that a launch moves; arithmetic counts as
// the bytes that the device could move in that time.
//
//     whole planes      ctx is read once, agg written once; needs max(2, L) planes of the map in shared memory
//     tiles             reads and computes the halo of all levels again; agg is read and written for the global term
//     a level a launch  reads the halo of one level only, but every level is written and read, and so is agg
//
// Host code without CUDA calls: the device's limits come in with the problem. A plan takes tens of microseconds and is
// the same every time, so plans are kept.

#include <algorithm>
#include <cmath>

#include "gated_aggregation.h"
#include "plans.h"

namespace focalnet::cuda {
namespace {

constexpr int kSector = 32;  // bytes: the unit in which global memory is read and written
// Bytes that a device moves while it does one multiply-add of these kernels, at half its rate: 3.35e12 bytes a second
// over half of 33e12 multiply-adds (H100 SXM; twice as many on an A100).
constexpr double kBytesPerMultiplyAdd = 0.2;
constexpr int kReservedBytes = 1024;   // of shared memory, by the driver, for every block
constexpr int kResidentThreads = 512;  // on a multiprocessor: 65536 registers, 128 a thread
constexpr int kTileHeights[] = {64, 56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4, 2};
constexpr int kTileWidths[] = {63, 56, 49, 42, 35, 28, 21, 14, 7};

// The smallest pitch, in elements, for which a step of kRunY rows is a step of block_c channels modulo the 32 banks.
int pitch_for(int columns, int block_c, int size) {
    const int words = block_c * size / 4, least = columns * words;
    if (words >= 32) return least * 4 / size;
    const int wanted = words / kRunY, modulus = 32 / kRunY;
    const int pitch = least + ((wanted - least) % modulus + modulus) % modulus;
    return pitch * 4 / size;
}

struct Chain {
    const Problem& p;
    int first, last;
    int reach_y(int from) const { return reach(from, &FocalWeight::kh); }
    int reach_x(int from) const { return reach(from, &FocalWeight::kw); }
    int taps() const {
        int taps = 0;
        for (int l = first; l < last; ++l) taps += p.weights[l].kh * p.weights[l].kw;
        return taps;
    }

  private:
    int reach(int from, int FocalWeight::* extent) const {
        int reach = 0;
        for (int l = from; l < last; ++l) reach += p.weights[l].*extent / 2;
        return reach;
    }
};

// Sets everything but the cost; `other_bytes` of shared memory are needed beside weights and planes.
Tiling cut(const Chain& chain, int block_c, int tile_h, int tile_w, int planes, int threads, size_t other_bytes) {
    const Problem& p = chain.p;
    Tiling t{};
    t.block_c = block_c;
    t.tile_h = std::min(tile_h, p.H);
    t.tile_w = std::min(tile_w, p.W);
    t.tiles_y = blocks_for(p.H, t.tile_h);
    t.tiles_x = blocks_for(p.W, t.tile_w);
    t.rows = std::min(p.H, t.tile_h + 2 * chain.reach_y(chain.first));
    const int columns = std::min(p.W, t.tile_w + 2 * chain.reach_x(chain.first));
    t.pitch = pitch_for(columns, block_c, size_of(p.element));
    t.threads = threads;
    const size_t plane = static_cast<size_t>(t.rows) * t.pitch * size_of(p.element);
    t.shared_bytes = planes * plane + sizeof(float) * chain.taps() * block_c + other_bytes;
    return t;
}

// Bytes and arithmetic of the tile and its halos, over all blocks; `passes` over the maps besides reading the input.
double cost_of(const Chain& chain, const Tiling& t, double passes) {
    const Problem& p = chain.p;
    const int channels = round_up(p.C, t.block_c);
    const double tiles = static_cast<double>(p.B) * t.tiles_y * t.tiles_x;
    const int columns = std::min(p.W, t.tile_w + 2 * chain.reach_x(chain.first));
    const int bytes_a_position = round_up(t.block_c * size_of(p.element), kSector) * (channels / t.block_c);
    const double moved = tiles * bytes_a_position * (t.rows * columns + passes * t.tile_h * t.tile_w);
    double multiply_adds = 0;
    for (int l = chain.first; l < chain.last; ++l) {
        const int rows = round_up(std::min(p.H, t.tile_h + 2 * chain.reach_y(l + 1)), kRunY);
        const int width = round_up(std::min(p.W, t.tile_w + 2 * chain.reach_x(l + 1)), kRunX);
        multiply_adds += tiles * channels * rows * width * p.weights[l].kh * p.weights[l].kw;
    }
    const double arithmetic = kBytesPerMultiplyAdd * multiply_adds;
    // Half of the smaller one is assumed to overlap with the larger one.
    double cost = std::max(moved, arithmetic) + 0.5 * std::min(moved, arithmetic);
    // A multiprocessor with one small block idles at every barrier; a last round of few blocks leaves multiprocessors
    // idle.
    const auto fitting = static_cast<int>(p.limits.shared_per_multiprocessor / (t.shared_bytes + kReservedBytes));
    const int resident = std::min(kResidentThreads / t.threads, fitting);
    if (resident * t.threads < kResidentThreads) cost *= 1.3;
    const double rounds = tiles * (channels / t.block_c) / (p.limits.multiprocessors * std::max(1, resident));
    return cost * std::ceil(rounds) / rounds;
}

void keep_cheaper(const Chain& chain, Tiling t, double passes, Tiling* best) {
    if (t.shared_bytes > static_cast<size_t>(chain.p.limits.shared_per_block)) return;
    t.cost = cost_of(chain, t, passes);
    if (best->cost == 0 || t.cost < best->cost) *best = t;
}

size_t sums_bytes(int threads) { return threads * 2 * sizeof(float); }

template <typename F>
void for_each_block_c(const Problem& p, F f) {
    const int least = 16 / size_of(p.element);
    for (int block_c = 64; block_c >= least; block_c /= 2)
        if (block_c == least || block_c < 2 * p.C) f(block_c);
}

int planes_of(const Chain& chain) { return std::max(2, chain.last - chain.first); }

Tiling whole_map(const Chain& chain) {
    Tiling best{};
    for_each_block_c(chain.p, [&](int block_c) {
        for (int threads : {256, 512})
            keep_cheaper(chain,
                         cut(chain, block_c, chain.p.H, chain.p.W, planes_of(chain), threads, sums_bytes(threads)), 1,
                         &best);
    });
    return best;
}

template <typename F>
void for_each_tile(F f) {
    for (int tile_h : kTileHeights)
        for (int tile_w : kTileWidths) f(tile_h, tile_w);
}

Tiling tiles(const Chain& chain, double passes) {
    Tiling best{};
    for_each_block_c(chain.p, [&](int block_c) {
        for_each_tile([&](int tile_h, int tile_w) {
            for (int threads : {256, 512})
                keep_cheaper(chain,
                             cut(chain, block_c, tile_h, tile_w, planes_of(chain), threads, sums_bytes(threads)),
                             passes, &best);
        });
    });
    return best;
}

ForwardPlan a_level_a_launch(const Problem& p) {
    ForwardPlan plan{p.L, {}, false};
    for (int l = 0; l < p.L; ++l) {
        const double passes = 1 + (l > 0) + (l + 1 < p.L);  // agg written, agg read, the level written
        plan.group[l] = {l, l + 1, tiles({p, l, l + 1}, passes)};
    }
    return plan;
}

double cost_of(const ForwardPlan& plan) {
    double cost = 0;
    for (int i = 0; i < plan.groups; ++i) cost += plan.group[i].tiling.cost;
    return cost;
}

ForwardPlan make_forward(const Problem& p) {
    const Chain all{p, 0, p.L};
    if (const Tiling t = whole_map(all); t.cost > 0) return {1, {{0, p.L, t}}, true};
    const ForwardPlan by_level = a_level_a_launch(p);
    if (const Tiling t = tiles(all, 1); t.cost > 0 && t.cost < cost_of(by_level)) return {1, {{0, p.L, t}}, false};
    return by_level;
}

// Planes of every level's input, of the last level and of every level's gradient.
Tiling make_backward_map(const Problem& p) {
    int columns = 1;
    for (int l = 0; l < p.L; ++l) columns = std::max(columns, std::min(p.weights[l].kw, kMaxColumns));
    const Chain chain{p, 0, p.L};
    Tiling best{};
    for_each_block_c(p, [&](int block_c) {
        for (int threads : {256, 512}) {
            const size_t other = sums_bytes(threads) * columns + 2 * block_c * sizeof(float);
            keep_cheaper(chain, cut(chain, block_c, p.H, p.W, 2 * p.L + 1, threads, other), 4, &best);
        }
    });
    return best;
}

// Two planes, of the gradient and of the level's input, and a partial weight gradient of every thread.
Tiling make_backward_level(const Problem& p, int level) {
    const int kw = p.weights[level].kw;
    const Chain chain{p, level, level + 1};
    Tiling best{};
    const auto consider = [&](int block_c, int tile_h, int tile_w) {
        for (int threads : {kThreads / 2, kThreads}) {
            const size_t partials = sums_bytes(threads) * std::min(kw, kMaxColumns);
            keep_cheaper(chain, cut(chain, block_c, tile_h, tile_w, 2, threads, partials), 4, &best);
        }
    };
    for_each_block_c(p, [&](int block_c) {
        consider(block_c, p.H, p.W);
        for_each_tile([&](int tile_h, int tile_w) { consider(block_c, tile_h, tile_w); });
    });
    return best;
}

}  // namespace

ForwardPlan plan_forward(const Problem& p) {
    static Plans<ForwardPlan> plans;
    return plans.get(p, 0, [&] { return make_forward(p); });
}

Tiling plan_backward_map(const Problem& p) {
    static Plans<Tiling> plans;
    return plans.get(p, 0, [&] { return make_backward_map(p); });
}

Tiling plan_backward_level(const Problem& p, int level) {
    static Plans<Tiling> plans;
    return plans.get(p, level, [&] { return make_backward_level(p, level); });
}

bool fits(const ForwardPlan& plan) {
    return std::all_of(plan.group, plan.group + plan.groups, [](const Group& g) { return g.tiling.cost > 0; });
}

}  // namespace focalnet::cuda
