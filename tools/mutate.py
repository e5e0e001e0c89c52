"""Would the tests notice?  Flips one small thing at a time in a copy of the tree and runs the tests that concern it.

    python tools/mutate.py --jobs 12             all mutations; prints each one's fate, and the survivors at the end
    python tools/mutate.py --file topk cache     those of files that are called so; --only 3 17: these
    python tools/mutate.py --log fates.jsonl     writes each fate there, and goes on behind those that stand there
    python tools/mutate.py --device cuda         on a GPU; what reads outside shows in the emulator alone
    python tools/mutate.py --check               only: does each still find its place?

A mutation is caught if a test fails, the compiler refuses it, or nothing comes back in time (a loop without an end).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sm120" / "deep_gemm"
PARTS = "sm120", "tests", "tools", "pyproject.toml"  # of the tree, that the tests need

PAGED = [
    "test_paged.py::test_dims",
    "test_paged.py::test_heads",
    "test_paged.py::test_page_sizes",
    "test_paged.py::test_next_n",
    "test_paged.py::test_dtypes",
    "test_paged.py::test_bf16_logits_are_the_rounded_fp32_ones",
    "test_paged.py::test_padded_cache",
    "test_paged.py::test_weights_with_a_row_stride",
    "test_paged.py::test_a_length_past_the_maximum_stays_inside_the_row",
    "test_paged.py::TestForeignBytes",
    "test_paged.py::TestSchedules::test_poor_balance",
    "test_paged.py::TestSchedules::test_slots",
    "test_paged.py::TestSchedules::test_many_rows_of_one_sequence",
    "test_paged.py::TestSchedules::test_many_rows_of_all_lengths",
    "test_paged.py::test_empty_rows",
]
RAGGED = [
    "test_ragged.py::test_compressed",
    "test_ragged.py::test_full",
    "test_ragged.py::test_dims",
    "test_ragged.py::test_no_padding_is_asked_for",
    "test_ragged.py::test_bounds_past_the_keys_are_cut",
    "test_ragged.py::test_bounds_before_the_first_key_are_cut",
    "test_ragged.py::test_a_window_that_ends_before_it_begins_is_empty",
    "test_ragged.py::test_nan_outside_the_window",
    "test_ragged.py::test_one_row_of_many_keys",
    "test_ragged.py::test_blocks_that_take_pieces_of_several_groups",
]
CLEAN = ["test_paged.py::test_clean_logits", "test_ragged.py::test_compressed", "test_ragged.py::test_full"]
ARCHITECTURES = [
    "test_architectures.py::test_other_cards[fp4-24-64-sm_89]",
    "test_architectures.py::test_scales_at_the_ends_of_their_range",
    "test_architectures.py::test_the_smallest_scale",
]
SMALL = "test_sanitizers.py::test_small_problems"
SHAPES = ["test_shapes.py::test_paged", "test_shapes.py::test_ragged"]
TOPK = [
    "test_topk.py::test_candidates_of_a_row_that_begins_at_the_last_key_of_all",
    "test_topk_garbage.py::test_blocks_behind_the_last_key",
    "test_topk_garbage.py::test_candidates_of_a_run",
    "test_topk.py::test_candidate_blocks_of_a_run",
    "test_topk_garbage.py::test_a_table_that_is_too_narrow",
    "test_topk.py::test_a_row_of_at_most_k_keys_is_not_read",
    "test_topk.py::test_what_the_kernel_before_has_yet_to_write",
    "test_topk.py::test_the_row_is_read_again_only_where_it_matters",
    "test_topk.py::test_the_last_keys_of_a_row_begin_a_piece",
    "test_topk.py::test_a_first_piece_that_is_no_sample",
    "test_topk.py::test_parts_have_as_many_keys_in_a_bin_as_a_front_holds",
    "test_topk.py::test_one_part_has_more_than_its_list_holds",
    "test_topk.py::test_zeros_of_both_signs_are_equal",
    "test_topk.py::test_zeros_of_both_signs_are_equal_in_one_part",
    "test_topk.py::test_the_merge_leaves_rows_of_one_part_alone",
    "test_topk.py::test_any_k_beside_any_length",
    "test_topk.py::test_any_alignment",
    "test_topk.py::test_any_values",
    "test_topk.py::test_pages_and_offsets",
    "test_topk.py::test_any_values_in_one_part",
    "test_topk.py::test_any_values_in_parts_of_several_pieces",
    "test_topk.py::test_a_length_past_the_columns_ends_there",
    "test_topk.py::test_candidate_blocks",
    "test_topk.py::test_any_values_in_bf16",
    "test_topk_garbage.py::test_topk",
    "test_topk.py::test_paged_logits_and_choice",
]
WHOLE = [  # rows of at most k keys
    "test_topk.py::test_keys_of_rows_that_are_chosen_whole_are_not_read",
    "test_topk.py::test_keys_of_a_run_that_are_chosen_whole_are_not_read",
    "test_topk.py::test_keys_of_a_prefill_that_are_chosen_whole_are_not_read",
    "test_sparse_topk.py::test_keys_of_rows_that_are_chosen_whole_are_not_read",
]
# For each file the tests that concern it, the likeliest to notice first: a run ends at the first failure.
TESTS = {
    "sm120/kernels/metadata.cuh": ["test_metadata.py", "test_garbage.py::test_metadata"],
    "sm120/kernels/window.cuh": [
        "test_metadata.py::test_a_row_is_as_long_as_its_longest_token",
        "test_garbage.py::test_lengths_at_the_ends_of_int32",
        *SHAPES,
        *RAGGED[4:7],
        "test_garbage.py::test_ragged",
        "test_garbage.py::test_paged_lengths_and_tables",
        "test_paged.py::test_a_length_past_the_maximum_stays_inside_the_row",
        *WHOLE,
    ],
    "sm120/kernels/clean.cuh": [*CLEAN, "test_garbage.py::test_ragged"],
    "sm120/kernels/formats.cuh": [*PAGED[:1], *ARCHITECTURES[:1], SMALL, *PAGED[1:3], *ARCHITECTURES[1:]],
    "sm120/kernels/ptx.cuh": [*PAGED[:6], "test_paged.py::TestForeignBytes", *ARCHITECTURES],
    "sm120/kernels/score.cuh": [
        *SHAPES,
        "test_paged.py::test_heads",
        "test_paged.py::test_dtypes",
        "test_paged.py::test_bf16_logits_are_the_rounded_fp32_ones",
        "test_rows.py::test_one_row_of_small_lengths",
        SMALL,
    ],
    "sm120/kernels/sinks.cuh": [
        "test_block_max.py::test_ragged",
        "test_block_max.py::test_many_rows",
        "test_block_max.py::test_next_n",
        "test_block_max.py::test_one_short_row",
        *RAGGED,
        *PAGED[:4],
    ],
    "sm120/kernels/keys.cuh": [
        *SHAPES,
        "test_paged.py::test_more_tiles_than_a_warp_has_lanes",
        "test_garbage.py::test_a_table_that_just_fits",
        "test_paged.py::test_padded_cache",
        "test_paged.py::test_page_sizes",
        "test_garbage.py",
        "test_sparse.py::test_blocks_and_pages",
        "test_sparse.py::test_lists",
        "test_sparse.py::test_bounds_outside_the_run_are_cut",
        "test_sharing.py",
    ],
    "sm120/kernels/stream.cuh": [
        *SHAPES,
        SMALL,
        "test_sharing.py",
        "test_paged.py::test_more_tiles_than_a_warp_has_lanes",
        "test_sparse.py::test_blocks_and_pages",
        "test_rows.py::test_one_row_of_small_lengths",
        "test_block_max.py::test_ragged",
        "test_paged.py::test_page_sizes",
        "test_ragged.py::test_one_row_of_many_keys",
    ],
    "sm120/kernels/group.cuh": [*SHAPES, "test_paged.py::TestSchedules", SMALL, "test_sharing.py"],
    "sm120/kernels/rows.cuh": [
        SHAPES[0],
        "test_rows.py::test_one_row_of_small_lengths",
        "test_topk.py::test_a_slot_ends_among_rows_that_are_chosen_whole",
        WHOLE[0],
        "test_rows.py::test_empty_rows_among_them",
        "test_paged.py::test_a_row_behind_many_empty_ones",
        "test_paged.py::test_a_long_row_among_many",
        "test_paged.py::TestSchedules",
        "test_garbage.py::test_paged_schedules",
        "test_garbage.py::test_paged_lengths_and_tables",
        "test_sparse.py::test_many_rows",
        "test_rows.py",
        "test_sharing.py",
    ],
    "sm120/kernels/ragged.cuh": [
        SHAPES[1],
        *RAGGED,
        "test_garbage.py::test_ragged",
        "test_sharing.py",
    ],
    "sm120/kernels/lists.cuh": [
        WHOLE[3],
        "test_sparse.py::TestMetadata::test_truncated_copy",
        "test_sparse.py::TestMetadata::test_columns_past_the_output_are_cut",
        "test_sparse.py::TestMetadata::test_foreign_bytes_write_nothing_outside",
        "test_sparse.py::test_a_long_row_among_many_is_shared_out",
        "test_sparse.py::TestProperties::test_slots_do_not_matter",
        "test_sparse.py::test_empty_and_short_rows",
        "test_sparse.py::TestMetadata::test_rows_of_metadata_for_more",
        "test_garbage.py::test_sparse",
    ],
    "sm120/kernels/sparse_metadata.cuh": [
        "test_sparse.py::test_bounds_outside_the_run_are_cut",
        "test_sparse.py::test_unaligned_starts",
        "test_sparse.py::test_widths",
        "test_sparse.py::TestMetadata::test_garbage_ids_stay_inside",
        "test_sparse.py::TestProperties::test_slots_do_not_matter",
        "test_sparse.py::test_many_rows",
        "test_garbage.py::test_sparse",
    ],
    "sm120/kernels/sparse.cuh": [
        "test_sparse.py::test_one_row_with_and_without_a_warp_for_every_eight_keys",
        "test_sparse.py::test_one_row_fills_the_chip",
        "test_sparse.py::test_one_row",
        "test_sparse.py::TestMetadata::test_foreign_bytes_write_nothing_outside",
    ],
    "sm120/kernels/carry.cuh": [
        "test_topk.py::test_pages_and_offsets_of_pieces",
        "test_topk.py::test_a_ragged_prefill_takes_turns",
        "test_topk.py::test_a_paged_prefill_takes_turns",
        "test_topk.py::test_any_prefill",
        WHOLE[2],
    ],
    "sm120/kernels/listed_columns.cuh": [
        "test_sparse_topk.py::test_a_list_that_does_not_ascend_ends_early",
        "test_sparse_topk.py::test_repeated_blocks",
        "test_sparse_topk.py::test_no_rows_no_pages",
        "test_sparse_topk.py::test_what_comes_after_a_list_does_not_count",
        "test_sparse_topk.py::test_garbage",
        "test_sparse_topk.py::test_any_k",
    ],
    "sm120/kernels/order.cuh": TOPK,
    "sm120/kernels/paged_fronts.cuh": ["test_fronts.py"],
    "sm120/kernels/fronts.cuh": ["test_fronts.py"],
    "sm120/kernels/topk.cuh": TOPK,
    "sm120/kernels/topk.py": [
        "test_topk.py::test_pages_and_offsets",
        "test_topk.py::test_a_workspace_may_hold_anything",
        *TOPK,
        "test_topk.py::test_paged_logits_and_choice",
    ],
    "sm120/kernels/metadata.py": [
        "test_garbage.py::test_metadata_of_lengths_at_the_ends_of_int32",
        "test_garbage.py::test_metadata",
        "test_metadata.py",
    ],
    "sm120/kernels/logits.py": [
        "test_rows.py::test_every_run_finds_a_warp",
        "test_garbage.py::test_a_grid_is_one_that_can_be_launched",
        "test_paged.py::test_block_table_with_a_stride_of_its_own",
        *SHAPES,
        "test_garbage.py::test_paged_lengths_and_tables",
        "test_rows.py",
        "test_sharing.py",
    ],
    "sm120/jit/cache.py": ["test_cache.py", "test_jit.py"],
    "sm120/jit/compiler.py": ["test_jit.py", "test_cache.py"],
    "sm120/jit/runtime.py": [
        "test_soak.py::test_the_emulator_keeps_its_newest_modules",
        "test_soak.py::test_modules_are_those_of_the_configurations_met",
        "test_jit.py",
        "test_launch.py",
        "test_soak.py::test_nothing_grows",
        "test_malformed.py",
    ],
    "sm120/jit/shipped.py": ["test_launch.py"],
    "sm120/checks.py": ["test_malformed.py", "test_arguments.py"],
    "sm120/arguments.py": ["test_malformed.py", "test_arguments.py", "test_signatures.py"],
    "sm120/paged.py": [
        "test_malformed.py::test_nothing_is_launched_for_nothing",
        "test_malformed.py",
        "test_arguments.py",
        *PAGED[:4],
        "test_garbage.py::test_no_room_at_all",
        "test_garbage.py::test_paged_lengths_and_tables",
        "test_signatures.py",
    ],
    "sm120/ragged.py": [
        "test_malformed.py",
        "test_arguments.py",
        *RAGGED,
        "test_garbage.py::test_ragged",
        "test_signatures.py",
    ],
    "sm120/debug.py": [
        "test_debug.py",
        "test_sparse_topk.py::test_debug_mode_names_lengths_that_the_metadata_were_not_made_from",
    ],
    "__init__.py": ["test_face.py"],
}

# «what stands there → what comes in its place»; the line around it says where: it is found once in the file.
MUTATIONS = {
    "sm120/kernels/metadata.cuh": [
        "if (lane «>= → >» distance) x += below;",
        "distance < «32 → 16»; distance *= 2",
        "if (lane == «31 → 30») warp_sums[warp] = x;",
        "return warp > «0 → 1» ? x + warp_sums[warp - 1] : x;",
        "+ kSplit« - 1 → ») / kSplit : 0;",
        "row < «rows → rows - 1»; row += kThreads",
        "shorter = p.slots - total % p.slots« → - 1»",
        "if (start < before || start «>= → >» until) continue;",
        "«<= → <» start) row += step;",
        "(row > 0 ? sums[row - 1] : «before → 0»)",
        "before = «until → total»;",
        "slot == p.slots« || total == 0 → »",
    ],
    "sm120/kernels/window.cuh": [
        "if (lengths_per_row «== next_n → != 1») {",
        "«max(end_at(ends + row), 0) → end_at(ends + row)»",
        "- (next_n -« 1 - → » (token - row * next_n));",
        "max(begin, «min(end, limit) → end»)",
        "«max(begin, min(end, limit)) → min(end, limit)»",
        "(own ? row * next_n« + n → » : row)",
        "own ? length : max(length, 0) - (next_n -« 1 - → » n)",
        "- (next_n - 1 - n), «limit → 0x7fffffff»)));",
        "starts ? «max(start_at(starts + token), 0) → start_at(starts + token)» : 0",
        "row * lengths_per_row« + i → »)",
        "return «min(longest, limit) → longest»;",
        "return keys «> → >=» least ? keys : 0;",
        "return «counted → int»(max(0, min(own ? length",
        "begin + «counted → int»(max(begin, min(end, limit)) - begin)",
    ],
    "sm120/kernels/clean.cuh": [
        "if (n < begin || n «>= → >» end)",
        "begin = «p.compressed ? 0 : window.begin → window.begin»",
        "end = «p.compressed ? window.end - window.begin : window.end → window.end»",
        "n += «gridDim.y → 2 * gridDim.y» * blockDim.x",
    ],
    "sm120/kernels/formats.cuh": [
        "return 4 * kVector * lane.«t → g»;",
        "key[2 * Step], key[2 * Step« + 1 → »], 0x7f7f7f7f",
        "0x7f7f7f«7f → 80»",
        "const int head = 32 * i + «8 → 4» * lane.t + lane.g;",
        "ptx::mma_e2m1<«2 * Step → 0», ALane, BLane>",
        "words[2 * j + 1] = (loaded[j] & 0x80808080) | (loaded[j] >> «2 → 1» & 0x1c1c1c1c);",
        "byte == 0 ? «0x00400000 → 0» : byte == 255",
        "return sum * «4096 → 2048»;",
        "4 * (2 * lane.t« + c → ») + KeyTile",
        "return sum «* → +» __uint_as_float(key_scale);",
    ],
    "sm120/kernels/ptx.cuh": [
        'asm("max«.NaN → ».f32 %0, %1, 0f00000000;"',
        "cvt.«rn → rz».bf16.f32",
    ],
    "sm120/kernels/score.cuh": [
        "int64(first_head + lane.«g → t») * Format::kRowBytes",
        "const int head = 16 * m« + 8 * half → »;",
        "if (head «< → <=» kHeads) {",
        "fragments[i][m][s][1] = rows[«1 → 0»][2 * s] ^ zero;",
        "fragments[i][m][s][2] = rows[0][2 * s« + 1 → »] ^ zero;",
        "token * «queries.weights_stride → kHeads» + lane.g",
        "return __uint_as_float(ptx::load_half(address) << «16 → 15»);",
        "sums[j % 2] += weights[i][m][j «/ → %» 2]",
        "scales[i].load(queries.scales« + first_head → », kHeads, lane);",
        "const bool keeps_upper = lane.id & «4 << Step → 4»;",
        "exchange<1>(exchange<0>(sums[2 * half][0], sums[2 * half« + 1 → »][0], lane)",
        "return exchange<2>(halves[0], halves[«1 → 0»], lane);",
        "return 16 * (lane.g >> 2) + «8 → 4» * (lane.g & 1)",
        "sum += __shfl_xor_sync(kAllLanes, sum, «8 → 4»);",
        "return 2 * lane.t + (lane.g & «1 → 0»);",
    ],
    "sm120/kernels/sinks.cuh": [
        "begin = «window.begin → 0»;",
        "(compressed ? 0 : «window.begin → 0»)",
        "if (n «< → <=» count) row[n]",
        "first = compressed ? «begin / kBlock → 0» : 0;",
        "room = (first + p.blocks) * kBlock« - begin → »;",
        "p.maxima + token * p.maxima_stride« - first → »);",
        "reach = count ? «min(int(count), room) → int(count)» + (kBlock - 1)",
        "reach = «count ? → true ?» min(int(count), room)",
        "min(int(count), room)« + (kBlock - 1) → » : 0;",
        "first = (key - «2 → 1» * odd) % Sink::kBlock == 0",
        "first = (key - 2 * odd) % Sink::kBlock == «0 → 1» && of(sinks).count > 0;",
        "% Sink::kBlock == 0« && of(sinks).count > 0 → »;",
        "        maxima += «key / 2 → 0»;",
        "own.begin += «2 → 0», --own.maxima;",
        "own.begin += 2, «-- → »own.maxima;",
        "odd = kTokens == 2 && «lane % 2 → lane / 2 % 2»;",
        "__shfl_xor_sync(kAllLanes, odd ? values[«0 → 1»] : values[1], 1));",
        "        «if (!first) return; → »\n        uint8* at",
        "if («from == 1 → false») logit = fmaxf",
        "if (key % kBlock == «0 → 2») place(n,",
        "shfl_xor_sync(kAllLanes, logit, «kApart → 16»));",
        "n < count ? float(stored) : __int_as_float(«0x7fffffff → 0»), 1);",
        "seen ? float(Logit(logits[i])) : __int_as_float(«0x7fffffff → 0»);",
        "const bool seen = kInside || tile * kTile - sinks[i].begin «< → <=» sinks[i].count;",
        "if (n + (kBlock - 1) «< → <=» reach) {",
        "n + kBlock «>= → >» count ?",
    ],
    "sm120/kernels/carry.cuh": [
        "return max(«min(window.end, key) → window.end» - window.begin, 0);",
        "return «min(p.k, keys_before(key)) → p.k»;",
        "return «min(max(key, from), to) → max(key, from)» - from;",
        "p.ends[row] = «scored ? end : start → end»;",
        "scored(window.end - window.begin «> → >=» p.least)",
        "p.firsts[row] = p.front + start« - carried → »;",
        "p.lengths[row] = «carried + end → end» - start;",
        "pages + min(page, p.table_columns« - 1 → »)",
        "pages = p.table + row« / p.tokens → » * p.table_stride;",
        "return «p.offset → false» ? place",
        "first = «max(row.window.begin, p.at) → row.window.begin»;",
        "carried[chosen] : first« - row.window.begin → » + fresh;",
        "fresh = chosen - «before → now»;",
        "buffer[fresh < 0 ? fresh : «first - p.at + fresh → fresh»];",
        "row.put(i, i «< → <=» now,",
        "buffer[i - «now → p.k»] = scores[j];",
        "if (threadIdx.x == 0) row.tell_next(«now → before»);",
    ],
    "sm120/kernels/listed_columns.cuh": [
        "length = min(«max(int(ptx::load_word(p.lengths + row)), 0) → int(ptx::load_word(p.lengths + row))», p.limit)",
        "0), «p.limit → 0x7fffffff»), full = length / p.block;",
        "(length + p.block« - 1 → ») / p.block);",
        "min(«uint32(p.width) → 0xffffffffu», (length",
        "< full ? entries : «i → i + 1»);",
        "ptx::load_word(list + i) «< → <=» full",
        "ptx::load_word(list + end) «== → >=» full;",
        "cut ? length % p.block : «0 → p.block»",
        "end * p.block + («cut ? length % p.block : 0 → 0»);",
        "ends[«lane % kWarps → 0»]);",
    ],
    "sm120/kernels/keys.cuh": [
        "«min(tile * kTile + lane.id * step * kTile + half * kTile / 2, last_key) → tile * kTile + half * kTile / 2»;",
        "lane.id * step * kTile + «half → 0» * kTile / 2, last_key);",
        "lane.id« * step → » * kTile + half",
        "if (!kOpened && turn == «32 → 33») open(tile, step, p->columns",
        "bool opened() const { return turn «< → <=» 32; }",
        "open(tile, step, p->columns * kPage« - 1 → », lane);",
        "ahead.halves[half] = «min → max»(ptx::load_word(p->block_table",
        "(table + key / kPage)), p->pages« - 1 → »);",
        "ahead.halves[kOnePage ? 0 : «1 → 0»], turn);",
        "last = («min(to * kTile, end) → to * kTile» - 1) / kPage;",
        "return __«all → any»_sync(kAllLanes, same);",
        "array += int64(page) * «p->page_stride → (kPage * (kRowBytes + 4))»;",
        "begin = tile «% → /» (kPage / kTile)",
        "(«min(key + more, last_key - tile * kTile) → (key + more)» * kBytes + (offset + begin));",
        "return array + (min(tile * kTile + key« + more → », last_key) % kPage",
        "key «< → <=» kTile / 2 ? page[0] : page[1]",
        "last_key(int, int keys) { return keys« - 1 → »; }",
    ],
    "sm120/kernels/stream.cuh": [
        "lane.g, «8 → 4» * j,",
        "if constexpr («kScaleBeside → !kScaleBeside») scale = next_scale;",
        "locate<kMany && kWhole>(«next → tile», step, last_key(), lane);",
        "if constexpr (kFetch) fetch<1, kWhole, kMany>(«next → tile»);",
        "kApart>(tile * kTile« + scorer.key_of(lane) → », logits[i]);",
        "const int cut = to - (kCut ? «2 → 1» : 1) * step;",
        "const int cut = to - (kCut ? 2 : «1 → 0») * step;",
        "if (!source.opened()) source.open(tile« + step → », step, last_key(), lane);",
        "kept = __shfl_sync(kAllLanes, own(), «lane.id → 0»)",
        "constexpr bool kInside = kWhole« && Source::kFromZero → »;",
        "else if («kTokens == 1 || sinks[i].count → true») {",
        "kApart>(tile * kTile + scorer.key_of(lane), logits[«i → 0»]);",
        "key = unit % 4 * «8 → 4»;",
        "key «< → <=» kTile / 2\n            ? source.template values<0, kWhole>",
        "key = lane.g < «2 → 8» ? 8 * unit",
    ],
    "sm120/kernels/group.cuh": [
        "const int tokens = «min(count, kSize) → kSize», sets",
        "return kWarps % sets <= «kWarps / 8 → kWarps» ? tokens : even * kTokens;",
        "? tokens : even« * kTokens → »;",
        "last = empty ? 0 : («mine.end - 1 → mine.end») / kTile + 1;",
        "active ? last : first > from ? first : «kNever → last»",
        "rest = change < to ? «change → kNever» : kNever;",
        "share = warp / sets, shares = «kWarps / sets → 1»,",
        "if («share >= shares || → » from + share >= until) return rest;",
        "my_rank == min(rank + i, «count - 1 → count»))) - 1;",
        "work.tokens[i] = first_token + «chosen → i»;",
        "work.row = «work.tokens[i] / p.windows.next_n → work.tokens[i]», work.end",
        "if (i == 0 || work.windows[i].end «> → <» work.end) {",
        "if (rank + i >= count) work.windows[i].end = «work.windows[i].begin → work.windows[i].end»;",
        "together «&= → |=» Source::alike(",
        "token / p.windows.next_n, window.end, from« + share → », shares, until};",
    ],
    "sm120/kernels/rows.cuh": [
        "tiles_of(int keys) { return (keys + kTile« - 1 → ») / kTile; }",
        "if (set * kTokens + i > n) share.windows[i].end = «0 → share.windows[i].end»;",
        "share.to = «min(to, tiles_of(share.end)) → to»;",
        "for (; share «>= → >» p.few.shares; ++set)",
        "return set * kTokens «>= → >» p.windows.next_n;",
        "p.windows.next_n == 1 ? «keys → to» : p.windows.end(row, n)",
        "if (part.idle(p) || item * «8 → 32» >= p.windows.limit) return;",
        "if (tiles * (kTile / 8) «<= → <» p.few.quarters) {",
        "if (item * 8 «< → <=» work.end) Group::score_eight",
        "return quotient + (number - quotient * by «>= → >» by);",
        "keys[i] = «max(keys[i], lengths[i]) → lengths[i]»;",
        "p.windows.counted(«min(keys[i], p.windows.limit) → keys[i]») : 0;",
        "p.windows.rows ?« p.windows.counted → »(min(keys[i], p.windows.limit)) : 0;",
        "const int keys = «p.windows.counted(longest) → longest», tiles",
        "if («total == 0 → false» || part.idle(p)) return;",
        "uint32 run = Divisor(takers, p.few.takers_inverse)(total - 1)« + 1 → + 2»;",
        "(total - 1)« + 1 → »;\n        while (run < enough) {",
        "runs_of(keys, middle)) «<= → <» takers) enough = middle;",
        "distance * kPerLane «< → <=» p.windows.rows; distance *= 2",
        "if (lane.id «>= → >» distance) end += before;",
        "if (rest «>= → >» runs) rest -= runs",
        "gridDim.x * (share >> p.few.pairs)) << p.few.pairs) + («share & p.few.pairs → 0»);",
        "part.set, rest * run, 1, («rest + 1 → rest + 2») * run);",
        "runs += run(tiles_of(keys[i]) + run.by« - 1 → »);",
        "p.windows.counted(p.windows.length(j)) «> → >=» 0;",
        "first += «32 * kAtOnce → 64 * kAtOnce») {",
        "if (found) return (first + 32 * i + __ffs(found)« - 1 → »)",
        "if (entry.x «>= → >» first_row + rows) return kNever;",
        "if (rows == 1) return «entry.y → (entry.y + 1)» * kTilesPerSplit;",
        "lane.id == row ? min(tiles, «entry.y * kTilesPerSplit → entry.y») : 0;",
        "if (missing «< → <=» active) return cut;",
        "begin.x == end.x && begin.y «>= → >» end.y ? 0",
        "end.x + «(end.y > 0) → 1»",
        "if («first_row → row» >= limit",
        "first_row >= limit« || row >= p.windows.rows → ») return;",
        "const int first_row = row« - row % p.rows_per_group → »,",
        "next = first_token + «size → count», tile = 0;",
        "window_of(p, first_token, «size → count», lane)",
        "score_span(p, first_token, mine, «max(tile, from) → from», to,",
        "const int row = max(«next / p.windows.next_n → 0», begin.x);",
        "next = next_row(p, first_row« + rows → », limit, lane)",
    ],
    "sm120/kernels/ragged.cuh": [
        "if (p.columns) window.end = «window.begin + → » min(window.end - window.begin, p.columns);",
        "if (lane.id >= Group::kSize || token «>= → >» p.windows.rows) return {0, 0};",
        "empty ? 0 : («mine.end - 1 → mine.end») / kTile + 1);",
        "from = first + piece * block + min(block, longer), to = first + piece * («block + 1 → block») + min",
        "to = «min(to - group * p.parts, p.parts) → to - group * p.parts»;",
        "first + share * to + min(to, «longer → 0»), p.columns",
        "if (tile == kNever) done = group * p.parts + to, tile = «0 → tile»;",
    ],
    "sm120/kernels/lists.cuh": [
        "return counted(max(0, min(head.seal == seal ? head.columns : «0 → limit», limit)));",
        "return columns «> → >=» least ? columns : 0;",
        "return «counted → int»(max(0, min(head.seal",
        "max(0, «min(head.seal == seal ? head.columns : 0, limit) → head.seal == seal ? head.columns : 0»));",
        "start = slot * share + max(0, slot - (slots - total % slots« → - 1»));",
        "if (start «>= → >» total) return {rows, 0};",
        "step * lane.id < span && head(probe).before «<= → <» start;",
        "return {row, max(0, start - «head(row).before → 0»)};",
    ],
    "sm120/kernels/sparse_metadata.cuh": [
        "int(ptx::load_word(p.windows.starts + row)), 0)«, p.windows.limit → , 0x7fffffff»);",
        "keys / kBlock« + (keys % kBlock > 0) → »);",
        "return «min(uint32(p.width), keys → (keys»",
        "= {int(p.seal), entries * kBlock, «before → 0», 0};",
        "«min(int64(page) * kBlocks + id % kBlocks, 0xffffffffll) → page * kBlocks»;",
        "(p.unaligned ? «first % kBlock → 0» : 0)",
        "ids[i] = «at + i * threads < p.width → true» ?",
        "if (at >= entries && at < written) ids[i] = ptx::load_word(list + entries« - 1 → »);",
        "table + «min(ids[i] / kBlocks, p.pages_per_row - 1u) → ids[i] / kBlocks»);",
        "if («base + i * threads < written → true») places",
    ],
    "sm120/kernels/sparse.cuh": [
        "ptx::load_word(list + 4 * («min(eight, last) → eight» / Source::kEights));",
        "if («eight < count → true») {",
        "if (kPage) place = «min(place, p.keys.places - 1) → place»;",
        "if (warp < kHeads / 8« → - 1») {",
        "«__syncthreads(); → »",
        "take<kApartOfEight>(«lane.g < 2 → lane.g < 1» ?",
    ],
    "sm120/kernels/order.cuh": [
        "return value > than || (value == than && entry.y «< → >» other.y);",
        "return value > than || (value == than && entry.y «< → <=» other.y);",
        "return x == x ? key_of_number(x) : «kNan → kZero»;",
    ],
    "sm120/kernels/paged_fronts.cuh": [
        "if (key «< → <=» count) row[key] = logit;",
        "ptx::store_shared(kept, «key < count ? __float_as_uint(logit) : kNanWord → __float_as_uint(logit)»);",
        "return eights ? «8 → 16» * item + Key::key_of_eight(lane)",
        "if (busy > 1 << i) most = fmaxf(most, other), shift = i« + 1 → »;",
        "if (work.eights «|| → &&» busy <= 1) __syncthreads();",
        "count = listed <= kFrontRoom ? listed : «0 → kFrontRoom»;",
        "p.heads[slot] = {«listed <= kFrontRoom ? gate : kAllLanes → gate», uint32(count)};",
        "p.places[at] = page * kPage + entry.y «% → /» kPage;",
    ],
    "sm120/kernels/fronts.cuh": [
        "if (__builtin_expect(«found < enough → false» && (met",
        "positions[row * kPitch + front] «>= → <» position)) break;",
        "p.windows.end(0, 0) > p.k ? «kNothing → kAllLanes» : kAllLanes;",
        "if (lane == 0 && key_of(value) «>= → >» memory.least) put",
        "if (at «>= → >» p.k) break;",
        "int filled = «reached → 0»;",
        "further = i >= kFrontRows || (i > 0 && «memory.values[(i - 1) * kPitch + own] == value → false»);",
        "if (row.length <= p.k) return «row.put_all() → »;",
        "for (int step = kFrontRows «/ 2 → / 4»; step > 0; step /= 2) {",
    ],
    "sm120/kernels/topk.cuh": [
        "length = end > uint32(first) ? (end + unit« - 1 → ») / unit - base : 0;",
        "length = «end > uint32(first) → true» ? (end + unit - 1)",
        "/ unit« - base → » : 0;",
        "end = first + «min(length, 0x7fffffff - first) → length»;",
        "first = «p.compressed ? 0 : base → base»;",
        "first = p.compressed ? 0 : «base → first»;",
        "return kUnits ? «row.base + position → position» : position;",
        "if (positions) positions[at] = «number_of(position) → position»;",
        "length = «min(length, p.columns - first) → length»;",
        "column_of(int page) const { return «min(page, p.table_columns - 1) → page»; }",
        "(p.tokens > 1 ? «row / p.tokens → row» : row)",
        "out[at] = place «+ → -» offset;",
        "if (uint32(first + i) «>= → >» uint32(length)) continue;",
        "cvt_rz_f16x2(second + 0.0f, first« + 0.0f → »)",
        "return halves ^ (~ptx::signs_of_halves(halves) & 0x7fff«7fff → 0000»);",
        "return bin >= kNegative + («0x7c00 → 0x7bff» >> kShift) ? lowest() : value;",
        "if (thread == 0 && «!bin_0_counts → false») bins[0] = 0;",
        "const int before = until« - sum → » + __reduce_add_sync",
        "if (before < want && before + int(sum) «>= → >» want) {",
        "if (upto «< → <=» want) ++bin, above = upto, inside = bins[i + 1];",
        "gate));\n        if (listed + places.total > «kCapacity → 2 * kCapacity») return false;",
        "(mask));\n        if (listed + places.total > «kCapacity → 2 * kCapacity») return false;",
        "ptx::store_word_if_at_least(at, value, match.«high → low», entry.y);",
        "if (__builtin_expect(value >= match.low && «!(value >= match.high) → true», 0)) {",
        "if (mine && rank «< → <=» want) chosen()[first + rank] = position;",
        "place(«i < inside → true» && (thread & (lanes - 1)) == 0, rank, tie.y);",
        "gate = search(listed, k, kCapacity / 8).«low → high»;",
        "high = __reduce_max_sync(kAllLanes, ends.y)« + 1 → »;",
        "position < uint32(row.length) && (!of_positions || «key == bound → true»)",
        "key > bound || (key == bound && ~position «>= → >» tie)",
        "const Match match = refine(find(room« + 1 → »), room + 1,",
        "if (bit < «32 * kBins → kBins»)",
        "const int chunk = block.thread / kLanes * pieces * parts« + part → »;",
        "const bool whole = «first >= 0 → true» && uint32(last)",
        "gate = fits ? block.gate_of(p.front, gate, listed) : «__uint_as_float(kNanWord) → gate»;",
        "if (kParted || __builtin_expect(«listed >= p.k → true» || want == p.k, 1)) break;",
        "least = «max → min»(least, gate == gate",
        "gate == gate ? key_of(gate) : «kAllLanes → kNothing»",
        "if (__builtin_expect(«found == words → true», 1)) break;",
        "if (at < «parts → parts - 1» * p.front)",
        "if (row.length <= p.k« || parts == 1 → ») {",
        "__builtin_expect(row.length «<= → <» p.k, 0)) return row.put_all();",
    ],
    "sm120/kernels/topk.py": [
        "p.page_shift = page, -1 if page & (page - 1) else page.bit_length()« - 1 → »",
        "p.tokens, p.unit, p.compressed, p.nowhere = «tokens → 1», unit",
        "p.tokens, p.unit, p.compressed, p.nowhere = tokens, unit, «compressed → False», nowhere",
        "p.logits_stride = logits.stride()[«0 → 1»]",
        "rows * parts * 8 * («1 → 0» + config.fronts // parts)",
        "p.fronts = p.gates + «8 → 4» * rows * parts",
        "p.front = config.fronts // parts« → + 1»",
    ],
    "sm120/kernels/metadata.py": [
        "limit = min(NO_LIMIT« - 255 → », NO_LIMIT",
        "NO_LIMIT // «max(context_lens.shape[0], 1) * 256 → 1»)",
    ],
    "sm120/kernels/logits.py": [
        "if rows «>= → >» slots and (rows <= FEW_ROWS[1]",
        "FEW_ROWS = (1, «32 → 33», 256)",
        "shares = config.warps // «sets → max(1, sets - 1)»",
        "for number in (takers, takers« - rows → »))",
        "p.pages = kv_cache.shape[0]« → + 1»",
        "p.table_stride = block_table.stride()[«0 → 1»]",
        "groups, tiles = «-(- → (»rows // min(32, config.warps",
    ],
    "sm120/jit/cache.py": [
        "if digest(entry[_DIGEST_BYTES:]) «!= → ==» entry[:_DIGEST_BYTES]:",
        'sha.update(«len(data) → len(sha.name)».to_bytes(8, "little"))',
        "if «str(where) not in _said → True»:",
        "_refuse_foreign(path, «path.lstat() → path.stat()»)",
        "        «_refuse_foreign(path, os.fstat(place)) → pass»\n        yield place",
        "path.mkdir(mode=«0o755 → 0o775», exist_ok=True)",
        "os.open(file, flags, «0o644 → 0o666», dir_fd=place)",
        "os.fchown(file.fileno(), -1, «group → -1»)",
        "os.fchmod(file.fileno(), «0o644 → 0o666»)",
        "«os.unlink(unfinished, dir_fd=place) → pass»",
        "_descriptor(name, «os.O_NOFOLLOW | → » os.O_NONBLOCK, place)",
        "_descriptor(name, os.O_NOFOLLOW« | os.O_NONBLOCK → », place)",
        "if «not stat.S_ISREG(status.st_mode) → False»:",
        "if status.st_size > «_LARGEST_ENTRY → 2**50»:",
        "        «_refuse_foreign(name, status) → pass»\n        return io",
        "«os.close(descriptor) → pass»",
        "trusted = status.st_gid «== → !=» _trusted_group()",
        "not in (os.geteuid(), «0 → 1») and not trusted:",
        "not in (os.geteuid(), 0)« and not trusted → »:",
        "stat.S_IWOTH if trusted else stat.S_IWGRP« | stat.S_IWOTH → »)",
        "stat.S_IWOTH if trusted else «stat.S_IWGRP | → » stat.S_IWOTH)",
        "mode & («stat.S_IWOTH → 0» if trusted",
        "number = int(name) if name.isdecimal() else «grp.getgrnam(name).gr_gid → 0»",
        "except (KeyError«, ValueError → »):",
        "if not 0 <= number < 2**«32 - 1 → 64»:",
    ],
    "sm120/jit/compiler.py": [
        "key = cache.key(identity(kernel, arch, target)«, nvrtc_version() → »)",
        "return cache.key(kernel.source, «target, → » *_options(arch), *headers)",
        "for part in («path.name, → » path.read_bytes())",
        "        «cache.put(key, binary) → pass»",
        "if error == nvrtc.nvrtcResult.«NVRTC_ERROR_INVALID_OPTION → NVRTC_ERROR_INTERNAL_ERROR»:",
        "with cache.opened(folder, make=«True → False») as place:",
    ],
    "sm120/jit/runtime.py": [
        "    «_loading = threading.Lock() → pass»\n\n\nos.register_at_fork",
        "if «not checked → False»:",
        "if len(emulated) «>= → >» _MOST_EMULATED:",
        "del _loaded[emulated[«0 → -1»]]",
        "if len(_loaded) «>= → >» _MOST_ON_GPUS:",
        "if «_current_device() == index → True»:",
        "if error and error == _driver().CUresult.CUDA_ERROR_INVALID_«CONTEXT → DEVICE»:",
        "if (kernel.follows or settings.get_pdl()) and _capability(index) >= («9 → 8», 0):",
        "if «(kernel, index) not in _loaded → True»:",
        "                    if «_is_capturing(stream) → False»:",
        "if error == driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_«IMPLICIT → MERGE»:",
        "if error.code not in (codes.CUDA_ERROR_NO_BINARY_FOR_GPU, codes.CUDA_ERROR_INVALID_«IMAGE → DEVICE»):",
        "    «if not _warned_of_shipped → if True»:",
        "        «driver.cuLibraryUnload(library) → pass»",
        "        «driver.cuCtxSetCurrent(before) → pass»",
        'return f"sm_{major}{minor}" + ("a" if major >= «9 → 8» else "")',
    ],
    "sm120/jit/shipped.py": [
        "files.get(identity(kernel, «arch → 'sm_120f'», \"cubin\"))",
        "except («OSError, → » ValueError):\n        return {}",
    ],
    "sm120/checks.py": [
        "if «value.layout is STRIDED and → » value.dtype in dtypes",
        "value.device == device« and value.shape == shape → »:",
        "STRIDED and «value.dtype in dtypes and → » value.device == device",
        "if not value.is_contiguous()« → and False»:",
        "if «value.layout is not STRIDED or → » not (value.is_cpu",
        "is not STRIDED or not («value.is_cpu or value.is_cuda → True»):",
        "if «isinstance(value, bool) or → » not isinstance(value, int)",
        "at_least «<= → <» value <= at_most",
        "together |= address« or 1 → »",
        "if value is None« or not value.numel() → »:",
        "if address «< → >» end and start < address",
        "        together «|= → =» address or 1",
        "start, end = addresses[at], addresses[at] + «sizes[at] → 1»",
        "                if address < end and start < address + «size → 1»:",
        "            at «-= → +=» 1",
        "(t.dtype, «t.shape → 0», t.stride(), t.device, t.requires_grad)",
        "(«t.dtype → 0», t.shape, t.stride(), t.device, t.requires_grad)",
        "(t.dtype, t.shape, «t.stride() → 0», t.device, t.requires_grad)",
        "(t.dtype, t.shape, t.stride(), «t.device → 0», t.requires_grad)",
        "(t.dtype, t.shape, t.stride(), t.device, «t.requires_grad → 0»)",
        "if len(self) «>= → <» _MOST_KNOWN:",
        "        «self.clear() → pass»",
        "[«t.nbytes → 0» if t.is_contiguous() or",
        "if t.is_contiguous() or not t.numel() else «_extent(t)[1] → t.nbytes»",
        "_ALIGNMENT = {2: «2 → 4»}",
        "if start + size «<= → <» address or address + bytes_ <= start:",
        "piece = «other_row if other_stride == stride else bytes_ → bytes_»",
        "return gap < row or gap + piece «> → >=» stride",
        "return «gap < row or → » gap + piece",
    ],
    "sm120/arguments.py": [
        "or len(shape) != dimensions« or not values.is_contiguous() → »:",
        '(rows, heads), device, «"q" → ""»)',
        "    if weights.stride()[1] != «1 → 2»:",
        "if not whole or not page_bytes <= page_stride < 2**32« or page_stride % 4 → »:",
        "or rows * table_stride >= 2**«31 → 33»:",
        "if context_lens.dim() == 2 and context_lens.shape[1] != «1 → 2»:",
        "schedule_meta.data_ptr() % «8 → 4»:",
        "if keys.shape[0] >= 2**«31 → 63»:",
        "if «out.requires_grad → False»:",
        "rows > 1 and row_stride «< → <=» columns:",
        "-(-columns // per_row) * «per_row → 1»",
        'device = device or «checks.on_a_device("context_lens", context_lens) → context_lens.device»',
    ],
    "sm120/paged.py": [
        "limit = «min(max_context_len, block_table.shape[1] * page) → max_context_len» if kv_cache",
        "* page)« if kv_cache.shape[0] else 0 → »",
        "aligned = («addresses[0] | addresses[2]) & 31 → 0)», addresses[5]",
        "& 31, «addresses[5] & 7 → 0»\n        call = layouts",
        "aligned, «max_context_len → 0», logits_dtype, least, fronts",
        "aligned, max_context_len, «logits_dtype → 0», least, fronts",
        "aligned, max_context_len, logits_dtype, «least → 0», fronts",
        "aligned, max_context_len, logits_dtype, least, fronts is not None, «arch → 0»",
        "except (AttributeError, «IndexError, → » RuntimeError):",
        "if «0 in shape → False»:",
        "if indices is not None and next_n != «1 → 2»:",
        'checks.integer("num_sms", num_sms, «1 → 0», 2**24)',
    ],
    "sm120/ragged.py": [
        "shape = rows, «max_seqlen_k or keys.shape[0] → keys.shape[0]»",
        "call = layouts, («addresses[0] | addresses[2]) & 31 → 0)», max_seqlen_k",
        "& 31, «max_seqlen_k → 0», logits_dtype, least, arch, num_sms",
        "& 31, max_seqlen_k, «logits_dtype → 0», least, arch, num_sms",
        "& 31, max_seqlen_k, logits_dtype, «least → 0», arch, num_sms",
        "& 31, max_seqlen_k, logits_dtype, least, «arch → 0», num_sms",
        "& 31, max_seqlen_k, logits_dtype, least, arch, «num_sms → 0»",
        "if «0 in shape → False»:",
        "if name «in kwargs → not in kwargs»:",
        "clean.clean(out, windows, bounds, compressed=max_seqlen_k > «0 → 1»)",
        "windows = windows_of_bounds(starts, ends, keys.shape[0]« → + 1», least)",
    ],
    "sm120/debug.py": [
        'ON = os.environ.get("DG_SM120_DEBUG") == "«1 → 2»"',
        '_look("context_lens", context_lens, context_lens «< → <=» 0,',
        "wrong = (context_lens < 0) | (context_lens «> → >=» most)",
        "block_table «>= → >» pages)) & (column",
        "& (column «< → <=» longest[:, None])",
        "(row < 0) | (row «> → >=» rows)",
        "backwards = torch.cat([torch.zeros(1, dtype=torch.bool), place[1:] «< → <=» place[:-1]])",
        "ends[0], ends[-1] = place[0] != 0, «place[-1] != total → False»",
        "ends - starts «> → >=» columns,",
        "index = wrong.nonzero()[«0 → -1»].tolist()",
        "torch.where(«counts → counts > -1», sparse_kv_block_indices // (page // block), 0)",
        "(block_table < 0)« & used → »,",
        "listed & (blocks «>= → >» places)",
        "torch.stack([«head[0] != MAGIC → head[0] < 0», head[1]",
        "!= MAGIC, head[1] «< → <=» rows])",
        "(columns «> → >=» width * block) |",
        "width * block)« | (columns % block != 0) → »",
        "before != splits.cumsum(0)« - splits → »,",
        "// block).clamp(max=«width → width + 1») != columns",
        "listed = torch.arange(blocks.shape[1]) «< → <=» columns[:, None] // block",
        "(starts < 0) | (starts «> → >=» columns)",
        "rest -= «starts → 0»",
        "(lengths < 0) | (lengths «> → >=» rest)",
        "(lengths < 0) | (lengths «> → >=» room)",
        "room = keys - («first % block → 0» if compressed",
        "_pages_that_have_places(block_table, «on_page > 0 → on_page > -99», page)",
        "used & ((block_table < 0) | (block_table «> → >=» most))",
        "most = 2**31 // size« - 1 → »",
        "block_table * page + on_page.clamp(max=page)« - 1 → »",
        "used = (page_first + page «> → >=» first[:, None])",
        "(page_first «< → <=» ends[:, None])",
        "ends = torch.where(«lengths > 0 → lengths > -1», first + lengths, 0)",
        "wrong = «(lengths > 0) → (lengths > -1)» & ((offset < 0)",
        "(offset < 0) | (offset + largest «>= → >» 2**31)",
        "(lengths < 0) | (ends «> → >=» most), f",
    ],
    "__init__.py": [
        'if device.type != "cuda" or os.environ.get("DG_SM120_FORCE") == "«1 → 0»":',
        "return major not in (9, 10) and (major, minor) >= (8, «9 → 10»)",
        "return major not in («9, → » 10)",
        "first = first[«0 → 1»]",
        "        «_upstream.keep_set(ours.__name__, value) → pass»",
    ],
}

# Survivors that are no gap, and why.
EXPLAINED = {
    "% Sink::kBlock == 0« && of(sinks).count > 0 → »;": "a second token for nobody is the first again: stored twice",
    "const bool seen = kInside || tile * kTile - sinks[i].begin «< → <=» sinks[i].count;": (
        "the key behind a window's last is in the block whose maximum is +inf, or in one that is not stored"
    ),
    "return bin >= kNegative + («0x7c00 → 0x7bff» >> kShift) ? lowest() : value;": "a limit lower than it need be",
    "if (start < before || start «>= → >» until) continue;": "what is written too early, the same thread corrects",
    "if (lengths_per_row «== next_n → != 1») {": "with one token and one length both ways lead to the same window",
    "if (set * kTokens + i > n) share.windows[i].end = «0 → share.windows[i].end»;": "the last token is stored twice",
    "if (tiles * (kTile / 8) «<= → <» p.few.quarters) {": "with as many blocks of eight as quarters both ways do",
    "if (item * 8 «< → <=» work.end) Group::score_eight": "eight keys behind the last one are scored, and not stored",
    "if («total == 0 → false» || part.idle(p)) return;": "no warp finds a run, and leaves a little later",
    "uint32 run = Divisor(takers, p.few.takers_inverse)(total - 1)« + 1 → + 2»;": "runs are longer than they need be",
    "runs_of(keys, middle)) «<= → <» takers) enough = middle;": "runs are longer than they need be",
    "distance * kPerLane «< → <=» p.windows.rows; distance *= 2": "only lanes without rows add more",
    "p.windows.counted(p.windows.length(j)) «> → >=» 0;": "rows without keys are looked at in turn",
    "FEW_ROWS = (1, «32 → 33», 256)": "another kernel for one number of rows, as right",
    "next = next_row(p, first_row« + rows → », limit, lane)": "rows known to have no keys are looked at again",
    "(«min(key + more, last_key - tile * kTile) → (key + more)» * kBytes + (offset + begin));": "the page is there",
    "empty ? 0 : («mine.end - 1 → mine.end») / kTile + 1);": "a tile of keys that nobody sees is scored",
    "else if («kTokens == 1 || sinks[i].count → true») {": "the last token is stored twice",
    "key = lane.g < «2 → 8» ? 8 * unit": "four lanes have the same score, and all store it",
    "if (missing «< → <=» active) return cut;": "cuts a group a tile earlier, alike for both slots that meet there",
    "begin.x == end.x && begin.y «>= → >» end.y ? 0": "an idle slot looks at its row and finds nothing to score",
    "end.x + «(end.y > 0) → 1»": "a slot looks at the row after its last and finds nothing to score",
    "? tokens : even« * kTokens → »;": "the last tokens of a group take more turns",
    "return «min(max(key, from), to) → max(key, from)» - from;": "only schedules are worse",
    "start = slot * share + max(0, slot - (slots - total % slots« → - 1»));": "other slots get one split more",
    "if (start «>= → >» total) return {rows, 0};": "the end, named as what is behind the last row's last split",
    "step * lane.id < span && head(probe).before «<= → <» start;": "a row's begin, named as the end of another",
    "int(ptx::load_word(p.windows.starts + row)), 0)«, p.windows.limit → , 0x7fffffff»);": "no blocks are there",
    "if (mine && rank «< → <=» want) chosen()[first + rank] = position;": "the entry behind the k-th is not read",
    "if (busy > 1 << i) most = fmaxf(most, other), shift = i« + 1 → »;": "another gate, no other choice",
    "if (work.eights «|| → &&» busy <= 1) __syncthreads();": "few keys get a gate, too, and the choice is the same",
    "count = listed <= kFrontRoom ? listed : «0 → kFrontRoom»;": "its gate is above everything: none of it is chosen",
}


class Mutation(NamedTuple):
    file: str
    text: str

    def applied(self, mutated: bool) -> str:
        """The line with or without the change."""
        return re.sub("«(.*?) → (.*?)»", r"\2" if mutated else r"\1", self.text, flags=re.S)


ALL = [Mutation(file, text) for file, texts in MUTATIONS.items() for text in texts]


def misplaced() -> list[str]:
    """Mutations that do not find their place any more."""
    sources = {file: (PACKAGE / file).read_text() for file in MUTATIONS}
    counts = [(m, sources[m.file].count(m.applied(False))) for m in ALL]
    return [f"{m.file}: '{m.applied(False)}' is there {count} times" for m, count in counts if count != 1]


class Fate(NamedTuple):
    file: str
    text: str
    survives: bool
    by: str  # what caught it
    seconds: int


def _run(tree: Path, tests: list[str], device: str) -> None:
    """Runs tests of `tree`, in a process of its own, and ends with pytest's status."""
    os.setsid()
    report = os.open(tree / "report.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(report, 1), os.dup2(report, 2)
    os.chdir(tree)
    os.environ.update(
        PYTHONPATH=str(tree / "sm120"),
        PYTHONDONTWRITEBYTECODE="1",
        DG_JIT_CACHE_DIR=str(tree / "cache"),
        DG_TEST_DEVICES=device,
        HYPOTHESIS_STORAGE_DIRECTORY=str(tree / "examples"),
    )
    sys.path.insert(0, str(tree / "sm120"))
    sys.dont_write_bytecode = True
    import pytest
    import torch

    torch.seed()  # the process that this one was forked from has one for all
    chosen = [f"tests/{test}" for test in dict.fromkeys(tests)]
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *chosen]))


def _copy(source: Path, tree: Path) -> Path:
    for part in PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / part, tree / part)
    return tree


def passes(tree: Path, tests: list[str], device: str, patience: float | None = None) -> tuple[bool, str]:
    """Whether tests pass in a tree, and if not, what failed."""
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(tree, tests, device))
    process.start()
    process.join(patience)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return False, "no end"
    report = (tree / "report.txt").read_text(errors="replace")
    if process.exitcode not in (0, 1, 2) and process.exitcode >= 0:  # 2: what the tests import fails
        raise RuntimeError(f"pytest ended with {process.exitcode}:\n{report[-4000:]}")
    failed = [line for line in report.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if process.exitcode == 0:
        return True, ""
    return False, failed[0].split(" - ")[0] if failed else f"status {process.exitcode}"


def fate(mutation: Mutation, base: Path, device: str, patience: float, until: float) -> Fate | None:
    """What becomes of a mutation of the tree `base`; None if time is up before it is known."""
    start = time.monotonic()
    if start > until:
        return None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tree = _copy(base, Path(folder))
        if not mutation.file.endswith(".cuh"):  # the kernels are as they were
            shutil.copytree(base / "cache", tree / "cache")
        file = tree / "sm120" / "deep_gemm" / mutation.file
        file.write_text(file.read_text().replace(mutation.applied(False), mutation.applied(True)))
        passed, by = passes(tree, TESTS[mutation.file], device, min(patience, until - start))
    if by == "no end" and time.monotonic() > until:
        return None
    return Fate(*mutation, passed, by, round(time.monotonic() - start))


def fates(
    mutations: list[Mutation], jobs: int, device: str, patience: float, until: float, sound: bool
) -> Iterator[Fate]:
    """The fates of mutations as they become known; first, unless it is known, whether the tests pass without any."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        base = _copy(ROOT, Path(folder))
        (base / "cache").mkdir()
        if not sound:
            tests = list(dict.fromkeys(test for mutation in mutations for test in TESTS[mutation.file]))
            passed, by = passes(base, tests, device)
            if not passed:
                raise SystemExit(f"the tests fail on the tree as it is: {by}")
        known = [pool.submit(fate, mutation, base, device, patience, until) for mutation in mutations]
        for future in as_completed(known):
            if future.result() is not None:
                yield future.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mutations")
    parser.add_argument("--file", nargs="+", default=[""], help="parts of the names of files, in turn")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--log", type=Path, help="a file of fates, which are added to, and not found out again")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the tests run")
    parser.add_argument("--patience", type=float, default=240, help="seconds after which nothing will come back")
    parser.add_argument("--seconds", type=float, default=1e9, help="what is not known after so many is left unknown")
    parser.add_argument("--sound", action="store_true", help="the tests are known to pass on the tree as it is")
    parser.add_argument("--check", action="store_true", help="only see that every mutation finds its place")
    arguments = parser.parse_args()
    lost, until = misplaced(), time.monotonic() + arguments.seconds
    print("\n".join(lost) or f"{len(ALL)} mutations find their place")
    if lost or arguments.check:
        return bool(lost)

    known = arguments.log.read_text().splitlines() if arguments.log and arguments.log.exists() else []
    known = {Mutation(fate.file, fate.text): fate for fate in (Fate(*json.loads(line)) for line in known)}
    chosen = [ALL[number] for number in arguments.only or range(len(ALL))]
    chosen = list(dict.fromkeys(m for part in arguments.file for m in chosen if part in m.file))
    left = [known[mutation] for mutation in chosen if mutation in known and known[mutation].survives]
    chosen = [mutation for mutation in chosen if mutation not in known]
    os.environ.setdefault("OMP_NUM_THREADS", "1" if arguments.jobs > 1 else str(os.cpu_count()))
    multiprocessing.set_forkserver_preload(["hypothesis", "numpy", "pytest", "torch"])
    for one in fates(chosen, arguments.jobs, arguments.device, arguments.patience, until, arguments.sound):
        if arguments.log:
            with arguments.log.open("a") as log:
                log.write(json.dumps(one) + "\n")
        left += [one] * one.survives
        what = f"SURVIVES {EXPLAINED.get(one.text, '')}" if one.survives else f"caught by {one.by}"
        print(f"{ALL.index(one[:2]):3} {one.file}: {one.text}  {what} ({one.seconds} s)", flush=True)
    print(f"{len(left)} survive, {sum(one.text in EXPLAINED for one in left)} of them explained")
    return any(one.text not in EXPLAINED for one in left)


if __name__ == "__main__":
    raise SystemExit(main())
