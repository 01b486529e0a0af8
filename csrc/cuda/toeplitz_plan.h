// What the plans of the kernels on tensor cores share: forward (toeplitz_plan.cpp) and backward
// (toeplitz_bwd_plan.cpp).

#pragma once

#include "toeplitz.h"

namespace focalnet::cuda {

constexpr int kReservedBytes = 1024;  // of shared memory, by the driver, for every block
constexpr int kResidentWarps = 16;    // on a multiprocessor: 65536 registers, 128 a thread
constexpr int kRowsOfTile = 16;
constexpr int kMaxStackedRows = 256;  // of the images of a block, for the division by a product (toeplitz.cuh)
// A warp's instructions of a tile, counted in machine code (tests/cuda/test_toeplitz_sass.py).
constexpr double kPerTile = 60.0;
// That L2 moves while a scheduler issues an instruction: 5.5e12 bytes a second over 132 * 4 * 1.7e9 (H100 SXM).
constexpr double kBytesPerInstruction = 6.0;

// Rows of a plane start in different quarters of the 32 banks, eight in a row: no conflict in ldmatrix.
inline int odd_pitch(int columns) { return (round_up(columns, 8) / 8 | 1) * 8; }

}  // namespace focalnet::cuda
