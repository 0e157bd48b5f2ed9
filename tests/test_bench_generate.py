"""hf-fastpath bench generate on the CPU: what it measures, counts, writes and refuses. Times are not judged."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import make_llama
from typer.testing import CliRunner

import hf_fastpath.eval
from hf_fastpath import cli, patch_model
from hf_fastpath.decode_graph import DecodeGraphs
from hf_fastpath.errors import Unsupported
from hf_fastpath.eval import (
    bench_gemm,
    bench_generate,
    decode_bytes,
    generate_models,
    generate_tables,
    profile_decode,
)
from hf_fastpath.eval.bench_generate import Sizes, Subject
from hf_fastpath.eval.generate_models import VARIANTS, Source, random_model
from hf_fastpath.eval.graph_replay import replay_of
from hf_fastpath.eval.profile_decode import Kernel

LAYERS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = {
    "tiny-llama": {"model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 256},
    "tiny-moe": {
        **{"model_type": "lfm2_moe", "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
        **{"num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    },
}


def bench(*args: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "generate", "--device", "cpu", *args])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gemm, "_CPU_SECONDS", 0.0)
    monkeypatch.setattr(bench_gemm, "_CPU_COPY_BYTES", 4000)
    for name, settings in TINY.items():
        monkeypatch.setitem(generate_models.SHAPES, name, {"vocab_size": 199} | LAYERS | settings)
    monkeypatch.setenv("COLUMNS", "200")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_csv_and_plots(tmp_path: Path) -> None:
    numbers, plot = tmp_path / "new" / "generate.csv", tmp_path / "generate.png"
    sizes = ("--batches", "1,2", "--prompts", "5,9", "--new", "6", "--stock-new", "5", "--runs", "1")
    result = bench("--shape", "tiny-llama", *sizes, "--out", str(numbers), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    assert "compiled: transformers compiles the decode step on a GPU only" in result.output
    assert "memory, CUDA graphs" in result.output
    rows = read(numbers)
    sizes_measured = [("1", "5"), ("2", "5"), ("1", "9"), ("2", "9")]
    expected = [(v, *size) for v in ("stock", "lossless", "w4a16+int8") for size in sizes_measured]
    assert [(row["variant"], row["batch"], row["prompt"]) for row in rows] == expected
    assert tuple(rows[0]) == bench_generate.COLUMNS
    for row in rows:
        assert row["new"] == ("5" if row["variant"] == "stock" else "6")
        assert float(row["tok_s_low"]) <= float(row["tok_s"]) <= float(row["tok_s_high"])
        limit = int(row["batch"]) * float(row["copy_gb_s"]) * 1000 / float(row["step_mb"])
        assert float(row["limit_tok_s"]) == pytest.approx(limit, rel=0.05)  # step_mb and copy_gb_s are rounded
        assert row["scale_search"] == ("absmax" if row["variant"] == "w4a16+int8" else "")
        assert (row["peak_gb"], row["patch_peak_gb"], row["replay_tok_s"]) == ("", "", "")
        assert row["device"]
        assert row["transformers"]
    assert [bool(row["patch_s"]) for row in rows[::4]] == [False, True, True]
    for path in (plot, tmp_path / "generate_context.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.svg"
    assert CliRunner().invoke(cli.app, ["bench", "plot", str(numbers), str(again)]).exit_code == 0
    assert "<svg" in again.read_text()


def test_the_help_names_every_variant_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    printed = " ".join(bench("--help").output.split())
    for name in (*VARIANTS, *(shape for shape in generate_models.SHAPES if shape not in TINY)):
        assert name in printed


def test_rows_are_added_to_a_file(tmp_path: Path) -> None:
    numbers = tmp_path / "generate.csv"
    base = ("--variants", "w4a16+int4", "--batches", "1", "--prompts", "4", "--new", "5", "--runs", "1")
    for shape, sample in (("tiny-llama", "greedy"), ("tiny-moe", "top-p,top-p-only")):
        result = bench("--shape", shape, *base, "--sample", sample, "--out", str(numbers), "--append")
        assert result.exit_code == 0, result.output
    found = [(row["model"], row["choice"]) for row in read(numbers)]
    assert found == [("tiny-llama", "greedy"), ("tiny-moe", "top-p"), ("tiny-moe", "top-p-only")]
    text = generate_tables.markdown(read(numbers))
    assert "| tiny-moe | w4a16+int4, top-p | 4 |" in text
    numbers.write_text("a,b\n1,2\n")
    result = bench("--shape", "tiny-llama", *base, "--out", str(numbers), "--append")
    assert "has other columns" in str(result.exception)


def test_a_model_that_ships_with_the_package() -> None:
    sizes = ("--variants", "stock,w4a16+int8", "--batches", "1", "--prompts", "8", "--new", "4", "--runs", "1")
    result = bench("--family", "gpt2", *sizes)
    assert result.exit_code == 0, result.output
    assert "gpt2" in result.output


def test_every_variant_is_one_of_this_version() -> None:
    """Their options are accepted, and they are different ones."""
    kinds = set()
    for name, overrides in VARIANTS.items():
        model = random_model("tiny-llama", "cpu", "fp32")
        if overrides is not None:
            patch_model(model, {"scale_search": "absmax", "progress": False}, **overrides)
            config = model._fastpath.config
            kinds.add((config.weights, config.kv_cache, config.lm_head))
        else:
            assert name in ("stock", "compiled")
    assert len(kinds) == len(VARIANTS) - 2


def test_what_a_patch_cannot_do_is_said_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise Unsupported("not this one")

    monkeypatch.setattr(bench_generate, "patch_model", refuse)
    base = ("--shape", "tiny-llama", "--batches", "1", "--prompts", "4", "--new", "5", "--runs", "1")
    result = bench(*base, "--variants", "stock,w4a16+int8")
    assert result.exit_code == 0, result.output
    assert "Not measured: w4a16+int8: not this one" in result.output
    assert "none of the variants" in str(bench(*base, "--variants", "w4a16+int8").exception)


def test_memory_that_runs_out_is_a_row_less(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, said = bench_generate.measure, []

    def measure(subject: Any, inputs: Any, *args: Any) -> Any:
        if inputs["input_ids"].shape[0] == 2:
            raise torch.OutOfMemoryError
        return stock(subject, inputs, *args)

    monkeypatch.setattr(bench_generate, "measure", measure)
    sizes = Sizes((1, 2, 3), (4,), 5, runs=1)
    found = bench_generate.rows(Source("tiny-llama"), ("w4a16+int8",), sizes, said.append)
    assert [row["batch"] for row in found] == [1, 3]
    assert said == ["Not measured: w4a16+int8, 2 rows of 4 + 5 tokens: out of memory"]


def test_a_prompt_is_profiled_of_each_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is, where there are graphs, and there are none here. What the profiler would see is made up."""

    def record(call: Any, times: int) -> list[Kernel]:
        call()
        return [Kernel("void hf_fastpath::rms_norm_kernel<X>(Y)", (1, 1, 1), 2.0 * i, 1.5) for i in range(4 * times)]

    monkeypatch.setattr(profile_decode, "record", record)
    sizes = Sizes((2,), (4,), 5, runs=1)
    found = list(bench_generate.profiles(Source("tiny-llama"), ("stock", "w4a16+int8"), sizes, print))
    for profiles, variant in zip(found, ("stock", "w4a16+int8"), strict=True):
        ((kernel,),) = profiles
        assert (kernel["variant"], kernel["phase"], kernel["batch"]) == (variant, "prompt", 2)
        assert (kernel["role"], kernel["nodes"], kernel["us"]) == ("norm", 4, 6)
        assert (kernel["wall_us"], kernel["idle_us"], kernel["choice"]) == (7.5, 1.5, "greedy")


class Clockwork:
    """A model whose generate() takes 5 s for the prompt, 0.25 s for each later token, and 7 s more the first time."""

    device, dtype = torch.device("cpu"), torch.float32
    config = make_llama().config

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def generate(self, max_new_tokens: int, **options: Any) -> None:
        self.now += 5 + 0.25 * (max_new_tokens - 1) + (0 if self.calls else 7)
        self.calls.append((max_new_tokens, options["do_sample"]))


def test_rates_and_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Clockwork()
    monkeypatch.setattr(bench_generate.time, "perf_counter", lambda: model.now)
    monkeypatch.setattr(bench_generate, "step_bytes", lambda model, batch, length: 1e6 * (batch + length))
    monkeypatch.setattr(bench_generate, "weight_bytes", lambda model: 2e9)
    subject = Subject(model, {"variant": "stock"}, {})
    inputs = bench_generate.prompt_of(subject, 3, 10)
    row = bench_generate.measure(subject, inputs, 9, "top-p", 2, copy_gb_s=1.0)
    assert (row["tok_s"], row["tok_s_low"], row["tok_s_high"]) == (12.0, 12.0, 12.0)
    assert (row["first_token_ms"], row["setup_s"], row["weight_gb"]) == (5000.0, 7.0, 2.0)
    assert row["step_mb"] == 3 + 10 + 4.5  # the mean length
    assert row["limit_tok_s"] == pytest.approx(3 * 1e9 / 17.5e6, abs=0.1)
    assert row["of_limit"] == pytest.approx(12 / row["limit_tok_s"], abs=1e-4)
    assert model.calls == [(9, True), (1, True), (1, True), (9, True), (9, True)]


def test_bytes_of_a_step() -> None:
    """Counted by hand from the shape."""
    model = random_model("tiny-llama", "cpu", "fp32")
    config = model.config
    weights = 4 * (sum(p.numel() for p in model.parameters()) - 199 * 64)  # the embedding gives a row a token
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    kv = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, channels, bytes
    assert decode_bytes.step_bytes(model, 3, 100.5) == weights + buffers + 3 * 100.5 * kv
    patch_model(model, weights=None, kv_cache="int8")
    assert decode_bytes.cache_bytes_read(model, 10) == 2 * 2 * 2 * (16 + 2) * 10
    tied = make_llama(tie_word_embeddings=True)
    assert decode_bytes.weight_bytes_read(tied, 1) == sum(
        tensor.nbytes for tensor in (*tied.parameters(), *tied.buffers())
    )
    assert decode_bytes.chosen_share(config, 5) == 1.0


@pytest.mark.parametrize("patched", [False, True])
def test_bytes_of_the_experts_that_are_chosen(patched: bool) -> None:
    model = random_model("tiny-moe", "cpu", "fp32")
    if patched:
        patch_model(model, scale_search="absmax", progress=False)
    few, many, all_of_them = (decode_bytes.weight_bytes_read(model, batch) for batch in (1, 2, 1000))
    experts = 2 * 4 * 3 * 64 * 32 * 4  # layers, experts, matrices of 64 x 32 in float32
    if not patched:
        assert all_of_them - few == pytest.approx(experts / 2)  # two of four
        assert all_of_them - many == pytest.approx(experts / 4)  # 1 - (1/2)^2 of them
    else:
        assert 0 < all_of_them - few < experts / 4
        assert all_of_them - few == pytest.approx(2 * (all_of_them - many))


def test_h2o_reads_its_budget() -> None:
    model = patch_model(make_llama(), weights=None, kv_cache="h2o", kv_budget=48)
    short, full, longer = (decode_bytes.cache_bytes_read(model, tokens) for tokens in (24, 48, 4800))
    assert 2 * short == full == longer


GREEDY, SAMPLE = {"do_sample": False}, {"do_sample": True, "top_k": 20}


class CalledAgain:
    def __init__(self, call: Any, log: list[Any]) -> None:
        self.call, self.log = call, log

    def replay(self) -> None:
        self.log.append(self.call)
        self.call()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("how", "graphs_of_a_token"), [(GREEDY, 1), (SAMPLE, 2)], ids=["greedy", "sample"])
def test_the_graphs_of_a_token_are_replayed_as_far_as_there_is_room(
    rows: int, how: dict[str, Any], graphs_of_a_token: int
) -> None:
    log: list[Any] = []
    model = patch_model(make_llama(), weights=None, kv_cache="int8")
    model._fastpath.graphs = DecodeGraphs(lambda *_: lambda call: CalledAgain(call, log))
    model._fastpath.graphs.watch(model)
    ids = torch.randint(2, 199, (rows, 1000))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    replay = replay_of(model, inputs, 10, **how)
    (slot,) = model._fastpath.graphs.slots
    assert replay.room == slot.capacity - 1003 - 1
    before, positions = int(slot.count), slot.positions.clone()
    log.clear()
    rate = replay.rate(rows, at_most=5)
    assert rate > 0
    assert len(log) == 5 * graphs_of_a_token
    assert int(slot.count) == before + 5
    assert replay.room == slot.capacity - 1003 - 1 - 5
    assert torch.equal(slot.positions, positions + 5)
    replay.room = 0
    with pytest.raises(ValueError, match="slot is full"):
        replay.token()
    for _ in range(2):  # what was replayed leaves nothing behind
        torch.manual_seed(1)
        out = model.generate(**inputs, **how, max_new_tokens=6)
    graphs, model._fastpath.graphs = model._fastpath.graphs, None
    torch.manual_seed(1)
    assert torch.equal(model.generate(**inputs, **how, max_new_tokens=6), out)
    model._fastpath.graphs = graphs
    with pytest.raises(Unsupported, match="how tokens are chosen"):
        replay_of(model, inputs, 10, do_sample=False, repetition_penalty=1.2)


def test_a_model_without_graphs_has_none_to_replay() -> None:
    model = patch_model(make_llama(), weights=None, kv_cache="int8")
    with pytest.raises(Unsupported, match="no graph to replay"):
        replay_of(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, 5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--shape", "llama-9"), "allowed are llama-3.1-8b, lfm2.5-8b-a1b"),
        (("--shape", "tiny-llama", "--model", "some/model"), "give one of them"),
        (("--shape", "tiny-llama", "--family", "gpt2"), "--family for a model that ships"),
        (("--model", "absent/folder"), "cannot load 'absent/folder'"),
        (("--shape", "tiny-llama", "--batches", "0"), "batches (0,): allowed are 1 and more"),
        (("--shape", "tiny-llama", "--batches", "x"), "write them as 1,16,64"),
        (("--shape", "tiny-llama", "--prompts", "-5"), "prompts (-5,): allowed are 1 and more"),
        (("--shape", "tiny-llama", "--new", "1"), "new=1: must be at least 4"),
        (("--shape", "tiny-llama", "--stock-new", "0"), "stock_new=0: must be at least 4"),
        (("--shape", "tiny-llama", "--runs", "0"), "runs=0: must be at least 1"),
        (("--shape", "tiny-llama", "--compiled-batches", "0"), "compiled_batches (0,)"),
        (("--shape", "tiny-llama", "--sample", "beam"), "allowed are greedy, top-p, top-p-only"),
        (("--shape", "tiny-llama", "--variants", "w2"), "allowed are stock, compiled, lossless"),
        (("--shape", "tiny-llama", "--variants", "stock,stock"), "one is there twice"),
        (("--shape", "tiny-llama", "--dtype", "auto"), "random weights need bf16"),
        (("--shape", "tiny-llama", "--dtype", "int8"), "allowed are 'bf16'"),
        (("--shape", "tiny-llama", "--scale-search", "best"), "scale_search='best'"),
        (("--shape", "tiny-llama", "--prompts", "250", "--new", "10"), "the model has 256 positions"),
        (("--shape", "tiny-llama", "--profile", "p.csv"), "--profile shows the kernels of a GPU"),
        (("--shape", "tiny-llama", "--plot", "x.bmp"), "is a .png, .svg or .pdf"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_mistakes_are_refused(args: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = bench(*args)
    assert isinstance(result.exception, ValueError), result.output
    assert message in str(result.exception)


def test_a_plot_without_matplotlib_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hf_fastpath.eval.plots", "hf_fastpath.eval.generate_plots"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(hf_fastpath.eval, name.split(".")[-1], raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench_generate, "rows", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match="plots need matplotlib"):
        bench_generate.run(Source("tiny-llama"), ("stock",), Sizes(), Console(), plot=Path("x.png"))
