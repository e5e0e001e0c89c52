"""The Lightning Indexer in float64: slow and obvious. What tests, demo and benchmarks compare with."""

import torch

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]).double()


def dequantize(values: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """Float64 [..., dim]: e4m3 [..., dim] times fp32 [...], or packed e2m1 [..., dim / 2] times UE8M0 words [...]."""
    if values.dtype == torch.float8_e4m3fn:
        numbers = values.double()
        return numbers if scales is None else numbers * scales.double().unsqueeze(-1)
    byte = values.view(torch.uint8).long()
    table = _E2M1.to(values.device)
    numbers = torch.stack([table[byte & 15], table[byte >> 4]], dim=-1).flatten(-2)  # low nibble first
    exponents = scales.contiguous().view(torch.uint8).unflatten(-1, (*scales.shape[-1:], 4)).double() - 127
    factors = torch.where(exponents == 128, torch.nan, torch.exp2(exponents))
    return numbers * factors.repeat_interleave(32, dim=-1)[..., : numbers.shape[-1]]


def gather_pages(kv_cache: torch.Tensor, pages: torch.Tensor, fp4: bool) -> torch.Tensor:
    """Float64 keys [len(pages) * block_kv, dim] out of a cache uint8 [pages, block_kv, 1, row + 4]."""
    block_kv, row = kv_cache.shape[1], kv_cache.shape[3] - 4
    flat = torch.stack([kv_cache[page].reshape(-1) for page in pages.tolist()])
    values = flat[:, : block_kv * row].reshape(-1, row).contiguous()
    scales = flat[:, block_kv * row :].reshape(-1, 4).contiguous()
    if fp4:
        return dequantize(values, scales.view(torch.int32).squeeze(-1))
    return dequantize(values.view(torch.float8_e4m3fn), scales.view(torch.float32).squeeze(-1))


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
