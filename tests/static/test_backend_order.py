"""The table of backends on a GPU is what bench/static/backend_order.py makes of the committed predictions."""

import backend_order
import pytest
import torch
import torch_launches
from processors import H100

from focalnet.backends import gpu_order
from focalnet.benchmark.floors import OPERATORS, stages, work

ROWS = backend_order.committed()


def test_the_table_is_what_the_committed_rows_say():
    assert backend_order.table(ROWS) == gpu_order.FIRST, "python bench/static/backend_order.py is due"


def row(backend, us, operator="gated_aggregation", stage=1, batch=128, **fields):
    found = {"x": "H100", "dtype": "bfloat16", "variant": "tiny_lrf", "subject": "all", "backend": backend}
    return found | {"operator": operator, "stage": stage, "batch": batch, "predicted_us": us} | fields


def grid(rows, operator="gated_aggregation"):
    return backend_order.table(rows).get(("H100", "bfloat16", operator))


def test_the_committed_rows_predict_both_backends():
    assert {one.get("backend") or "triton" for one in ROWS} == {"triton", "cuda"}
    assert gpu_order.FIRST


def test_the_faster_backend_of_a_class_comes_first_and_a_batch_that_was_not_predicted_is_a_dot():
    rows = [row("triton", 100), row("cuda", 50), row("triton", 10, batch=8), row("cuda", 20, batch=8)]
    assert grid(rows) == "... ... ... .TC"


def test_where_one_backend_alone_was_predicted_the_default_holds():
    rows = [row("triton", 100), row("cuda", 50), row("triton", 10, batch=8), row("triton", 10, batch=1)]
    assert grid(rows) == "... ... ... ..C"


def test_a_stage_that_was_predicted_for_one_backend_alone_decides_nothing():
    assert grid([row("triton", 100), row("cuda", 50, stage=2)]) is None


def test_of_several_maps_of_a_class_the_sum_decides():
    rows = [
        row("triton", 100),
        row("cuda", 50),
        row("triton", 100, variant="tiny_srf"),
        row("cuda", 160, variant="tiny_srf"),
    ]
    assert grid(rows) == "... ... ... ..T"


def test_a_row_without_a_backend_is_of_triton():
    assert grid([row(None, 100), row("cuda", 50)]) == "... ... ... ..C"


@pytest.mark.parametrize("triton_us, letter", [(1.2, "C"), (0.8, "T")])
@pytest.mark.parametrize("operator", ["focal_modulation", "focal_modulation_bwd"])
def test_what_pytorch_launches_around_the_aggregation_counts(operator, triton_us, letter):
    stage = stages("tiny_lrf")[0]
    launches = torch_launches.around_aggregation(operator, stage)
    whole = 50 + 1e6 * torch_launches.seconds(launches, stage, 128, torch.bfloat16, H100)
    aggregation = operator.replace("focal_modulation", "gated_aggregation")
    rows = [row("triton", triton_us * whole, operator), row("cuda", 50, aggregation), row("triton", 60, aggregation)]
    assert grid(rows, operator) == f"... ... ... ..{letter}"


def test_the_written_module_holds_the_table():
    with open(gpu_order.__file__) as file:
        text = file.read()
    rows = {
        ("H100", "bfloat16", "focal_modulation"): "TTC TTC CCC CCC",
        ("B200", "float32", "gated_aggregation"): "... ... ... CCC",
    }
    names = {"__name__": gpu_order.__name__, "__package__": "focalnet.backends"}
    exec(backend_order.written(text, rows), names)
    assert names["FIRST"] == rows
    assert backend_order.written(text, gpu_order.FIRST).count("FIRST:") == 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_operator_under_torch_compile_is_predicted_below_its_floor(operator):
    """The floor counts every byte once; torch.compile moves each of them at least once."""
    for stage in stages("tiny_lrf"):
        launches = torch_launches.compiled_reference(operator, stage)
        planes = sum(one.planes for one in launches) * 128 * stage.height * stage.width * stage.channels * 2
        assert planes > 0.95 * work(operator, stage, 128, torch.bfloat16).bytes
        assert torch_launches.seconds(launches, stage, 128, torch.bfloat16, H100) > planes / H100.bandwidth


def test_rows_state_the_least_that_torch_compile_takes():
    from performance_model import inductor_least_us
    from processors import PROCESSORS

    whole = [one for one in ROWS if one["subject"] == "all" and not one.get("backend")]
    assert whole
    for one in whole:
        stage, dtype = stages(one["variant"])[one["stage"] - 1], getattr(torch, one["dtype"])
        expected = inductor_least_us(one["operator"], stage, one["batch"], dtype, PROCESSORS[one["x"]])
        assert one["inductor_least_us"] == expected
