// How fast the CPU kernels' matrix products are, alone: GFLOP/s on one core, for the shapes of FocalNet-T at batch 1.
// "packed": weights packed before; "in place": packed slice by slice while they are used. The least of many calls, in
// time of the thread, so that what else runs on the machine counts as little as possible. For an x86-64 processor with
// AVX512_BF16, and AMX if it has that:
//
//     for f in kernels_{avx2,avx512,avx512_bf16,amx} amx; do g++ -std=c++20 -O3 -Icsrc -c csrc/cpu/$f.cpp; done
//     g++ -std=c++20 -O3 -Icsrc bench/cpu_products.cpp kernels_*.o amx.o -o cpu_products
//     taskset -c 0 ./cpu_products

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/amx.h"
#include "cpu/block.h"

using namespace focalnet::cpu;

namespace {

constexpr double kSeconds = 0.25;  // of each measurement

struct Shape {
    int64_t tokens, K, N;
    int64_t rows;  // of a block of tokens
    After after;
    bool float_result;
};

constexpr Shape kShapes[] = {
    {3136, 96, 196, 180, After::kNothing, false}, {3136, 96, 384, 180, After::kGelu, false},
    {3136, 96, 384, 180, After::kNothing, false}, {3136, 384, 96, 180, After::kNothing, true},
    {784, 192, 768, 120, After::kNothing, false}, {784, 768, 192, 120, After::kNothing, true},
    {196, 384, 1536, 98, After::kGelu, false},    {196, 384, 1536, 98, After::kNothing, false},
    {196, 1536, 384, 98, After::kNothing, true},  {49, 768, 3072, 49, After::kNothing, false},
    {49, 3072, 768, 49, After::kNothing, true},
};

struct Kind {
    const char* name;
    Products products;
    Element element;
};

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

int64_t size_of(Element e) { return e == Element::kBFloat16 ? 2 : 4; }

double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

using Memory = std::unique_ptr<char, decltype(&std::free)>;

Memory random_matrix(int64_t elements, Element element) {
    constexpr size_t kPage = size_t{2} << 20;
    const size_t bytes = (static_cast<size_t>(elements * size_of(element)) / kPage + 1) * kPage;
    Memory memory(static_cast<char*>(std::aligned_alloc(kPage, bytes)), &std::free);
    std::memset(memory.get(), 0, bytes);
    for (int64_t i = 0; i < elements; ++i) {
        const float value = static_cast<float>(std::rand() % 1000 - 500) / 1000.0f;
        const char* from = reinterpret_cast<const char*>(&value) + (element == Element::kBFloat16 ? 2 : 0);
        std::memcpy(memory.get() + i * size_of(element), from, size_of(element));
    }
    return memory;
}

int64_t pitch_of(int64_t columns, Element e) {
    const int64_t line = 64 / size_of(e);
    return (ceil_div(columns, line) | 1) * line;
}

double gigaflops(const Shape& s, const Kind& kind, bool packed) {
    const Products& p = kind.products;
    const Element result = s.float_result ? Element::kFloat32 : kind.element;
    const int64_t a_pitch = pitch_of(s.K, kind.element), c_pitch = pitch_of(s.N, result),
                  panels = ceil_div(s.N, kPanel);
    const Memory a = random_matrix(s.tokens * a_pitch, kind.element), w = random_matrix(s.K * s.N, kind.element);
    const Memory c = random_matrix(s.tokens * c_pitch, result);
    const int64_t panel = (p.header + ceil_div(s.K, p.words_of_k)) * kPanel;
    const Memory panels_memory = random_matrix(panels * panel, Element::kFloat32);
    float* to = reinterpret_cast<float*>(panels_memory.get());
    Linear linear{w.get(), kind.element, nullptr, nullptr, s.K, s.N};
    for (int64_t j = 0; j < panels; ++j) p.pack(linear, j * kPanel, to + j * panel);
    if (packed) linear.packed = to;
    const int64_t k_block = ceil_div(ceil_div(s.K, ceil_div(s.K, p.depth)), kPanel) * kPanel;
    double least = 1e9;
    for (const double start = thread_seconds(); thread_seconds() - start < kSeconds;) {
        const double begin = thread_seconds();
        for (int64_t row = 0; row < s.tokens; row += s.rows)
            p.gemm({{a.get() + row * a_pitch * size_of(kind.element), a_pitch, kind.element},
                    std::min(s.rows, s.tokens - row),
                    linear,
                    0,
                    s.K,
                    k_block,
                    0,
                    panels * kPanel,
                    {c.get() + row * c_pitch * size_of(result), c_pitch, result},
                    false,
                    s.after,
                    {}});
        least = std::min(least, thread_seconds() - begin);
    }
    return 2e-9 * static_cast<double>(s.tokens * s.K * s.N) / least;
}

}  // namespace

int main() {
    const Products avx2{Element::kFloat32, kDepth, 1, 1, kAvx2Kernels.pack, kAvx2Kernels.gemm};
    const Products avx512{Element::kFloat32, kDepth, 1, 1, kAvx512Kernels.pack, kAvx512Kernels.gemm};
    std::vector<Kind> kinds = {{"avx2", avx2, Element::kFloat32},
                               {"avx512", avx512, Element::kFloat32},
                               {"avx512_bf16", kDotProducts, Element::kBFloat16}};
    if (why_not_amx() == nullptr) kinds.push_back({"amx", kAmxProducts, Element::kBFloat16});
    std::printf("GFLOP/s, packed / in place\n%-22s", "tokens      K      N");
    for (const Kind& kind : kinds) std::printf("%18s", kind.name);
    for (const Shape& s : kShapes) {
        std::printf("\n%6ld %6ld %6ld%s", long(s.tokens), long(s.K), long(s.N), s.after == After::kGelu ? "+g" : "  ");
        for (const Kind& kind : kinds)
            std::printf("%11.1f /%5.1f", gigaflops(s, kind, true), gigaflops(s, kind, false));
    }
    std::printf("\n");
}
