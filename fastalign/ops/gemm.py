"""Products that `F.linear` does not give: fp32 through oneDNN on the CPU, weights packed once. `gemm_wide`: fp32 results of 16 bits.

A row of x · weightᵀ + bias has the same bits in any batch of `MIN_ROWS` rows or more.

MKL, which torch's `F.linear` calls in fp32, changes a row's bits with the row count below 12 rows and is slower where rows are few.
Measured on 2 cores of an AMD EPYC with AVX-512, [64, 512] · [32000, 512]ᵀ: MKL 22.8 ms, oneDNN 13.5, packed 10.5. Dense and
packed weights give the same bits (tested), so the sampler packs and the trainer does not. bf16 is oneDNN's in `F.linear` already,
and packing it saves the same copy: on one core of that machine 16 rows of [1408, 512] take 0.53 ms dense and 0.29 packed, of
[32000, 512] 10.1 and 3.4, of [512, 512] 0.25 and 0.12; the bits agree from 2 rows on, and every shape is looked at before its
first use (`_packs_exactly`). Our own product (`gemm_native`) takes both dtypes where there is AVX2 and no AVX-512, fp32 where there is
AVX-512 and no AMX, bf16 where there is AMX: oneDNN's fp32 is that of machines with AMX, and of those without our native module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign.ops import gemm_native
from fastalign.ops.backend import PLAIN, is_traced, load_native
from fastalign.ops.gemm_native import native_products
from fastalign.ops.int8 import QuantizedWeights

PACKED_ROWS = 64  # the row count that packed weights are laid out for; any count may use them
MIN_ROWS = 2  # oneDNN's product of one row is another kernel, with other bits where K is over 1,024 (measured)


class PackedWeights:
    """Packed copies of weights, each made at its first use and kept until its weight changes; about the weights' size in memory.

    A weight that was written to since (its version counter says so) is packed again. Writing through `.data` or a pointer does not
    count: call `clear` after that.

    Args:
        quantization: "int8": linear layers multiply by integers (`ops.int8`), kept until `clear`; what is asked for here, as the
            head's products are, stays exact.

    Attributes:
        notes: what callers found out about modules while these copies hold; forgotten with them.
    """

    def __init__(self, quantization: str | None = None) -> None:
        self._quantized = None if quantization is None else QuantizedWeights()
        self._kept: dict[int, Packed] = {}  # by the weight's id
        self.notes: dict[Any, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, products without a gradient use these copies; a thread's own, so that engines may generate side by side."""
        token = _packing.set(self)
        try:
            with nullcontext() if self._quantized is None else self._quantized.active():
                yield
        finally:
            _packing.reset(token)

    def clear(self) -> None:
        """Forgets every copy and frees its memory."""
        self._kept.clear()
        self.notes.clear()
        if self._quantized is not None:
            self._quantized.clear()

    def known(self, x: Tensor, weight: Tensor) -> Product | None:
        """The product with a weight that has multiplied such an `x` before; None sends the call past all the checks."""
        kept = self._kept.get(id(weight))
        if kept is None or not kept.holds(weight) or torch.is_grad_enabled() or type(x) is not Tensor or not x.numel():
            return None
        fits = x.dtype is kept.dtype and x.shape[-1] == kept.width and x.is_cpu and not torch.is_autocast_enabled("cpu")
        return kept.product if fits else None

    def kept(self, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Packed] | None:
        """The copies of weights that have all multiplied inputs of this dtype on the CPU before; None where one has no such product."""
        found = []
        for weight in weights:
            one = self._kept.get(id(weight))
            if one is None or one.product is None or one.dtype is not dtype or not one.holds(weight):
                return None
            found.append(one)
        return found

    @property
    def quantizes(self) -> bool:
        """Whether linear layers multiply by integers inside `active`."""
        return self._quantized is not None

    def of(self, weight: Tensor) -> Tensor | None:
        """The packed form of weight [N, K]; None where its products would have other bits than the dense one's."""
        kept = self._kept.get(id(weight))
        if kept is None or not kept.holds(weight):
            kept = self._kept[id(weight)] = Packed(weight)
        return kept.form


Product = Callable[[Tensor, Tensor | None], Tensor]  # x [..., K], bias [N] or None → [..., N]


class Packed:
    """A weight [N, K] with its packed form, as they were when it was made; every linear of a decode step asks for one.

    Attributes:
        form: None: the dense weight is multiplied.
        ours: whether the form is that of `gemm_native.pack`, which other native calls read.
        product: x · weightᵀ + bias from the packed form; None without one.
        out, width: N and K.
    """

    __slots__ = ("_version", "_weight", "dtype", "form", "ours", "out", "product", "width")

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._version = weight, None if weight.is_inference() else weight._version
        self.dtype, (self.out, self.width) = weight.dtype, weight.shape
        self.form = _pack(weight.detach())
        self.ours = self.form is not None and self.form.dim() == 3
        self.product = None if self.form is None or not weight.is_cpu else _product_with(self.form, weight.shape[0], weight.dtype)

    def holds(self, weight: Tensor) -> bool:
        """Whether this is the weight, unchanged."""
        return self._weight is weight and (self._version is None or self._version == weight._version)


_packing: ContextVar[PackedWeights | None] = ContextVar("fastalign_packing", default=None)


def active_packs() -> PackedWeights | None:
    """The copies whose `active` block this is."""
    return _packing.get()


def has_route(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `product` takes these operands: oneDNN's fp32, or ours; anything unusual goes to torch, which says what is wrong with it."""
    ours = native_products(x.dtype) is not None or (AVAILABLE and x.dtype == torch.float32)
    return ours and _takes(x, weight, bias)


def keeps_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a row of `linear` has the same bits in any batch: by a route of this module, or by oneDNN's bf16 product in `F.linear`."""
    return has_route(x, weight, bias) or (x.dtype == torch.bfloat16 and _BF16 and _takes(x, weight, bias))


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are plain, fitting operands on the CPU, outside autocast and torch.compile."""
    if is_traced():
        return False
    if type(x) not in PLAIN or type(weight) not in PLAIN or weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        return False
    if bias is not None and not (bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.is_contiguous()):
        return False
    plain = x.dtype == weight.dtype and x.device.type == weight.device.type == "cpu"
    return plain and x.numel() > 0 and weight.is_contiguous() and not torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias [N] → [..., N], as `torch.nn.functional.linear`."""
    packs = _packing.get()
    if packs is not None and (known := packs.known(x, weight)) is not None:
        return known(x, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias, _dense(weight)) if keeps_rows(x, weight, bias) else F.linear(x, weight, bias)
    if not has_route(x, weight, bias):
        packed = packed_product(x, weight, bias)
        return F.linear(x, weight, bias) if packed is None else packed
    return product(x, weight, bias)


def known_product(x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    """`linear` with its gradients, for operands of which `keeps_rows` holds, where `product(x, bias)` knows the result [..., N] already."""
    return _Linear.apply(x, weight, bias, product)


def _dense(weight: Tensor) -> Product:
    torch_has_it = weight.dtype == torch.bfloat16 and native_products(weight.dtype) is None
    return lambda x, bias: F.linear(x, weight, bias) if torch_has_it else _multiply(x, None, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same without autograd, for operands of which `has_route` holds; packed where `PackedWeights` are active."""
    packs = _packing.get()
    return _multiply(x, (packs.of(weight) if packs is not None else None), weight, bias)


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """x · weightᵀ + bias in bf16 from a packed weight; None where none is active, its bits would differ or autograd wants a say."""
    packs = _packing.get()
    if packs is None or torch.is_grad_enabled() or x.dtype != torch.bfloat16 or not AVAILABLE or not _takes(x, weight, bias):
        return None
    packed = packs.of(weight)
    return None if packed is None else _multiply(x, packed, weight, bias)


def _multiply(x: Tensor, packed: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    if packed is not None:
        return _product_with(packed, weight.shape[0], weight.dtype)(x, bias)
    module = native_products(x.dtype)
    if module is not None:
        return gemm_native.multiply(module, x, weight, bias)
    return _onednn(x, weight, bias)


def _product_with(packed: Tensor, out: int, dtype: torch.dtype) -> Product:
    """The product with a packed weight of `out` rows."""
    if packed.dim() == 3:  # by `gemm_native.pack`
        return gemm_native.product_with(load_native()[0], packed, out, dtype)  # type: ignore[arg-type]
    return lambda x, bias: _onednn(x, packed, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By oneDNN; weight dense or in its own layout."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def _pack(weight: Tensor) -> Tensor | None:
    """The packed form of a dense weight, if its products are those of the dense one."""
    module = native_products(weight.dtype)
    if module is not None:
        return gemm_native.pack(module, weight)
    key = (*weight.shape, weight.dtype, torch.get_num_threads())
    if _exact.get(key) is False:
        return None
    if weight.dtype == torch.bfloat16 and not _BF16:
        return None  # torch's own product goes on
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
    if key not in _exact:
        _exact[key] = _packs_exactly(weight, packed)
    return packed if _exact[key] else None


_exact: dict[tuple[object, ...], bool] = {}  # (N, K, dtype, threads) → whether packing keeps the bits; one look a process
_LOOK_FLOP = 1e9  # of one look: some 10 ms


def _packs_exactly(weight: Tensor, packed: Tensor) -> bool:
    """Whether few, some and many rows of random numbers give the bits of the dense product, of many rows, in each row.

    More than 256 rows are looked at, too: with AMX oneDNN's packed bf16 product has other bits from there on.
    """
    out, width = weight.shape
    most = int(max(4, min(600, _LOOK_FLOP // (8 * out * width))))
    x = torch.randn(most, width, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    whole = F.linear(x, weight) if weight.dtype != torch.float32 else _multiply(x, None, weight, None)
    return all(
        torch.equal(_multiply(x[:rows], packed, weight, None), whole[:rows]) for rows in {MIN_ROWS, min(17, most), min(257, most), most}
    )


@contextmanager
def packed_weights() -> Iterator[None]:
    """Inside, products without a gradient pack each weight once; the copies are dropped at the end (`PackedWeights` keeps them)."""
    with (_packing.get() or PackedWeights()).active():
        yield


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] · b [K, N], as torch.mm; by our own product where that is the one to use."""
    module = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else native_products(a.dtype)
    ours = module is not None and a.dtype == b.dtype and type(a) in PLAIN and type(b) in PLAIN
    if ours and a.device.type == b.device.type == "cpu":
        return gemm_native.product(module, a, b)  # type: ignore[arg-type]
    return torch.mm(a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, weight.shape[0])
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        return (
            matmul(flat, weight).view(x.shape) if need_x else None,
            matmul(flat.t(), x.reshape(-1, weight.shape[1])) if need_weight else None,
            flat.sum(0) if need_bias else None,
            None,
        )


def _probe() -> bool:
    """Whether this build of torch has the fp32 kernels and they are what is said above."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        x, weight = torch.ones(3, 5), torch.ones(2, 5)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        return all(torch.equal(torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), x @ weight.t()) for w in (weight, packed))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


AVAILABLE = _probe()
_BF16 = AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not without AVX-512 or AVX-NE-CONVERT
