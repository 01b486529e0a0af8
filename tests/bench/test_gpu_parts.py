"""The parts of bench/gpu.sh, as far as they can be seen without a GPU: what they compile, compare, parse and write."""

from types import SimpleNamespace

import gpu_launches
import gpu_ncu
import gpu_numbers
import gpu_precompile
import gpu_sweep
import pytest
import torch

from focalnet.benchmark import tuning
from focalnet.benchmark.operators import Stage
from focalnet.benchmark.runtimes import Case


def test_numbers_obey_the_rule_on_a_cpu_and_wrong_ones_do_not(monkeypatch):
    (shape,) = gpu_numbers.SMALL
    row = gpu_numbers.compared(shape, torch.float32, "reference", "cpu")
    assert row["obeys"]
    assert row["error_over_allowed"].keys() == {
        "out", "d projection", "d weight", "d bias", "d focal weight 0", "d focal weight 1",
    }  # fmt: skip
    results = gpu_numbers.results

    def wrong(given, dtype, backend):
        found = results(given, dtype, "reference")
        return found | ({"d bias": found["d bias"] * torch.nan} if backend == "wrong" else {})

    monkeypatch.setattr(gpu_numbers, "results", wrong)
    assert not gpu_numbers.compared(shape, torch.float32, "wrong", "cpu")["obeys"]


def test_a_call_that_fails_is_a_row_like_wrong_numbers(capsys):
    assert not gpu_numbers._one(gpu_numbers.SMALL[0], torch.float16, "cpu", "cpu", {})
    assert "WRONG cpu, float16" in capsys.readouterr().out


def test_the_checked_sizes_are_the_real_stages_and_a_large_map():
    assert [(shape.height, shape.channels) for shape in gpu_numbers.SHAPES] == [
        (56, 96), (28, 192), (14, 384), (7, 768), (96, 192),
    ]  # fmt: skip
    assert gpu_numbers.SHAPES[-1].kernels == (5, 7, 9)


NCU = """==PROF== Connected to process 7
call of gated_aggregation, stage 1, triton
call of gated_aggregation_bwd, stage 3, cuda
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Context","Stream","Metric Name","Metric Unit","Metric Value"
"0","7","at::cuda::(anonymous namespace)::spin_kernel(long)","1","7","dram__bytes.sum","byte","0"
"0","7","at::cuda::(anonymous namespace)::spin_kernel(long)","1","7","lts__t_sector_hit_rate.pct","%","0"
"1","7","gated_aggregation_fwd_kernel","1","7","dram__bytes.sum","byte","1,234,567"
"1","7","gated_aggregation_fwd_kernel","1","7","lts__t_sector_hit_rate.pct","%","n/a"
"2","7","at::cuda::(anonymous namespace)::spin_kernel(long)","1","7","dram__bytes.sum","byte","0"
"3","7","void focalnet::cuda::(anonymous namespace)::toeplitz_bwd_kernel<__nv_bfloat16, 7>(int)","1","7","dram__bytes.sum","byte","5"
"""  # noqa: E501


def test_what_ncu_prints_is_read_by_call_kernel_and_metric():
    assert gpu_ncu.parsed(NCU) == {
        "gated_aggregation, stage 1, triton": {"gated_aggregation_fwd_kernel": {"dram__bytes.sum": 1234567.0}},
        "gated_aggregation_bwd, stage 3, cuda": {"toeplitz_bwd_kernel": {"dram__bytes.sum": 5.0}},
    }
    assert gpu_ncu.parsed("==ERROR== ERR_NVGPUCTRPERM\n") == {}
    row = gpu_ncu.row_of("gated_aggregation_bwd, stage 3, cuda", "toeplitz_bwd_kernel", {})
    assert (row["operator"], row["stage"], row["backend"]) == ("gated_aggregation_bwd", 3, "cuda")


def test_ncu_watches_the_script_of_the_launches_in_options_that_it_has():
    words = gpu_ncu.command("ncu")
    script = words.index(str(gpu_ncu.SCRIPT))
    assert gpu_ncu.SCRIPT.exists()
    options = {word for word in words[script + 1 :] if word.startswith("--")}
    assert options == {"--once", "--operator", "--stage"}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("void at::native::vectorized_elementwise_kernel<4, x>(int)", "vectorized_elementwise_kernel"),
        ("modulator_fwd_kernel", "modulator_fwd_kernel"),
        (
            "void focalnet::cuda::(anonymous namespace)::toeplitz_fwd_planes_kernel<__nv_bfloat16, 7>"
            "(focalnet::cuda::PlanesParams)",
            "toeplitz_fwd_planes_kernel",
        ),
        (
            "void focalnet::cuda::(anonymous namespace)::sum_dgates_kernel<__nv_bfloat16>(float const*, "
            "__nv_bfloat16*, long, int, float)",
            "sum_dgates_kernel",
        ),
        ("nvjet_sm90_tst_96x384_64x3_1x2_h_bz_coopA_bias_TNN", "nvjet_sm90_tst_96x384_64x3_1x2_h_bz_coopA_bias_TNN"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_kernels_go_by_their_plain_names(name, expected):
    assert gpu_launches.short(name) == expected


def event(name, device_type, start, end):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=device_type, time_range=span)


def test_kernels_of_one_session_go_to_the_calls_in_whose_ranges_they_ran():
    cpu, cuda = gpu_launches.DeviceType.CPU, gpu_launches.DeviceType.CUDA
    events = [
        event("call: a", cpu, 0, 100), event("call: b", cpu, 100, 300), event("aten::mm", cpu, 10, 20),
        event("call: a", cuda, 12, 90), event("void one<int>(int)", cuda, 12, 22), event("one", cuda, 50, 90),
        event("one", cuda, 110, 120), event("two", cuda, 130, 180), event("stray", cuda, 400, 500),
        event("inner range", cpu, 5, 95), event("inner range", cuda, 12, 90),
    ]  # fmt: skip
    found = gpu_launches.by_call(events, "cuda")
    times = gpu_launches.CALLS
    assert found == {
        "a": {"one": (pytest.approx(50e-6 / times), pytest.approx(2 / times))},
        "b": {
            "one": (pytest.approx(10e-6 / times), pytest.approx(1 / times)),
            "two": (pytest.approx(50e-6 / times), pytest.approx(1 / times)),
        },
    }


def test_a_session_tells_calls_apart():
    numbers = torch.ones(8)
    calls = {"sums": lambda: numbers.sum(), "sines": lambda: numbers.sin()}
    found = gpu_launches.kernel_seconds(calls, "cpu")
    assert found["sums"].keys() >= {"sum"} and "sin" not in found["sums"]
    assert found["sines"]["sin"][1] == pytest.approx(1.0)


def test_the_sum_of_a_calls_kernels_is_a_row_and_predictions_stand_beside_what_was_measured():
    stage = gpu_launches.stages("tiny_lrf")[0]
    case = gpu_launches.Case("gated_aggregation", stage, 128, torch.bfloat16, "cuda")
    expected = {("gated_aggregation", "tiny_lrf", 1, 128, "bfloat16", "triton", "all"): 10.0}
    a, b, whole = gpu_launches.rows_of(case, "triton", {"a": (2e-6, 1.0), "b": (3e-6, 2.0)}, expected)
    assert (whole["subject"], whole["measured_us"], whole["launches"]) == ("all", 5.0, 3.0)
    assert whole["predicted_over_measured"] == 2.0
    assert "predicted_us" not in a and b["launches"] == 2.0


def test_a_kernel_of_the_extension_finds_the_sum_of_its_predicted_launches():
    found = gpu_launches.predicted("H100")
    rows = [row for row in gpu_launches.read("predicted_cuda", gpu_launches.NOWHERE) if row["x"] == "H100"]
    call = ("tiny_lrf", 1, 128, "bfloat16")
    rows = [row for row in rows if (row["variant"], row["stage"], row["batch"], row["dtype"]) == call]
    sums = [row["predicted_us"] for row in rows if "sum_partials_kernel" in row["subject"]]

    def of(operator, kernel):
        return found[(operator, *call, "cuda", kernel)]

    assert of("gated_aggregation_bwd", "sum_partials_kernel") == pytest.approx(sum(sums))
    forward = "toeplitz_fwd_planes_kernel"
    assert of("gated_aggregation", forward) == of("focal_modulation", forward) > 0


def test_every_time_of_a_sweep_is_a_row():
    stage = Stage(128, 56, 56, 96, (3, 5, 7))
    plans = {"table": ({"rows": 8}, 2e-4), "plan 1": ({"rows": 4}, 1e-4)}
    found = tuning.Measured("focal_modulation", stage, None, {"triton": 2e-4, "cuda": 3e-4}, plans, {"plan 2": "no"})
    rows = gpu_sweep.rows_of(found, Case("tiny_lrf", 224, 128))
    assert [(row.get("backend"), row.get("subject"), row.get("seconds")) for row in rows] == [
        ("triton", None, 2e-4), ("cuda", None, 3e-4), ("triton", "table", 2e-4), ("triton", "plan 1", 1e-4),
        (None, "plan 2", None),
    ]  # fmt: skip


# ---- precompiling ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def h100():
    from focalnet.kernels.plan import H100

    return H100


def test_what_is_measured_is_compiled_before_what_the_sweep_tries(h100):
    operators = [operator for operator, case in gpu_precompile.cases() if case.batch == 128]
    assert set(operators) == set(gpu_precompile.PLANS)
    first = next(iter(gpu_precompile.launches(h100)))[0]
    assert first.name == "gated_aggregation_fwd_kernel"


def test_the_kernels_of_every_checked_call_are_compiled(h100):
    """By what the compiler sees: plans of calls as gpu_numbers makes them launch nothing that is not in the list."""
    from focalnet.kernels.plan import Device

    from focalnet.backends import triton_plans

    listed = {key(launch, types) for launch, types in gpu_precompile.launches(h100)}
    for shape in gpu_numbers.SHAPES:
        for operator, mask in (("focal_modulation", ()), ("focal_modulation_bwd", (True,) * 6)):
            operands = named(shape)
            case = triton_plans._case(operands, False, mask)
            assert Device.of(torch.device("cpu")) == h100
            plan = triton_plans._with(None, operator, operands, case, precise=True)
            assert {key(launch, plan.dtype_of()) for launch in plan.launches} <= listed


def test_the_kernels_of_the_stages_of_the_triton_tests_are_compiled(h100):
    """tests/triton/test_production_tiles.py: the same shapes, its q, ctx and gates contiguous."""
    from focalnet.backends import triton_plans

    listed = {key(launch, types) for launch, types in gpu_precompile.launches(h100)}
    for shape in gpu_numbers.SHAPES:
        for operator, mask in (("focal_modulation", ()), ("focal_modulation_bwd", (True,) * 6)):
            operands = {name: torch.empty_like(one).contiguous() for name, one in named(shape).items()}
            case = triton_plans._case(operands, False, mask)
            plan = triton_plans._with(None, operator, operands, case, precise=True)
            assert {key(launch, plan.dtype_of()) for launch in plan.launches} <= listed


def named(shape):
    """The operands of a call of gpu_numbers in bfloat16, as views of its projection."""
    channels, levels = shape.channels, len(shape.kernels)

    def empty(*size):
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    packed = empty(shape.batch, shape.height, shape.width, 2 * channels + levels + 1)
    q, ctx, gates = packed.split([channels, channels, levels + 1], -1)
    weights, product = [empty(channels, 1, k, k) for k in shape.kernels], empty(channels, channels)
    found = {"ctx": ctx, "gates": gates, **{f"w{level}": weight for level, weight in enumerate(weights)}}
    return found | {"q": q, "weight": product, "bias": product[0], "dout": torch.empty_like(q.contiguous())}


def key(launch, types):
    tensors = tuple(types.get(value, "number") for value in launch.arguments.values())
    return launch.name, tensors, *launch.constexprs.items(), *launch.options.items()


@pytest.mark.slow
def test_a_kernel_is_compiled_for_the_device_without_its_tensors(h100, monkeypatch):
    """With a driver that only names its device; what it compiles is what the reports compile for it."""
    import triton
    from all_launches import arguments_of
    from compiled import compile_launch
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    launches = gpu_precompile.launches(h100)
    number = next(number for number, (launch, _) in enumerate(launches) if "sum" in launch.name)
    launch, types = launches[number]
    with monkeypatch.context() as patched:
        patched.setattr(triton.runtime.driver, "_active", Driver(), raising=False)
        assert gpu_precompile.precompile(number, h100) is None
    compiled, *_ = launch.kernel.device_caches.pop(0)
    (made,) = compiled.values()
    expected = compile_launch(launch.kernel, arguments_of(launch, types), launch.options, 90)
    assert made.asm["ptx"] == expected.asm["ptx"]
