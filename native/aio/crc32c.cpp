#include "zcore/crc32c.hpp"

#include <array>
#include <bit>
#include <cstring>

#include "aio/crc32c_parts.hpp"

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace zcore {

namespace {

// Polynomials over GF(2) with their bits reversed: the highest bit is x^0, the lowest x^31.
constexpr std::uint32_t polynomial = 0x82F63B78;
constexpr std::uint32_t one = 1u << 31;

constexpr std::uint32_t times_x(std::uint32_t a) { return (a >> 1) ^ (a & 1 ? polynomial : 0); }

constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
    std::uint32_t product = 0;
    for (; a != 0; a <<= 1, b = times_x(b)) {
        product ^= b & (0u - (a >> 31));
    }
    return product;
}

// x^(8 * 2^k), for each bit k of a number of bytes.
constexpr std::array<std::uint32_t, 64> powers = [] {
    std::array<std::uint32_t, 64> table{};
    table[0] = one >> 8;
    for (std::size_t k = 1; k < table.size(); ++k) {
        table[k] = multiply(table[k - 1], table[k - 1]);
    }
    return table;
}();

std::uint32_t power_of_bytes(std::uint64_t bytes) {
    std::uint32_t power = one;
    for (; bytes != 0; bytes &= bytes - 1) {
        power = multiply(power, powers[static_cast<std::size_t>(std::countr_zero(bytes))]);
    }
    return power;
}

// tables[k][b]: what byte b adds to the register when k more bytes follow it.
using Tables = std::array<std::array<std::uint32_t, 256>, 8>;
constexpr Tables tables = [] {
    Tables made{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t state = byte;
        for (int bit = 0; bit < 8; ++bit) {
            state = times_x(state);
        }
        made[0][byte] = state;
    }
    for (std::size_t k = 1; k < made.size(); ++k) {
        for (std::size_t byte = 0; byte < 256; ++byte) {
            made[k][byte] = (made[k - 1][byte] >> 8) ^ made[0][made[k - 1][byte] & 255];
        }
    }
    return made;
}();

}  // namespace

namespace detail {

std::uint32_t crc32c_by_tables(std::uint32_t state, const std::byte* data, std::size_t bytes) {
    const auto at = [&](std::size_t index) { return std::to_integer<std::uint32_t>(data[index]); };
    for (; bytes >= 8; data += 8, bytes -= 8) {
        state ^= at(0) | at(1) << 8 | at(2) << 16 | at(3) << 24;
        state = tables[7][state & 255] ^ tables[6][state >> 8 & 255] ^ tables[5][state >> 16 & 255] ^
                tables[4][state >> 24] ^ tables[3][at(4)] ^ tables[2][at(5)] ^ tables[1][at(6)] ^ tables[0][at(7)];
    }
    for (; bytes > 0; ++data, --bytes) {
        state = (state >> 8) ^ tables[0][(state ^ at(0)) & 255];
    }
    return state;
}

#if defined(__x86_64__)

bool has_sse42() { return __builtin_cpu_supports("sse4.2") != 0; }

// The instruction takes 8 bytes a cycle and answers 3 cycles later: three thirds at a time keep it busy. To join them
// costs some 25 multiplications of polynomials, about a microsecond, so shorter data goes in one stream.
constexpr std::size_t three_streams_from = 16 << 10;  // bytes

__attribute__((target("sse4.2"))) std::uint32_t crc32c_by_sse42(std::uint32_t state, const std::byte* data,
                                                                std::size_t bytes) {
    std::uint64_t word, first = state;
    if (bytes >= three_streams_from) {
        const std::size_t third = bytes / 24 * 8;
        std::uint64_t second = 0, last = 0, word2, word3;
        for (const std::byte* const end = data + third; data < end; data += 8) {
            std::memcpy(&word, data, 8);
            std::memcpy(&word2, data + third, 8);
            std::memcpy(&word3, data + 2 * third, 8);
            first = _mm_crc32_u64(first, word);
            second = _mm_crc32_u64(second, word2);
            last = _mm_crc32_u64(last, word3);
        }
        const std::uint32_t behind = power_of_bytes(third);
        const std::uint32_t two = multiply(static_cast<std::uint32_t>(first), behind) ^ static_cast<std::uint32_t>(second);
        first = multiply(two, behind) ^ static_cast<std::uint32_t>(last);
        data += 2 * third;
        bytes -= 3 * third;
    }
    for (; bytes >= 8; data += 8, bytes -= 8) {
        std::memcpy(&word, data, 8);
        first = _mm_crc32_u64(first, word);
    }
    auto rest = static_cast<std::uint32_t>(first);
    for (; bytes > 0; ++data, --bytes) {
        rest = _mm_crc32_u8(rest, static_cast<unsigned char>(*data));
    }
    return rest;
}

#endif

}  // namespace detail

std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t before) {
#if defined(__x86_64__)
    static const auto compute = detail::has_sse42() ? detail::crc32c_by_sse42 : detail::crc32c_by_tables;
#else
    constexpr auto compute = detail::crc32c_by_tables;
#endif
    return ~compute(~before, bytes.data(), bytes.size());
}

std::uint32_t crc32c_shift(std::uint32_t crc, std::uint64_t bytes) { return multiply(crc, power_of_bytes(bytes)); }

}  // namespace zcore
