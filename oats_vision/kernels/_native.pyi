class Matrix:
    def __init__(
        self,
        values: int,
        type: int,
        nonzeros: int,
        bitmask: int,
        rows: int,
        columns: int,
        U: int,
        V: int,
        width: int,
        parts: list[tuple[int, int]],
        bias: int,
        threads: int,
        /,
    ) -> None: ...
    def few_tokens(self, x: int, x_type: int, tokens: int, stride: int, y: int, threads: int, /) -> None: ...
    def many_tokens(
        self, U: int, bias: int, Vx: int, x: int, tokens: int, stride: int, y: int, threads: int, /
    ) -> None: ...
    def many_bfloat16(self, x: int, tokens: int, stride: int, y: int, threads: int, /) -> None: ...
    def expand(self, dense: int, threads: int, /) -> None: ...

class FewBitsMatrix:
    def __init__(
        self,
        bits: int,
        levels: int,
        group_size: int,
        codes: int,
        count: int,
        scales: int,
        zeros: int,
        bitmask: int,
        rows: int,
        columns: int,
        U: int,
        V: int,
        type: int,
        U_scale: int,
        V_scale: int,
        width: int,
        parts: list[tuple[int, int]],
        bias: int,
        bias_type: int,
        threads: int,
        /,
    ) -> None: ...
    def few_tokens(self, x: int, x_type: int, tokens: int, stride: int, y: int, threads: int, /) -> None: ...
    def dequantise(self, dense: int, threads: int, /) -> None: ...

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use(name: str, /) -> None: ...
def multiplies_bfloat16() -> bool: ...
def sparse_step(
    rows: int, columns: int, keep: int, beta: float, A: int, L: int, S: int, next: int, threshold: int, threads: int, /
) -> float: ...
