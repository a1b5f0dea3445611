"""Writes kernels/bias_activation/gelu_table.h: the polynomials that the CPU's AVX-512 kernel takes GELU from.

    python tools/gelu_table.py

act(v) = v · gate(v), with gate(v) + gate(-v) = 1 and act'(v) + act'(-v) = 1, so that the negative side is enough. There
gate and act' are polynomials of degree 5 in u = 5|v| - k, |u| <= 1/2, a piece for each k = round(5|v|) of 0 … 30; the
last piece, k = 31, is 0. They meet the functions at Chebyshev's points.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

PIECES, DEGREE, PER_UNIT = 32, 5, 5
HEADER = Path(__file__).parents[1] / "kernels" / "bias_activation" / "gelu_table.h"
TANH_SCALE, TANH_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def gelu_gate(v: float) -> tuple[float, float]:
    """Φ(v) and its derivative."""
    return 0.5 * math.erfc(-v / math.sqrt(2)), math.exp(-v * v / 2) / math.sqrt(2 * math.pi)


def gelu_tanh_gate(v: float) -> tuple[float, float]:
    """(1 + tanh(√(2/π) (v + 0.044715 v³))) / 2 and its derivative."""
    gate = 1 / (1 + math.exp(-TANH_SCALE * (v + TANH_CUBIC * v**3)))
    return gate, gate * (1 - gate) * TANH_SCALE * (1 + 3 * TANH_CUBIC * v * v)


def pieces(function: Callable[[float], float]) -> np.ndarray:  # float32 [DEGREE + 1, PIECES]
    """Coefficients of `function(-a)`, the constants first; the value at 0 is kept exactly."""
    table = np.zeros((DEGREE + 1, PIECES))
    nodes = np.cos(np.pi * (np.arange(DEGREE + 1) + 0.5) / (DEGREE + 1))
    for k in range(PIECES - 1):
        if k == 0:  # 0 <= u <= 1/2
            u = (nodes[1:] + 1) / 4
            slopes = [(function(-float(x) / PER_UNIT) - function(0.0)) / x for x in u]
            table[1:, 0] = np.polynomial.polynomial.polyfit(u, slopes, DEGREE - 1)
            table[0, 0] = function(0.0)
        else:
            u = nodes / 2
            values = [function(-(k + float(x)) / PER_UNIT) for x in u]
            table[:, k] = np.polynomial.polynomial.polyfit(u, values, DEGREE)
    return table.astype(np.float32)


def header() -> str:
    lines = [
        "// Made by tools/gelu_table.py, which says what the numbers are. [coefficient of u^i][piece k]",
        "#pragma once",
        "",
        "namespace fastdiff {",
        "",
        f"constexpr float kGeluPiecesPerUnit = {PER_UNIT}, kGeluLastPiece = {PIECES - 1};",
    ]
    for gate, name in ((gelu_gate, "Gelu"), (gelu_tanh_gate, "GeluTanh")):
        functions = {
            f"k{name}Gate": lambda v, gate=gate: gate(v)[0],
            f"k{name}Derivative": lambda v, gate=gate: gate(v)[0] + v * gate(v)[1],
        }
        for variable, function in functions.items():
            lines += ["", f"alignas(64) constexpr float {variable}[{DEGREE + 1}][{PIECES}] = {{"]
            for row in pieces(function):
                numbers = [f"{x:.8e}f" for x in row]
                rows = [", ".join(numbers[i : i + 7]) for i in range(0, PIECES, 7)]
                lines += ["    {" + ",\n     ".join(rows) + "},"]
            lines += ["};"]
    return "\n".join([*lines, "", "}  // namespace fastdiff", ""])


if __name__ == "__main__":
    HEADER.write_text(header())
