// Where keys come from: the pages of a cache, one run of keys, or blocks of either that a list names. A source finds the bytes
// of key `key` of tile `tile`; a tile is 32 keys of one row, in order.
//
// What a source says:
//   Params             what the launcher hands in
//   last_key           that may be read, of a row whose keys end before `end`
//   kRowsDiffer        whether rows have keys of their own at all
//   alike              whether two rows have the same keys in some tiles, so that one look serves both
//   kFromZero          whether every window begins with key 0
//   open               the tiles to come are tile, tile + step, ...
//   opened             whether the next of them can be located, or `open` is due
//   locate             the first, then the next of these tiles is meant by what follows. Opens what is due, unless kOpened
//   values, scales     address of `offset` bytes into a key's values, and of its scale. `Half` is the half of the tile in
//                      which the key lies. Keys past `last_key` are not there: it is read in their place. Where the tile is
//                      kWhole there are none, and it is `own` that counts: key * row bytes + offset
//   kTilesWhole        whether every tile is whole: what is there past a row's last key is read, and counts for nothing
//   kReadOnce          whether no other warp reads the same keys
#pragma once

#include "lists.cuh"

struct Pages {
    const uint8* values;         // [pages][page_stride]      a page is its values, then its scales
    const int* block_table;      // [rows][table_stride]      page numbers
    uint32 page_stride;          // bytes
    int table_stride;            // entries
    uint32 pages;
    uint32 columns;              // of the block table
};

// kPage keys a page. No table entry leads outside the cache: one that would is taken for the last page.
// kPastEnd: what a tile's page holds past a row's last key is read as well, where a page holds whole tiles.
// kOnce: each key is one warp's.
template <int kPage, int kRowBytes, bool kPastEnd, bool kOnce>
struct PagedKeys {
    using Params = Pages;
    static_assert(kPage % 16 == 0);
    static constexpr bool kOnePage = kPage % kTile == 0;   // else the two halves of a tile may lie in two pages
    static constexpr bool kTilesWhole = kOnePage && kPastEnd, kFromZero = true, kReadOnce = kOnce;

    // Page numbers come from as far as keys do, and keys cannot be asked for without them. So lane i holds that of the ith
    // tile to come, of 32; a shuffle hands it out.
    struct Ahead { uint32 halves[kOnePage ? 1 : 2]; };

    const Pages* p;
    uint32 table;                // entry of the block table at which this row begins
    uint32 page[2];              // of the tile's halves
    Ahead ahead;
    int turn;

    __device__ PagedKeys(const Pages& p, int row) : p(&p), table(row * p.table_stride) {}

    __device__ void open(uint32 tile, uint32 step, uint32 last_key, const Lane& lane) {
        #pragma unroll
        for (int half = 0; half < (kOnePage ? 1 : 2); ++half) {
            const uint32 key = min(tile * kTile + lane.id * step * kTile + half * kTile / 2, last_key);
            ahead.halves[half] = min(ptx::load_word(p->block_table + (table + key / kPage)), p->pages - 1);
        }
        turn = 0;
    }

    __device__ bool opened() const { return turn < 32; }

    // `tile` is the one meant from now on. (What bounds the next 32 look-ups is where the table ends, not where the row does:
    // that would be the register by which FP8 of 64 heads spills.)
    template <bool kOpened = false>
    __device__ void locate(uint32 tile, uint32 step, uint32, const Lane& lane) {
        if (!kOpened && turn == 32) open(tile, step, p->columns * kPage - 1, lane);
        page[0] = __shfl_sync(kAllLanes, ahead.halves[0], turn);
        page[1] = kOnePage ? page[0] : __shfl_sync(kAllLanes, ahead.halves[kOnePage ? 0 : 1], turn);
        ++turn;
    }

    // Keys of other rows are never read.
    __device__ static uint32 last_key(int end, int) { return end - 1; }

    // Whether two rows have the same pages for the keys of tiles `from` to `to` that lie before `end`.
    static constexpr bool kRowsDiffer = true;
    __device__ static bool alike(const Pages& p, int row, int other, int from, int to, int end, const Lane& lane) {
        if (row == other) return true;
        const int first = from * kTile / kPage, last = (min(to * kTile, end) - 1) / kPage;
        bool same = true;
        #pragma unroll 4
        for (int i = first + lane.id; i <= last; i += 32) {
            same &= ptx::load_word(p.block_table + row * p.table_stride + i)
                    == ptx::load_word(p.block_table + other * p.table_stride + i);
        }
        return __all_sync(kAllLanes, same);
    }

    template <int kBytes, bool kWhole>
    __device__ const uint8* at(const uint8* array, uint32 page, uint32 tile, uint32 last_key, uint32 key, uint32 more,
                               uint32 offset, uint32 own) const {
        array += int64(page) * p->page_stride;
        if constexpr (kOnePage) {
            const uint32 begin = tile % (kPage / kTile) * (kTile * kBytes);
            if constexpr (kWhole) return array + (own + begin) + more * kBytes;             // `more`: the load's constant
            return array + (min(key + more, last_key - tile * kTile) * kBytes + (offset + begin));
        } else {
            return array + (min(tile * kTile + key + more, last_key) % kPage * kBytes + offset);
        }
    }

    template <int Half, bool kWhole>
    __device__ const uint8* values(uint32 tile, uint32 last_key, uint32 key, uint32 more, uint32 offset, uint32 own) const {
        return at<kRowBytes, kWhole>(p->values, page[Half], tile, last_key, key, more, offset, own);
    }

    template <bool kWhole>
    __device__ const uint8* scales(uint32 tile, uint32 last_key, uint32 key) const {
        return at<4, kWhole>(p->values + kPage * kRowBytes, key < kTile / 2 ? page[0] : page[1], tile, last_key, key, 0, 0,
                             4 * key);
    }
};

struct Run {
    const uint8* values;         // [keys][row bytes]
    const uint32* scales;        // [keys]
};

template <int kRowBytes>
struct RunOfKeys {
    using Params = Run;
    static constexpr bool kTilesWhole = false, kFromZero = false, kReadOnce = false;
    const Run& p;

    __device__ RunOfKeys(const Run& p, int) : p(p) {}

    static constexpr bool kRowsDiffer = false;
    __device__ static bool alike(const Run&, int, int, int, int, int, const Lane&) { return true; }
    __device__ static uint32 last_key(int, int keys) { return keys - 1; }

    __device__ void open(uint32, uint32, uint32, const Lane&) {}
    __device__ bool opened() const { return true; }
    template <bool kOpened = false>
    __device__ void locate(uint32, uint32, uint32, const Lane&) {}

    template <int kBytes, bool kWhole>
    __device__ static const uint8* at(const uint8* array, uint32 tile, uint32 last_key, uint32 key, uint32 more,
                                      uint32 offset, uint32 own) {
        array += int64(tile) * (kTile * kBytes);
        if constexpr (kWhole) return array + own + more * kBytes;
        return array + (min(key + more, last_key - tile * kTile) * kBytes + offset);
    }

    template <int Half, bool kWhole>
    __device__ const uint8* values(uint32 tile, uint32 last_key, uint32 key, uint32 more, uint32 offset, uint32 own) const {
        return at<kRowBytes, kWhole>(p.values, tile, last_key, key, more, offset, own);
    }

    template <bool kWhole>
    __device__ const uint8* scales(uint32 tile, uint32 last_key, uint32 key) const {
        return at<4, kWhole>(reinterpret_cast<const uint8*>(p.scales), tile, last_key, key, 0, 0, 4 * key);
    }
};

struct Listed {
    const uint8* values;         // paged: [pages][page_stride]; ragged: [keys][row bytes]
    const uint32* scales;        // ragged: [keys]
    const uint8* metadata;       // lists.cuh: places of blocks
    uint32 pitch;                // bytes from row to row of it
    uint32 page_stride;          // bytes
    uint32 places;               // paged: blocks in the cache; ragged: keys
};

// Blocks of kBlock keys. A place is, paged, the number of a block in the cache; a number past the last one is taken for that.
// Ragged (kPage = 0), it is the number of a block's first key; keys past the last one are zeros.
template <int kPage, int kBlock, int kRowBytes>
struct ListedKeys {
    using Params = Listed;
    static_assert(kBlock % 8 == 0 && kPage % kBlock == 0);
    static constexpr uint32 kEights = kBlock / 8;      // of a block: eight keys that lie together
    static constexpr uint32 kBlocks = kPage ? kPage / kBlock : 1;
    static constexpr bool kTilesWhole = false, kFromZero = true, kReadOnce = false;

    const Params* p;
    const uint8* list;           // places of this row
    uint32 place[4], later[4];   // of the tile's eights, and of the next tile's
    uint32 first;                // of the tile's eights

    __device__ ListedKeys(const Params& p, int row)
        : p(&p), list(p.metadata + kFirstRow + int64(row) * p.pitch + sizeof(RowHead)) {}

    __device__ static uint32 last_key(int end, int) { return end - 1; }

    static constexpr bool kRowsDiffer = true;
    __device__ static bool alike(const Params&, int row, int other, int, int, int, const Lane&) { return row == other; }

    __device__ void ask(uint32 tile, uint32 last_key) {
        tile = min(tile, last_key / kTile);
        if constexpr (kBlock == 8) {
            ptx::load<4>(later, list + 16 * tile);
        } else if constexpr (kBlock == 16) {
            ptx::load<2>(later, list + 8 * tile);
            later[3] = later[2] = later[1], later[1] = later[0];
        } else if constexpr (kBlock % kTile == 0) {
            later[0] = later[1] = later[2] = later[3] = ptx::load_word(list + 4 * (4 * tile / kEights));
        } else {
            for (int j = 0; j < 4; ++j) later[j] = ptx::load_word(list + 4 * (min(4 * tile + j, last_key / 8) / kEights));
        }
    }

    __device__ void open(uint32 tile, uint32, uint32 last_key, const Lane&) { ask(tile, last_key); }

    __device__ bool opened() const { return true; }

    template <bool kOpened = false>
    __device__ void locate(uint32 tile, uint32 step, uint32 last_key, const Lane&) {
        first = 4 * tile;
        for (int j = 0; j < 4; ++j) place[j] = kPage ? min(later[j], p->places - 1) : later[j];
        ask(tile + step, last_key);
    }

    template <int kBytes>
    __device__ const uint8* at(const uint8* array, uint32 key, uint32 more, uint32 offset) const {
        const uint32 eight = key / 8 + more / 8;       // known to the compiler but for scales
        const uint32 place = eight < 2 ? eight == 0 ? this->place[0] : this->place[1]
                                       : eight == 2 ? this->place[2] : this->place[3];
        return of<kBytes>(*p, array, place, first + eight, key, offset);
    }

    // Key `key` % 8 of the row's eight number `eight`, whose block lies at `place`.
    template <int kBytes>
    __device__ static const uint8* of(const Listed& p, const uint8* array, uint32 place, uint32 eight, uint32 key,
                                      uint32 offset) {
        const uint32 within = kEights == 1 ? key % 8 : eight % kEights * 8 + key % 8;
        if constexpr (kPage > 0) {
            array += int64(place / kBlocks) * p.page_stride;
            return array + (place % kBlocks * (kBlock * kBytes) + within * kBytes + offset);
        } else {
            const uint32 token = place + within;
            return (token < p.places ? array + int64(token) * kBytes : p.metadata + kZeros) + offset;
        }
    }

    template <int Half, bool>
    __device__ const uint8* values(uint32, uint32, uint32 key, uint32 more, uint32 offset, uint32) const {
        return at<kRowBytes>(p->values, key, more, offset);
    }

    template <bool>
    __device__ const uint8* scales(uint32, uint32, uint32 key) const {
        return at<4>(scales(*p), key, 0, 0);
    }
    __device__ static const uint8* scales(const Listed& p) {
        return kPage ? p.values + kPage * kRowBytes : reinterpret_cast<const uint8*>(p.scales);
    }
};
