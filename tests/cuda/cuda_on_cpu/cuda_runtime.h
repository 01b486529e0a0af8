// CUDA on a CPU, for tests: the part of the language and of the runtime that csrc/cuda uses, as C++ for g++. The
// threads of a block are fibers. One runs until it meets a barrier or a shuffle, then another, picked by a seeded
// generator: a barrier that is missing lets a thread read what no other has written yet. Blocks run one after the
// other, in shuffled order. Dynamic shared memory is a heap block of the size that the launch asked for, filled with
// NaN: AddressSanitizer sees an access beyond it, the numbers show a read of what was never written.

#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __shared__ static
#define FOCALNET_SHARED_MEMORY(name) unsigned char* name = cuda_on_cpu::shared_memory()

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1) : x(x) {}
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using std::max;
using std::min;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline int threadIdxOf = 0;
struct ThreadIndex {  // unsigned, as CUDA's
    struct {
        operator unsigned() const { return static_cast<unsigned>(threadIdxOf); }
    } x;
};
inline const ThreadIndex threadIdx;
inline dim3 blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

inline std::mt19937 generator;
inline size_t shared_limit = 48 * 1024;  // of a launch; cudaFuncSetAttribute raises it, to the device's at most
inline size_t device_shared_limit = 99 * 1024;
inline long launches = 0;
inline bool records = false;  // launches are printed, not run

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
    std::_Exit(3);  // not exit: what runs at the end does not expect to run on a fiber's stack
}

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;

// Leaves the stack whose pointer goes to *from, and goes on with the stack `to`. Not swapcontext: that asks the kernel
// for the signal mask, and AddressSanitizer clears the shadow of a whole stack, at every switch.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
#if defined(__x86_64__)
constexpr size_t kReturn = 6;  // the word above a switch's stack pointer that says where to go on
asm(R"(
.text
.weak cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#elif defined(__aarch64__)
constexpr size_t kReturn = 11;
asm(R"(
.text
.weak cuda_on_cpu_switch
.type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#else
#error "cuda_on_cpu_switch is written for x86-64 and aarch64"
#endif

struct Fiber {
    enum State { kReady, kAtBarrier, kAtShuffle, kDone };
    void* stack_pointer = nullptr;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    State state = kReady;
    void* fake_stack = nullptr;
    // What the lane brings to a shuffle or an mma: one value, or its elements of A and B. Two of each, in turn: no
    // lane gets to the second operation before all have read what they need of the first.
    int turn = 0;
    float shuffled[2] = {};
    float elements[2][12] = {};
    const void* address = nullptr;  // of the row that ldmatrix is to read
    struct Copy {
        void* to;
        const void* from;
        int bytes, given;
    };
    std::vector<Copy> copies;  // asked for, not made yet
};

inline std::vector<std::unique_ptr<Fiber>> fibers;  // kept from block to block
inline void* scheduler = nullptr;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
inline std::function<void()> body;
inline unsigned char* shared = nullptr;

inline unsigned char* shared_memory() { return shared; }

inline void wait(Fiber::State state) {
    Fiber& fiber = *fibers[threadIdxOf];
    fiber.state = state;
    __sanitizer_start_switch_fiber(state == Fiber::kDone ? nullptr : &fiber.fake_stack, scheduler_stack,
                                   scheduler_stack_size);
    cuda_on_cpu_switch(&fiber.stack_pointer, scheduler);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

inline void entry() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
    body();
    wait(Fiber::kDone);
}

// A stack on which a switch finds nothing to restore and goes to `entry`, aligned as after a call.
inline void prepare(Fiber& fiber) {
    __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
    const auto end = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{63};
    void** words = reinterpret_cast<void**>(end - 256);
    std::fill_n(words, 32, nullptr);
    words[kReturn] = reinterpret_cast<void*>(&entry);
    fiber.stack_pointer = words;
#if defined(__x86_64__)
    // `ret` leaves the pointer 8 beyond kReturn, and a function expects it 8 off a multiple of 16.
    static_assert((kReturn + 1) % 2 == 1);
#endif
    fiber.state = Fiber::kReady;
    fiber.turn = 0;
    if (!fiber.copies.empty()) fail("a thread ended with copies that it did not wait for");
}

inline void resume(int thread) {
    Fiber& fiber = *fibers[thread];
    threadIdxOf = thread;
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStackBytes);
    cuda_on_cpu_switch(&scheduler, fiber.stack_pointer);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

inline void release(Fiber::State waiting, int first, int last) {
    int arrived = 0;
    for (int i = first; i < last; ++i) arrived += fibers[i]->state == waiting;
    if (arrived == 0) return;
    if (arrived != last - first) fail("threads wait at a barrier or a shuffle that others never reach");
    for (int i = first; i < last; ++i) fibers[i]->state = Fiber::kReady;
}

inline void run_block(int threads) {
    while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
    for (int i = 0; i < threads; ++i) prepare(*fibers[i]);
    std::vector<int> ready(threads);
    std::iota(ready.begin(), ready.end(), 0);
    while (!ready.empty()) {
        std::shuffle(ready.begin(), ready.end(), generator);
        for (int thread : ready) resume(thread);
        // A shuffle joins a warp, a barrier the block; whoever waits at neither is done.
        for (int first = 0; first < threads; first += kWarp) {
            const int last = min(first + kWarp, threads);
            if (std::any_of(fibers.begin() + first, fibers.begin() + last,
                            [](auto& f) { return f->state == Fiber::kAtShuffle; }))
                release(Fiber::kAtShuffle, first, last);
        }
        const auto runs = [](auto& f) { return f->state == Fiber::kReady; };
        if (std::none_of(fibers.begin(), fibers.begin() + threads, runs)) release(Fiber::kAtBarrier, 0, threads);
        ready.clear();
        for (int i = 0; i < threads; ++i)
            if (fibers[i]->state == Fiber::kReady) ready.push_back(i);
    }
}

}  // namespace cuda_on_cpu

namespace cuda_on_cpu {
inline void copy_async(void* to, const void* from, int bytes, int given) {
    for (const void* at : {static_cast<const void*>(to), from})
        if (reinterpret_cast<uintptr_t>(at) % bytes) fail("a copy that is not aligned");
    fibers[threadIdxOf]->copies.push_back({to, from, bytes, given});
}

inline void wait_for_copies() {
    for (const auto& copy : fibers[threadIdxOf]->copies) {
        std::memset(copy.to, 0, copy.bytes);
        std::memcpy(copy.to, copy.from, copy.given);
    }
    fibers[threadIdxOf]->copies.clear();
}
}  // namespace cuda_on_cpu

namespace cuda_on_cpu {
// CUDA_ON_CPU_WITHOUT=toeplitz_fwd.cu:128 leaves out the barrier of that line, so a test needs no second program.
inline const char* const left_out = std::getenv("CUDA_ON_CPU_WITHOUT");

inline bool is_left_out(const char* file, int line) {
    if (left_out == nullptr) return false;
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line) == left_out;
}

inline void barrier(Fiber::State state, const char* file, int line) {
    if (!is_left_out(file, line)) wait(state);
}
}  // namespace cuda_on_cpu

// The defaults are the file and the line of the call.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_on_cpu::barrier(cuda_on_cpu::Fiber::kAtBarrier, file, line);
}
inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_on_cpu::barrier(cuda_on_cpu::Fiber::kAtShuffle, file, line);
}

// Four of the eight bytes of two words: b has the upper four.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

// The value of the lane `from` of the same warp.
inline float __shfl_sync(unsigned mask, float value, int from) {
    using namespace cuda_on_cpu;
    if (mask != 0xffffffffu) fail("only whole warps shuffle here");
    const int turn = fibers[threadIdxOf]->turn ^= 1;
    fibers[threadIdxOf]->shuffled[turn] = value;
    wait(Fiber::kAtShuffle);
    return fibers[threadIdxOf / kWarp * kWarp + from % kWarp]->shuffled[turn];
}

inline float __shfl_xor_sync(unsigned mask, float value, int lanes) {
    using namespace cuda_on_cpu;
    return __shfl_sync(mask, value, threadIdxOf % kWarp ^ lanes);
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
    if (static_cast<size_t>(bytes) > cuda_on_cpu::device_shared_limit) return cudaErrorInvalidValue;
    cuda_on_cpu::shared_limit = bytes;
    return cudaSuccess;
}

namespace cuda_on_cpu {
template <typename T>
void print_bytes(const T& argument) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(&argument);
    std::printf(" ");
    for (size_t i = 0; i < sizeof argument; ++i) std::printf("%02x", bytes[i]);
}
}  // namespace cuda_on_cpu

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
    using namespace cuda_on_cpu;
    const size_t bytes = config->dynamicSmemBytes;
    const size_t limit = shared_limit;
    shared_limit = 48 * 1024;
    if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024)
        return cudaErrorInvalidConfiguration;
    if (bytes > limit) return cudaErrorInvalidValue;
    ++launches;
    if (records) {
        // Where the kernel lies, from a symbol that `nm` lists.
        const auto place = reinterpret_cast<intptr_t>(kernel) - reinterpret_cast<intptr_t>(&cuda_on_cpu_switch);
        std::printf("%td %u %u %zu", place, config->gridDim.x, config->blockDim.x, bytes);
        (print_bytes(args), ...);
        std::printf("\n");
        return cudaSuccess;
    }
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    body = [=] { kernel(args...); };
    std::vector<unsigned> blocks(gridDim.x);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::shuffle(blocks.begin(), blocks.end(), generator);
    for (unsigned block : blocks) {
        blockIdx = dim3(block);
        // malloc aligns to 16 bytes, as the kernels' declaration of shared memory does.
        shared = static_cast<unsigned char*>(std::malloc(bytes));
        std::memset(shared, 0xff, bytes);
        run_block(static_cast<int>(blockDim.x));
        std::free(shared);
    }
    return cudaSuccess;
}
