// CRC32C (Castagnoli), the checksum of bytes on their way between memory and files.    [RFC 3720, appendix B.4]
//
//     crc32c("123456789") = 0xE3069283
//     crc32c(A B) = shift(crc32c(A), |B|) ^ crc32c(B)
//
// The second line is why it is this one and not a faster hash: each block of a request, in whatever order blocks
// complete, is shifted by the bytes behind it, and the sum (exclusive or) over all blocks is that of the request.
// It reads each byte once: 8 bytes a cycle where the machine has SSE4.2, a byte a cycle or so by tables elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace zcore {

// Of `bytes`, behind bytes whose checksum is `before` (0 is that of nothing).
std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t before = 0);

// What `crc` becomes when `bytes` more follow, before their own checksum is added: crc x^(8 bytes) in GF(2)[x] / P.
std::uint32_t crc32c_shift(std::uint32_t crc, std::uint64_t bytes);

inline std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes) {
    return crc32c_shift(first, second_bytes) ^ second;
}

}  // namespace zcore
