"""Kernels by role, from traces that were made up: what a GPU is not needed for."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_fastpath.eval import generate_tables, profile_decode
from hf_fastpath.eval.profile_decode import Kernel, role_of, short_name

OURS = "void hf_fastpath::"
LINEAR = (
    "void hf_fastpath::linear::linear_kernel<hf_fastpath::linear::Int4Weights<__nv_bfloat16, 128>, 1, 8, 8, "
    "(hf_fastpath::linear::Place)2, true, (hf_fastpath::linear::Epilogue)1>(hf_fastpath::linear::Params<__nv_bfloat16>)"
)
ARGMAX = (
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>, unsigned int, "
    "long, 4> >(at::native::ReduceOp<float, at::native::ArgMaxOps<float>, unsigned int, long, 4>)"
)
COPY = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>(int)"


@pytest.mark.parametrize(
    ("name", "role"),
    [
        (LINEAR, "product"),
        (OURS + "w4a16_gemm_sm90_kernel<__nv_bfloat16, 128, 8, 4, 1>(Sm90Params<__nv_bfloat16>)", "product"),
        (OURS + "(anonymous namespace)::rms_norm_kernel<__half>(hf_fastpath::RmsNormArgs)", "norm"),
        (OURS + "attn::attn_decode_kernel<hf_fastpath::attn::Format<X> >(Params)", "attention"),
        (OURS + "attn::attn_step_kernel<hf_fastpath::attn::Format<X>, hf_fastpath::kv::Int8>(Params)", "attention"),
        (OURS + "kv::append_few_kernel<hf_fastpath::Int8, __half, 8, 2>(hf_fastpath::KvNewTokens)", "append"),
        (OURS + "(anonymous namespace)::finish_chunk_kernel<__half, 8, 2>(hf_fastpath::KvNewTokens, int)", "append"),
        (OURS + "(anonymous namespace)::rope_angles_kernel<__half>(long const*, float const*, float, X)", "angles"),
        (OURS + "(anonymous namespace)::moe_router_kernel<__nv_bfloat16, 4>(Params)", "router"),
        (OURS + "(anonymous namespace)::gate_up_kernel<W, (Form)0>(Params)", "experts"),
        (OURS + "(anonymous namespace)::down_kernel<W, (Form)0>(Params)", "experts"),
        (OURS + "moe::combine_kernel<__half>(float4 const*)", "experts"),
        (OURS + "(anonymous namespace)::step_kernel<__nv_bfloat16, 3, 2>(ShortConvArgs)", "convolution"),
        (OURS + "(anonymous namespace)::best_of_parts_kernel<__nv_bfloat16, true, false>(ChooseTokensArgs)", "choice"),
        (OURS + "(anonymous namespace)::note_tokens_kernel(hf_fastpath::ChooseTokensArgs, int)", "choice"),
        (OURS + "(anonymous namespace)::sampling_threshold_kernel<__half>(SamplingWeightsArgs)", "choice"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "product"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>(cublasGemvParams)", "product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>(Params)", "product"),
        ("void pytorch_flash::flash_fwd_kernel<X>(Flash_fwd_params)", "attention"),
        (ARGMAX, "choice"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>(float*)", "choice"),
        (COPY, "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_roles(name: str, role: str) -> None:
    assert role_of(name) == role


def test_short_names() -> None:
    want = "linear_kernel<Int4Weights<__nv_bfloat16, 128>, 1, 8, 8, (Place)2, true, (Epilogue)1>"
    assert short_name(LINEAR) == want
    assert short_name(OURS + "(anonymous namespace)::rms_norm_kernel<__half>(X)") == "rms_norm_kernel<__half>"
    assert short_name("nvjet_tst_64x8") == "nvjet_tst_64x8"


def event(name: str, start: float, us: float, grid: tuple[int, ...] = (4, 1, 1), **other: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": us, "args": {"grid": list(grid)}} | other


def test_a_trace_is_read_in_order() -> None:
    events = [
        event("later", 5.0, 1.0),
        event("cudaGraphLaunch", 0.0, 9.0, cat="cuda_runtime"),
        {"ph": "M", "name": "process_name"},
        event("Memset", 2.0, 1.0, cat="gpu_memset", args={}),
        event("first", 1.0, 0.5, (2, 3, 1)),
    ]
    found = profile_decode.read_trace({"traceEvents": events})
    assert found == [
        Kernel("first", (2, 3, 1), 1.0, 0.5),
        Kernel("Memset", (), 2.0, 1.0),
        Kernel("later", (4, 1, 1), 5.0, 1.0),
    ]


def test_time_of_overlapping_kernels() -> None:
    """From 0 to 10; nothing runs from 6 to 8. A kernel inside another one adds nothing."""
    kernels = [Kernel("a", (), 0, 4), Kernel("b", (), 1, 1), Kernel("c", (), 3, 3), Kernel("d", (), 8, 2)]
    assert profile_decode.wall_and_idle(kernels) == (10, 2)


def steps(tokens: int) -> list[Kernel]:
    """Two products of one name and grid, the head the second, a norm before and a copy behind each."""
    names = ("void hf_fastpath::rms_norm_kernel<X>(Y)", LINEAR, COPY, LINEAR)
    return [Kernel(name, (8, 1, 1), 10.0 * i, 2.0 + (i % 4)) for i, name in enumerate(names * tokens)]


def profile_rows() -> list[dict[str, Any]]:
    step, choice = steps(3), [Kernel(ARGMAX, (1,), 5.0 * i, 4.0) for i in range(3)]
    both = [Kernel("x", (), 0.0, 20.0), Kernel("y", (), 25.0, 5.0)]
    rows = profile_decode.rows_of(step, choice, both, 3)
    named = {"model": "m", "variant": "v", "choice": "greedy", "batch": 1, "prompt": 512}
    return [named | row for row in rows]


def test_the_rows_of_a_profile() -> None:
    rows = profile_rows()
    found = {row["role"]: (row["nodes"], row["us"]) for row in rows}
    assert found == {"norm": (1, 2), "product": (1, 3), "other": (1, 4), "head": (1, 5), "choice": (1, 4)}
    assert rows[0]["role"] == "head"  # what takes longest
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-3)
    first = rows[0]
    assert (first["nodes_total"], first["sum_us"], first["wall_us"], first["idle_us"]) == (5, 18, 10.0, 1.7)


def test_the_rows_of_a_prompt() -> None:
    """The run of median length counts, and its last product is the head's."""
    rows = profile_decode.rows_of_prompts([slower(steps(1), by) for by in (3.0, 1.0, 2.0)])
    found = {row["role"]: (row["nodes"], row["us"]) for row in rows}
    assert found == {"norm": (1, 2), "product": (1, 3), "other": (1, 4), "head": (1, 5)}
    first = rows[0]
    assert (first["phase"], first["nodes_total"], first["sum_us"]) == ("prompt", 4, 14)
    assert (first["wall_us"], first["idle_us"]) == (65, 51)
    with pytest.raises(ValueError, match="saw no kernel"):
        profile_decode.rows_of_prompts([steps(1), [], steps(1)])


def slower(kernels: list[Kernel], by: float) -> list[Kernel]:
    return [dataclasses.replace(kernel, start=kernel.start * by) for kernel in kernels]


def test_a_head_of_two_kernels() -> None:
    parts = ("nvjet_tst_64x8_splitK", "void cublasLt::splitKreduce_kernel<X>(Y)")
    names = (parts[0], "void hf_fastpath::rms_norm_kernel<X>(Y)", LINEAR, *parts)
    step = [Kernel(name, (8,), float(i), 1.0) for i, name in enumerate(names * 2)]
    roles = [role for role, _ in profile_decode.with_roles(step, 2)]
    assert roles == ["product", "norm", "product", "head", "head"] * 2


def test_a_trace_that_lost_a_kernel_has_no_head() -> None:
    roles = [role for role, _ in profile_decode.with_roles(steps(3)[1:], 3)]
    assert "head" not in roles
    assert roles.count("product") == 6


def test_nothing_seen_is_said() -> None:
    with pytest.raises(ValueError, match="saw no kernel"):
        profile_decode.rows_of([], [], [], 1)


def test_table_csv_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = profile_rows()
    console = Console(width=200, record=True)
    profile_decode.show(rows, console)
    printed = console.export_text()
    assert "One token of m, v, 1 row(s), greedy:" in printed
    assert "10.0 us a token, of which 1.7 us no kernel runs; kernels that are launched early overlap" in printed
    prompt = [rows[0] | row for row in profile_decode.rows_of_prompts([steps(1)])]
    profile_decode.show(prompt, console)
    printed = console.export_text()
    assert "The first token, 512 of prompt, of m, v, 1 row(s), greedy:" in printed
    assert "35.0 us a prompt, of which 21.0 us no kernel runs." in printed
    path = tmp_path / "new" / "profile.csv"
    sampled = [row | {"choice": "top-p"} for row in prompt]
    profile_decode.write([*rows, *prompt], path)
    with path.open(newline="") as file:
        assert tuple(csv.DictReader(file).fieldnames or ()) == profile_decode.COLUMNS
    capsys.readouterr()
    generate_tables.main([str(path)])
    printed = capsys.readouterr().out
    assert "| nodes, us | m, v, 1 row(s), greedy | m, v, 1 row(s), a prompt of 512 |" in printed
    assert "| head | 1, 5.0 | 1, 5.0 |" in printed
    assert "| time | 10 us | 35 us |" in printed
    profile_decode.write([*prompt, *sampled], path)
    generate_tables.main([str(path)])
    printed = capsys.readouterr().out
    assert "| nodes, us | m, v, 1 row(s), a prompt of 512 | m, v, 1 row(s), a prompt of 512, top-p |" in printed
    assert "| head | 1, 5.0 | 1, 5.0 |" in printed
    path.write_text("a\n1\n")
    with pytest.raises(ValueError, match="not a CSV of"):
        generate_tables.main([str(path)])
