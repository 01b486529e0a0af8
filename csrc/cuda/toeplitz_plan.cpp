// How the kernels on tensor cores cut the maps: whole maps where a block's planes fit shared memory, so that the
// global level needs no second pass; else tiles with the halo of all levels. The cheapest by the instructions that a
// multiprocessor issues, and the bytes that it moves. Host code without CUDA calls.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "plans.h"
#include "toeplitz.h"

namespace focalnet::cuda {
namespace {

constexpr int kReservedBytes = 1024;  // of shared memory, by the driver, for every block
constexpr int kSector = 32;           // bytes: the unit in which global memory is read and written
constexpr int kResidentWarps = 16;    // on a multiprocessor: 65536 registers, 128 a thread
constexpr int kRowsOfTile = 16;
constexpr int kMaxGroupWarps = 16;    // of a block
constexpr int kMaxStackedRows = 256;  // of the images of a block, for the division by a product (toeplitz.cuh)
constexpr int kTileHeights[] = {16, 24, 32, 40, 48, 64, 80, 96};
constexpr int kTileWidths[] = {16, 24, 32, 40, 48, 56, 64, 80, 96, 112};
// A warp's instructions, counted in machine code (tests/cuda/test_toeplitz_sass.py): of a tile; of eight columns of
// it, four outputs a lane; of a kernel's row beside mma and loads; of an element that is read and written.
constexpr double kPerTile = 60.0, kPerOutputs = 110.0, kPerKernelRow = 12.0, kPerElements = 16.0;
// That L2 moves while a scheduler issues an instruction: 5.5e12 bytes a second over 132 * 4 * 1.7e9 (H100 SXM).
constexpr double kBytesPerInstruction = 6.0;
// Clocks from the end of a launch to the work of the next, and from memory to the first result.
constexpr double kPerLaunch = 6000.0;
// That memory moves in a clock, for a multiprocessor: 2.5e12 a second.
constexpr double kBytesPerClock = 11.0;
// Where fewer channels than fill half a sector are read and written at a time, the others come when it has left L2
// (measured: H100, 56x56x96, batch 128).
constexpr double kFetchedAgain = 4.0;

int round_up(int n, int to) { return (n + to - 1) / to * to; }
int blocks_for(int n, int size) { return (n + size - 1) / size; }
// Rows of a plane start in different quarters of the 32 banks, eight in a row: no conflict in ldmatrix.
int odd_pitch(int columns) { return (round_up(columns, 8) / 8 | 1) * 8; }

struct Reach {
    int y = 0, x = 0;
};

Reach reach_of(const Problem& p) {
    Reach reach;
    for (int l = 0; l < p.L; ++l) {
        reach.y += p.weights[l].kh / 2;
        reach.x += p.weights[l].kw / 2;
    }
    return reach;
}

// Rows of an image's plane: every level is written above its input by the level's reach (toeplitz_fwd.cu).
int rows_of(const Problem& p, int held) {
    int rows = 0, start = reach_of(p).y;
    for (int l = 0; l < p.L; ++l) {
        const int reach = p.weights[l].kh / 2;
        rows = std::max(rows, start + held + reach);
        start -= reach;
    }
    return rows;
}

// Everything but the cost.
ToeplitzTiling cut(const Problem& p, int images, int block_c, int groups, int warps, int blocks, int tile_h,
                   int tile_w) {
    ToeplitzTiling t{};
    t.images = images;
    t.block_c = block_c;
    t.groups = groups;
    t.warps = warps;
    t.blocks = blocks;
    t.tile_h = std::min(tile_h, p.H);
    t.tile_w = std::min(tile_w, p.W);
    t.tiles_y = blocks_for(p.H, t.tile_h);
    t.tiles_x = blocks_for(p.W, t.tile_w);
    int steps = 1;
    for (int l = 0; l < p.L; ++l) {
        const int mine = toeplitz_steps(p.weights[l].kw);
        t.tap_rows = std::max(t.tap_rows, p.weights[l].kh);
        t.tap_pitch = std::max(t.tap_pitch, 2 * toeplitz_tap_width(mine));
        steps = std::max(steps, mine);
    }
    t.padding = steps == 1 ? kToeplitzPadding : kToeplitzPadding2;
    const int held = std::min(p.H, t.tile_h + 2 * reach_of(p).y);
    t.rows = rows_of(p, held);
    // Rows of two images that ldmatrix reads together lie in different quarters of the banks, too.
    if (images > 1) t.rows = held + round_up(t.rows - held, 8);
    // Fragments beyond the last block of columns: one, or three of which one lies before it.
    t.pitch = odd_pitch(8 * warps * blocks + (steps == 1 ? 8 : 24));
    t.sum_rows = images * t.tile_h;
    t.sum_pitch = odd_pitch(8 * warps * blocks);
    const size_t elements = static_cast<size_t>(block_c) * (t.plane() + t.sums()) +
                            static_cast<size_t>(p.L + 1) * t.sums() +
                            static_cast<size_t>(groups) * t.tap_rows * t.tap_pitch;
    const size_t floats = static_cast<size_t>(block_c) * (warps * t.sum_rows + images);
    t.shared_bytes = 2 * elements + 4 * floats;
    return t;
}

double cost_of(const Problem& p, const ToeplitzTiling& t) {
    const Reach reach = reach_of(p);
    const int held_h = std::min(p.H, t.tile_h + 2 * reach.y), held_w = std::min(p.W, t.tile_w + 2 * reach.x);
    double instructions = 0;
    int after = reach.y;
    for (int l = 0; l < p.L; ++l) {
        after -= p.weights[l].kh / 2;
        const int rows = t.images * std::min(p.H, t.tile_h + 2 * after);
        const int steps = toeplitz_steps(p.weights[l].kw);
        const double kernel_row = t.blocks * steps + (t.blocks + 2 * steps) / 2 + 2 * steps + kPerKernelRow;
        instructions += blocks_for(rows, kRowsOfTile) * t.warps *
                        (kPerTile + kPerOutputs * t.blocks + kernel_row * p.weights[l].kh);
    }
    const double outputs = static_cast<double>(t.images) * t.tile_h * t.tile_w;
    instructions += kPerElements * (t.images * held_h * held_w + outputs) / 32 + 40.0 * t.tap_rows * p.L;
    instructions *= t.block_c;
    // A sector of 32 bytes is the least that is read.
    const double bytes =
        std::max(32, 2 * t.block_c) * (t.images * held_h * held_w + (t.whole_map() ? 1 : 3) * outputs);
    const auto fitting = static_cast<int>(p.limits.shared_per_multiprocessor / (t.shared_bytes + kReservedBytes));
    const int warps = t.groups * t.warps, resident = std::max(1, std::min(kResidentWarps / warps, fitting));
    const double blocks =
        static_cast<double>(blocks_for(static_cast<int>(p.B), t.images)) * t.tiles() * blocks_for(p.C, t.block_c);
    const double rounds = std::ceil(blocks / (static_cast<double>(p.limits.multiprocessors) * resident));
    // Fewer than 16 warps leave slots empty; so does a block alone, which idles while it reads and writes.
    const double filled = std::min(1.0, 0.4 + 0.6 * resident * warps / kResidentWarps) * (resident > 1 ? 1.0 : 0.85);
    return rounds * resident * (instructions / (4 * filled) + bytes / (4 * kBytesPerInstruction));
}

struct Best {
    const Problem& p;
    ToeplitzTiling tiling{};
    void consider(ToeplitzTiling t) {
        if (t.shared_bytes > static_cast<size_t>(p.limits.shared_per_block)) return;
        t.cost = cost_of(p, t);
        if (tiling.cost == 0 || t.cost < tiling.cost) tiling = t;
    }
};

// All ways to spread the columns that a tile holds over warps, and channels over groups of them.
void consider_columns(Best& best, int images, int tile_h, int tile_w) {
    const Problem& p = best.p;
    const int held = std::min(p.W, tile_w + 2 * round_up(reach_of(p).x, 2)), wanted = blocks_for(held, 8);
    for (int blocks : {1, 2, 4, 7}) {
        const int warps = blocks_for(wanted, blocks);
        if (warps > 8) continue;
        for (int block_c : {4, 8, 16, 32}) {
            if (block_c > 8 && block_c >= 2 * p.C) continue;
            for (int groups : {1, 2, 4, 8, 16})
                if (groups <= block_c && groups * warps <= kMaxGroupWarps)
                    best.consider(cut(p, images, block_c, groups, warps, blocks, tile_h, tile_w));
        }
    }
}

ToeplitzTiling make(const Problem& p) {
    Best best{p};
    for (int images : {1, 2, 4, 8, 16})
        if (images == 1 || (images < 2 * p.B && images * p.H <= kMaxStackedRows))
            consider_columns(best, images, p.H, p.W);
    if (best.tiling.cost > 0) return best.tiling;
    for (int tile_h : kTileHeights)
        for (int tile_w : kTileWidths) consider_columns(best, 1, tile_h, tile_w);
    return best.tiling;
}

// Blocks of eight columns that kernels exist for. Only the last may lie beyond the map, in part or whole.
int plane_blocks(int W) {
    const int blocks = blocks_for(W, 8);
    if (blocks <= 4) return blocks;
    return W >= kToeplitzPlaneColumns - 8 && W <= kToeplitzPlaneColumns ? 7 : 0;
}

// Rows that an image takes of a group are 7, 14, 28 or 56: their number as a power.
int image_bits_of(int H) {
    int bits = 0;
    while (kToeplitzPlaneSets << bits < H) ++bits;
    return bits;
}

ToeplitzPlanesTiling cut_planes(const Problem& p, int channels, int turn_bits, int images) {
    ToeplitzPlanesTiling t{};
    t.channels = channels;
    t.turn_bits = turn_bits;
    t.images = images;
    t.image_bits = image_bits_of(p.H);
    t.blocks = plane_blocks(p.W);
    for (int l = 0; l < p.L; ++l) {
        const int kh = toeplitz_plane_tap_rows(p.weights[l].kh);
        t.halo = std::max(t.halo, kh / 2);
        t.tap_rows += kh;
    }
    // A product takes eight sets of rows, where a group has seven: one row more is read.
    t.rows = images * (t.span() + kToeplitzImageGap) - kToeplitzImageGap + 2 * t.halo + 1;
    t.shared_bytes = t.rows * static_cast<size_t>(toeplitz_plane_row(t.blocks, channels)) +
                     (p.L + 1) * static_cast<size_t>(toeplitz_gate_plane(t.blocks)) +
                     112 * static_cast<size_t>(t.owned()) * t.tap_rows;
    return t;
}

// Of a group of images, as machine code has it: a warp's instructions for its channel, and for its share of the rest.
double group_cost(const Problem& p, const ToeplitzPlanesTiling& t) {
    constexpr double kPerPair = 18.0, kPerLevel = 60.0, kPerPosition = 48.0;
    double instructions = 0;
    for (int l = 0; l < p.L; ++l)
        instructions += kPerLevel + 7 * kPerPair * t.blocks + 4.0 * p.weights[l].kh * (2 * t.blocks + 4);
    return instructions + kPerPosition * t.images * p.H * blocks_for(p.W, 2) / 32 / 8 + 21 * t.blocks;
}

// Clocks of a scheduler for what L2 moves of a group of images: whole sectors of ctx and agg of all channels, and the
// gates' once.
double group_traffic(const Problem& p, const ToeplitzPlanesTiling& t) {
    return ((2 << t.turn_bits) + 1) * kSector * t.images * p.H * p.W / (4.0 * kBytesPerInstruction);
}

// The tiling's own cost is that of instructions, as plan_toeplitz's; among planes, what L2 moves decides too.
struct CostedPlanes {
    ToeplitzPlanesTiling tiling{};
    double total = 0;  // 0: nothing fits
    void consider(const CostedPlanes& other) {
        if (other.total > 0 && (total == 0 || other.total < total)) *this = other;
    }
};

CostedPlanes best_programs(const Problem& p, ToeplitzPlanesTiling t) {
    const auto fitting = static_cast<int>(p.limits.shared_per_multiprocessor / (t.shared_bytes + kReservedBytes));
    const int resident = std::max(1, std::min(toeplitz_planes_resident(t.blocks, t.channels), fitting));
    const int groups = blocks_for(static_cast<int>(p.B), t.images), blocks = blocks_for(p.C, t.owned());
    const double channels = t.channels, setup = 40.0 * t.tap_rows + 0.3 * t.rows * (t.blocks + 1);
    // More than a few rounds of blocks gain nothing.
    const int most = std::min(groups, 4 * resident * p.limits.multiprocessors);
    CostedPlanes best;
    for (int programs = 1; programs <= most; ++programs) {
        const int turns = blocks_for(groups, programs);
        const int rounds = blocks_for(programs * blocks, p.limits.multiprocessors * resident);
        const double used =
            std::min<double>(resident, std::ceil(static_cast<double>(programs) * blocks / p.limits.multiprocessors));
        // Fewer than 16 channels leave slots empty: those of a warp overlap like those of two.
        const double filled = std::min(1.0, 0.4 + 0.6 * used * channels / kResidentWarps);
        t.cost = rounds * used * (setup + turns * group_cost(p, t)) * t.owned() / 4 / filled;
        t.programs = programs;
        best.consider({t, t.cost + rounds * used * turns * group_traffic(p, t)});
    }
    return best;
}

ToeplitzPlanesTiling make_planes(const Problem& p) {
    if (plane_blocks(p.W) == 0 || p.H > kToeplitzPlaneRows) return {};
    for (int l = 0; l < p.L; ++l)
        if (toeplitz_steps(p.weights[l].kw) > 1) return {};
    CostedPlanes best;
    for (int channels : {16, 8}) {
        if (channels > 8 && p.C < channels) continue;
        for (int turn_bits : {0, 1}) {
            if (turn_bits > 0 && !toeplitz_planes_turn(plane_blocks(p.W))) continue;
            if (blocks_for(p.C, channels) % (1 << turn_bits) != 0) continue;  // every turn has channels
            for (int images : {1, 2, 4, 8}) {
                if (images > 1 && (!toeplitz_planes_stacked(plane_blocks(p.W)) || images << image_bits_of(p.H) > 8))
                    break;
                if (images > 1 && images >= 2 * p.B) break;
                const ToeplitzPlanesTiling t = cut_planes(p, channels, turn_bits, images);
                if (t.shared_bytes > static_cast<size_t>(p.limits.shared_per_block)) break;
                best.consider(best_programs(p, t));
            }
        }
    }
    return best.tiling;
}

int bits_of(int power) {
    int bits = 0;
    while (power >> (bits + 1)) ++bits;
    return bits;
}

// Rows that dweights takes together reach as far below the last row of dz, which must be zero there.
int backward_halo(const FocalWeight& w) { return std::max(w.kh / 2, toeplitz_together(w.kw) - 1); }

// What it reads below the last row of the input, and multiplies by zero.
int rows_below(const FocalWeight& w, int rows) { return w.kh / 2 + round_up(rows, toeplitz_together(w.kw)) - rows; }

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
        t.tap_rows = std::max(t.tap_rows, p.weights[l].kh);
        t.tap_pitch = std::max(t.tap_pitch, 2 * toeplitz_tap_width(mine));
        t.all_taps += p.weights[l].kh * p.weights[l].kw;
        t.halo = std::max({t.halo, 1, backward_halo(p.weights[l])});
        t.below = std::max(t.below, rows_below(p.weights[l], p.H));
        t.product = std::max(t.product, toeplitz_wide(p.weights[l].kh, p.weights[l].kw) ? 256 : 128);
        steps = std::max(steps, mine);
    }
    t.padding = steps == 1 ? kToeplitzPadding : kToeplitzPadding2;
    t.below = p.H + std::max(t.halo, t.below);
    t.rows = p.H + t.halo;
    const int columns = 8 * t.groups * blocks;
    t.pitch = odd_pitch(columns + (steps == 1 ? 8 : 24));
    t.sum_pitch = odd_pitch(columns);
    t.odd_pitch = odd_pitch(columns + 28);
    const size_t sums = static_cast<size_t>(images) * p.H * t.sum_pitch;
    const size_t elements = static_cast<size_t>(block_c) * ((p.L + 1) * t.plane() + sums) + (p.L + 1) * sums +
                            static_cast<size_t>(block_c) * t.tap_rows * t.tap_pitch + t.raw();
    // What dweights needs; before, agg lies there.
    const size_t shared =
        std::max(2 * t.odd() + 4 * static_cast<size_t>(block_c) * sharers * t.product, 2 * block_c * sums);
    const size_t floats = 2 * static_cast<size_t>(block_c) * images * (1 + blocks_for(p.H, 8) * t.groups);
    t.shared_bytes = 2 * elements + shared + 4 * floats;
    return t;
}

// A warp's instructions for a tile of sixteen rows under a kernel, and for what dweights takes of it.
double convolved(const FocalWeight& w, int blocks) {
    const int steps = toeplitz_steps(w.kw);
    return kPerTile + w.kh * (2.0 * blocks * steps + (blocks + 2.0 * steps) / 2 + 2 * steps + 8);
}
double correlated(const FocalWeight& w, int blocks, int groups) {
    const double columns = blocks * groups + 1, together = toeplitz_together(w.kw);
    const double wide = toeplitz_wide(w.kh, w.kw) ? 1.5 : 1.0;
    return 60 + 10.0 * blocks * groups + 16 / together * (10 + 2.75 * columns * wide);
}

// Of one chunk of channels: a warp's instructions, times the warps, and bytes by sectors.
struct ChunkCost {
    double instructions = 0, bytes = 0;

    ChunkCost(const Problem& p, const ToeplitzBackwardTiling& t) {
        constexpr double kPerStored = 5.0, kPerLast = 30.0, kPerDz = 50.0;  // of a pair of outputs, in a tile
        constexpr double kPerActive = 32.0, kPerFinished = 56.0, kPerTaps = 60.0, kPerPass = 40.0;
        const int rows = t.images * p.H, strips = t.images * blocks_for(p.H, 8), row_tiles = blocks_for(strips, 2);
        const int channels = blocks_for(t.block_c, t.warps / t.sharers);  // of a warp
        const int tiles = blocks_for(row_tiles * t.groups, t.sharers) * channels;
        const int strip_pairs = blocks_for(row_tiles, t.sharers) * channels;
        for (int l = 0; l < p.L; ++l) {
            const FocalWeight& w = p.weights[l];
            instructions += 2 * tiles * convolved(w, t.blocks) + strip_pairs * correlated(w, t.blocks, t.groups);
            instructions += tiles * 2.0 * t.blocks * (l + 1 == p.L ? kPerLast : kPerStored);
            instructions += tiles * 2.0 * t.blocks * (l > 0 ? kPerDz : kPerStored);
            instructions += 2 * blocks_for(t.block_c, t.warps) * (kPerTaps + 7.0 * w.kh) + 4 * kPerPass;
            instructions += blocks_for(t.block_c * w.kh * w.kw, t.threads()) * (40.0 + 8.0 * t.sharers);
            instructions += 60.0 * channels;
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
    t.halo = std::max(1, backward_halo(w));
    t.band = std::min(band, p.H);
    t.bands = blocks_for(p.H, t.band);
    t.rows = t.band + t.halo + std::max(t.halo, rows_below(w, 1));
    t.product = toeplitz_wide(w.kh, w.kw) ? 256 : 128;
    const int columns = 8 * t.groups * blocks;
    t.pitch = odd_pitch(columns + (steps == 1 ? 8 : 24));
    t.sum_pitch = odd_pitch(columns);
    t.odd_pitch = odd_pitch(columns + 28);
    t.tap_rows = w.kh;
    t.tap_pitch = 2 * toeplitz_tap_width(steps);
    const size_t elements = 2 * static_cast<size_t>(block_c) * t.plane() + static_cast<size_t>(t.band) * t.sum_pitch +
                            t.odd() + static_cast<size_t>(block_c) * t.tap_rows * t.tap_pitch;
    t.shared_bytes = 2 * elements + 4 * static_cast<size_t>(block_c) * sharers * t.product;
    return t;
}

double cost_of(const Problem& p, int level, const ToeplitzBandTiling& t) {
    constexpr double kPerPair = 75.0, kPerHeldPair = 30.0;  // instructions
    const FocalWeight& w = p.weights[level];
    const int row_tiles = blocks_for(t.band, kRowsOfTile), channels = blocks_for(t.block_c, t.warps / t.sharers);
    double instructions = blocks_for(row_tiles * t.groups, t.sharers) * channels * convolved(w, t.blocks);
    instructions += blocks_for(row_tiles, t.sharers) * channels * correlated(w, t.blocks, t.groups) + 100.0 * channels;
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

ToeplitzTiling plan_toeplitz(const Problem& p) {
    static Plans<ToeplitzTiling> plans;
    return plans.get(p, 0, [&] { return make(p); });
}

ToeplitzPlanesTiling plan_toeplitz_planes(const Problem& p) {
    static Plans<ToeplitzPlanesTiling> plans;
    return plans.get(p, 0, [&] { return make_planes(p); });
}

bool planes_forward(const Problem& p) {
    const ToeplitzPlanesTiling planes = plan_toeplitz_planes(p);
    if (planes.cost == 0) return false;
    // Offsets within a group of images are 32 bits wide.
    for (const Map& m : {p.ctx, p.gates})
        if ((planes.images - 1) * m.stride_b + p.H * m.stride_h + p.W * m.stride_w + p.C > INT32_MAX) return false;
    const double tiles = plan_toeplitz(p).cost;
    return tiles == 0 || planes.cost <= tiles;
}

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
