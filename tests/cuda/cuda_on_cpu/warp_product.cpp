// A product of a warp: `warp_product CASE RESULT`. CASE is a list of int64 (the element type, how A and B lie, the
// pitch of their rows), then the elements of A and B in shared memory; RESULT receives C (16 x 8) in float32. Prints
// how many matrices ldmatrix loaded, and how many passes it took beyond one for each.

#include <fstream>
#include <iostream>
#include <iterator>

#include "warp_matrix.cuh"

using namespace focalnet::cuda;

namespace {

struct Operands {
    const uint16_t *a, *b;
    int pitch;
    bool a_transposed, b_transposed;  // A as [k][m] instead of [m][k]; B as [k][n] instead of [n][k]
    bool halves;                      // two mma of half the sum
    float* c;
};

template <typename T>
void product_kernel(const Operands p) {
    const int lane = threadIdx.x, i = lane % 8, second = lane / 8 % 2, third = lane / 16;
    const int row = p.a_transposed ? i + 8 * third : i + 8 * second, column = 8 * (p.a_transposed ? second : third);
    const SharedAddress a = shared_address(p.a + row * p.pitch + column);
    const SharedAddress b =
        shared_address(p.b + (p.b_transposed ? (i + 8 * second) * p.pitch : i * p.pitch + 8 * second));
    uint32_t fa[4], fb[2];
    float c[4] = {};
    if (p.a_transposed)
        ldmatrix_x4<true>(fa[0], fa[1], fa[2], fa[3], a);
    else
        ldmatrix_x4<false>(fa[0], fa[1], fa[2], fa[3], a);
    if (p.b_transposed)
        ldmatrix_x2<true>(fb[0], fb[1], b);
    else
        ldmatrix_x2<false>(fb[0], fb[1], b);
    if (p.halves) {
        mma_half<T>(c, fa[0], fa[1], fb[0]);
        mma_half<T>(c, fa[2], fa[3], fb[1]);
    } else {
        mma<T>(c, fa[0], fa[1], fa[2], fa[3], fb[0], fb[1]);
    }
    for (int j = 0; j < 4; ++j) p.c[(lane / 4 + 8 * (j / 2)) * 8 + 2 * (lane % 4) + j % 2] = c[j];
}

}  // namespace

int main(int, char** argv) {
    std::ifstream file(argv[1], std::ios::binary);
    int64_t numbers[6];  // element, A transposed, B transposed, pitch, offset of A in bytes, halves
    file.read(reinterpret_cast<char*>(numbers), sizeof numbers);
    const std::vector<char> elements{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    const int pitch = static_cast<int>(numbers[3]);
    char* memory = static_cast<char*>(std::aligned_alloc(16, 128 * 1024));
    char* a = memory + numbers[4];
    std::memcpy(a, elements.data(), 32 * pitch);
    std::memcpy(memory + 64 * 1024, elements.data() + 32 * pitch, 32 * pitch);
    float c[128];
    const Operands p{reinterpret_cast<uint16_t*>(a),
                     reinterpret_cast<uint16_t*>(memory + 64 * 1024),
                     pitch,
                     numbers[1] != 0,
                     numbers[2] != 0,
                     numbers[5] != 0,
                     c};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(32);
    if (numbers[0])
        cudaLaunchKernelEx(&config, product_kernel<__half>, p);
    else
        cudaLaunchKernelEx(&config, product_kernel<__nv_bfloat16>, p);
    std::ofstream(argv[2], std::ios::binary).write(reinterpret_cast<char*>(c), sizeof c);
    std::free(memory);
    std::cout << cuda_on_cpu::matrices_loaded << " " << cuda_on_cpu::extra_passes << "\n";
}
