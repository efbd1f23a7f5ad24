// Rows of S reordered for a product with many tokens: block by block of columns.
#pragma once

#include <cstring>

#include "rows.inl.hpp"

namespace oats::OATS_ISA {

constexpr int64_t block_columns = 64, block_bytes = block_columns / 8;  // of a tile of inputs

struct Entry {  // one row's values in one block of columns
    uint16_t row, count;
};

OATS_INLINE uint64_t block_bits(const uint8_t *row, int64_t row_bytes, int64_t block) {
    return read_bits(row + block * block_bytes, row_bytes - block * block_bytes);
}

// Some rows of S in the order in which `multiply` goes through them: block by block of columns, and in a block by
// the number of values, so that loops of equal length follow each other and the CPU foresees their ends.
struct Stream {
    struct Place {  // of the next row with some number of values in some block
        int64_t value, entry;
    };
    static constexpr int64_t counts = block_columns + 1;

    int64_t first, rows;
    float *values;
    uint8_t *columns;  // within the block
    Entry *entries;    // blocks x rows
    int64_t *start;    // of each block in values and columns
    Place *places;     // blocks x counts

    // Rows are read as they lie in memory, and written to the places of their numbers of values. False if a row does
    // not fit.
    template <class V>
    bool build(const Sparse &S, const int64_t *row_start) const {
        const int64_t row_bytes = S.row_bytes(), blocks = ceil_div(S.columns, block_columns);
        std::memset(places, 0, sizeof(Place) * blocks * counts);
        for (int64_t r = 0; r < rows; r++) {
            if (!row_fits(S, row_start, first + r)) return false;
            const uint8_t *row = S.bitmask + (first + r) * row_bytes;
            for (int64_t b = 0; b < blocks; b++) places[b * counts + popcount(block_bits(row, row_bytes, b))].entry++;
        }
        int64_t value = 0;
        for (int64_t b = 0; b < blocks; b++) {
            start[b] = value;
            int64_t entry = b * rows;
            for (int64_t n = 0; n < counts; n++) {
                Place &place = places[b * counts + n];
                const int64_t count = place.entry;
                place = {value, entry};
                entry += count;
                value += count * n;
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *row = S.bitmask + (first + r) * row_bytes;
            const V *from = static_cast<const V *>(S.values) + row_start[first + r];
            for (int64_t b = 0; b < blocks; b++) {
                const uint64_t bits = block_bits(row, row_bytes, b);
                const int n = popcount(bits);
                Place &place = places[b * counts + n];
                entries[place.entry++] = {static_cast<uint16_t>(r), static_cast<uint16_t>(n)};
                positions(bits, columns + place.value);
                widen(from, values + place.value, n);
                place.value += n;
                from += n;
            }
        }
        return true;
    }
};

}  // namespace oats::OATS_ISA
