"""Traces: kernels are found in their part and step, and own times add up."""

import pytest

from fastmoco.bench.timeline import kernels, leaves, seconds_of_parts, waits


def span(name: str, start: float, length: float, **more) -> dict:
    return {"ph": "X", "name": name, "ts": start, "dur": length, "cat": "cpu_op", "tid": 1, **more}


def test_an_operator_keeps_what_its_callees_leave_it():
    events = [
        span("outer", 0, 100),
        span("inner", 10, 30),
        span("innermost", 15, 5),
        span("inner", 50, 40),
        span("elsewhere", 20, 7, tid=2),
        span("loss", 0, 60, cat="user_annotation"),
    ]
    rows = {(row.name, row.part): row for row in kernels(events)}
    assert rows[("outer", "loss")].seconds == pytest.approx(30e-6)
    assert rows[("inner", "loss")].seconds == pytest.approx(65e-6) and rows[("inner", "loss")].calls == 2
    assert rows[("innermost", "loss")].seconds == pytest.approx(5e-6)
    assert rows[("elsewhere", "loss")].seconds == pytest.approx(7e-6)
    assert sum(row.seconds for row in rows.values()) == pytest.approx(107e-6)


def test_a_kernel_belongs_to_the_part_that_launched_it_however_late_it_runs():
    events = [
        span("update", 0, 10, cat="user_annotation"),
        span("enqueue", 20, 10, cat="user_annotation"),
        span("cuLaunchKernel", 5, 1, cat="cuda_driver", args={"correlation": 1}),
        span("cudaLaunchKernel", 25, 1, cat="cuda_runtime", args={"correlation": 2}),
        span("_update_kernel", 22, 6, cat="kernel", args={"correlation": 1}, tid=7),
        span("_enqueue_kernel", 90, 3, cat="kernel", args={"correlation": 2}, tid=7),
        span("cast", 95, 1, cat="kernel", args={"correlation": 3}, tid=7),
        span("aten::add", 2, 2),
    ]
    actual = [(row.name, row.part, row.calls) for row in kernels(events)]
    assert actual == [("_update_kernel", "update", 1), ("_enqueue_kernel", "enqueue", 1), ("cast", "other", 1)]


def test_calls_are_kept_by_step_and_marks_of_steps_are_no_parts():
    events = [
        span("step 2", 50, 40, cat="user_annotation"),
        span("step 1", 0, 40, cat="user_annotation"),
        span("update", 10, 20, cat="user_annotation"),
        span("update", 60, 20, cat="user_annotation"),
        span("add", 12, 3),
        span("add", 62, 4),
        span("add", 70, 5),
        span("add", 2, 1),
        span("add", 95, 2),
    ]
    rows = {row.part: row for row in kernels(events)}
    assert rows.keys() == {"update", "other"} and rows["update"].by_step == pytest.approx((3e-6, 9e-6))
    # Outside of every step: counted, but in none of them.
    assert rows["other"].by_step == pytest.approx((1e-6, 0)) and rows["other"].seconds == pytest.approx(3e-6)
    assert seconds_of_parts(list(rows.values()))["update"] == (rows["update"].seconds, list(rows["update"].by_step))


def node(name: str, *children: dict, **metrics: float) -> dict:
    return {"frame": {"name": name, "type": "function"}, "children": list(children), "metrics": metrics}


def leaf(name: str, count: int, nanoseconds: int) -> dict:
    return node(name, **{"count": count, "time (ns)": nanoseconds})


TREE = node(
    "ROOT",
    node("backward", leaf("dgrad", 4, 3000), node("inside", leaf("dgrad", 2, 500))),
    node("enqueue", leaf("_enqueue_kernel", 2, 40)),
    leaf("memset", 1, 10),
    node("update"),
    count=0,
)


def test_protons_kernels_belong_to_the_part_above_them():
    rows = [(row.name, row.part, row.calls, round(1e9 * row.seconds)) for row in leaves(TREE)]
    assert rows == [("dgrad", "backward", 6, 3500), ("_enqueue_kernel", "enqueue", 2, 40), ("memset", "other", 1, 10)]


def runtime(name: str, start: float, number: int = 0, cat: str = "cuda_runtime") -> dict:
    return span(name, start, 1, cat=cat, args={"correlation": number})


def copy(name: str, start: float, number: int) -> dict:
    return span(name, start, 1, cat="gpu_memcpy", tid=7, args={"correlation": number})


def test_waits_are_those_asked_for_between_the_first_step_and_the_last():
    steps = [span(f"step {i}", 10 * i, 9, cat="user_annotation") for i in (1, 2, 3)]
    quiet = [
        runtime("cudaStreamSynchronize", 5),
        runtime("cudaDeviceSynchronize", 41),
        runtime("cudaLaunchKernel", 12),
        runtime("cudaGraphLaunch", 22),
        runtime("cudaMemcpyAsync", 13, 1),
        copy("Memcpy DtoD (Device -> Device)", 14, 1),
        runtime("cudaMemcpyAsync", 8, 2),
        copy("Memcpy DtoH (Device -> Pageable)", 15, 2),
    ]
    assert waits([*steps, *quiet]) == {}
    loud = [
        runtime("cudaStreamSynchronize", 13),
        runtime("cudaStreamSynchronize", 19.5),
        runtime("cuCtxSynchronize", 22, cat="cuda_driver"),
        runtime("cudaMemcpyAsync", 38, 3),
        copy("Memcpy DtoH (Device -> Pinned)", 60, 3),
    ]
    expected = {"cudaStreamSynchronize": 2, "cuCtxSynchronize": 1, "Memcpy DtoH": 1}
    assert waits([*steps, *quiet, *loud]) == expected
    with pytest.raises(ValueError, match="no steps"):
        waits(loud)
