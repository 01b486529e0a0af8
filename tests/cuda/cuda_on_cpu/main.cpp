// Runs one call of csrc/cuda's launchers: `main CASE RESULT`. CASE is a list of int64 (see main), then the elements of
// the tensors; RESULT receives the outputs' elements. Every tensor, and the scratch, is a heap block of its exact
// size. Prints the path that is taken, and how many bank conflicts ldmatrix met. `main CASE` reads the numbers alone
// and prints how every launch cuts the maps; `main CASE - launches` prints the launches themselves. The first number
// of a case says what is called: the aggregation, its backward, or a product by rows (modulate.h).

#include <fstream>
#include <iostream>

#include "gated_aggregation.h"
#include "modulate.h"
#include "toeplitz.h"
#include "warp_matrix.h"

using namespace focalnet::cuda;

namespace {

class Case {
  public:
    explicit Case(const char* path) : file_(path, std::ios::binary) {}

    int64_t number() {
        int64_t value = 0;
        if (!file_.read(reinterpret_cast<char*>(&value), sizeof value)) cuda_on_cpu::fail("the case ends early");
        return value;
    }

    void* elements(int64_t bytes) {
        char* data = static_cast<char*>(std::malloc(bytes));
        if (bytes && !file_.read(data, bytes)) cuda_on_cpu::fail("the case ends early");
        return data;
    }

  private:
    std::ifstream file_;
};

// Never written is NaN in every element type.
void* unwritten(int64_t bytes) {
    void* data = std::malloc(bytes);
    std::memset(data, 0xff, bytes);
    return data;
}

struct Layout {
    int64_t size, offset, stride_b, stride_h, stride_w;
    explicit Layout(Case& c)
        : size(c.number()), offset(c.number()), stride_b(c.number()), stride_h(c.number()), stride_w(c.number()) {}
    Map map(void* storage, int element) const {
        return {static_cast<char*>(storage) + offset * element, stride_b, stride_h, stride_w};
    }
};

Map contiguous(void* data, const Problem& p, int64_t channels) {
    return {data, p.H * p.W * channels, p.W * channels, channels};
}

void check(Status status) {
    if (!status) return;
    std::cerr << status.kernel << " failed with error " << status.error << "\n";
    std::exit(4);
}

const char* path_of(const Problem& p) {
    if (p.tensor_cores && planes_forward(p)) return "planes";
    if (p.tensor_cores) return plan_toeplitz(p).whole_map() ? "whole maps" : "tiles";
    const ForwardPlan plan = plan_forward(p);
    return plan.whole_map ? "whole map" : plan.groups > 1 ? "levels" : "tiles";
}

const char* backward_path_of(const Problem& p) {
    if (p.tensor_cores && whole_maps_backward(p)) return plan_toeplitz_backward(p).planar ? "planar" : "whole maps";
    if (p.tensor_cores && plan_toeplitz_bands(p).cost > 0) return "bands";
    return plan_backward_map(p).cost > 0 ? "whole map" : "levels";
}

void print(const char* what, int block_c, int tile_h, int tile_w, int threads, size_t shared_bytes, double cost) {
    std::cout << what << " " << block_c << " " << tile_h << " " << tile_w << " " << threads << " " << shared_bytes
              << " " << (cost > 0) << "\n";
}

void print(const char* what, const Tiling& t) {
    print(what, t.block_c, t.tile_h, t.tile_w, t.threads, t.shared_bytes, t.cost);
}

int print_plans(const Problem& p) {
    const ForwardPlan plan = plan_forward(p);
    std::cout << path_of(p) << "\n" << backward_path_of(p) << "\n";
    if (const ToeplitzPlanesTiling t = plan_toeplitz_planes(p); p.tensor_cores && planes_forward(p))
        print("forward", t.channels, p.H, p.W, 32 * toeplitz_plane_warps(t.blocks, t.channels), t.shared_bytes,
              t.cost);
    else if (const ToeplitzTiling t = plan_toeplitz(p); p.tensor_cores)
        print("forward", t.block_c, t.tile_h, t.tile_w, t.threads(), t.shared_bytes, t.cost);
    for (int i = 0; i < plan.groups && !p.tensor_cores; ++i) print("forward", plan.group[i].tiling);
    if (const ToeplitzBackwardTiling t = plan_toeplitz_backward(p); p.tensor_cores && whole_maps_backward(p)) {
        print("backward", t.block_c, p.H, p.W, t.threads(), t.shared_bytes, t.cost);
    } else if (const ToeplitzBandsPlan bands = plan_toeplitz_bands(p); p.tensor_cores && bands.cost > 0) {
        print("backward", bands.block_c, kToeplitzFirstBand, p.W, kToeplitzBackwardThreads, bands.first_bytes, 1);
        for (int l = 0; l < p.L; ++l)
            print("backward", bands.block_c, bands.level[l].band, p.W, 32 * bands.level[l].warps,
                  bands.level[l].shared_bytes, bands.level[l].cost);
    } else if (plan_backward_map(p).cost > 0) {
        print("backward", plan_backward_map(p));
    } else {
        for (int l = 0; l < p.L; ++l) print("backward", plan_backward_level(p, l));
    }
    return 0;
}

// The launches of a contiguous problem: the first address and the bytes of what they are given, then a line each, with
// the kernel's address, grid, threads, shared memory, and the bytes of the arguments. Nothing is computed; pointers
// are whatever they are, but null where nothing is wanted.
int print_launches(Problem p, bool backward, Gradients out, bool want_agg) {
    cuda_on_cpu::records = true;
    alignas(16) static char somewhere[16];
    const int64_t packed = (2 * p.C + p.L + 1 + 15) / 16 * 16;
    p.ctx = {somewhere, p.H * p.W * packed, p.W * packed, packed};
    p.gates = p.ctx;
    for (int l = 0; l < p.L; ++l) p.weights[l].data = somewhere;
    const Map map = contiguous(somewhere, p, p.C);
    const auto memory = [&](size_t bytes) {
        std::cout << reinterpret_cast<uintptr_t>(somewhere) << " " << bytes << "\n";
    };
    if (!backward) {
        memory(forward_scratch_bytes(p));
        check(gated_aggregation(p, map, somewhere, nullptr));
        return 0;
    }
    if (out.want_ctx) out.dctx = map;
    if (out.want_gates) out.dgates = contiguous(somewhere, p, p.L + 1);
    if (want_agg) out.agg = map;
    out.planar_maps = takes_planar_maps(p);  // as focal modulation gives and wants them
    for (int l = 0; l < p.L; ++l) out.dweights[l] = somewhere;
    memory(backward_scratch_bytes(p, out));
    check(gated_aggregation_backward(p, map, out, somewhere, nullptr));
    return 0;
}

// dctx and dgates: contiguous, or parts of rows of `pitch` elements, as those of a packed gradient.
class InputGradients {
  public:
    InputGradients(const Problem& p, Gradients& out, int64_t pitch)
        : positions_(p.B * p.H * p.W), size_(size_of(p.element)) {
        const auto make = [&](bool wanted, int64_t channels) {
            counts_.push_back(wanted ? positions_ * channels : 0);
            storages_.push_back(unwritten(counts_.back() * size_));
            return storages_.back();
        };
        if (pitch > 0) {
            char* rows = static_cast<char*>(make(true, pitch));
            out.dctx = {rows + p.C * size_, p.H * p.W * pitch, p.W * pitch, pitch};
            out.dgates = {rows + 2 * p.C * size_, p.H * p.W * pitch, p.W * pitch, pitch};
        } else {
            out.dctx = contiguous(make(out.want_ctx, p.C), p, p.C);
            out.dgates = contiguous(make(out.want_gates, p.L + 1), p, p.L + 1);
        }
    }

    template <typename F>
    void write(F write_elements) {
        for (size_t i = 0; i < storages_.size(); ++i) write_elements(storages_[i], counts_[i]);
    }

  private:
    int64_t positions_, size_;
    std::vector<void*> storages_;
    std::vector<int64_t> counts_;
};

// The rows of two factors and of the product, which lies in a storage of its own or, `place` = 1, in that of the first
// factor; then the sum over the rows, if it is wanted. Prints the grid.
int run_modulate(Case& input, std::ofstream& result) {
    cuda_on_cpu::generator.seed(static_cast<unsigned>(input.number()));
    RowsProblem p{};
    p.element = static_cast<Element>(input.number());
    p.rows = input.number();
    p.C = static_cast<int>(input.number());
    p.multiprocessors = static_cast<int>(input.number());
    const bool want_sum = input.number(), in_place = input.number();
    const int size = size_of(p.element);
    int64_t sizes[3], offsets[3], pitches[3];
    for (int i = 0; i < 3; ++i) {
        sizes[i] = input.number() * size;
        offsets[i] = input.number() * size;
        pitches[i] = input.number();
    }
    void* storages[3] = {input.elements(sizes[0]), input.elements(sizes[1]), nullptr};
    storages[2] = in_place ? storages[0] : unwritten(sizes[2]);
    Rows rows[3];
    for (int i = 0; i < 3; ++i) rows[i] = {static_cast<char*>(storages[i]) + offsets[i], pitches[i]};
    void* sum = unwritten(want_sum ? p.C * size : 0);
    if (want_sum) {
        const size_t bytes = modulate_and_sum_scratch_bytes(p);
        void* scratch = unwritten(static_cast<int64_t>(bytes));
        check(modulate_and_sum(p, rows[0], rows[1], rows[2], sum, scratch, nullptr));
        std::free(scratch);
    } else {
        check(modulate(p, rows[0], rows[1], rows[2], nullptr));
    }
    result.write(static_cast<char*>(storages[2]), sizes[2]);
    result.write(static_cast<char*>(sum), want_sum ? p.C * size : 0);
    std::free(sum);
    for (int i = 0; i < 3 - in_place; ++i) std::free(storages[i]);
    std::cout << cuda_on_cpu::launches << " " << gridDim.x << "\n";
    return 0;
}

}  // namespace

int main(int count, char** argv) {
    Case input(argv[1]);
    const int64_t operation = input.number();
    const bool backward = operation == 1;
    if (operation == 2) {
        std::ofstream result(argv[2], std::ios::binary);
        return run_modulate(input, result);
    }
    cuda_on_cpu::generator.seed(static_cast<unsigned>(input.number()));
    Problem p{};
    p.element = static_cast<Element>(input.number());
    p.B = input.number();
    p.H = static_cast<int>(input.number());
    p.W = static_cast<int>(input.number());
    p.C = static_cast<int>(input.number());
    p.L = static_cast<int>(input.number());
    p.scale = input.number() ? 1.0f / static_cast<float>(p.L + 1) : 1.0f;
    p.tensor_cores = input.number();
    p.limits.shared_per_block = static_cast<int>(input.number());
    p.limits.shared_per_multiprocessor = static_cast<int>(input.number());
    p.limits.multiprocessors = static_cast<int>(input.number());
    cuda_on_cpu::device_shared_limit = p.limits.shared_per_block;
    const int size = size_of(p.element);
    const Layout ctx(input), gates(input);  // views of one storage
    const Layout dagg(input);
    int64_t taps[kMaxLevels];
    for (int l = 0; l < p.L; ++l) {
        p.weights[l].kh = static_cast<int>(input.number());
        p.weights[l].kw = static_cast<int>(input.number());
        taps[l] = p.weights[l].kh * p.weights[l].kw;
    }
    Gradients out{};
    out.want_ctx = input.number();
    out.want_gates = input.number();
    const bool want_agg = input.number();
    out.want_weights = input.number();

    if (count == 2) return print_plans(p);
    if (count == 4) return print_launches(p, backward, out, want_agg);

    const int64_t gradient_pitch = input.number();
    out.planar_maps = input.number();  // dagg's elements follow in that order, and agg's are written so
    if (out.planar_maps && !takes_planar_maps(p)) cuda_on_cpu::fail("backward takes no planar maps of this shape");
    std::ofstream result(argv[2], std::ios::binary);
    void* packed = input.elements(ctx.size * size);
    p.ctx = ctx.map(packed, size);
    p.gates = gates.map(packed, size);
    for (int l = 0; l < p.L; ++l) p.weights[l].data = input.elements(taps[l] * p.C * size);
    const int64_t positions = p.B * p.H * p.W;
    const auto write = [&](void* data, int64_t elements) {
        result.write(static_cast<char*>(data), elements * size);
        std::free(data);
    };

    if (!backward) {
        void* agg = unwritten(positions * p.C * size);
        void* scratch = unwritten(static_cast<int64_t>(forward_scratch_bytes(p)));
        check(gated_aggregation(p, contiguous(agg, p, p.C), scratch, nullptr));
        write(agg, positions * p.C);
        std::free(scratch);
    } else {
        void* dagg_storage = input.elements(dagg.size * size);
        InputGradients input_gradients(p, out, gradient_pitch);
        void* agg = unwritten(want_agg ? positions * p.C * size : 0);
        if (want_agg) out.agg = contiguous(agg, p, p.C);
        for (int l = 0; l < p.L; ++l) out.dweights[l] = unwritten(out.want_weights ? taps[l] * p.C * size : 0);
        void* scratch = unwritten(static_cast<int64_t>(backward_scratch_bytes(p, out)));
        check(gated_aggregation_backward(p, dagg.map(dagg_storage, size), out, scratch, nullptr));
        input_gradients.write(write);
        write(agg, want_agg ? positions * p.C : 0);
        for (int l = 0; l < p.L; ++l) write(out.dweights[l], out.want_weights ? taps[l] * p.C : 0);
        std::free(scratch);
        std::free(dagg_storage);
    }
    std::free(packed);
    for (int l = 0; l < p.L; ++l) std::free(const_cast<void*>(p.weights[l].data));
    std::cout << (backward ? backward_path_of(p) : path_of(p)) << "\n" << cuda_on_cpu::extra_passes << "\n";
}
