"""Every op's Python schema against its C++ signature: the stable ABI does not check argument types, so a mismatch would
run and deliver garbage."""

from __future__ import annotations

import re

import pytest

from hf_fastpath.build import source_dir
from hf_fastpath.ops import IN_PYTHON, NAMESPACE, SCHEMAS

CPP_TYPES = {
    "Tensor": "Tensor",
    "Tensor?": "std::optional<Tensor>",
    "int": "int64_t",
    "float": "double",
    "bool": "bool",
    "()": "void",
}


def schema_types(schema: str) -> tuple[list[str], str]:
    """The C++ argument types and return type that a schema asks for."""
    match = re.fullmatch(r"\w+\((.*)\) -> (.+)", schema)
    assert match, schema
    arguments = [re.sub(r"\(\w!\)", "", argument).split()[0] for argument in match[1].split(", ")]
    returned = match[2]
    if returned not in CPP_TYPES:  # "(Tensor, Tensor)"
        return [CPP_TYPES[argument] for argument in arguments], f"std::tuple<{returned.strip('()')}>"
    return [CPP_TYPES[argument] for argument in arguments], CPP_TYPES[returned]


def mismatches(source: str) -> list[str]:
    """What is wrong with the C++ sources, for each op; empty when all is well."""
    source = re.sub(r"//.*", "", source)
    libraries = re.findall(rf"STABLE_TORCH_LIBRARY_IMPL\({NAMESPACE}, CUDA, m\) \{{(.*?)\n\}}", source, re.DOTALL)
    lines = "\n".join(libraries)
    registered = dict(re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&(?:\w+::)*(\w+)\)\);', lines))
    problems = [f"{name}: registered, but not an op" for name in registered.keys() - SCHEMAS.keys()]
    for name, schema in SCHEMAS.items():
        function = registered.get(name)
        if (function is None) != (name in IN_PYTHON):
            problems.append(f"{name}: {'not registered' if function is None else 'registered, but said to have none'}")
        if function is None:
            continue
        definition = re.search(rf"^([\w:<>, ]+) {function}\(([^)]*)\) \{{", source, re.MULTILINE)
        if definition is None:
            problems.append(f"{name}: no function {function}")
            continue
        arguments = [
            re.sub(r"\s*&?\s*\w+$", "", argument.strip().removeprefix("const "))
            for argument in definition[2].split(",")
        ]
        found, wanted = (arguments, definition[1]), schema_types(schema)
        if found != wanted:
            problems.append(f"{name}: the schema asks for {wanted}, the source has {found}")
    return problems


def source_text() -> str:
    return "\n".join(file.read_text() for file in sorted(source_dir().glob("ops_*.cpp")))


def test_every_op_has_the_signature_of_its_schema() -> None:
    assert len(SCHEMAS) >= 5
    assert mismatches(source_text()) == []


@pytest.mark.parametrize(
    ("right", "wrong", "op"),
    [
        ("const std::optional<Tensor>& mask, double scaling, int64_t window, double softcap, "
         "const std::optional<Tensor>& sinks) { Decode d(\"attn_decode_int8\"",
         "const std::optional<Tensor>& mask, double scaling, double window, double softcap, "
         "const std::optional<Tensor>& sinks) { Decode d(\"attn_decode_int8\"", "attn_decode_int8"),
        ("int64_t out_features, int64_t group_size) {\n  constexpr Check check{\"w4a16_linear\"}",
         "int64_t out_features) {\n  constexpr Check check{\"w4a16_linear\"}", "w4a16_linear"),
        ("const std::optional<Tensor>& norm_weight, double eps, int64_t intermediate_size",
         "const Tensor& norm_weight, double eps, int64_t intermediate_size", "w4a16_swiglu"),
        ("const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size) {",
         "const Tensor& bias, int64_t out_features, int64_t group_size) {", "w4a16_linear"),
        ("int64_t group_size, int64_t variant, const std::optional<Tensor>& residual) {",
         "int64_t group_size, const std::optional<Tensor>& residual) {", "w4a16_gemm"),
        ("void kv_int8_dequantize(", "Tensor kv_int8_dequantize(", "kv_int8_dequantize"),
        ('m.impl("kv_int8_append"', '// m.impl("kv_int8_append"', "kv_int8_append"),
        ("TORCH_BOX(&hf_fastpath::w4a16_dequantize)", "TORCH_BOX(&hf_fastpath::w4a16_linear)", "w4a16_dequantize"),
    ],
)  # fmt: skip
def test_a_planted_mismatch_is_found(right: str, wrong: str, op: str) -> None:
    # The formatter may have wrapped the line differently: any white space matches any other.
    pattern = re.compile(r"\s+".join(map(re.escape, right.split())))
    planted, count = pattern.subn(wrong.replace("\\", r"\\"), source_text())
    assert count == 1
    assert [problem.split(":")[0] for problem in mismatches(planted)] == [op]
