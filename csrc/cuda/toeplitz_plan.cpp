// How the forward kernels on tensor cores cut the maps: whole maps where a block's planes fit shared memory, so that
// the global level needs no second pass; else tiles with the halo of all levels. The cheapest by the instructions that
// a multiprocessor issues, and the bytes that it moves. Host code without CUDA calls.

#include "toeplitz_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "plans.h"

namespace focalnet::cuda {
namespace {

constexpr int kSector = 32;         // bytes: the unit in which global memory is read and written
constexpr int kMaxGroupWarps = 16;  // of a block
constexpr int kTileHeights[] = {16, 24, 32, 40, 48, 64, 80, 96};
constexpr int kTileWidths[] = {16, 24, 32, 40, 48, 56, 64, 80, 96, 112};
// A warp's instructions, beside kPerTile: of eight columns of a tile, four outputs a lane; of a kernel's row beside
// mma and loads; of an element that is read and written.
constexpr double kPerOutputs = 110.0, kPerKernelRow = 12.0, kPerElements = 16.0;

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

}  // namespace focalnet::cuda
