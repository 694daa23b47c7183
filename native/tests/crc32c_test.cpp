#include "zcore/crc32c.hpp"

#include <gtest/gtest.h>

#include <random>
#include <string_view>
#include <vector>

#include "aio/crc32c_parts.hpp"

namespace {

std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }

std::vector<std::byte> random_bytes(std::size_t count) {
    std::mt19937 random(7);
    std::vector<std::byte> bytes(count);
    for (std::byte& each : bytes) {
        each = static_cast<std::byte>(random());
    }
    return bytes;
}

// Bit by bit, straight from the definition.
std::uint32_t reference(std::span<const std::byte> bytes) {
    std::uint32_t state = ~0u;
    for (const std::byte each : bytes) {
        state ^= std::to_integer<std::uint32_t>(each);
        for (int bit = 0; bit < 8; ++bit) {
            state = (state >> 1) ^ (state & 1 ? 0x82F63B78 : 0);
        }
    }
    return ~state;
}

}  // namespace

TEST(Crc32c, IsThatOfTheStandard) {  // RFC 3720, appendix B.4
    EXPECT_EQ(zcore::crc32c(bytes_of("123456789")), 0xE3069283);
    EXPECT_EQ(zcore::crc32c({}), 0u);
    EXPECT_EQ(zcore::crc32c(std::vector<std::byte>(32)), 0x8A9136AA);
    EXPECT_EQ(zcore::crc32c(std::vector<std::byte>(32, std::byte{0xFF})), 0x62A8AB43);
}

TEST(Crc32c, IsTheReferenceByEachWayAtAnyAddress) {
    const std::vector<std::byte> bytes = random_bytes(300001);
    for (const std::size_t count : {0ul, 1ul, 7ul, 8ul, 123ul, 16383ul, 16384ul, 16391ul, 299990ul}) {
        for (const std::size_t begin : {0ul, 1ul, 5ul}) {
            const auto part = std::span(bytes).subspan(begin, count);
            const std::uint32_t expected = reference(part);
            EXPECT_EQ(zcore::crc32c(part), expected) << count;
            EXPECT_EQ(~zcore::detail::crc32c_by_tables(~0u, part.data(), count), expected) << count;
#if defined(__x86_64__)
            if (zcore::detail::has_sse42()) {
                EXPECT_EQ(~zcore::detail::crc32c_by_sse42(~0u, part.data(), count), expected) << count;
            }
#endif
        }
    }
}

TEST(Crc32c, OfTwoPartsIsThatOfTheWhole) {
    const std::vector<std::byte> bytes = random_bytes(70001);
    const auto whole = std::span<const std::byte>(bytes);
    const std::uint32_t expected = zcore::crc32c(whole);
    for (const std::size_t cut : {0ul, 1ul, 7ul, 4096ul, 65537ul, 70000ul, 70001ul}) {
        const auto first = whole.first(cut), second = whole.subspan(cut);
        EXPECT_EQ(zcore::crc32c(second, zcore::crc32c(first)), expected);
        EXPECT_EQ(zcore::crc32c_combine(zcore::crc32c(first), zcore::crc32c(second), second.size()), expected);
    }
}

TEST(Crc32c, ShiftsByMoreThan32BitsOfBytes) {
    const std::uint64_t far = (5ull << 33) + 3;
    std::uint32_t twice = zcore::crc32c_shift(zcore::crc32c_shift(0x12345678, far / 2), far - far / 2);
    EXPECT_EQ(zcore::crc32c_shift(0x12345678, far), twice);
}
