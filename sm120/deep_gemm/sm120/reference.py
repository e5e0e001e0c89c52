"""The Lightning Indexer in float64: slow and obvious. What tests, demo and benchmarks compare with."""

import torch

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]).double()


def dequantize(values: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """Float64 [..., dim]: e4m3 [..., dim] times fp32 [...], or packed e2m1 [..., dim / 2] times UE8M0 words [...], or
    e4m3 times such words (MXFP8)."""
    if values.dtype == torch.float8_e4m3fn:
        numbers = values.double()
        if scales is not None and scales.dtype == torch.int32:
            return numbers * _factors(scales, numbers.shape[-1])
        return numbers if scales is None else numbers * scales.double().unsqueeze(-1)
    byte = values.view(torch.uint8).long()
    table = _E2M1.to(values.device)
    numbers = torch.stack([table[byte & 15], table[byte >> 4]], dim=-1).flatten(-2)  # low nibble first
    return numbers * _factors(scales, numbers.shape[-1])


def _factors(scales: torch.Tensor, dim: int) -> torch.Tensor:
    """Float64 [..., dim]: byte j of each UE8M0 word for elements 32j to 32j + 31; 255 is NaN."""
    exponents = scales.contiguous().view(torch.uint8).unflatten(-1, (*scales.shape[-1:], 4)).double() - 127
    factors = torch.where(exponents == 128, torch.nan, torch.exp2(exponents))
    return factors.repeat_interleave(32, dim=-1)[..., :dim]


def gather_pages(kv_cache: torch.Tensor, pages: torch.Tensor, fp4: bool, mx: bool = False) -> torch.Tensor:
    """Float64 keys [len(pages) * block_kv, dim] out of a cache uint8 [pages, block_kv, 1, row + 4]; `mx`: MXFP8."""
    block_kv, row = kv_cache.shape[1], kv_cache.shape[3] - 4
    flat = torch.stack([kv_cache[page].reshape(-1) for page in pages.tolist()])
    values = flat[:, : block_kv * row].reshape(-1, row).contiguous()
    scales = flat[:, block_kv * row :].reshape(-1, 4).contiguous()
    if fp4:
        return dequantize(values, scales.view(torch.int32).squeeze(-1))
    return dequantize(values.view(torch.float8_e4m3fn), scales.view(torch.int32 if mx else torch.float32).squeeze(-1))


def logits_of(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[tokens, keys] = sum_h weights[tokens, h] * relu(query[tokens, h] . keys), float64."""
    return torch.stack([torch.relu(keys @ q.T) @ w for q, w in zip(query.double(), weights.double())])


def windows(context_lens: torch.Tensor, next_n: int) -> torch.Tensor:
    """Keys [batch, next_n] that each token sees."""
    if context_lens.dim() == 2:
        return context_lens
    return (context_lens[:, None] - next_n + 1 + torch.arange(next_n, device=context_lens.device)).clamp(min=0)


def paged_logits(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
) -> torch.Tensor:
    """Float64 [batch * next_n, max_context_len]; -inf past each row's length. Arguments as in `paged.py`."""
    values, scales = q if isinstance(q, tuple) else (q, None)
    batch, next_n = values.shape[:2]
    query = dequantize(values, scales)
    out = torch.full((batch, next_n, max_context_len), -torch.inf, dtype=torch.float64, device=values.device)
    for row, lengths in enumerate(windows(context_lens, next_n).tolist()):
        if max(lengths) == 0:
            continue
        pages = block_table[row, : -(-max(lengths) // kv_cache.shape[1])]
        keys = gather_pages(kv_cache, pages, fp4=scales is not None)[: max(lengths)]
        scores = logits_of(query[row], keys, weights.view(batch, next_n, -1)[row])
        for token, length in enumerate(lengths):
            out[row, token, :length] = scores[token, :length]
    return out.flatten(0, 1)


def ragged_logits(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    max_seqlen_k: int = 0,
) -> torch.Tensor:
    """Float64 [seq_len, seq_len_kv or max_seqlen_k]; -inf outside each row's range. Arguments as in `ragged.py`."""
    values, scales = q if isinstance(q, tuple) else (q, None)
    query, keys = dequantize(values, scales), dequantize(*kv)
    out = torch.full((len(query), max_seqlen_k or len(keys)), -torch.inf, dtype=torch.float64, device=values.device)
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
        if start < end:
            scores = logits_of(query[row : row + 1], keys[start:end], weights[row : row + 1])[0]
            column = 0 if max_seqlen_k else start
            out[row, column : column + end - start] = scores
    return out


def block_max(
    logits: torch.Tensor, starts: list[int], ends: list[int], compressed: bool = False, block: int = 8
) -> torch.Tensor:
    """Float64 [rows, ceil(columns / block)]: the maxima that the logits functions store beside logits [rows, columns]
    of keys [start, end) of each row; -inf where nothing is written. Column n is key n, or (`compressed`) start + n."""
    rows, columns = logits.shape
    out = torch.full((rows, -(-columns // block)), -torch.inf, dtype=torch.float64)
    for row, (start, end) in enumerate(zip(starts, ends)):
        first = start // block if compressed else 0
        for b in range(start // block, -(-end // block) if start < end else 0):
            keys = range(max(start, b * block), min(end, (b + 1) * block))
            values = [logits[row, key - start if compressed else key].item() for key in keys]
            numbers = [value for value in values if value == value]
            if b - first < out.shape[1]:
                largest = max(numbers) if numbers else torch.nan
                out[row, b - first] = torch.inf if end <= (b + 1) * block else largest
    return out


def listed_positions(lists: torch.Tensor, lengths: torch.Tensor, block: int) -> torch.Tensor:
    """int64 [rows, width * block]: i * block + o for key o of each block i; -1 for entries that do not count."""
    entries = torch.arange(lists.shape[1], device=lists.device)
    counted = entries < -(-lengths[:, None].long() // block)
    positions = lists.long()[..., None] * block + torch.arange(block, device=lists.device)
    return torch.where(counted[..., None], positions, -1).flatten(1)


def paged_sparse_logits(
    q: tuple[torch.Tensor, torch.Tensor],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    lists: torch.Tensor,
    block: int,
    logits_of=logits_of,
) -> torch.Tensor:
    """Float64 [rows, width * block]; -inf where nothing is written. Arguments as in `sparse.py`."""
    page, fp4 = kv_cache.shape[1], q[0].dtype != torch.float8_e4m3fn
    keys = gather_pages(kv_cache, torch.arange(kv_cache.shape[0]), fp4, mx=not fp4)
    positions = listed_positions(lists, context_lens.view(-1), block)
    pages = block_table.long().gather(1, (positions // page).clamp(min=0))
    tokens = torch.where(positions < 0, -1, pages * page + positions % page)
    return _listed_logits(tuple(part.flatten(0, 1) for part in q), keys, weights, tokens, logits_of)


def ragged_sparse_logits(
    q: tuple[torch.Tensor, torch.Tensor],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    lists: torch.Tensor,
    block: int,
    unaligned: bool = False,
    logits_of=logits_of,
) -> torch.Tensor:
    """Float64 [rows, width * block]; -inf where nothing is written. Arguments as in `sparse.py`."""
    keys = dequantize(*kv)
    first = starts.clamp(max=len(keys))
    positions = listed_positions(lists, ends.clamp(max=len(keys)).maximum(first) - first, block)
    further = starts[:, None] % block if unaligned else 0
    return _listed_logits(q, keys, weights, torch.where(positions < 0, -1, positions + further), logits_of)


def _listed_logits(q, keys, weights, tokens, logits_of) -> torch.Tensor:
    """Row by row those of keys [tokens]; past the last key there are zeros."""
    query = dequantize(*q)
    out = torch.full(tokens.shape, -torch.inf, dtype=torch.float64, device=tokens.device)
    keys = torch.cat([keys, torch.zeros_like(keys[:1])])
    for row, chosen in enumerate(tokens.clamp(max=len(keys) - 1)):
        written = chosen >= 0
        out[row, written] = logits_of(query[row : row + 1], keys[chosen[written]], weights[row : row + 1])[0]
    return out


def chained_logits_of(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`logits_of` as DeepGEMM's SM100 kernels round it: each head's relu, and every partial sum of four chains over the
    heads h mod 4, to bf16, so are the sums of chains 0 and 2, 1 and 3, and of both."""

    def bf16(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16).double()

    rows = []
    for q, w in zip(query.double(), weights.double()):
        scores = bf16(torch.relu(keys @ q.T).float())
        chains = torch.zeros(4, len(keys), dtype=torch.float64, device=keys.device)
        for head in range(len(w)):
            chains[head % 4] = bf16(scores[:, head] * w[head] + chains[head % 4])
        rows.append(bf16(bf16(chains[0] + chains[2]) + bf16(chains[1] + chains[3])))
    return torch.stack(rows)


def schedule(context_lens: torch.Tensor, num_sms: int) -> torch.Tensor:
    """int32 [num_sms + 1, 2], the plan of `get_paged_mqa_logits_metadata`, by writing out the list of all splits."""
    longest = context_lens.reshape(context_lens.shape[0], -1).amax(dim=1) if len(context_lens) else context_lens
    splits = [(row, split) for row, length in enumerate(longest.tolist()) for split in range(-(-length // 256))]
    share, longer = divmod(len(splits), num_sms)
    starts = [slot * share + max(0, slot - (num_sms - longer)) for slot in range(num_sms + 1)]
    entries = [splits[start] if start < len(splits) else (context_lens.shape[0], 0) for start in starts]
    return torch.tensor(entries, dtype=torch.int32, device=context_lens.device)


def topk(logits: torch.Tensor, lengths: list[int], k: int, starts: list[int] | None = None) -> list[list[int]]:
    """The positions that `sm120.topk` chooses in each row, ascending: larger logits first, then smaller positions."""
    chosen = []
    for row, start, length in zip(logits, starts or [0] * len(lengths), lengths):
        keys = row[start : start + max(length, 0)].double()
        lowest = torch.finfo(torch.float64).min  # of no fp32: -inf stays above NaN
        keys = keys.masked_fill(keys == -torch.inf, lowest).masked_fill(keys.isnan(), -torch.inf)
        order = torch.sort(keys, descending=True, stable=True).indices[:k]
        chosen.append(sorted(order.tolist()))
    return chosen
