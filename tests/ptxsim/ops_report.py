# SPDX-License-Identifier: Apache-2.0
"""Counts what the CUDA kernels ask of memory, in the simulator, and writes the table of docs/simulated.md.

    PYTHONPATH=tests:. python -m ptxsim.ops_report

Counted, not measured: there is no cache, no clock and no GPU here.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .cudart import CUDA_SOURCES, ROOT, Device
from .ops import BF16, F16, F32, UPDATE
from .ops_cases import Case, case

DOCUMENT = ROOT / "docs" / "simulated.md"
ARCH, OLDER = "sm_90", "sm_80"  # with clusters, and without

# Which operand a line of a kernel reaches: text of that line, or of the line it was inlined at. Of ops not named here,
# whose operands are small or are read once, only the totals are shown.
OPERANDS = {
    "low_rank_down": {
        "x": "x[group][i].load(", "factor": "share.load(source", "out": "store_as(out, dtype",
        "out ": "out[row * args.rank", "out  ": "workspace[part * n",
    },
    "multi_lora_down": {
        "x": "x[group][i].load(", "factors": "share.load(source", "out": "store_as(out, dtype",
        "out ": "out[row * args.rank", "out  ": "workspace[part * n", "plan": "groups.order[",
        "plan ": "groups.tiles[", "plan  ": "groups.offsets[",
    },
    "low_rank_up": {
        "u": "load_quad(from +", "factor": "chunk.load(source", "out_scale and bias": "vector[vector_column] : 0",
        "y": "y_chunk[i].load(", "y ": "static_cast<T*>(args.y) + index",
        "z": "static_cast<T*>(args.z) + index",
    },
    "low_rank_grad": {
        "x": "x[i][half].load(", "u": "from[row * ranks", "grad": "store_as(args.grad",
        "sums": "[first_column + c] = total", "sums ": "part_sums(args, left.parts, 0)", "grad ": "workspace[index]",
        "grad  ": "workspace[part * n", "grad   ": "store_as(out, dtype",
    },
    "multi_lora_grad": {
        "x": "x[i][half].load(", "u": "from[row * ranks", "grad": "store_as(args.grad", "grad ": "part[index] = value",
        "grad  ": "workspace[part * n", "grad   ": "store_as(out, dtype", "plan": "order_[entry]",
        "plan ": "groups.offsets[",
    },
    "nf4_gradient": {
        "q": "copy_async(stage + q_target_", "packed": "copy_async(stage + packed_target_",
        "absmax": "absmax_of(weight_", "factor": "args.factor.data", "dh": "load_quad(args.dh",
        "dx": "store_quad(", "table": "kNf4Table[",
    },
    "column_sums": {
        "g": "g_chunk[i].load(", "z": "z_chunk[i].load(", "scale": "load_chunk(args.scale", "q": "store_chunk(q +",
        "sums and dots": "out[first_column + c]", "sums and dots ": "workspace[part * n",
        "sums and dots  ": "store_as(out, dtype",
    },
    "quantize_nf4": {"w": "load_chunk(w + index", "absmax": "args.absmax[block]", "packed": "(packed) = word"},
    "dequantize_nf4": {"packed": "load_codes(args.packed", "absmax": "args.absmax[index", "out": "store_chunk("},
    "nf4_forward": {
        "x": "copy_async((target", "packed": "copy_async(packed", "absmax": "static_cast<const float*>(blocks_)",
        "table": "kDynamicTable[code]", "codes": "static_cast<const uint8_t*>(blocks_)",
        "nested_absmax": "weight_.nested_absmax[", "offset": "*weight_.offset", "table ": "kNf4Table[",
        "u": "load_quad(args.u", "factor": "args.factor.data) +", "out_scale": "load_quad(args.out_scale",
        "bias": "load_quad(args.bias",
        "y": "store_quad(static_cast<T*>(args_.y)", "z": "store_quad(static_cast<T*>(args_.z)",
        "workspace": "to[0] =", "workspace ": "to[stride_] =", "workspace  ": "row_pair(from[0], from[stride_])",
    },
    "quantize_absmax": {
        "absmax, for the mean": "load_quad(args.absmax + at", "absmax": "load_quad(args.absmax + index",
        "codes": "(codes) = word", "nested_absmax": "args.nested_absmax[block]", "offset": "args.offset",
        "workspace": "args.workspace[",
    },
    "dequantize_absmax": {
        "codes": "(codes);", "nested_absmax and offset": "args.nested_absmax[block]",
        "absmax": "store_quad(args.absmax",
    },
}  # fmt: skip
# Where the field of the struct has another name.
FIELDS = {
    "packed": ("packed", "weight.packed"), "absmax": ("absmax", "weight.absmax"), "codes": ("codes", "weight.codes"),
    "nested_absmax": ("nested_absmax", "weight.nested_absmax"), "offset": ("offset", "weight.offset"),
    "factor": ("factor.data",), "factors": ("factors.data",), "y ": ("y",),
    **dict.fromkeys(("plan", "plan ", "plan  "), ("groups.offsets", "groups.order", "groups.tiles")),
    "absmax, for the mean": ("absmax",),
    **dict.fromkeys(("sums and dots", "sums and dots ", "sums and dots  "), ("sums", "dots")),
    "out_scale and bias": ("out_scale", "bias"), "nested_absmax and offset": ("nested_absmax", "offset"),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    case: Case
    title: str


def _rows() -> list[Row]:
    down, up, grad = (dict(rows=n, columns=m) for n, m in ((256, 2048), (256, 2048), (2048, 256)))
    plain = dict(out_scale=False, bias=False, z=False)
    many = dict(adapters=4, kind="all", own=False, rank=16, x=BF16)
    layers, factors = ((12, 2048, 2048), (12, 2048, 512)), ((16, 2048, True), (16, 2048, False))
    gemm, everything = dict(out=512, columns=1024), dict(rank=16, out_scale=True, bias=True, z=True)
    return [
        Row(case("low_rank_down", **down, rank=8, x=BF16), "256 x 2048 bf16, rank 8"),
        Row(case("low_rank_down", **down, rank=16, x=BF16, p=0.1), "256 x 2048 bf16, rank 16, dropout"),
        Row(
            case("low_rank_down", **down, rank=16, x=BF16, rank_major=False), "256 x 2048 bf16, rank 16, F column-major"
        ),
        Row(case("low_rank_down", **down, rank=32, x=F32), "256 x 2048 f32, rank 32"),
        Row(case("low_rank_down", rows=2048, columns=256, rank=16, x=BF16), "2048 x 256 bf16, rank 16"),
        Row(case("low_rank_up", **up, rank=16, y=BF16, rank_major=False, **plain), "256 x 2048 bf16, rank 16"),
        Row(
            case("low_rank_up", **up, rank=16, y=BF16, p=0.1, **plain),
            "256 x 2048 bf16, rank 16, dropout, F rank-major",
        ),
        Row(case("low_rank_up", **up, rank=16, y=BF16), "256 x 2048 bf16, rank 16, out_scale, bias, z"),
        Row(case("low_rank_up", **up, rank=32, y=F32, **plain), "256 x 2048 f32, rank 32"),
        Row(case("low_rank_grad", **grad, rank=8, x=BF16, p=0.1), "2048 x 256 bf16, rank 8, dropout"),
        Row(case("low_rank_grad", **grad, rank=16, x=BF16), "2048 x 256 bf16, rank 16"),
        Row(
            case("low_rank_grad", **grad, rank=16, x=BF16, rank_major=False, sums=True),
            "2048 x 256 bf16, rank 16, column-major, with sums",
        ),
        Row(case("low_rank_grad", **grad, rank=16, x=F32, rank_major=False), "2048 x 256 f32, rank 16, column-major"),
        Row(case("low_rank_grad", **up, rank=16, x=BF16), "256 x 2048 bf16, rank 16"),
        Row(case("multi_lora_down", **down, **many), "256 x 2048 bf16, rank 16, 4 adapters"),
        Row(
            case("multi_lora_down", **down, **many | {"adapters": 32}, p=0.1),
            "256 x 2048 bf16, rank 16, 32 adapters, dropout",
        ),
        Row(case("multi_lora_down", **down, **many | {"x": F32}), "256 x 2048 f32, rank 16, 4 adapters"),
        Row(case("multi_lora_grad", **grad, **many, p=0.1), "2048 x 256 bf16, rank 16, 4 adapters, dropout"),
        Row(
            case("multi_lora_grad", **down, **many, rank_major=False),
            "256 x 2048 bf16, rank 16, 4 adapters, column-major",
        ),
        Row(
            case("multi_lora_up", **down, adapters=4, kind="all", own=False, rank=16, y=BF16, rank_major=False),
            "256 x 2048 bf16, rank 16, 4 adapters",
        ),
        Row(case("multi_lora_plan", rows=4096, adapters=32, kind="all"), "4096 rows, 32 adapters"),
        Row(
            case("nf4_gradient", rows=64, out=512, columns=1024, rank=16, p=0.1),
            "64 x 512 x 1024 bf16, rank 16, dropout",
        ),
        Row(case("nf4_gradient", rows=256, out=512, columns=8192), "256 x 512 x 8192 bf16"),
        Row(case("column_sums", **grad, g=BF16, q=False, dots=False), "2048 x 256 bf16, sums"),
        Row(case("column_sums", **grad, g=BF16, q=False), "2048 x 256 bf16, sums and dots"),
        Row(case("column_sums", **grad, g=BF16), "2048 x 256 bf16, q, sums and dots"),
        Row(case("column_sums", **grad, g=F32), "2048 x 256 f32, q, sums and dots"),
        Row(case("quantize_nf4", n=2**19, block_size=64, w=BF16, special=False), "524,288 bf16, blocks of 64"),
        Row(case("quantize_nf4", n=2**19, block_size=1024, w=BF16, special=False), "524,288 bf16, blocks of 1,024"),
        Row(case("quantize_nf4", n=2**19, block_size=64, w=F32, special=False), "524,288 f32, blocks of 64"),
        Row(case("dequantize_nf4", n=2**19, block_size=64, out=BF16), "524,288 bf16, blocks of 64"),
        Row(case("dequantize_nf4", n=2**19, block_size=64, out=F32), "524,288 f32, blocks of 64"),
        Row(case("nf4_forward", **gemm, rows=8, rank=16), "8 x 1024 bf16 to 512, rank 16"),
        Row(case("nf4_forward", **gemm, rows=8, splits=4), "8 x 1024 bf16 to 512, 4 splits"),
        Row(case("nf4_forward", **gemm, rows=1, splits=4), "1 x 1024 bf16 to 512, 4 splits"),
        Row(case("nf4_forward", **gemm, rows=16, rank=16, nested=True), "16 x 1024 bf16 to 512, rank 16, nested"),
        Row(case("nf4_forward", **gemm, rows=64, rank=16, x=F16), "64 x 1024 f16 to 512, rank 16"),
        Row(case("nf4_forward", **gemm, rows=128, rank=16), "128 x 1024 bf16 to 512, rank 16"),
        Row(case("nf4_forward", **gemm, rows=256, **everything), "256 x 1024 bf16 to 512, rank 16, all"),
        Row(case("quantize_absmax", n=2**16), "65,536"),
        Row(case("dequantize_absmax", n=2**16), "65,536"),
        Row(case("squared_row_norms", rows=512, columns=2048, dtype=BF16), "512 x 2048 bf16"),
        Row(case("squared_row_norms", rows=512, columns=2048, dtype=BF16, block_size=64), "512 x 2048 NF4"),
        Row(case("dora_norm", rows=2048, rank=16), "2048, rank 16"),
        Row(case("update_importance", shapes=layers, dtypes=(BF16,)), "two layers, 2048 to 2048 and to 512, rank 12"),
        Row(case("rank_mask", n=8192, budget=4000), "8,192 triplets"),
        Row(case("mask_ranks", ranks=(12,) * 200), "200 layers, rank 12"),
        Row(case("orthogonality", shapes=factors, dtypes=(BF16,)), "two factors, 16 x 2048"),
        Row(case("orthogonality_grad", shapes=factors, dtypes=(BF16,)), "two factors, 16 x 2048"),
        Row(case("jacobi_svd", n=32, batch=4), "4 of 32 x 32"),
    ]


ROWS = _rows()


class Counting(Device):
    """Without the race detector, which changes no count."""

    def options(self, name: str) -> dict:
        return {"races": False}


def count(each: Case, arch: str = ARCH) -> tuple[Counter, dict[str, Counter]]:
    """Totals, and the traffic of each operand: `bytes`, `sectors`, `ideal_sectors`.

    A request's bytes are those its lanes ask for, or those of its sectors where these are fewer because lanes share an
    address.
    """
    device, problem = Counting(arch), each.make()
    problem.run(device, each.op)
    totals, operands = Counter(), {}
    for result in device.results:
        for index, stat in enumerate(result.raw):
            totals["waves"] += int(stat["waves"])
            totals["ideal_waves"] += int(stat["ideal_waves"])
            if stat["sectors"]:
                name = operand_of(each.op, result.kernel.program.lines[index])
                traffic = operands.setdefault(name, Counter())
                # lanes that share an address need fewer sectors than their bytes would fill
                traffic["ideal_sectors"] += int(min(stat["ideal_sectors"], stat["sectors"]))
                traffic["sectors"] += int(stat["sectors"])
                traffic["bytes"] += int(min(stat["bytes"], 32 * stat["sectors"]))
        totals["distinct"] += result.stats["distinct_bytes"]
    compulsory = {
        o.path: o.nbytes * (2 if o.access == UPDATE else 1)
        for o in problem.args.operands()
        if o.address(problem.args) and o.path != "workspace"
    }
    totals["compulsory"] = sum(compulsory.values())
    totals["workspace"] = sum(o.nbytes for o in problem.args.operands() if o.path == "workspace")
    for name, traffic in operands.items():
        traffic["compulsory"] = sum(compulsory.get(field, 0) for field in FIELDS.get(name, (name,)))
    return totals, operands


def operand_of(op: str, line) -> str:
    if op not in OPERANDS:
        return "all"
    texts = [_source(position.file, position.line) for position in line.chain()]
    for name, token in OPERANDS[op].items():
        if any(token in text for text in texts):
            return name
    if any("dropout.seed" in text for text in texts):
        return "seed"
    raise KeyError(f"{op}: no operand is named for `{texts}`; add it to OPERANDS in {__file__}")


def _source(file: str, line: int) -> str:
    path = CUDA_SOURCES / file
    return path.read_text().splitlines()[line - 1] if line and path.exists() else ""


def line_of(row: Row, totals: Counter, operands: dict[str, Counter], older: Counter) -> str:
    """A row of the table, from what count() gives for ARCH and for OLDER."""
    moved = sum(t["bytes"] for t in operands.values())
    sectors, ideal = (sum(t[key] for t in operands.values()) for key in ("sectors", "ideal_sectors"))
    waves = f"{totals['waves'] / totals['ideal_waves']:.2f}" if totals["ideal_waves"] else "none"
    parts: dict[str, list[int]] = {}
    for name, traffic in operands.items():
        part = parts.setdefault(name.strip(), [0, 0])
        part[0] += traffic["bytes"]
        part[1] = max(part[1], traffic["compulsory"])
    each = [f"{name} {moved_part / needed:.2f}" for name, (moved_part, needed) in parts.items() if needed >= 1024]
    distinct = " | ".join(f"{t['distinct'] / t['compulsory']:.2f}" for t in (totals, older))
    return (
        f"| `{row.case.op}` {row.title} | {distinct} | {moved / totals['compulsory']:.2f} | {sectors / ideal:.2f} | "
        f"{waves} | {', '.join(each) or '-'} |"
    )


def table() -> str:
    lines = [
        f"| kernel and shape | distinct | {OLDER} | bytes | sectors | waves | bytes of each operand |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [line_of(row, *count(row.case), count(row.case, OLDER)[0]) for row in ROWS])


def replace_section(name: str, text: str) -> None:
    """Puts text between `<!-- name -->` and `<!-- /name -->` of docs/simulated.md."""
    document = DOCUMENT.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    assert pattern.search(document), f"{DOCUMENT} has no section {name}"
    DOCUMENT.write_text(pattern.sub(lambda m: m[1] + text + "\n" + m[2], document))


if __name__ == "__main__":
    text = table()
    print(text)
    replace_section("counts", text)
