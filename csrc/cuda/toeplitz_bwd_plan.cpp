// How the backward kernels on tensor cores cut the maps: whole images where a block's planes fit shared memory, or one
// level after the other in bands of rows. The cheapest by the instructions that a multiprocessor issues, and the bytes
// that it moves. Host code without CUDA calls.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "plans.h"
#include "toeplitz_plan.h"

namespace focalnet::cuda {
namespace {

// Clocks from the end of a launch to the work of the next, and from memory to the first result.
constexpr double kPerLaunch = 6000.0;
// That memory moves in a clock, for a multiprocessor: 2.5e12 a second.
constexpr double kBytesPerClock = 11.0;
// Where fewer channels than fill half a sector are read and written at a time, the others come when it has left L2
// (measured: H100, 56x56x96, batch 128).
constexpr double kFetchedAgain = 4.0;

int bits_of(int power) {
    int bits = 0;
    while (power >> (bits + 1)) ++bits;
    return bits;
}

// Floats that a warp leaves of a channel's dweights (toeplitz_correlate.cuh). An odd number: channels meet in no bank.
int product_of(const FocalWeight& w) { return 4 * w.kh * (w.kw + 6) + 1; }

ToeplitzBackwardTiling cut_backward(const Problem& p, int images, int block_c, int warps, int sharers, int blocks) {
    ToeplitzBackwardTiling t{};
    t.images = images;
    t.block_c = block_c;
    t.channel_bits = bits_of(block_c);
    t.chunks = 1;
    t.warps = warps;
    t.sharers = sharers;
    t.blocks = blocks;
    t.groups = blocks_for(p.W, 8 * blocks);
    int steps = 1;
    for (int l = 0; l < p.L; ++l) {
        const int mine = toeplitz_steps(p.weights[l].kw);
        t.tap_rows += p.weights[l].kh;
        t.tap_pitch = std::max(t.tap_pitch, 2 * toeplitz_tap_width(mine));
        t.all_taps += p.weights[l].kh * p.weights[l].kw;
        t.halo = std::max({t.halo, 1, p.weights[l].kh / 2});
        t.product = std::max(t.product, product_of(p.weights[l]));
        steps = std::max(steps, mine);
    }
    t.padding = steps == 1 ? kToeplitzPadding : kToeplitzPadding2;
    t.rows = p.H + t.halo;
    const int columns = 8 * t.groups * blocks;
    t.pitch = odd_pitch(columns + (steps == 1 ? 8 : 24));
    t.sum_pitch = odd_pitch(columns);
    const size_t sums = static_cast<size_t>(images) * p.H * t.sum_pitch;
    const size_t elements = static_cast<size_t>(block_c) * ((p.L + 1) * t.plane() + sums) + (p.L + 1) * sums +
                            static_cast<size_t>(block_c) * t.tap_rows * t.tap_pitch + t.raw();
    // What dweights needs; before, agg lies there.
    const size_t shared = std::max(4 * static_cast<size_t>(block_c) * sharers * t.product, 2 * block_c * sums);
    const size_t floats = 2 * static_cast<size_t>(block_c) * images * (1 + blocks_for(p.H, 8) * t.groups);
    t.shared_bytes = 2 * elements + shared + 4 * floats;
    return t;
}

// A warp's instructions for a tile of sixteen rows under a kernel, for what dweights takes of it, and for the sums of
// dweights.
double convolved(const FocalWeight& w, int blocks) {
    const int steps = toeplitz_steps(w.kw);
    return kPerTile + w.kh * ((blocks > 1 ? 2.0 : 1.0) * blocks * steps + (blocks + 2.0 * steps) / 2 + 2 * steps + 3);
}
double correlated(const FocalWeight& w, int blocks) {
    const int steps = toeplitz_steps(w.kw);
    const double of_row = blocks * steps + (blocks + 2.0 * steps) / 2 + blocks / 2 * 4.0 + 1;
    return 25 + 2.5 * blocks + w.kh * of_row;
}
double diagonals(const FocalWeight& w) { return 30 + 12.0 * w.kh * toeplitz_steps(w.kw); }

// Of one chunk of channels: a warp's instructions, times the warps, and bytes by sectors.
struct ChunkCost {
    double instructions = 0, bytes = 0;

    ChunkCost(const Problem& p, const ToeplitzBackwardTiling& t) {
        constexpr double kPerStored = 5.0, kPerLast = 30.0, kPerDz = 50.0;  // of a pair of outputs, in a tile
        constexpr double kPerActive = 32.0, kPerFinished = 56.0, kPerTaps = 60.0, kPerPass = 40.0;
        const int rows = t.images * p.H, strips = t.images * blocks_for(p.H, 8), row_tiles = blocks_for(strips, 2);
        const int channels = blocks_for(t.block_c, t.warps / t.sharers);  // of a warp
        const int tiles = blocks_for(row_tiles * t.groups, t.sharers) * channels;
        for (int l = 0; l < p.L; ++l) {
            const FocalWeight& w = p.weights[l];
            instructions += tiles * (2 * convolved(w, t.blocks) + correlated(w, t.blocks)) + channels * diagonals(w);
            instructions += tiles * 2.0 * t.blocks * (l + 1 == p.L ? kPerLast : kPerStored);
            instructions += tiles * 2.0 * t.blocks * (l > 0 ? kPerDz : kPerStored);
            instructions += blocks_for(t.block_c, t.warps) * (kPerTaps + 7.0 * w.kh) + 4 * kPerPass;
            instructions += blocks_for(t.block_c * w.kh * w.kw, t.threads()) * (40.0 + 8.0 * t.sharers);
        }
        const int rounds = blocks_for(rows * blocks_for(p.W, 2), t.threads());
        instructions += rounds * t.block_c * ((p.L - 1) * kPerActive + kPerFinished) + rounds * p.L * 30.0;
        instructions += 24.0 * t.block_c * rows * p.W / t.threads();
        instructions *= t.warps;
        // Twice ctx, dagg, dctx and agg.
        const int channels_held = std::min(t.block_c, p.C);
        bytes = 5.0 * rows * p.W * (t.planar ? 2 * channels_held : std::max(2 * channels_held, std::min(32, 2 * p.C)));
        if (!t.planar && t.block_c < std::min(8, p.C)) bytes *= kFetchedAgain;
    }
};

// ctx and dagg, dctx and agg: read and written, on the way to planar maps or back.
double turning_cost(const Problem& p) {
    const double map = 2.0 * static_cast<double>(p.B) * p.C * p.H * (p.W + (p.W + 7) / 8 * 8);
    return 2 * kPerLaunch + 4 * map / (kBytesPerClock * p.limits.multiprocessors);
}

// `chunks` blocks of channels one after the other, gates and dgates' partials once.
double cost_of(const Problem& p, const ToeplitzBackwardTiling& t) {
    const ChunkCost chunk(p, t);
    const double positions = static_cast<double>(t.images) * p.H * p.W;
    const double instructions = t.chunks * chunk.instructions + (16.0 + 4 * p.L) * positions / 32;
    const double bytes = t.chunks * chunk.bytes + 10.0 * (p.L + 1) * positions;
    const auto fitting = static_cast<int>(p.limits.shared_per_multiprocessor / (t.shared_bytes + kReservedBytes));
    const int resident = std::max(1, std::min(kResidentWarps / t.warps, fitting));
    const double blocks =
        static_cast<double>(blocks_for(static_cast<int>(p.B), t.images)) * blocks_for(p.C, t.block_c * t.chunks);
    const double rounds = std::ceil(blocks / (static_cast<double>(p.limits.multiprocessors) * resident));
    // A block alone idles at its barriers.
    const double filled = std::min(1.0, 0.3 + 0.7 * resident * t.warps / kResidentWarps) * (resident > 1 ? 1.0 : 0.85);
    return rounds * resident * (instructions / (4 * filled) + bytes / (4 * kBytesPerInstruction)) +
           (t.planar ? turning_cost(p) : 0.0);
}

struct BestBackward {
    const Problem& p;
    ToeplitzBackwardTiling tiling{};
    void consider(ToeplitzBackwardTiling t) {
        if (t.shared_bytes > static_cast<size_t>(p.limits.shared_per_block)) return;
        const int all = blocks_for(p.C, t.block_c);
        // Two blocks for every multiprocessor, or all that there are.
        const int groups = std::max(1, blocks_for(static_cast<int>(p.B), t.images));
        const int fewest = std::min(all, blocks_for(2 * p.limits.multiprocessors, groups));
        for (int splits = fewest; splits <= std::max(fewest, std::min(all, 32)); ++splits) {
            t.chunks = std::max(1, all / splits);
            for (bool planar : {false, true}) {
                t.planar = planar;
                t.cost = cost_of(p, t);
                if (tiling.cost == 0 || t.cost < tiling.cost) tiling = t;
            }
        }
    }
};

ToeplitzBackwardTiling make_backward(const Problem& p) {
    BestBackward best{p};
    const int wanted = blocks_for(p.W, 8);
    for (int images : {1, 2, 4, 8, 16}) {
        if (images > 1 && (images >= 2 * p.B || images * p.H > kMaxStackedRows)) continue;
        for (int blocks : {1, 2, 4, 7}) {
            if (blocks_for(wanted, blocks) > 8 || (blocks > 1 && blocks >= 2 * wanted)) continue;
            for (int block_c : {2, 4, 8, 16}) {
                if (block_c > 4 && block_c >= 2 * p.C) continue;
                for (int warps : {8, 16})
                    for (int sharers : {1, 2, 4, 8})
                        best.consider(cut_backward(p, images, block_c, warps, sharers, blocks));
            }
        }
    }
    return best.tiling;
}

ToeplitzBandTiling cut_band(const Problem& p, int level, int block_c, int warps, int sharers, int blocks, int band) {
    const FocalWeight& w = p.weights[level];
    const int steps = toeplitz_steps(w.kw);
    ToeplitzBandTiling t{};
    t.block_c = block_c;
    t.channel_bits = bits_of(block_c);
    t.warps = warps;
    t.sharers = sharers;
    t.blocks = blocks;
    t.groups = blocks_for(p.W, 8 * blocks);
    t.padding = steps == 1 ? kToeplitzPadding : kToeplitzPadding2;
    t.halo = std::max(1, w.kh / 2);
    t.band = std::min(band, p.H);
    t.bands = blocks_for(p.H, t.band);
    t.rows = t.band + 2 * t.halo;
    t.product = product_of(w);
    const int columns = 8 * t.groups * blocks;
    t.pitch = odd_pitch(columns + (steps == 1 ? 8 : 24));
    t.sum_pitch = odd_pitch(columns);
    t.tap_rows = w.kh;
    t.tap_pitch = 2 * toeplitz_tap_width(steps);
    const size_t elements = 2 * static_cast<size_t>(block_c) * t.plane() + static_cast<size_t>(t.band) * t.sum_pitch +
                            static_cast<size_t>(block_c) * t.tap_rows * t.tap_pitch;
    t.shared_bytes = 2 * elements + 4 * static_cast<size_t>(block_c) * sharers * t.product;
    return t;
}

double cost_of(const Problem& p, int level, const ToeplitzBandTiling& t) {
    constexpr double kPerPair = 75.0, kPerHeldPair = 30.0;  // instructions
    const FocalWeight& w = p.weights[level];
    const int row_tiles = blocks_for(t.band, kRowsOfTile), channels = blocks_for(t.block_c, t.warps / t.sharers);
    const int tiles = blocks_for(row_tiles * t.groups, t.sharers) * channels;
    double instructions = tiles * (convolved(w, t.blocks) + correlated(w, t.blocks)) + channels * (40 + diagonals(w));
    instructions *= t.warps;
    instructions += t.block_c * blocks_for(p.W, 2) * (kPerPair * t.band + kPerHeldPair * t.rows) / 32;
    // dz and what is below, with halo; z and dagg, and what is written; a float of dgates, written and read. Channels
    // last, a sector of 32 bytes is the least.
    const int planar = 2 * t.block_c, turned = level > 0 ? planar : std::max(32, planar);
    const double bytes = p.W * (t.rows * (planar + turned) + t.band * (2.0 * planar + turned + (level > 0 ? 8 : 0)));
    const auto fitting = static_cast<int>(p.limits.shared_per_multiprocessor / (t.shared_bytes + kReservedBytes));
    const int resident = std::max(1, std::min(kResidentWarps / t.warps, fitting));
    const double blocks = static_cast<double>(p.B) * t.bands * blocks_for(p.C, t.block_c);
    const double rounds = std::ceil(blocks / (static_cast<double>(p.limits.multiprocessors) * resident));
    return rounds * resident * (instructions / (4 * (resident > 1 ? 1.0 : 0.6)) + bytes / (4 * kBytesPerInstruction));
}

ToeplitzBandTiling cheapest_band(const Problem& p, int level, int block_c) {
    ToeplitzBandTiling best{};
    for (int blocks : {2, 4, 7})
        for (int band : {16, 32, 48, 64, 96, 128, p.H})
            for (int warps : {4, 8})
                for (int sharers = 1; sharers <= warps; sharers *= 2) {
                    if (band > p.H) continue;
                    ToeplitzBandTiling t = cut_band(p, level, block_c, warps, sharers, blocks, band);
                    if (t.shared_bytes > static_cast<size_t>(p.limits.shared_per_block)) continue;
                    t.cost = cost_of(p, level, t);
                    if (best.cost == 0 || t.cost < best.cost) best = t;
                }
    return best;
}

ToeplitzBandsPlan make_bands(const Problem& p) {
    ToeplitzBandsPlan best{};
    for (int block_c : {2, 4, 8, 16}) {
        ToeplitzBandsPlan plan{};
        plan.block_c = block_c;
        bool fits = true;
        for (int l = 0; l < p.L && fits; ++l) {
            plan.level[l] = cheapest_band(p, l, block_c);
            plan.cost += plan.level[l].cost;
            fits = plan.level[l].cost > 0;
        }
        plan.first_bytes =
            2 * static_cast<size_t>(block_c + 1) * std::min(p.H, kToeplitzFirstBand) * plan.level[p.L - 1].sum_pitch;
        fits = fits && plan.first_bytes <= static_cast<size_t>(p.limits.shared_per_block);
        // What the first launches take: GELU and its derivative once more, passes over dagg, z and dz, two of dgates.
        const double channels = static_cast<double>(blocks_for(p.C, block_c)) * block_c;
        const double bytes = 2.0 * 4 * channels + (std::max(32, 2 * block_c) + 16) * channels / block_c;
        plan.cost +=
            p.B * p.H * p.W * (channels * 70.0 / 32 + bytes / kBytesPerInstruction) / (4.0 * p.limits.multiprocessors);
        // Half of a block of channels and more may lie beyond C.
        if (fits && (block_c == 2 || block_c < 2 * p.C) && (best.cost == 0 || plan.cost < best.cost)) best = plan;
    }
    if (best.cost == 0) return best;
    const ToeplitzTiling forward = plan_toeplitz(p);
    if (forward.cost == 0) return {};
    best.cost += 1.1 * forward.cost + (4 + p.L) * kPerLaunch;
    return best;
}

}  // namespace

ToeplitzBackwardTiling plan_toeplitz_backward(const Problem& p) {
    static Plans<ToeplitzBackwardTiling> plans;
    return plans.get(p, 0, [&] { return make_backward(p); });
}

ToeplitzBandsPlan plan_toeplitz_bands(const Problem& p) {
    static Plans<ToeplitzBandsPlan> plans;
    return plans.get(p, 0, [&] { return make_bands(p); });
}

bool whole_maps_backward(const Problem& p) {
    const double whole = plan_toeplitz_backward(p).cost, bands = plan_toeplitz_bands(p).cost;
    return whole > 0 && (bands == 0 || whole <= bands);
}

}  // namespace focalnet::cuda
