// What the two ways of going backward share: whole planes (gated_aggregation_bwd_planes.cu) and level by level
// (gated_aggregation_bwd.cu).

#pragma once

#include "launch.cuh"

namespace focalnet::cuda {

inline constexpr int kSumPositions = 1024;  // of a block of gate_sums_kernel

// [parts][taps][C] in float32, and where their sum goes, (C, taps).
struct Partials {
    const float* data;
    int parts, taps;
    void* sum;
};

// At most kMaxLevels sums in one launch, each in a fixed order (partial_sums.cu).
template <typename T>
Status sum_partials(const Partials* partials, int count, int C, cudaStream_t stream);

// dweights of all levels, if they are wanted: of a level there are parts(level) partials.
template <typename T, typename F>
Status sum_weight_partials(const Problem& p, const Gradients& out, float* const* partials, F parts,
                           cudaStream_t stream) {
    Partials levels[kMaxLevels];
    for (int l = 0; l < p.L; ++l)
        levels[l] = {partials[l], static_cast<int>(parts(l)), p.weights[l].kh * p.weights[l].kw, out.dweights[l]};
    return sum_partials<T>(levels, out.want_weights ? p.L : 0, p.C, stream);
}

// dgates: the sum of partials [blocks][B * H * W][L + 1], or if `planar` [blocks][B][L + 1][H * W], times the scale.
template <typename T>
Status sum_dgates(const Problem& p, const float* partials, int blocks, const Map& dgates, cudaStream_t stream,
                  bool planar = false);

// The global level's share, in scratch.
struct GlobalTerm {
    int tiles, chunks;
    float* level_sums;      // [B][tiles][C], of the last level
    float* gate_sums;       // [B][chunks][C], of dagg * gate
    float *global, *dmean;  // [B][C]: GELU(mean), and what every position of the last level receives

    GlobalTerm() = default;
    GlobalTerm(const Problem& p, int tiles, Scratch& scratch)
        : tiles(tiles), chunks(blocks_for(static_cast<int64_t>(p.H) * p.W, kSumPositions)) {
        level_sums = scratch.take<float>(p.B * tiles * p.C);
        gate_sums = scratch.take<float>(p.B * chunks * p.C);
        global = scratch.take<float>(p.B * p.C);
        dmean = scratch.take<float>(p.B * p.C);
    }
};

// From level_sums: global, and with `wants_dmean` also dmean.
template <typename T>
Status global_gradient(const Problem& p, const Map& dagg, const GlobalTerm& term, bool wants_dmean,
                       cudaStream_t stream);

// A map, channels last and planar (toeplitz.h).
struct TurnedMap {
    Map last;
    void* planar;
};

// One or two maps of C channels made planar, what lies beyond W zero, or with `back` channels last (toeplitz_turn.cu).
template <typename T>
Status turn_maps(const Problem& p, const TurnedMap* maps, int count, bool back, cudaStream_t stream);

// On tensor cores, level by level (toeplitz_bwd_levels.cu).
template <typename T>
size_t toeplitz_bands_scratch_bytes(const Problem& p, const Gradients& out);
template <typename T>
Status toeplitz_backward_bands(const Problem& p, const Map& dagg, const Gradients& out, void* scratch,
                               cudaStream_t stream);

template <typename T>
size_t scratch_bytes_of_planes(const Problem& p, const Gradients& out);
template <typename T>
Status backward_of_planes(const Problem& p, const Map& dagg, const Gradients& out, void* scratch, cudaStream_t stream);

}  // namespace focalnet::cuda
