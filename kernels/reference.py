"""Every op in plain torch: the specification that kernels are tested against, and the CPU path."""

from collections.abc import Sequence

import torch
from torch import Tensor

RANK_TILE = 8  # rank rows of one adapter tile
_FIRST_WIDTH = 64  # sorted tokens looked at first; nearly all filters keep fewer


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) * weight over the last side. x [.., H], weight [H] -> [.., H]."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def rope_angles(positions: Tensor, signed_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotary`: angle[t, i] = positions[t] * signed_freq[i].

    positions [T] int, signed_freq [D] float32, the frequencies of the pairs twice, first negated
    -> cos and sin [T, 1, D]; so the first half of sin is negated and cos is not.
    """
    angles = positions[:, None, None] * signed_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y = x * cos + (x with its halves exchanged) * sin. x [T, H, D], cos and sin of `rope_angles`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def gated_activation(gate_up: Tensor) -> Tensor:
    """y = silu(g) * u. gate_up [T, 2F] = (g | u) -> [T, F]."""
    width = gate_up.shape[-1] // 2
    return torch.nn.functional.silu(gate_up[..., :width]) * gate_up[..., width:]


def write_kv(k: Tensor, v: Tensor, slabs: Tensor, layer: int, block: Tensor, offset: Tensor) -> None:
    """slabs[block[t], layer, 0, offset[t]] = k[t]; slabs[block[t], layer, 1, offset[t]] = v[t].

    k and v [T, Hkv, D]; slabs [num_slabs, L, 2, block_size, Hkv, D] is changed; block and offset [T] int64.
    """
    slabs[block, layer, 0, offset] = k
    slabs[block, layer, 1, offset] = v


def write_kv_all_layers(kv: Tensor, slabs: Tensor, block: Tensor, offset: Tensor) -> None:
    """slabs[block[t], l, i, offset[t]] = kv[2 * l + i, t]: one new position per sequence, all layers at once.

    kv [2 L, T, Hkv, D], K and V of each layer in turn; slabs [num_slabs, L, 2, block_size, Hkv, D] is
    changed; block and offset [T] int64.
    """
    rows = slabs.flatten(1, 3).flatten(2)  # [num_slabs, 2 L * block_size, Hkv * D]: whole rows go fast
    first = torch.arange(0, rows.shape[1], slabs.shape[3], device=kv.device)
    rows[block, first[:, None] + offset] = kv.flatten(2)


def paged_attention(
    q: Tensor,
    slabs: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Sequence[int],
    query_start: Sequence[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of each sequence's newest tokens over its own pages; decode and prefill alike.

    o[t] = sum_j softmax_j(scale * q[t] . K[j]) V[j] over the positions j of the same sequence with
    p - window < j <= p, where p is the position of t; query head h reads K/V head h // (Hq / Hkv).

    q [T, Hq, D] holds tokens query_start[s] .. query_start[s+1] of sequence s, the last of its
    context_lens[s] positions, whose K/V is already written. slabs [num_slabs, L, 2, block_size, Hkv, D];
    position j of sequence s lies in slab block_tables[s, j // block_size] at offset j % block_size.
    Nothing else of the slabs is read. -> [T, Hq, D].
    """
    out = torch.empty_like(q)
    block_size = slabs.shape[3]
    for s, length in enumerate(context_lens):
        begin, end = query_start[s], query_start[s + 1]
        if begin == end:
            continue
        blocks = block_tables[s, : -(-length // block_size)]
        pages = slabs[blocks, layer]  # [n, 2, block_size, Hkv, D]
        kv = pages.transpose(0, 1).reshape(2, -1, *pages.shape[3:])[:, :length]  # [2, length, Hkv, D]
        out[begin:end] = attend_one(q[begin:end], kv[0], kv[1], scale, window)
    return out


def attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of the last rows of one sequence. q [n, Hq, D], k and v [len, Hkv, D] -> [n, Hq, D].

    Row i of q stands at position len - n + i and sees positions up to its own, the newest `window` of them.
    """
    count, length = q.shape[0], k.shape[0]
    is_causal = count == length and (window is None or window >= length)
    mask = None
    if not is_causal and (count > 1 or (window is not None and window < length)):
        last = torch.arange(length - count, length, device=q.device)[:, None]
        at = torch.arange(length, device=q.device)
        mask = at <= last
        if window is not None:
            mask &= at > last - window
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, Hq, n, D]
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
    )
    return mixed[0].transpose(0, 1)


def lane_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one new token per sequence, all sequences side by side.

    o[h] = softmax(scale * q[h] K[h] + mask[h]) V[h] for each lane and K/V head h, whose G query heads are the
    rows of q[h]. q [N, G, D], k [N, D, n], v [N, n, D], mask [N, 1, n] (0 or -inf) -> [N, G, D].
    """
    scores = torch.baddbmm(mask, q, k, alpha=scale)
    return torch.bmm(scores.softmax(-1), v)


def lora_pages(
    x: Tensor,
    y: Tensor,
    arena: Tensor,
    segments: Sequence[tuple[int, int, int]],
    tiles_a: Tensor,
    tiles_b: Tensor,
    scales: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """Mixed-adapter LoRA straight from pages, for the modules of one fused group in one layer.

    For each segment (n, begin, end), rows begin <= t < end, and module m with columns c(m) of y:

        y[t, c(m)] += scales[n, m] * (x[t] @ A[n, m].T) @ B[n, m]

    Rows in no segment keep y and cost nothing. x [T, in]; y [T, sum(widths)], changed in place and returned;
    arena: flat, of x's dtype. A[n, m] are the rows of the tiles [8, in] that start at elements
    tiles_a[n, m, p] of the arena, B[n, m] those of the tiles [8, widths[m]] at tiles_b[n, m, p], p = 0, 1, …;
    -1 ends the list (a rank below the largest, or no such module). tiles_a and tiles_b [N, M, P] int64,
    scales [N, M] float32.
    """
    for n, begin, end in segments:
        rows_a = [_tiles(arena, offsets, x.shape[1]) for offsets in tiles_a[n].tolist()]
        if not any(rows_a):
            continue
        u = x[begin:end] @ torch.cat([tile for rows in rows_a for tile in rows]).t()
        rank = column = 0
        factors, all_offsets = scales[n].tolist(), tiles_b[n].tolist()
        for m, width in enumerate(widths):
            if rows_a[m]:
                ranks = slice(rank, rank + RANK_TILE * len(rows_a[m]))
                b = torch.cat(_tiles(arena, all_offsets[m], width))
                y[begin:end, column : column + width].addmm_(u[:, ranks], b, alpha=factors[m])
                rank = ranks.stop
            column += width
    return y


def _tiles(arena: Tensor, offsets: Sequence[int], width: int) -> list[Tensor]:
    return [arena[o : o + RANK_TILE * width].view(RANK_TILE, width) for o in offsets if o >= 0]


def sample_rows(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
    seed: Tensor,
    index: Tensor,
) -> Tensor:
    """One token id per row; -1 where the largest logit is not finite (a NaN counts as the largest).

    temperature 0 takes the largest logit, the first of equal ones. Otherwise softmax(logits / temperature) is
    filtered (see `filtered`), and the token is the first, in order of id, at which the kept p, added up,
    exceed u times their sum, with u = uniform(seed, index).

    logits [R, V], -inf forbids a token; the columns [R]: temperature, top_p and min_p float32, top_k, seed
    and index int64. -> [R] int64.
    """
    token_ids = logits.argmax(-1)
    is_finite = logits.gather(1, token_ids[:, None]).isfinite()[:, 0]
    is_drawn = is_finite & (temperature > 0)
    is_filtered = (top_k > 0) | (top_p < 1) | (min_p > 0)
    rows = (is_drawn & ~is_filtered).nonzero()[:, 0]
    if len(rows):
        p = _probabilities(logits[rows], temperature[rows])
        token_ids[rows] = _invert(p, uniform(seed[rows], index[rows]))
    rows = (is_drawn & is_filtered).nonzero()[:, 0]
    if len(rows):
        p, ids = filtered(logits[rows], temperature[rows], top_p[rows], top_k[rows], min_p[rows])
        places = _invert(p, uniform(seed[rows], index[rows]))
        token_ids[rows] = ids.gather(1, places[:, None])[:, 0]
    return token_ids.masked_fill_(~is_finite, -1)


def filtered(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """(p [n, W], 0 where filtered out; token ids [n, W], rising) of these n rows of logits [n, V].

    Of the tokens in falling order of their logits, equal ones in order of id, are kept: the first top_k; of
    those, renormalised, the ones that have less than top_p before them; of those the ones whose p is at least
    min_p times the largest. All three keep a beginning, so W sorted tokens are enough once something is cut
    off before the last of them.
    """
    all_p = _probabilities(logits, temperature)
    vocab = logits.shape[1]
    most = torch.where(top_k > 0, top_k, vocab)[:, None]
    # top_p is a share of the mass of the first top_k, so those must be in view.
    width = min(max(_FIRST_WIDTH, int(top_k.max())), vocab)
    while True:
        ids = _largest(logits, width)
        p = all_p.gather(1, ids)
        places = torch.arange(width, device=logits.device)
        within = p.double() * (places < most)
        sums = within.cumsum(-1)
        total = torch.where(most < vocab, sums[:, -1:], 1.0)
        before = sums - within
        # top_p = 1 keeps all: rounding could let `before` reach 1 too early
        is_within = (before < top_p[:, None] * total) | (top_p[:, None] == 1)
        keep = (places < most) & is_within & (p >= p[:, :1] * min_p[:, None])
        if width == vocab or not keep[:, -1].any():
            ids, order = ids.sort(-1)
            return (p * keep).gather(1, order), ids
        width = min(width * 8, vocab) if width == _FIRST_WIDTH else vocab


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """u in [0, 1), float64: the top 53 bits of splitmix64 at state mix(seed) + index * golden. Both int64.

    splitmix64 (Steele, Lea & Flood, 2014) is made for consecutive states; mixing the seed first keeps the
    streams of nearby seeds apart.
    """
    return _shift_right(_mix(_mix(seed) + index * _signed(0x9E3779B97F4A7C15)), 11).double() * 2.0**-53


def _probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    logits = logits.float()
    # Subtract first: logits / 1e-6 would overflow where the difference to the largest does not matter.
    return ((logits - logits.amax(-1, keepdim=True)) / temperature[:, None]).softmax(-1)


def _largest(logits: Tensor, width: int) -> Tensor:
    """Ids of the `width` largest of each row, falling; equal ones in order of id, whatever the company."""
    if width < logits.shape[1]:
        values, ids = logits.topk(width, dim=-1)
        if ((logits >= values[:, -1:]).sum(-1) == width).all():
            ids = ids.sort(-1).values
            order = logits.gather(1, ids).sort(stable=True, dim=-1, descending=True).indices
            return ids.gather(1, order)
        # Of those that equal the last, topk takes any.
    return logits.sort(stable=True, dim=-1, descending=True).indices[:, :width]


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """Per row of p [n, W] the place where the running sum first exceeds u times the sum -> [n]."""
    sums = p.double().cumsum(-1)
    total = sums[:, -1]
    # u * total may round up to total, which no running sum exceeds.
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, target[:, None], right=True)[:, 0]


def _mix(state: Tensor) -> Tensor:
    """The output function of splitmix64. Products of int64 wrap around, as the algorithm wants."""
    z = state + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift as unsigned: int64 would draw in copies of the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


class PackedNorm:
    """`rms_norm` on a CPU in float32 in four operations.

    y = x * (sqrt(H) * weight) / sqrt(|x|² + H * eps); the divisor is the hypotenuse of |x| and sqrt(H * eps).
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[0]
        self._scaled = weight.detach() * size**0.5
        self._side = self._scaled.new_full((1,), (size * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        y: Tensor = (x * self._scaled).div_(length.hypot_(self._side))
        return y


class PackedLinear:
    """y = x @ W.T (+ bias) on a CPU in float32, from a copy of W in the order the product reads it in.

    A plain product of few rows packs W anew in each call, at 8 rows for as much time as the product itself
    takes; and reading W from memory is most of what is left. So the copy is of 16 bits where W was stored in
    16 bits and they hold it exactly (sums stay float32), and of 32 bits otherwise.
    """

    # Each layout is good for any number of rows. The first is laid out for as many as a decode step usually
    # has; the second loses to a plain product from here on.
    _PACKED_FOR_ROWS = 64
    _MOST_HALF_ROWS = 24

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._half = None
        self._full = None
        fits_half = torch.equal(self._weight.half().float(), self._weight)
        if fits_half and torch.backends.quantized.engine in ("x86", "fbgemm"):
            self._half = torch.ops.quantized.linear_prepack_fp16(self._weight, self._bias)
        else:
            self._full = torch.ops.mkl._mkl_reorder_linear_weight(self._weight, self._PACKED_FOR_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self._half is None:
            y = torch.ops.mkl._mkl_linear(x, self._full, self._weight, self._bias, rows)
        elif rows <= self._MOST_HALF_ROWS:
            y = torch.ops.quantized.linear_dynamic_fp16(x, self._half)
        else:
            y = torch.nn.functional.linear(x, self._weight, self._bias)
        assert isinstance(y, Tensor)
        return y

    @staticmethod
    def supports(weight: Tensor) -> bool:
        """Whether this torch build has the packed products, for a tensor like this."""
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and hasattr(torch.ops.mkl, "_mkl_linear")
        )
